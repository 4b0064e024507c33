from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

from hfcompress import QuantizationConfig, compress
from hfcompress.errors import CompressionError
from hfcompress.modeling.checkpoint import commit, needs_plugin, save
from hfcompress.modeling.integrity import verify_files
from hfcompress.modeling.layers.bitsandbytes import KINDS, dequantize, kind_of, quantize_linear, settle, settle_all
from tests.modeling.compressed import load, outputs
from tests.workshop import tiny_classifier

FOUR_BIT = [kind for kind in KINDS if kind != "int8"]


def has_the_kernel() -> bool:
    from bitsandbytes.nn.modules import has_avx512bf16

    return bool(has_avx512bf16())


needs_the_kernel = pytest.mark.skipif(
    not has_the_kernel(), reason="the fault is in a kernel for AVX512-BF16, which this CPU has not"
)


def unsettle(module: nn.Module) -> None:
    """Makes a layer what transformers alone would have loaded."""
    import bitsandbytes

    module.__class__ = bitsandbytes.nn.Linear4bit
    vars(module)["support_avx512bf16_for_cpu"] = True


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "outs"), [(64, 32), (100, 32), (128, 2), (7, 5), (1, 1)])
def test_any_width_runs_and_is_unchanged_by_it(kind: Any, inputs: int, outs: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outs)
    module = quantize_linear(linear, kind).eval()
    assert kind_of(module) == kind
    before = state_of(module)
    x = torch.randn(3, inputs)
    with torch.no_grad():
        y = module(x)
        assert y.shape == (3, outs)
        assert torch.allclose(y, linear(x), atol=0.7)
    assert_same(state_of(module), before)
    with torch.no_grad():
        assert torch.equal(module(x), y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("inputs", "outs"), [(64, 32), (48, 64), (160, 384), (7, 5)])
def test_dequantized_weights_are_those_that_forward_uses(kind: Any, inputs: int, outs: int) -> None:
    torch.manual_seed(0)
    module = quantize_linear(nn.Linear(inputs, outs), kind).eval()
    with torch.no_grad():
        columns = module(torch.eye(inputs)) - module.bias
    # int8 layers round their inputs as well, and compute in float16.
    atol = 2e-3 if kind == "int8" else 1e-6
    assert torch.allclose(dequantize(module), columns.T, atol=atol)


def test_without_the_cure_scales_are_mixed_up_where_blocks_run_across_rows() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(48, 64)
    module = quantize_linear(linear, "nf4").train()
    x = torch.randn(3, 48, requires_grad=True)
    right = module(x)
    unsettle(module)
    wrong = module(x)
    assert (wrong - right).abs().max() > 1e-3
    assert (right - linear(x)).abs().mean() < (wrong - linear(x)).abs().mean()


@needs_the_kernel
def test_without_the_cure_odd_widths_crash_and_a_forward_changes_what_is_saved() -> None:
    torch.manual_seed(0)
    odd = quantize_linear(nn.Linear(100, 32), "nf4").eval()
    unsettle(odd)
    with pytest.raises(RuntimeError), torch.no_grad():
        odd(torch.randn(3, 100))
    module = quantize_linear(nn.Linear(128, 64), "nf4").eval()
    before = state_of(module)
    unsettle(module)
    with torch.no_grad():
        module(torch.randn(3, 128))
    with pytest.raises(AssertionError, match="absmax"):
        assert_same(state_of(module), before)


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-double"])
def test_saving_after_a_forward_is_bit_equal(kind: Any, tmp_path: Path) -> None:
    model = compress(tiny_classifier(intermediate_size=100), [QuantizationConfig(weights=kind, embeddings="int8")])
    save(model, tmp_path / "before")
    wanted = outputs(model)
    save(model, tmp_path / "after")
    again = load(tmp_path / "before")
    assert torch.equal(outputs(again), wanted)
    again.save_pretrained(tmp_path / "again")
    for name in ("after", "again"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == (
            tmp_path / "before" / "model.safetensors"
        ).read_bytes()
    assert torch.equal(outputs(again), wanted)


@pytest.mark.parametrize("kind", ["int8", "nf4", "nf4-double"])
def test_bitsandbytes_alone_is_a_stock_checkpoint(kind: Any, tmp_path: Path) -> None:
    model = compress(tiny_classifier(intermediate_size=128), [QuantizationConfig(weights=kind, embeddings=None)])
    assert not needs_plugin(model)
    model.save_pretrained(tmp_path / "1")
    assert verify_files(tmp_path / "1") == []
    loaded = load(tmp_path / "1")
    settle_all(loaded)
    assert torch.equal(outputs(loaded), outputs(model))
    code = f"""
import sys
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "1")!r})
assert model.is_quantized and "hfcompress" not in sys.modules
"""
    if kind == "nf4":
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_stock_checkpoint_that_was_loaded_is_saved_again(tmp_path: Path) -> None:
    model = compress(tiny_classifier(intermediate_size=128), [QuantizationConfig(weights="nf4", embeddings=None)])
    model.save_pretrained(tmp_path / "1")
    loaded = load(tmp_path / "1")
    with pytest.raises(NotImplementedError):  # transformers alone cannot
        loaded.save_pretrained(tmp_path / "2")
    settle_all(loaded)
    outputs(loaded)
    save(loaded, tmp_path / "2")
    again = load(tmp_path / "2")
    settle_all(again)
    assert torch.equal(outputs(again), outputs(loaded))
    commit(loaded)
    loaded.save_pretrained(tmp_path / "3")  # committed, its plain save does it too
    assert verify_files(tmp_path / "3") == []


@needs_the_kernel
def test_a_loaded_model_whose_weights_were_repacked_is_not_saved(tmp_path: Path) -> None:
    model = compress(tiny_classifier(intermediate_size=128), [QuantizationConfig(weights="nf4", embeddings=None)])
    for module in model.modules():
        if kind_of(module):
            unsettle(module)
    outputs(model)
    with pytest.raises(CompressionError, match=r"encoder.layer.0.*repacked"):
        save(model, tmp_path / "1")
    assert not (tmp_path / "1").exists()


def test_settling_a_model_that_transformers_quantized(tmp_path: Path) -> None:
    tiny_classifier(intermediate_size=128).save_pretrained(tmp_path / "float")
    stock = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "float",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["classifier"]
        ),
    )
    settle_all(stock)
    before = state_of(stock)
    wanted = outputs(stock)
    assert_same(state_of(stock), before)
    save(stock, tmp_path / "1")
    again = load(tmp_path / "1")
    settle_all(again)
    assert torch.equal(outputs(again), wanted)


def test_widths_that_stock_gets_wrong_need_hfcompress(tmp_path: Path) -> None:
    model = compress(tiny_classifier(intermediate_size=96), [QuantizationConfig(weights="nf4", embeddings=None)])
    assert needs_plugin(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(load(tmp_path)), outputs(model))


def test_settling_other_modules_does_nothing() -> None:
    linear = nn.Linear(2, 2)
    assert settle(linear) is linear
    assert "support_avx512bf16_for_cpu" not in vars(linear)
    assert kind_of(linear) is None
