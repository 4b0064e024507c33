from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hfcompress import QuantizationConfig, compress
from hfcompress.errors import CheckpointError, RunFolderError
from hfcompress.modeling.anatomy import base_model
from hfcompress.modeling.checkpoint import commit, save
from hfcompress.modeling.densify import densify, stock_twin
from hfcompress.modeling.integrity import verify_files
from tests import tiny_models
from tests.modeling.compressed import KINDS, LOW_RANK, edit_config, load, make, outputs
from tests.modeling.test_families import uneven
from tests.workshop import batches, tiny_tokenizer


def close(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.allclose(a, b, atol=2e-5, rtol=1e-4) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_the_twin_computes_the_same(family: str) -> None:
    model = tiny_models.make(family)
    inputs = tiny_models.inputs_for(family)
    uneven(model, by="pruning")
    compress(model, [LOW_RANK.model_copy(update={"targets": ("linear",), "method": "svd"})])
    twin = stock_twin(model)
    assert type(twin) is type(model)
    assert not hasattr(twin.config, "quantization_config")
    stock = type(model)(twin.config)
    assert {n: t.shape for n, t in twin.state_dict().items()} == {n: t.shape for n, t in stock.state_dict().items()}
    stock.load_state_dict(twin.state_dict())  # with what is computed, not stored
    stock.eval()
    assert close(tiny_models.run(model, inputs), tiny_models.run(stock, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights_become_floats(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    save(model, tmp_path / "compressed", tokenizer=tiny_tokenizer())
    densify(tmp_path / "compressed", tmp_path / "dense")
    assert verify_files(tmp_path / "dense") == []
    assert (tmp_path / "dense" / "tokenizer.json").is_file()
    dense = load(tmp_path / "dense")
    assert dense.config.num_attention_heads == 4 and dense.config.intermediate_size == 96
    # int8 layers of bitsandbytes also round their inputs; nothing else may differ.
    atol = 0.02 if "int8" in kind or kind == "nf4" else 1e-5
    assert torch.allclose(outputs(dense), outputs(load(tmp_path / "compressed")), atol=atol)


def test_dense_checkpoints_load_without_hfcompress(tmp_path: Path) -> None:
    for kind in ("pruned", "everything"):
        model = make(kind)
        save(model, tmp_path / kind)
        densify(tmp_path / kind, tmp_path / "dense" / kind)
        batch = batches(labels=False)[0]
        torch.save((batch, outputs(model)), tmp_path / "dense" / kind / "expected.pt")
    code = """
import sys, torch
from transformers import AutoModelForSequenceClassification
for folder in sys.argv[1:]:
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    batch, expected = torch.load(f"{folder}/expected.pt")
    with torch.no_grad():
        assert torch.allclose(model(**batch).logits, expected, atol=1e-5)
assert not any(name.split(".")[0] == "hfcompress" for name in sys.modules)
"""
    folders = [str(tmp_path / "dense" / kind) for kind in ("pruned", "everything")]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kept_heads_go_back_to_their_own_places() -> None:
    model = tiny_models.make("mpnet")
    inputs = tiny_models.inputs_for("mpnet")
    uneven(model, by="pruning")
    commit(model)
    attention = next(module for module in model.modules() if hasattr(module, "kept_heads"))
    kept: Any = attention.kept_heads
    with torch.no_grad():  # a bias that matters
        base_model(model).encoder.relative_attention_bias.weight.normal_()
    wanted = tiny_models.run(model, inputs)
    assert close(tiny_models.run(stock_twin_with_buffers(model), inputs), wanted)
    attention.kept_heads = torch.tensor([place for place in range(4) if place not in kept.tolist()][: len(kept)])
    wrong = stock_twin_with_buffers(model)  # the same weights in other places
    assert not close(tiny_models.run(wrong, inputs), wanted)


def stock_twin_with_buffers(model: Any) -> Any:
    twin = stock_twin(model)
    stock = type(model)(twin.config)
    stock.load_state_dict(twin.state_dict())
    return stock.eval()


def test_a_tie_stays(tmp_path: Path) -> None:
    model = tiny_models.make("gpt2", "CausalLM" if "CausalLM" in tiny_models.FAMILIES["gpt2"].heads else None)
    compress(model, [LOW_RANK])
    model.save_pretrained(tmp_path / "1")
    densify(tmp_path / "1", tmp_path / "2")
    again = type(model).from_pretrained(tmp_path / "2")
    if again.get_output_embeddings() is not None:
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_bitsandbytes_alone_becomes_float(tmp_path: Path) -> None:
    model = compress(make("pruned"), [QuantizationConfig(weights="nf4", embeddings=None)])
    model.save_pretrained(tmp_path / "1")
    densify(tmp_path / "1", tmp_path / "2")
    assert "quantization_config" not in json.loads((tmp_path / "2" / "config.json").read_text())
    assert torch.allclose(outputs(load(tmp_path / "2")), outputs(model), atol=1e-5)


def test_what_cannot_be_written_or_read_is_refused(tmp_path: Path) -> None:
    make("pruned").save_pretrained(tmp_path / "1")
    with pytest.raises(RunFolderError, match="not empty"):
        densify(tmp_path / "1", tmp_path / "1")
    edit_config(tmp_path / "1", architectures=["os"])
    with pytest.raises(CheckpointError, match="names no model class"):
        densify(tmp_path / "1", tmp_path / "2")
    assert not (tmp_path / "2").exists()
