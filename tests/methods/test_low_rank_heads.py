"""Queries, keys and values that are factorised head by head."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hfcompress import LowRankConfig, QuantizationConfig, UnstructuredPruningConfig, compress, lora_targets
from hfcompress.errors import CheckpointError, CompressionError, ConfigError
from hfcompress.methods.low_rank import low_rank
from hfcompress.methods.low_rank.costs import Measure, costs_of
from hfcompress.methods.low_rank.fitting import Group, matrix_of, pieces_of
from hfcompress.methods.low_rank.maths import energies, pull, truncate
from hfcompress.methods.low_rank.method import learn
from hfcompress.methods.pruning.units import head_units
from hfcompress.methods.registry import Context
from hfcompress.modeling import surgery
from hfcompress.modeling.anatomy import attention_blocks, base_model, heads_by_projection
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.densify import densify
from hfcompress.modeling.layers.headwise import HeadwiseLinear
from hfcompress.modeling.structure import rebuild
from tests.tiny_models import FAMILIES, class_of, inputs_for, make, run
from tests.workshop import batches, logits, tiny_classifier

BY_HEAD = LowRankConfig(keep=0.6, per_head=True, method="svd", multiple_of=1)
INTO_HEADS = ("query", "key", "value")
QUERY = "encoder.layer.0.attention.self.query"


def headwise_layers(model: Any) -> dict[str, HeadwiseLinear]:
    return {name: each for name, each in base_model(model).named_modules() if isinstance(each, HeadwiseLinear)}


def same(left: list[torch.Tensor], right: list[torch.Tensor], **tolerance: float) -> None:
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


# The form


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3, 10), (2, 5, 10), (10,)])
def test_it_computes_the_product_of_each_heads_factors(bias: bool, shape: tuple[int, ...]) -> None:
    layer, inputs = HeadwiseLinear(10, 12, 2, 3, bias=bias), torch.randn(shape)
    weight = layer.compose(layer.up.weight, layer.down.weight)
    for head in range(3):
        rows, components = layer.up.weight[4 * head :][:4], layer.down.weight[2 * head :][:2]
        torch.testing.assert_close(weight[4 * head :][:4], rows @ components)
    wanted = nn.functional.linear(inputs, weight, layer.bias)
    torch.testing.assert_close(layer(inputs), wanted)
    seen: list[tuple[int, ...]] = []
    handle = layer.up.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0].shape))
    torch.testing.assert_close(layer(inputs), wanted)  # for whoever watches it, `up` is called
    handle.remove()
    assert seen == [(3 * inputs[..., 0].numel(), 2)]
    assert layer.multiplications == sum(each.numel() for each in layer.parameters() if each.dim() == 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(inputs).dtype == nn.Linear(10, 12)(inputs).dtype == torch.bfloat16


def test_outputs_that_do_not_fall_into_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="10 outputs do not fall into 4 heads"):
        HeadwiseLinear(8, 10, 2, 4, bias=False)


@pytest.mark.parametrize("family", ["bert", "mpnet", "albert", "deberta-v2", "gpt2", "llama", "t5", "whisper", "vit"])
def test_it_is_the_product_and_comes_back_exactly(family: str, tmp_path: Path) -> None:
    head = FAMILIES[family].heads[1]
    inputs = inputs_for(family, head)
    attention = "sdpa" if FAMILIES[family].sdpa else "eager"  # as a plain load chooses
    model = compress(make(family, head, attention=attention), [BY_HEAD])
    assert set(headwise_layers(model)) == set(heads_by_projection(model))
    outputs, merged = run(model, inputs), copy.deepcopy(model)
    model.save_pretrained(tmp_path / "saved")
    again = class_of(family, head).from_pretrained(tmp_path / "saved")
    tensors = model.state_dict()
    assert tensors.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.state_dict().items())
    assert all(torch.equal(*each) for each in zip(run(again, inputs), outputs, strict=True))
    densify(tmp_path / "saved", tmp_path / "dense")
    same(run(class_of(family, head).from_pretrained(tmp_path / "dense"), inputs), outputs, atol=1e-4, rtol=1e-3)
    for path in headwise_layers(merged):
        surgery.defactorize(merged, path)
    same(run(merged, inputs), outputs, atol=1e-4, rtol=1e-3)


def test_it_learns() -> None:
    model = compress(tiny_classifier(), [BY_HEAD]).train()
    model(**batches(1)[0]).loss.backward()
    for each in headwise_layers(model).values():
        assert each.up.weight.grad is not None and each.up.weight.grad.any()
        assert each.down.weight.grad is not None and each.down.weight.grad.any()


def test_graphs_compute_the_same() -> None:
    layer = HeadwiseLinear(10, 12, 2, 3, bias=True).eval()
    inputs = torch.randn(2, 5, 10)
    exported = torch.export.export(layer, (inputs,)).module()
    torch.testing.assert_close(exported(inputs), layer(inputs))


# With other methods


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_heads_are_pruned_with_their_components(family: str, tmp_path: Path) -> None:
    head = FAMILIES[family].heads[1]
    inputs, model = inputs_for(family, head), compress(make(family, head, attention="sdpa"), [BY_HEAD])
    whole = copy.deepcopy(model)
    for path in headwise_layers(whole):
        surgery.defactorize(whole, path)
    for each in (model, whole):
        for attention in attention_blocks(each):
            surgery.shrink_attention(attention, [1])
        commit(each)
    same(run(model, inputs), run(whole, inputs), atol=1e-4, rtol=1e-3)
    model.save_pretrained(tmp_path)
    again = class_of(family, head).from_pretrained(tmp_path)
    assert all(torch.equal(*each) for each in zip(run(again, inputs), run(model, inputs), strict=True))


def test_a_part_of_a_head_cannot_go() -> None:
    with pytest.raises(CompressionError, match="some outputs of a head would go"):
        surgery.select_outputs(HeadwiseLinear(8, 12, 2, 3, bias=True), torch.tensor([0, 1, 2, 3, 4]))


def test_what_pruning_counts_is_what_there_is() -> None:
    model = compress(tiny_classifier(), [LowRankConfig(targets=INTO_HEADS, keep=0.6, per_head=True, method="svd")])
    for units in head_units(model):
        unit, fixed = units.costs("parameters")
        block = units.block.at("attention")
        assert units.count * unit + fixed == sum(each.numel() for each in block.parameters() if each.dim() > 0) - 2 * 64


@pytest.mark.parametrize("weights", ["int8", "nf4"])
def test_it_is_quantized_and_comes_back(weights: Any, tmp_path: Path) -> None:
    model, data = compress(tiny_classifier(), [BY_HEAD]), batches(1)[0]
    before = logits(model, data)
    compress(model, [QuantizationConfig(weights=weights, embeddings=None)])
    torch.testing.assert_close(logits(model, data), before, atol=0.3, rtol=0.3)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert headwise_layers(again)
    assert torch.equal(logits(again, data), logits(model, data))


# peft 0.21 reads a name that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_its_factors_are_adapted_and_pruned_by_what_they_read() -> None:
    import peft

    data = batches(2)
    model = compress(tiny_classifier(), [BY_HEAD])
    before = logits(model, data[0])
    targets = lora_targets(model, ["query"])
    assert set(targets) == {"query.down", "query.up"}
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=targets, r=2))
    torch.testing.assert_close(logits(adapted, data[0]), before)
    with torch.no_grad():
        for name, each in adapted.named_parameters():
            if "lora_B" in name:
                each.normal_(std=5)
    changed = logits(adapted, data[0])
    assert (changed - before).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged, data[0]), changed, atol=1e-5, rtol=1e-4)
    compress(model, [UnstructuredPruningConfig(sparsity=0.5, importance="wanda")], calibration=data)
    assert all((each.up.weight == 0).float().mean() > 0.4 for each in headwise_layers(model).values())


# The fit


@pytest.mark.parametrize(
    "values",
    [
        {"method": "svd", "rank": 5},
        {"method": "fisher", "keep": 0.6},
        {"method": "nmf", "keep": 0.6, "refit": True},
        {"energy": 0.8},
        {"keep": 0.6, "correct_bias": True},
        {"rank": 6, "sequential": True, "correct_bias": True},
        {"budget": 0.6},
        {"budget": 0.6, "budget_of": "flops"},
        {"budget": 0.6, "budget_of": "bytes", "sensitivity": "outputs"},
    ],
    ids=lambda values: " ".join(values),
)
def test_every_way_to_fit_and_size_knows_heads(values: dict[str, Any], tmp_path: Path) -> None:
    data, model = batches(2), tiny_classifier()
    found = low_rank(model, LowRankConfig(per_head=True, multiple_of=1, **values), Context(calibration=data))
    made = headwise_layers(model)
    assert made and all(found["ranks"][path] == each.rank for path, each in made.items())
    sizes = [sum(each.numel() for each in layer.parameters() if each.dim() == 2) for layer in made.values()]
    assert max(sizes) < 64 * 64
    if values.get("budget_of", "parameters") == "parameters" and "budget" in values:
        everything = sum(each.numel() for each in model.bert.encoder.parameters() if each.dim() == 2)
        assert 0.5 < everything / (2 * (4 * 64 * 64 + 2 * 64 * 96)) <= 0.6
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), data[0]), logits(model, data[0]))


def test_its_error_is_what_the_heads_discard() -> None:
    model = tiny_classifier()
    weight = matrix_of(model, QUERY).clone()
    compress(model, [LowRankConfig(targets=("query",), rank=5, per_head=True, method="svd")])
    layer = headwise_layers(model)[QUERY]
    assert (layer.heads, layer.rank) == (4, 5)
    error = (weight - layer.compose(layer.up.weight, layer.down.weight)).square().sum().item()
    assert error == pytest.approx(sum(energies(each)[5:].sum().item() for each in weight.chunk(4)), rel=1e-4)


@pytest.mark.parametrize("weighs", [True, False])
def test_each_head_is_fitted_to_its_inputs_and_by_its_outputs(weighs: bool) -> None:
    data, model = batches(4), tiny_classifier()
    config = LowRankConfig(targets=("value",), rank=6, per_head=True, weigh_outputs=weighs)
    path = QUERY.replace("query", "value")
    known = learn(model, [path], config, "whitened", data)
    weight = matrix_of(model, path).clone()
    compress(model, [config], calibration=data)
    layer = headwise_layers(model)[path]
    made = layer.compose(layer.up.weight, layer.down.weight).chunk(4)
    for head, rows in enumerate(weight.chunk(4)):
        own = slice(16 * head, 16 * head + 16)
        whole: Any = known.curvature.get(path)
        up, down = truncate(rows, 6, known.inputs[path].second_moment, whole[own, own] if weighs else None)
        torch.testing.assert_close(made[head], up @ down, atol=1e-5, rtol=1e-4)


def test_the_curvature_of_all_heads_together_is_no_heads() -> None:
    model, data = tiny_classifier(), batches(2)
    config = LowRankConfig(targets=("value",), rank=6, per_head=True)
    known = learn(model, [QUERY.replace("query", "value")], config, "whitened", data)
    path, curvature = next(iter(known.curvature.items()))
    assert isinstance(curvature, torch.Tensor)
    pulled = replace(known, curvature={path: pull(matrix_of(model, path), curvature)})
    with pytest.raises(ValueError, match="of the outputs of a head alone the curvature is not known"):
        pieces_of(model, Group((path,), (64,), 64, 4), pulled)


def test_it_costs_what_its_heads_do() -> None:
    model, batch = tiny_classifier(), batches(1)[0]
    units: dict[Measure, int] = {"parameters": 1, "bytes": 4, "flops": batch["input_ids"].numel()}
    form: dict[str, Any] = {"pivoted": False, "heads": {QUERY: 4}}
    for measure, unit in units.items():
        cost = costs_of(model, {QUERY: (64, 64)}, measure, batch, **form)[QUERY]
        assert (cost(None), cost(5)) == (unit * 64 * 64, unit * 4 * 5 * (16 + 64))
    assert costs_of(model, {QUERY: (64, 64)}, "latency", batch, **form)[QUERY](5) > 0


# What is refused


def test_what_does_not_go_together_is_refused() -> None:
    for other in ("share", "pivoted"):
        with pytest.raises(ConfigError, match="per_head goes without share and pivoted"):
            LowRankConfig(per_head=True, **{other: True})
    with pytest.raises(CompressionError, match="per_head finds no heads among the targets"):
        compress(tiny_classifier(), [LowRankConfig(targets=("ffn",), per_head=True)])


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (8, "must hold rank and heads, not 8"),
        ({"rank": 4}, "must hold rank and heads"),
        ({"rank": 4, "heads": 5}, "must divide 64, not be 5"),
        ({"rank": 65, "heads": 4}, "must be an integer from 1 to 64, not 65"),
        ({"rank": True, "heads": 4}, "must be an integer"),
    ],
)
def test_a_record_of_no_heads_is_refused(form: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=rf"structure\.headwise: .*{said}"):
        rebuild(tiny_classifier(), {"headwise": {QUERY: form}})
