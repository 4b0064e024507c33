"""Every family and head: pruned equals zeroed, saved equals live, whatever the layers keep."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import CheckpointError, CompressionError
from hfcompress.methods import compress
from hfcompress.methods.low_rank import LowRankConfig
from hfcompress.methods.quantization import QuantizationConfig
from hfcompress.methods.structured_pruning import StructuredPruningConfig
from hfcompress.modeling import surgery
from hfcompress.modeling.anatomy import (
    AttentionBlock,
    FeedForwardBlock,
    attention_blocks,
    base_model,
    feed_forward_blocks,
    linear_layers,
    modules_by_role,
)
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.layers.low_rank import LowRankLinear
from hfcompress.modeling.stock_fields import say_in_stock_fields
from hfcompress.modeling.structure import describe
from tests.tiny_models import CELLS, FAMILIES, class_of, inputs_for, make, run

MAIN = [(family, made.heads[min(1, len(made.heads) - 1)]) for family, made in FAMILIES.items()]
OTHERS = [cell for cell in CELLS if cell not in MAIN]
MATRIX = [*MAIN, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in OTHERS)]
GENERATING = [(family, head) for family, made in FAMILIES.items() for head in made.generates]
# What stock classes cannot load from another head's checkpoint, compressed or not.
IMPOSSIBLE = {
    ("llama", "QuestionAnswering"): "the class keeps its base model under another name",
    ("qwen2", "QuestionAnswering"): "the class keeps its base model under another name",
    ("qwen3", "QuestionAnswering"): "the class keeps its base model under another name",
    ("bart", "CausalLM"): "an encoder-decoder's files hold its embeddings under another name",
    ("pegasus", "CausalLM"): "an encoder-decoder's files hold its embeddings under another name",
}
# Which heads and neurons go, layer by layer: different numbers, and of one number different ones.
GONE_HEADS = ([0, 2], [1], [3], [0, 1, 3], [], [2])
GONE_NEURONS = ([0, 5, 6], [23], [], [1, 2, 3, 4, 5, 6, 7, 8], [11, 12])


def _gone(index: int, pattern: tuple[list[int], ...]) -> list[int]:
    return pattern[index % len(pattern)]


def zero(block: AttentionBlock | FeedForwardBlock, units: list[int]) -> None:
    """Cuts units off from what they feed, in the full model."""
    output = block.at(block.spec.output)
    width = block.head_dim * block.queries_per_head if isinstance(block, AttentionBlock) else 1
    weight = output.weight.detach().T if isinstance(output, nn.Linear) else output.weight.detach()
    for unit in units:
        weight[unit * width : (unit + 1) * width] = 0


def uneven(model: PreTrainedModel, *, by: str) -> None:
    """Removes, or zeroes, the units that the patterns name."""
    for index, block in enumerate(attention_blocks(model)):
        gone = _gone(index, GONE_HEADS)
        kept = [head for head in range(block.heads) if head not in gone]
        zero(block, gone) if by == "zeroing" else surgery.shrink_attention(block, kept)
    for index, block in enumerate(feed_forward_blocks(model)):
        gone = _gone(index, GONE_NEURONS)
        kept = [neuron for neuron in range(block.neurons) if neuron not in gone]
        zero(block, gone) if by == "zeroing" else surgery.shrink_feed_forward(block, kept)


def factorize(model: PreTrainedModel) -> list[str]:
    """Splits linear layers of the base model, of ranks that differ from layer to layer."""
    paths = [path for path in linear_layers(model) if not surgery.tied_to(model, path)]
    for index, path in enumerate(paths):
        module = base_model(model).get_submodule(path)
        weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
        rank = min(*weight.shape, 3 + index % 5)
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        surgery.factorize(model, path, rank, (left[:, :rank] * values[:rank], right[:rank]))
    return paths


def reload(model: PreTrainedModel, folder: Path, cls: Any = None, **arguments: Any) -> Any:
    """Saves by plain `save_pretrained` and loads by plain `from_pretrained`."""
    model.save_pretrained(folder)
    arguments.setdefault("attn_implementation", model.config._attn_implementation)
    return (cls or type(model)).from_pretrained(folder, **arguments)


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def close(first: list[torch.Tensor], second: list[torch.Tensor], rtol: float = 1e-4, atol: float = 2e-5) -> bool:
    return len(first) == len(second) and all(
        torch.allclose(a, b, rtol=rtol, atol=atol) for a, b in zip(first, second, strict=True)
    )


def generate(model: Any, family: str, head: str, *, cache: bool = True) -> list[torch.Tensor]:
    """Returns the logits of each generated token: tokens alone hide small differences."""
    inputs = {name: value for name, value in inputs_for(family, head).items() if "decoder" not in name}
    lengths = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    made = model.generate(**inputs, **lengths, use_cache=cache, return_dict_in_generate=True, output_logits=True)
    assert len(made.logits) == 6
    return list(made.logits)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("family", "head"), MATRIX)
def test_uneven_pruning_equals_zeroing(family: str, head: str, attention: str) -> None:
    if attention == "sdpa" and not FAMILIES[family].sdpa:
        pytest.skip("the family declares no sdpa")
    full = make(family, head, attention=attention)
    pruned = copy.deepcopy(full)
    inputs = inputs_for(family, head)
    before = run(full, inputs)
    uneven(full, by="zeroing")
    uneven(pruned, by="pruning")
    assert not close(run(full, inputs), before)  # what was zeroed matters
    assert close(run(pruned, inputs), run(full, inputs))


@pytest.mark.parametrize(("family", "head"), MATRIX)
def test_reloads_exactly_twice(family: str, head: str, tmp_path: Path) -> None:
    model = make(family, head)
    uneven(model, by="pruning")
    # Half of the layers, so that factors and whole layers meet.
    for path in list(linear_layers(model))[::2]:
        if not surgery.tied_to(model, path):
            surgery.factorize(model, path, 3, None)
            module = base_model(model).get_submodule(path)
            nn.init.normal_(module.up.weight, std=0.3)
            nn.init.normal_(module.down.weight, std=0.3)
    commit(model)
    expected = run(model, inputs_for(family, head))
    once = reload(model, tmp_path / "once")
    twice = reload(once, tmp_path / "twice")
    for again in (once, twice):
        assert describe(again) == describe(model)
        assert same(run(again, inputs_for(family, head)), expected)


@pytest.mark.parametrize(("family", "head"), MATRIX)
def test_every_linear_layer_factorizes(family: str, head: str, tmp_path: Path) -> None:
    model = make(family, head)
    # At full rank nothing changes but rounding.
    full = run(model, inputs_for(family, head))
    paths = [path for path in linear_layers(model) if not surgery.tied_to(model, path)]
    roles = {path for found in modules_by_role(model).values() for path in found}
    assert roles <= set(paths)
    whole = copy.deepcopy(model)
    for path in paths:
        module = base_model(whole).get_submodule(path)
        weight = module.weight.detach().T if isinstance(module, Conv1D) else module.weight.detach()
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        surgery.factorize(whole, path, len(values), (left * values, right))
    assert close(run(whole, inputs_for(family, head)), full, rtol=1e-3, atol=1e-3)
    factorize(model)
    commit(model)
    assert not close(run(model, inputs_for(family, head)), full)
    assert same(run(reload(model, tmp_path), inputs_for(family, head)), run(model, inputs_for(family, head)))


@pytest.mark.parametrize(("family", "head"), GENERATING)
def test_generates_as_before_saving(family: str, head: str, tmp_path: Path) -> None:
    model = make(family, head)
    zeroed = copy.deepcopy(model)
    uneven(zeroed, by="zeroing")
    uneven(model, by="pruning")
    commit(model)
    expected = generate(model, family, head)
    assert close(generate(zeroed, family, head), expected)
    assert same(generate(reload(model, tmp_path), family, head), expected)
    # The cache holds each layer's own heads and changes nothing.
    assert close(generate(model, family, head, cache=False), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_model_and_another_head_from_a_task_checkpoint(family: str, tmp_path: Path) -> None:
    heads = FAMILIES[family].heads
    head = next((name for name in heads[1:] if name != "MaskedLM"), heads[0])
    model = make(family, head)
    uneven(model, by="pruning")
    factorize(model)
    commit(model)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    trunk = {name: weight for name, weight in base_model(model).state_dict().items()}
    loaded = base_model(base).state_dict()
    shared = [name for name in loaded if name in trunk]
    assert len(shared) > len(trunk) / 2
    assert all(torch.equal(loaded[name], trunk[name]) for name in shared)
    for other in heads:
        if (family, other) in IMPOSSIBLE:
            with pytest.raises(CheckpointError, match="missing"):  # stock goes on with random weights
                class_of(family, other).from_pretrained(tmp_path)
            continue
        one_score = {"ignore_mismatched_sizes": other == "MultipleChoice"}  # its classifier has one output
        loaded = base_model(class_of(family, other).from_pretrained(tmp_path, **one_score)).state_dict()
        shared = [name for name in loaded if name in trunk and not name.startswith(("lm_head", "pooler"))]
        assert len(shared) > len(trunk) / 4
        assert all(torch.equal(loaded[name], trunk[name]) for name in shared), other


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_arguments(family: str, tmp_path: Path) -> None:
    model = make(family)
    uneven(model, by="pruning")
    factorize(model)
    commit(model)
    expected = run(model, inputs_for(family))
    half = reload(model, tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    inputs = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs_for(family).items()
    }
    assert all(torch.isfinite(output).all() for output in run(half, inputs))
    if FAMILIES[family].sdpa:
        other = type(model).from_pretrained(tmp_path, attn_implementation="sdpa")
        assert other.config._attn_implementation == "sdpa"
        assert close(run(other, inputs_for(family)), expected)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in ("mpnet", "t5", "t5-gated")])
def test_swapped_heads_of_a_shared_bias_show(family: str, tmp_path: Path) -> None:
    """The tests above would see a wrong row of the bias."""
    model = make(family)
    uneven(model, by="pruning")
    commit(model)
    inputs = inputs_for(family)
    expected = run(model, inputs)
    swapped = 0
    for block in attention_blocks(model):
        kept = getattr(block.module, "kept_heads", None)
        if kept is None or len(kept) < 2 or "EncDec" in block.name:
            continue
        stored = kept.clone()
        kept[:2] = stored[[1, 0]]
        assert not close(run(model, inputs), expected), block.name
        kept.copy_(stored)
        swapped += 1
    assert swapped > 1
    assert same(run(model, inputs), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_swapped_heads_show(family: str) -> None:
    model = make(family)
    uneven(model, by="pruning")
    expected = run(model, inputs_for(family))
    block = next(block for block in attention_blocks(model) if block.heads > 1)
    width = block.head_dim * block.queries_per_head
    weight = block.at(block.spec.output).weight.detach()
    inputs = weight if isinstance(block.at(block.spec.output), Conv1D) else weight.T
    inputs[: 2 * width] = torch.cat((inputs[width : 2 * width], inputs[:width]))
    assert not close(run(model, inputs_for(family)), expected)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name in ("llama", "mistral", "qwen2", "qwen3", "vit")])
def test_heads_of_one_number_are_said_in_stock_fields(family: str, tmp_path: Path) -> None:
    model = make(family)
    for index, block in enumerate(attention_blocks(model)):
        surgery.shrink_attention(block, [[0, 2], [1, 3], [0, 1]][index])
    for block in feed_forward_blocks(model):
        surgery.shrink_feed_forward(block, range(3, 19))
    say_in_stock_fields(model)
    commit(model)
    assert describe(model) == {}
    again = reload(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert same(run(again, inputs_for(family)), run(model, inputs_for(family)))
    # And from there unevenly.
    surgery.shrink_attention(attention_blocks(again)[0], [1])
    commit(again)
    assert list(describe(again)) == ["heads"]
    assert same(run(reload(again, tmp_path / "uneven"), inputs_for(family)), run(again, inputs_for(family)))


def test_heads_that_a_config_refuses_stay_in_the_structure(tmp_path: Path) -> None:
    model = make("llama")
    for block in attention_blocks(model):
        surgery.shrink_attention(block, [0, 1, 3])  # 6 query heads do not divide a width of 32
    say_in_stock_fields(model)
    commit(model)
    assert describe(model) == {"heads": {"layers.*.self_attn": 3}}
    assert same(run(reload(model, tmp_path), inputs_for("llama")), run(model, inputs_for("llama")))


@pytest.mark.parametrize("family", FAMILIES)
def test_feed_forwards_of_one_width_are_an_ordinary_checkpoint(family: str, tmp_path: Path) -> None:
    model = make(family)
    for index, block in enumerate(feed_forward_blocks(model)):
        surgery.shrink_feed_forward(block, range(index, index + 16))
    say_in_stock_fields(model)
    commit(model)
    again = reload(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert same(run(again, inputs_for(family)), run(model, inputs_for(family)))


def test_a_tied_head_is_not_factorized() -> None:
    model = make("t5", "ConditionalGeneration")
    assert model.lm_head.weight is model.shared.weight
    with pytest.raises(CompressionError, match="shares its weight"):
        surgery.factorize(model, "lm_head", 4)
    assert model.lm_head.weight is model.shared.weight
    assert "lm_head" not in linear_layers(model)


def test_fused_projections_factorize_before_they_are_pruned() -> None:
    for family in ("gpt2", "modernbert"):
        model = make(family)
        factorize(model)
        zeroed = copy.deepcopy(model)
        for block in attention_blocks(model):
            surgery.shrink_attention(block, [0, 3])
        for block in attention_blocks(zeroed):
            output = block.at(block.spec.output)
            assert isinstance(output, LowRankLinear)
            output.down.weight.data[:, block.head_dim : 3 * block.head_dim] = 0
        assert close(run(model, inputs_for(family)), run(zeroed, inputs_for(family)))


METHODS = [
    StructuredPruningConfig(heads=0.3, neurons=0.3, multiple_of=2),
    LowRankConfig(keep=0.7, multiple_of=2),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_that_look_at_data(family: str, tmp_path: Path) -> None:
    inputs = inputs_for(family)
    model = compress(make(family), METHODS, calibration=[inputs])
    structure = describe(model)
    assert structure["low_rank"]
    assert structure["heads"]
    assert same(run(reload(model, tmp_path), inputs), run(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_after_the_other_methods(family: str, kind: Any, tmp_path: Path) -> None:
    inputs = inputs_for(family)
    steps = [StructuredPruningConfig(heads=0.3, neurons=0.3, multiple_of=2), LowRankConfig(targets=("ffn",), keep=0.7)]
    model = compress(make(family), [*steps, QuantizationConfig(weights=kind, embeddings=None)], calibration=[inputs])
    expected = run(model, inputs)
    again = reload(model, tmp_path / "once")
    assert set(describe(again)["linear"].values()) == {kind}
    assert same(run(again, inputs), expected)
    assert same(run(reload(again, tmp_path / "twice"), inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_alone_is_a_stock_checkpoint(family: str, tmp_path: Path) -> None:
    inputs = inputs_for(family)
    model = compress(make(family), [QuantizationConfig(weights="int8", embeddings=None)])
    expected = run(model, inputs)
    again = reload(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    assert same(run(again, inputs), expected)
