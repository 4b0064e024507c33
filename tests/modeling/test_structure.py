"""The record of a structure: small, read off the live model, put back on an empty one, and held to it."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from hfcompress.errors import CheckpointError
from hfcompress.modeling import surgery
from hfcompress.modeling.anatomy import attention_blocks, base_model, feed_forward_blocks
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.stock_fields import say_in_stock_fields
from hfcompress.modeling.structure import describe, rebuild
from tests.modeling.test_families import factorize, uneven
from tests.tiny_models import CELLS, FAMILIES, class_of, make


def shapes(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def empty(family: str, head: str, config: Any) -> Any:
    with torch.device("meta"):
        return class_of(family, head)(copy.deepcopy(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stock_model_has_none(family: str) -> None:
    assert describe(make(family)) == {}


@pytest.mark.parametrize(("family", "head"), CELLS)
def test_what_was_read_is_put_back(family: str, head: str) -> None:
    model = make(family, head)
    uneven(model, by="pruning")
    factorize(model)
    structure = json.loads(json.dumps(describe(model)))
    rebuilt = empty(family, head, model.config)
    rebuild(rebuilt, structure)
    assert shapes(rebuilt) == shapes(model)
    assert describe(rebuilt) == structure


def test_layers_that_agree_are_one_entry() -> None:
    model = make("bert")
    for block in attention_blocks(model):
        surgery.shrink_attention(block, [0, 3])
    assert describe(model) == {"heads": {"encoder.layer.*.attention.self": 2}}
    surgery.shrink_attention(attention_blocks(model)[1], [0])
    assert describe(model)["heads"] == {f"encoder.layer.{i}.attention.self": n for i, n in enumerate([2, 1, 2])}


def test_an_encoder_and_a_decoder_fold_apart() -> None:
    model = make("t5")
    for block in attention_blocks(model):
        kept = [0] if block.name.startswith("encoder.") else [0, 1]
        surgery.shrink_attention(block, kept)
    assert describe(model) == {
        "heads": {
            "encoder.block.*.layer.*.SelfAttention": 1,
            "decoder.block.*.layer.*.SelfAttention": 2,
            "decoder.block.*.layer.*.EncDecAttention": 2,
        }
    }


def test_only_what_a_relative_has_is_passed_over() -> None:
    model = make("t5", "EncoderModel")
    rebuild(model, {"heads": {"decoder.block.0.layer.0.SelfAttention": 2}})
    with pytest.raises(CheckpointError, match=r"no module 'decodr\.block"):
        rebuild(model, {"heads": {"decodr.block.0.layer.0.SelfAttention": 2}})
    with pytest.raises(CheckpointError, match=r"no module 'decoder\.block"):
        rebuild(make("t5"), {"heads": {"decoder.block.9.layer.0.SelfAttention": 2}})
    rebuild(make("bert", "TokenClassification"), {"low_rank": {"pooler.dense": 2}})
    with pytest.raises(CheckpointError, match=r"no module 'pool\.dense'"):
        rebuild(make("bert", "TokenClassification"), {"low_rank": {"pool.dense": 2}})


@pytest.mark.parametrize("value", [0, -1, 5, 10**9, 2.0, "2", True, None, [2]])
@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "whisper"])
def test_numbers_of_heads_are_bounded_by_the_config(family: str, value: Any) -> None:
    model = make(family)
    name = attention_blocks(model)[0].name
    with pytest.raises(CheckpointError, match="from 1 to 4"):
        rebuild(model, {"heads": {name: value}})


@pytest.mark.parametrize("value", [0, -1, 97, True, "8"])
@pytest.mark.parametrize("family", ["gpt2", "modernbert", "t5-gated"])
def test_numbers_of_neurons_are_bounded_by_the_config(family: str, value: Any) -> None:
    model = make(family)
    block = feed_forward_blocks(model)[0]
    value = block.stock_neurons + 1 if value == 97 else value
    with pytest.raises(CheckpointError, match=f"from 1 to {block.stock_neurons}"):
        rebuild(model, {"neurons": {block.name: value}})


@pytest.mark.parametrize("name", ["encoder.layers.0.self_attn.q_proj", "decoder.layers.*.fc1"])
def test_ranks_are_bounded_by_the_matrix(name: str) -> None:
    for value in (0, 33, -2, "4"):
        with pytest.raises(CheckpointError, match="low_rank"):
            rebuild(make("whisper"), {"low_rank": {name: value}})


def test_an_unknown_section_names_the_known_ones() -> None:
    with pytest.raises(CheckpointError, match=r"structure\.head is unknown; did you mean 'heads'"):
        rebuild(make("bert"), {"head": {}})


def test_an_embedding_that_does_more_than_look_up_is_no_table() -> None:
    form = {"bits": 8, "group_size": 32}
    with pytest.raises(CheckpointError, match="no module"):
        rebuild(make("bart", ""), {"embeddings": {"decoder.embed_positions": form}})


def test_stacks_with_fields_of_their_own_are_said_apart() -> None:
    model = make("bart")
    for index, block in enumerate(feed_forward_blocks(model)):
        decoder = block.name.startswith("decoder.")
        surgery.shrink_feed_forward(block, range(8 + index if decoder else 16))
    say_in_stock_fields(model)
    assert model.config.encoder_ffn_dim == 16
    assert model.config.decoder_ffn_dim == 32
    assert set(describe(model)) == {"neurons"}
    assert all(name.startswith("decoder.") for name in describe(model)["neurons"])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_stock_heads_keep_their_width_and_groups(family: str) -> None:
    model = make(family)
    width = attention_blocks(model)[0].head_dim
    for block in attention_blocks(model):
        surgery.shrink_attention(block, [1, 2])
    say_in_stock_fields(model)
    config = model.config
    assert (config.num_key_value_heads, config.num_attention_heads, config.head_dim) == (2, 4, width)
    assert shapes(empty(family, "CausalLM", config)) == shapes(model)


def test_heads_of_a_shared_bias_are_never_said_in_stock_fields() -> None:
    model = make("t5")
    for block in attention_blocks(model):
        surgery.shrink_attention(block, [1, 2])
    say_in_stock_fields(model)
    assert model.config.num_heads == 4
    commit(model)
    assert set(describe(model)) == {"heads"}


def test_sizes_that_a_config_leaves_open_are_bounded_too() -> None:
    model = make("gpt2")
    assert model.config.n_inner is None
    for index, block in enumerate(feed_forward_blocks(model)):
        surgery.shrink_feed_forward(block, range(100 + index))
    structure = describe(model)
    assert structure == {"neurons": {f"h.{index}.mlp.c_fc": 100 + index for index in range(3)}}
    rebuilt = empty("gpt2", "LMHeadModel", model.config)
    rebuild(rebuilt, structure)
    assert shapes(rebuilt) == shapes(model)
    assert base_model(rebuilt) is rebuilt.transformer
