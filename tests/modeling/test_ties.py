"""Compressed embedding tables that an output layer, or a second stack, reads as well."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForMaskedLM

from hfcompress import LowRankConfig, QuantizationConfig, compress
from hfcompress.errors import CheckpointError, CompressionError, ConfigError
from hfcompress.modeling.anatomy import base_model
from hfcompress.modeling.densify import densify
from hfcompress.modeling.integrity import verify_files
from hfcompress.modeling.layers.quantized_embedding import QuantizedEmbedding
from hfcompress.modeling.layers.tied import LowRankEmbedding, TiedLookup, TiedOutput
from hfcompress.modeling.measure import count_parameters
from hfcompress.modeling.ties import replace_table
from tests.modeling.compressed import edit_record
from tests.tiny_models import class_of, inputs_for, make, run

# Family, head, path of the table: an encoder, two decoders, and two families with three readers of one table.
CASES = [
    ("bert", "MaskedLM", "embeddings.word_embeddings"),
    ("gpt2", "LMHeadModel", "wte"),
    ("qwen3", "CausalLM", "embed_tokens"),
    ("t5", "ConditionalGeneration", "shared"),
    ("bart", "ConditionalGeneration", "shared"),
]
FACTORS = LowRankConfig(targets=(), embeddings=0.5, multiple_of=2)
KINDS: dict[str, list[Any]] = {
    "int8": [QuantizationConfig(weights=None, embeddings="int8")],
    "int4": [QuantizationConfig(weights=None, embeddings="int4", embedding_group_size=8)],
    "low rank": [FACTORS],
    "low rank, int8": [FACTORS, QuantizationConfig(weights=None, embeddings="int8")],
}
families = pytest.mark.parametrize(("family", "head", "path"), CASES, ids=[case[0] for case in CASES])


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def readers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, (TiedOutput, TiedLookup))]


@families
@pytest.mark.parametrize("kind", KINDS)
def test_saved_once_and_reloaded_as_it_was(kind: str, family: str, head: str, path: str, tmp_path: Path) -> None:
    model = compress(make(family, head), KINDS[kind])
    inputs = inputs_for(family, head)
    outputs = run(model, inputs)
    model.save_pretrained(tmp_path / "saved")
    assert verify_files(tmp_path / "saved") == []
    stored = load_file(tmp_path / "saved" / "model.safetensors")
    rows = [name for name, tensor in stored.items() if tensor.dim() == 2 and len(tensor) == 61 and "type" not in name]
    inside = {name for name in rows if f"{path}." in name}
    assert inside and set(rows) - inside == set()  # nothing else has one row a token
    again = class_of(family, head).from_pretrained(tmp_path / "saved", attn_implementation="eager")
    table = base_model(again).get_submodule(path)
    assert isinstance(table, LowRankEmbedding if "low rank" in kind else QuantizedEmbedding)
    assert readers(again) and all(reader.table is table for reader in readers(again))
    assert same(run(again, inputs), outputs)
    again.tie_weights()
    assert same(run(copy.deepcopy(again), inputs), outputs)
    again.save_pretrained(tmp_path / "again")
    assert {name: tensor.tolist() for name, tensor in load_file(tmp_path / "again" / "model.safetensors").items()} == {
        name: tensor.tolist() for name, tensor in stored.items()
    }


@families
def test_a_full_rank_changes_nothing(family: str, head: str, path: str) -> None:
    model = make(family, head)
    inputs = inputs_for(family, head)
    before = run(model, inputs)
    table: Any = base_model(model).get_submodule(path)
    up, sizes, right = torch.linalg.svd(table.weight.detach(), full_matrices=False)
    scale = float(getattr(table, "embed_scale", 1.0))
    replace_table(model, path, LowRankEmbedding.from_factors(up * sizes, right.T, scale=scale))
    for one, other in zip(run(model, inputs), before, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_scaled_table_stays_scaled() -> None:
    model = make("bart", "ConditionalGeneration", scale_embedding=True)
    inputs = inputs_for("bart", "ConditionalGeneration")
    before = run(model, inputs)
    compress(model, KINDS["int8"])
    for one, other in zip(run(model, inputs), before, strict=True):
        assert (one - other).abs().max() < 0.05 * other.abs().max()


def test_eight_bits_are_near_and_four_not_far() -> None:
    inputs = inputs_for("gpt2", "LMHeadModel")
    whole = run(make("gpt2", "LMHeadModel"), inputs)[0]
    for kind, most in (("int8", 0.02), ("int4", 0.2)):
        outputs = run(compress(make("gpt2", "LMHeadModel"), KINDS[kind]), inputs)[0]
        assert (outputs - whole).abs().max() < most * whole.abs().max()


def test_the_projection_is_the_product_with_the_table_it_looks_up() -> None:
    torch.manual_seed(0)
    embedding, hidden = nn.Embedding(9000, 16), torch.randn(2, 3, 16)
    for table in (
        QuantizedEmbedding.from_float(embedding, bits=8, group_size=16),
        QuantizedEmbedding.from_float(embedding, bits=4, group_size=8),
        LowRankEmbedding.from_factors(torch.randn(9000, 4), torch.randn(16, 4)),
    ):
        torch.testing.assert_close(table.project(hidden), hidden @ table(torch.arange(9000)).T, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(table.dense(), table(torch.arange(9000)))


def test_what_generates_generates_the_same(tmp_path: Path) -> None:
    model = compress(make("qwen3", "CausalLM"), KINDS["int8"])
    model.save_pretrained(tmp_path)
    again = class_of("qwen3", "CausalLM").from_pretrained(tmp_path, attn_implementation="eager")
    arguments = inputs_for("qwen3", "CausalLM") | {"max_new_tokens": 5, "do_sample": False}
    assert torch.equal(again.generate(**arguments), model.generate(**arguments))


def test_factors_learn_from_both_ends() -> None:
    model = compress(make("gpt2", "LMHeadModel"), [FACTORS])
    table: Any = model.transformer.wte
    model.train()(input_ids=torch.tensor([[7, 8, 9]]), labels=torch.tensor([[7, 8, 9]])).loss.backward()
    assert table.up.grad.abs().max() > 0
    assert table.table.weight.grad[20].abs().max() > 0  # a token that was never looked up, only scored


def test_factors_fitted_to_the_scores_are_nearer_to_them_than_plain_ones() -> None:
    inputs = inputs_for("gpt2", "LMHeadModel")
    model = make("gpt2", "LMHeadModel")
    with torch.no_grad():  # a few directions of what enters the output layer are much larger, as in trained models
        model.transformer.ln_f.weight[:4] *= 20
    whole = run(model, inputs)[0]
    errors = {}
    for method in ("svd", "whitened"):
        small: Any = copy.deepcopy(model)
        compress(small, [LowRankConfig(targets=(), embeddings=0.5, multiple_of=2, method=method)], calibration=[inputs])
        with torch.no_grad():
            scores = small.lm_head(model.transformer(**inputs).last_hidden_state)
        errors[method] = float((scores - whole).square().mean())
    assert errors["whitened"] < 0.5 * errors["svd"]


def test_it_has_fewer_numbers_and_bytes(tmp_path: Path) -> None:
    whole = make("bert", "MaskedLM")
    small = compress(make("bert", "MaskedLM"), [FACTORS])
    rank = small.bert.embeddings.word_embeddings.rank  # type: ignore[union-attr]
    assert count_parameters(whole) - count_parameters(small) == 61 * 32 - rank * (61 + 32)
    assert rank * (61 + 32) <= 61 * 32 * 0.5
    eight = compress(make("bert", "MaskedLM"), KINDS["int8"])
    assert count_parameters(eight) == count_parameters(whole)


def test_a_compressed_backbone_takes_a_tied_head(tmp_path: Path) -> None:
    model = compress(make("bert", "SequenceClassification"), KINDS["low rank, int8"])
    model.save_pretrained(tmp_path)
    other = AutoModelForMaskedLM.from_pretrained(tmp_path)
    head: Any = other.get_output_embeddings()
    assert isinstance(head, TiedOutput) and head.table is other.get_input_embeddings()
    assert head.bias is other.cls.predictions.bias  # a tie of its own, which stays


def test_densify_brings_the_stock_tie_back(tmp_path: Path) -> None:
    model = compress(make("gpt2", "LMHeadModel"), KINDS["low rank, int8"])
    model.save_pretrained(tmp_path / "small")
    densify(tmp_path / "small", tmp_path / "stock")
    stock = class_of("gpt2", "LMHeadModel").from_pretrained(tmp_path / "stock", attn_implementation="eager")
    assert stock.lm_head.weight is stock.transformer.wte.weight  # type: ignore[union-attr]
    inputs = inputs_for("gpt2", "LMHeadModel")
    for one, other in zip(run(stock, inputs), run(model, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_without_hfcompress_it_does_not_load(tmp_path: Path) -> None:
    for kind in ("int8", "low rank"):
        compress(make("gpt2", "LMHeadModel"), KINDS[kind]).save_pretrained(tmp_path / kind)
    code = """
import sys
from transformers import AutoModel, AutoModelForCausalLM
for folder in sys.argv[1:]:
    for cls in (AutoModel, AutoModelForCausalLM):
        try:
            cls.from_pretrained(folder)
        except RuntimeError:
            print("refused")
"""
    folders = [str(tmp_path / kind) for kind in ("int8", "low rank")]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused"] * 4


def test_a_tie_that_the_class_does_not_know_is_refused() -> None:
    model = make("gpt2", "LMHeadModel")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    for config in (FACTORS, QuantizationConfig(weights="int8", embeddings="int8")):
        with pytest.raises(CompressionError, match="wte is tied to nothing, its class ties it to lm_head"):
            compress(model, [config])
    assert not readers(model) and type(model.transformer.wte) is nn.Embedding


@pytest.mark.parametrize("rank", [0, -1, 33, True, "8", 8.0])
def test_the_record_is_bounded(rank: Any, tmp_path: Path) -> None:
    compress(make("bert", "MaskedLM"), [FACTORS]).save_pretrained(tmp_path)
    edit_record(tmp_path, structure={"low_rank_embeddings": {"embeddings.word_embeddings": rank}})
    with pytest.raises(CheckpointError):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(ConfigError, match="targets must name a role"):
        LowRankConfig(targets=())
    with pytest.raises(CompressionError, match="not a table of tokens"):
        compress(make("vit"), [FACTORS])
    quantized = compress(make("gpt2", "LMHeadModel"), KINDS["int8"])
    with pytest.raises(CompressionError, match=r"quantized already"):
        compress(quantized, [FACTORS])
