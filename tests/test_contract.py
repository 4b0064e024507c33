"""Every method on every architecture: apply, save, reload, equal logits, and once more on the reloaded model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from hfcompress import (
    LayerDroppingConfig,
    LowRankConfig,
    QuantizationAwareConfig,
    QuantizationConfig,
    StructuredPruningConfig,
    StudentConfig,
    UnstructuredPruningConfig,
    compress,
)
from hfcompress.configuration import Config
from hfcompress.methods.registry import methods
from hfcompress.modeling.anatomy import attention_blocks

# How far each family that takes text for classification can be made small; the rest is in modeling/test_families.
FAMILIES = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "electra": {"embedding_size": 64},
    "mpnet": {},
    "distilbert": {"vocab_size": 60, "dim": 64, "n_heads": 4, "hidden_dim": 96, "n_layers": 2},
}
SMALL = {
    "vocab_size": 60,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 40,
}
# One config a method that works at once: a new method is found by the registry and must be added here.
AT_ONCE: dict[str, Config] = {
    "structured_pruning": StructuredPruningConfig(heads=0.4, neurons=0.3),
    "layer_dropping": LayerDroppingConfig(drop=1),
    "student": StudentConfig(sizes={"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}),
    "unstructured_pruning": UnstructuredPruningConfig(sparsity=0.5),
    "low_rank": LowRankConfig(keep=0.6),
    "quantization_aware": QuantizationAwareConfig(attention="ternary", ffn="packed-2"),
    "quantization": QuantizationConfig(weights="nf4-double", embeddings="int4"),
}
# These change the tokenizer with the model, and have round trips of their own in their tests.
WITH_TOKENIZER = {"vocabulary"}
# These need an engine that is installed in an environment of its own; their tests say so.
ELSEWHERE = {"gptq"}
# Not every family has a narrower stock model, so it walks through the families in methods/test_width_pruning.
BY_FAMILY = {"width_pruning"}
CHAINS = [
    *([name] for name in AT_ONCE),
    ["structured_pruning", "low_rank"],
    ["low_rank", "structured_pruning"],
    ["structured_pruning", "low_rank", "quantization"],
    ["layer_dropping", "structured_pruning", "unstructured_pruning", "low_rank", "quantization"],
]


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    small = FAMILIES[family] if family == "distilbert" else SMALL | FAMILIES[family]
    config = AutoConfig.for_model(family, **small)
    return AutoModelForSequenceClassification.from_config(config).eval()


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (4, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 1, 0])}


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits


def reload(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    model.save_pretrained(folder)
    return AutoModelForSequenceClassification.from_pretrained(folder)


def test_no_method_is_missing_here() -> None:
    with_texts = {"vocabulary"}  # works on model and tokenizer together: see methods/test_vocabulary
    known = set(AT_ONCE) | with_texts | ELSEWHERE | BY_FAMILY
    assert known == {name for name, method in methods().items() if method.apply}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chain", CHAINS, ids="+".join)
def test_what_is_saved_is_what_is_loaded(family: str, chain: list[str], tmp_path: Path) -> None:
    model = compress(build(family), [AT_ONCE[name] for name in chain], calibration=[batch(1), batch(2)])
    wanted = logits(model)
    again = reload(model, tmp_path / "1")
    assert torch.equal(logits(again), wanted)
    assert torch.equal(logits(reload(again, tmp_path / "2")), wanted)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reloaded_model_is_compressed_further(family: str, tmp_path: Path) -> None:
    first = compress(build(family), [AT_ONCE["structured_pruning"]], calibration=[batch(1)])
    loaded = reload(first, tmp_path / "1")
    further = [StructuredPruningConfig(heads=0.3), AT_ONCE["low_rank"], AT_ONCE["quantization"]]
    compress(loaded, further, calibration=[batch(1)])
    assert sum(block.heads for block in attention_blocks(loaded)) < sum(
        block.heads for block in attention_blocks(first)
    )
    wanted = logits(loaded)
    assert torch.equal(logits(reload(loaded, tmp_path / "2")), wanted)
