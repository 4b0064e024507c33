"""Compressed checkpoints of every kind, for tests of saving and loading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from hfcompress import LowRankConfig, QuantizationConfig, compress
from hfcompress.configuration import Config
from hfcompress.modeling.anatomy import attention_blocks, feed_forward_blocks
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.surgery import shrink_attention, shrink_feed_forward
from tests.workshop import batches, logits, tiny_classifier

LOW_RANK = LowRankConfig(keep=0.5)
PRUNED: Config | None = None  # stands for pruning by hand, other heads and widths in each layer
KINDS: dict[str, Sequence[Config | None]] = {
    "pruned": [PRUNED],
    "low-rank": [LOW_RANK],
    "embedding": [QuantizationConfig(weights=None, embeddings="int8")],
    "embedding-int4": [QuantizationConfig(weights=None, embeddings="int4")],
    "nf4": [QuantizationConfig(attention="nf4", ffn="int8", weights=None, embeddings=None)],
    "int8-pruned": [PRUNED, QuantizationConfig(weights="int8", embeddings=None)],
    "everything": [PRUNED, LOW_RANK, QuantizationConfig(weights="nf4-double", embeddings="int4")],
}


def make(kind: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Makes a compressed classifier, committed, in evaluation mode."""
    model = tiny_classifier(seed, **changes)
    if PRUNED in KINDS[kind]:
        prune(model)
    configs = [config for config in KINDS[kind] if config is not None]
    return compress(model, configs, calibration=batches()).eval()


def prune(model: PreTrainedModel) -> None:
    """Keeps two and three of four heads, and a half and three quarters of the neurons."""
    for block, heads in zip(attention_blocks(model), ([1, 3], [0, 1, 3]), strict=True):
        shrink_attention(block, heads)
    for block, share in zip(feed_forward_blocks(model), (2, 4), strict=True):
        shrink_feed_forward(block, [neuron for neuron in range(block.neurons) if neuron % share])
    commit(model)


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
