"""Compressed checkpoints of every kind, for tests of saving and loading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hfcompress import LowRankConfig, QuantizationConfig, StructuredPruningConfig, compress
from hfcompress.configuration import Config
from tests.workshop import batches, logits, tiny_classifier

PRUNING = StructuredPruningConfig(heads=0.5, neurons=0.4)
LOW_RANK = LowRankConfig(keep=0.5)
KINDS: dict[str, Sequence[Config]] = {
    "pruned": [PRUNING],
    "low-rank": [LOW_RANK],
    "embedding": [QuantizationConfig(weights=None, embeddings="int8")],
    "embedding-int4": [QuantizationConfig(weights=None, embeddings="int4")],
    "nf4": [QuantizationConfig(attention="nf4", ffn="int8", weights=None, embeddings=None)],
    "int8-pruned": [PRUNING, QuantizationConfig(weights="int8", embeddings=None)],
    "everything": [PRUNING, LOW_RANK, QuantizationConfig(weights="nf4-double", embeddings="int4")],
}


def make(kind: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Makes a compressed classifier, committed, in evaluation mode."""
    model = tiny_classifier(seed, **changes)
    return compress(model, KINDS[kind], calibration=batches()).eval()


def load(folder: Path, **arguments: Any) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder, **arguments)


def outputs(model: torch.nn.Module) -> torch.Tensor:
    return logits(model, batches(labels=False)[0])


def edit_config(folder: Path, **values: Any) -> dict[str, Any]:
    """Sets keys of config.json; a value of ... removes the key. Returns what is written."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for key, value in values.items():
        config[key] = value
        if value is ...:
            del config[key]
    file.write_text(json.dumps(config))
    return config


def edit_record(folder: Path, **values: Any) -> None:
    """Sets keys of quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    edit_config(folder, quantization_config=config["quantization_config"] | values)
