"""The checkpoints that are damaged: compressed, of three families, two of them sharded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from hfcompress import LayerDroppingConfig, LowRankConfig, QuantizationConfig, StructuredPruningConfig, compress

INPUTS = {"input_ids": torch.arange(4, 24).reshape(2, 10), "attention_mask": torch.ones(2, 10, dtype=torch.long)}


@dataclass(frozen=True)
class Original:
    """An undamaged checkpoint, what it computes, and what loading it takes."""

    folder: Path
    other: Path  # the same of another seed
    logits: torch.Tensor
    megabytes: float = 0.0


def _build(family: str, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 6000, "max_position_embeddings": 64}
    if family == "distilbert":
        config = AutoConfig.for_model(family, dim=192, n_heads=6, n_layers=3, hidden_dim=512, **sizes)
    else:
        sizes |= {"hidden_size": 192, "num_attention_heads": 6, "num_hidden_layers": 3, "intermediate_size": 512}
        config = AutoConfig.for_model(family, **sizes)
    return AutoModelForSequenceClassification.from_config(config).eval()


def make_originals(place: Path) -> dict[str, Original]:
    """Saves five compressed checkpoints of three families, two of them sharded, each with two seeds."""
    pruning = StructuredPruningConfig(heads=0.4, neurons=0.4, importance="magnitude")
    low_rank = LowRankConfig(keep=0.5, method="svd")
    plans: dict[str, tuple[str, list[Any], dict[str, Any]]] = {
        "bert-everything": (
            "bert",
            [pruning, low_rank, QuantizationConfig(weights="nf4-double", embeddings="int4")],
            {},
        ),
        "mpnet-pruned": ("mpnet", [pruning], {}),
        "distilbert-low-rank-int8-sharded": (
            "distilbert",
            [low_rank, QuantizationConfig(weights=None, embeddings="int8")],
            {"max_shard_size": "700KB"},
        ),
        "bert-without-a-block-pivoted-packed": (
            "bert",
            [
                LayerDroppingConfig(part="ffn", drop=1),
                LowRankConfig(keep=0.5, method="svd", pivoted=True),
                QuantizationConfig(weights="packed-4", embeddings=None),
            ],
            {},
        ),
        "bert-pruned-low-rank-sharded": ("bert", [pruning, low_rank], {"max_shard_size": "2MB"}),
    }
    originals: dict[str, Original] = {}
    for name, (family, configs, options) in plans.items():
        for seed in (0, 1):
            model = compress(_build(family, seed), configs)
            model.save_pretrained(place / name / str(seed), **options)
        folder = place / name / "0"
        originals[name] = Original(folder, place / name / "1", logits_of(load(folder)))
    return originals


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(folder)


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**INPUTS).logits
