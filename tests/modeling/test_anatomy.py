"""Parts are found where they are, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM, UMT5Config, UMT5ForConditionalGeneration

from hfcompress.errors import UnsupportedModelError
from hfcompress.methods import compress
from hfcompress.methods.low_rank import LowRankConfig
from hfcompress.methods.quantization import QuantizationConfig
from hfcompress.methods.structured_pruning import StructuredPruningConfig
from hfcompress.modeling.anatomy import (
    attention_blocks,
    base_model,
    embedding_paths,
    feed_forward_blocks,
    linear_layers,
    modules_by_role,
    modules_of,
    tied_to,
)
from hfcompress.modeling.architectures import architectures
from tests.tiny_models import CELLS, FAMILIES, HEADS, LAYERS, NEURONS, inputs_for, make, run


def unlisted() -> OPTForCausalLM:
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=61,
        hidden_size=64,
        num_hidden_layers=2,
        ffn_dim=128,
        num_attention_heads=4,
        max_position_embeddings=40,
        word_embed_proj_dim=64,
    )
    return OPTForCausalLM(config).eval()


@pytest.mark.parametrize(("family", "head"), CELLS)
def test_sizes_are_the_configs(family: str, head: str) -> None:
    model = make(family, head)
    attentions, blocks = attention_blocks(model), feed_forward_blocks(model)
    assert {block.heads for block in attentions} == {HEADS} == {block.stock_heads for block in attentions}
    assert all(block.neurons == block.stock_neurons for block in blocks)
    assert len({block.name for block in attentions}) == len(attentions)
    if family != "albert":
        assert len(attentions) >= len(blocks) >= LAYERS
    if family not in ("gpt2",):
        assert {block.neurons for block in blocks} <= {NEURONS, NEURONS + 8}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_role_is_linear_and_has_one_path(family: str) -> None:
    model = make(family)
    by_role = modules_by_role(model)
    paths = [path for found in by_role.values() for path in found]
    assert len(paths) == len(set(paths))
    assert set(paths) <= set(linear_layers(model))
    fused = {"gpt2": {"key", "value"}, "modernbert": {"key", "value"}}.get(family, set())
    assert {role for role, found in by_role.items() if not found} == fused
    assert modules_of(model, ("attention", "attention", "query")) == modules_of(model, ("attention",))


@pytest.mark.parametrize(("family", "head"), CELLS)
def test_heads_are_no_part_of_the_base(family: str, head: str) -> None:
    model = make(family, head)
    output = model.get_output_embeddings()
    found = linear_layers(model)
    assert output is None or all(module is not output for module in found.values())
    names = ("lm_head", "qa_outputs", "classifier", "classification_head", "projector", "proj_out")
    assert not [path for path in found if path.startswith(names)]


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_plain_lookups_or_shared(family: str) -> None:
    model = make(family, FAMILIES[family].heads[0])
    for path in embedding_paths(model):
        assert type(base_model(model).get_submodule(path)) is nn.Embedding or tied_to(model, path), path


def test_projections_of_positions_are_cut_where_there_are_any() -> None:
    roles = [role for role, _ in attention_blocks(make("deberta-v2-own"))[0].projections]
    assert roles == ["query", "key", "value", "query", "key"]
    assert len(attention_blocks(make("deberta-v2"))[0].projections) == 3


def test_an_encoder_alone_has_no_decoder() -> None:
    names = [block.name for block in attention_blocks(make("t5", "EncoderModel"))]
    assert len(names) == LAYERS
    assert all(name.startswith("encoder.") for name in names)


def test_ties_are_seen_both_ways() -> None:
    model = make("t5", "ConditionalGeneration")
    assert tied_to(model, "lm_head") == ["shared", "encoder.embed_tokens", "decoder.embed_tokens"]
    assert "lm_head" in tied_to(model, "shared")
    assert tied_to(model, "encoder.block.0.layer.0.SelfAttention.q") == []
    assert tied_to(make("gpt2"), "wte") == ["lm_head"]


def test_data_files_are_consistent() -> None:
    assert len(architectures()) >= 17
    for model_type, architecture in architectures().items():
        assert model_type in architecture.model_types
        assert architecture.stacks


def test_an_unlisted_family_is_told_what_is_listed_and_what_to_write() -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        attention_blocks(unlisted())
    assert all(name in caught.value.message for name in ("bert", "llama", "t5", "whisper", "'opt'"))
    assert "hfcompress/modeling/architectures/<family>.py" in caught.value.hint
    with pytest.raises(UnsupportedModelError):
        compress(unlisted(), [StructuredPruningConfig(heads=0.5)])
    with pytest.raises(UnsupportedModelError):
        compress(unlisted(), [LowRankConfig(keep=0.5)])


def test_the_head_of_an_unlisted_family_is_no_part_of_the_base() -> None:
    config = UMT5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=24, num_layers=1, num_heads=4)
    model = UMT5ForConditionalGeneration(config)
    assert base_model(model) is model
    assert "decoder.block.0.layer.0.SelfAttention.q" in linear_layers(model)
    assert "lm_head" not in linear_layers(model)


def test_linear_layers_of_an_unlisted_family_are_factorized(tmp_path: Path) -> None:
    model = compress(unlisted(), [LowRankConfig(targets=("linear",), keep=0.5)])
    inputs = inputs_for("gpt2")
    expected = run(model, inputs)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(map(torch.equal, run(again, inputs), expected))
    assert again.lm_head.weight is again.get_input_embeddings().weight
    again.save_pretrained(tmp_path / "again")
    third = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert all(map(torch.equal, run(third, inputs), expected))


@pytest.mark.slow
def test_linear_layers_of_an_unlisted_family_are_quantized(tmp_path: Path) -> None:
    model = compress(
        unlisted(),
        [
            LowRankConfig(targets=("linear",), keep=0.5),
            QuantizationConfig(weights="int8", embeddings=None),
        ],
    )
    expected = run(model, inputs_for("gpt2"))
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(map(torch.equal, run(again, inputs_for("gpt2")), expected))
