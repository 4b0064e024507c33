"""Layers dropped, modules split: equal to what stock models of that shape compute."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hfcompress.errors import CompressionError
from hfcompress.modeling import depth, surgery
from hfcompress.modeling.anatomy import attention_blocks, base_model, feed_forward_blocks, linear_layers
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.layers.low_rank import LowRankLinear
from hfcompress.modeling.structure import describe
from tests.modeling.test_families import GENERATING, close, generate, reload, same, uneven, zero
from tests.tiny_models import FAMILIES, LAYERS, inputs_for, make, run

# Layer 1 goes wherever it can, and layer 0 with what it alone has.
FIRST_GOES = [name for name in FAMILIES if name not in ("modernbert", "albert")]


def drop(model: Any, kept: list[int]) -> dict[str, list[int]]:
    """Drops layers of every stack, of the second one another number; returns what each kept."""
    chosen: dict[str, list[int]] = {}
    for place, (stack, count) in enumerate(depth.stack_depths(model).items()):
        left = kept if place == 0 else [count - 1] if len(kept) > 1 else [0, count - 1]
        depth.drop_layers(model, left, stack=stack)
        chosen[stack] = left
    return chosen


def renamed(stack: str, kept: list[int]) -> Callable[[str], str | None]:
    """Maps the names of a full model's weights to those of the shallow one; None for what went."""

    def rename(name: str) -> str | None:
        before, found, after = name.partition(f"{stack}.")
        if not found:
            return name
        number, _, rest = after.partition(".")
        if "relative_attention_bias" in rest:
            return name  # the first layer's, whichever that is
        return f"{before}{stack}.{kept.index(int(number))}.{rest}" if int(number) in kept else None

    return rename


WEIGHING = [("whisper", "AudioClassification"), ("wav2vec2", "SequenceClassification")]


@pytest.mark.parametrize(("family", "head"), WEIGHING)
def test_heads_that_weigh_layers_weigh_those_left(family: str, head: str, tmp_path: Path) -> None:
    model = make(family, head)
    weights = model.layer_weights.detach().clone()
    depth.drop_layers(model, [0, 2])
    assert torch.equal(model.layer_weights, weights[[0, 1, 3]])
    commit(model)
    inputs = inputs_for(family, head)
    assert same(run(reload(model, tmp_path), inputs), run(model, inputs))


@pytest.mark.parametrize("family", FAMILIES)
def test_dropped_layers_are_the_stock_model_of_that_depth(family: str, tmp_path: Path) -> None:
    model = make(family)
    full = {name: weight.clone() for name, weight in model.state_dict().items()}
    kept = [0, 2]
    chosen = drop(model, kept)
    commit(model)
    stock = type(model)(copy.deepcopy(model.config)).eval()
    if family != "albert":  # there the layers are one
        for stack, left in chosen.items():
            names = {name: renamed(stack, left)(name) for name in full}
            full = {new: full[name] for name, new in names.items() if new is not None}
    assert set(full) == set(stock.state_dict())
    stock.load_state_dict(full)
    expected = run(stock, inputs_for(family))
    assert same(run(model, inputs_for(family)), expected)
    again = reload(model, tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert same(run(again, inputs_for(family)), expected)
    assert len(json.loads((tmp_path / "config.json").read_text()).get("layer_types") or kept) == len(kept)


@pytest.mark.parametrize("family", [name for name in FAMILIES if FAMILIES[name].pre_norm])
def test_dropped_layers_are_identities(family: str) -> None:
    model = make(family)
    identity = copy.deepcopy(model)
    chosen = drop(model, [0, 2])
    for block in [*attention_blocks(identity), *feed_forward_blocks(identity)]:
        if int(block.layer.rpartition(".")[2]) not in chosen[block.stack.layers]:
            zero(block, list(range(getattr(block, "heads", getattr(block, "neurons", 0)))))
            output = block.at(block.spec.output)
            if output.bias is not None:
                output.bias.data.zero_()
    assert close(run(model, inputs_for(family)), run(identity, inputs_for(family)))


@pytest.mark.parametrize("family", FIRST_GOES)
def test_the_first_layer_goes(family: str, tmp_path: Path) -> None:
    """What it alone had (a position bias) is carried on, also when heads were removed before."""
    model = make(family)
    drop(model, [0, 2])
    stack = next(iter(depth.stack_depths(model)))
    fresh = make(family)
    uneven(fresh, by="pruning")
    depth.drop_layers(fresh, [1, 2], stack=stack)
    commit(fresh)
    expected = run(fresh, inputs_for(family))
    assert not close(expected, run(model, inputs_for(family)))
    assert same(run(reload(fresh, tmp_path), inputs_for(family)), expected)


def test_the_bias_of_the_first_layer_is_carried_on() -> None:
    model = make("t5", "EncoderModel")
    identity = copy.deepcopy(model)
    depth.drop_layers(model, [1, 2])
    for block in [attention_blocks(identity)[0], feed_forward_blocks(identity)[0]]:
        zero(block, list(range(24))[: 4 if hasattr(block, "heads") else 24])
    assert close(run(model, inputs_for("t5", "EncoderModel")), run(identity, inputs_for("t5", "EncoderModel")))


# Stock T5 makes its cache as deep as the encoder: a decoder that is deeper cannot use one, compressed or not.
SHALLOW = [(*cell, kept) for cell in GENERATING for kept in ([0, 2], [1]) if kept != [1] or "t5" not in cell[0]]


@pytest.mark.parametrize(("family", "head", "kept"), SHALLOW)
def test_shallow_models_generate(family: str, head: str, kept: list[int], tmp_path: Path) -> None:
    model = make(family, head)
    uneven(model, by="pruning")
    drop(model, kept)
    commit(model)
    expected = generate(model, family, head)
    assert same(generate(reload(model, tmp_path), family, head), expected)
    assert close(generate(model, family, head, cache=False), expected)


def test_a_stack_with_a_config_of_its_own_knows_its_depth(tmp_path: Path) -> None:
    model = make("t5")
    depth.drop_layers(model, [0, 1], stack="encoder.block")
    depth.drop_layers(model, [2], stack="decoder.block")
    commit(model)
    for each in (model, reload(model, tmp_path)):
        assert (each.config.num_layers, each.config.num_decoder_layers) == (2, 1)
        assert (each.encoder.config.num_layers, each.decoder.config.num_layers) == (2, 1)


def test_a_first_layer_that_is_unlike_the_others_stays() -> None:
    with pytest.raises(CompressionError, match=r"layer 0 .* must stay"):
        depth.drop_layers(make("modernbert"), [1, 2])


def test_layers_that_compute_by_their_number_stay() -> None:
    with pytest.raises(CompressionError, match="scale_attn_by_inverse_layer_idx"):
        depth.drop_layers(make("gpt2", scale_attn_by_inverse_layer_idx=True), [0, 2])


def test_groups_of_shared_layers_stay() -> None:
    with pytest.raises(CompressionError, match="one group"):
        depth.drop_layers(make("albert", num_hidden_groups=3), [0, 2])


def test_shared_groups_are_pruned_each(tmp_path: Path) -> None:
    model = make("albert", num_hidden_groups=3, inner_group_num=2)
    zeroed = copy.deepcopy(model)
    assert len(attention_blocks(model)) == 6
    uneven(model, by="pruning")
    uneven(zeroed, by="zeroing")
    commit(model)
    assert close(run(model, inputs_for("albert")), run(zeroed, inputs_for("albert")))
    assert same(run(reload(model, tmp_path), inputs_for("albert")), run(model, inputs_for("albert")))


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [-1, 0], [0, LAYERS]])
def test_kept_layers_are_checked(kept: list[int]) -> None:
    with pytest.raises(CompressionError, match="ascending numbers from 0 to 2"):
        depth.drop_layers(make("bert"), kept)


def test_the_stack_is_named_where_there_are_several() -> None:
    model = make("bart")
    with pytest.raises(CompressionError, match=r"name one: encoder\.layers, decoder\.layers"):
        depth.drop_layers(model, [0])
    with pytest.raises(CompressionError, match="no stack 'decoder'"):
        depth.drop_layers(model, [0], stack="decoder")
    depth.drop_layers(model, [0], stack="decoder.layers")
    assert depth.stack_depths(model) == {"encoder.layers": 3, "decoder.layers": 1}


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_nothing_is_left(family: str) -> None:
    model = make(family)
    with pytest.raises(CompressionError, match="at least one head"):
        surgery.shrink_attention(attention_blocks(model)[0], [])
    with pytest.raises(CompressionError, match="at least one neuron"):
        surgery.shrink_feed_forward(feed_forward_blocks(model)[0], [])


def test_groups_of_query_heads_go_together() -> None:
    model = make("qwen3")
    block = attention_blocks(model)[0]
    rows = block.at("self_attn.q_proj").weight.detach().clone().view(4, 2, 12, 32)
    surgery.shrink_attention(block, [1, 3])
    assert (block.heads, block.query_heads, block.queries_per_head) == (2, 4, 2)
    assert torch.equal(block.at("self_attn.q_proj").weight, rows[[1, 3]].reshape(48, 32))


def test_cross_attention_of_a_decoder() -> None:
    model = make("gpt2", add_cross_attention=True)
    zeroed = copy.deepcopy(model)
    inputs = inputs_for("gpt2") | {"encoder_hidden_states": torch.randn(2, 5, 32)}
    assert len(attention_blocks(model)) == 2 * LAYERS
    uneven(model, by="pruning")
    uneven(zeroed, by="zeroing")
    assert close(run(model, inputs), run(zeroed, inputs))


@pytest.mark.parametrize("family", ["t5", "mpnet"])
def test_heads_pruned_in_two_goes(family: str, tmp_path: Path) -> None:
    once, twice = make(family), make(family)
    for block in attention_blocks(once):
        surgery.shrink_attention(block, [1, 3])
    for block in attention_blocks(twice):
        surgery.shrink_attention(block, [0, 1, 3])
        surgery.shrink_attention(block, [1, 2])
    commit(twice)
    assert same(run(twice, inputs_for(family)), run(once, inputs_for(family)))
    assert same(run(reload(twice, tmp_path), inputs_for(family)), run(once, inputs_for(family)))


def test_training_goes_through_a_shared_bias() -> None:
    model = make("t5")
    uneven(model, by="pruning")
    model.train()
    inputs = {name: value for name, value in inputs_for("t5").items() if "decoder" not in name}
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    table = model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assert torch.isfinite(table.grad).all()
    assert (table.grad.abs().sum(0) > 0).all()  # every head is kept in some layer


def test_factors_keep_the_bias_and_mode() -> None:
    model = make("bert").train()
    path = "encoder.layer.0.output.dense"
    bias = base_model(model).get_submodule(path).bias
    surgery.factorize(model, path, 4)
    made = base_model(model).get_submodule(path)
    assert isinstance(made, LowRankLinear)
    assert made.up.bias is bias
    assert made.training
    assert isinstance(made.down, nn.Linear)
    assert f"{path}.down" in linear_layers(model)
    assert describe(model) == {"low_rank": {path: 4}}
