from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import nn
from transformers import AutoModelForSequenceClassification

from hfcompress import LowRankConfig, QuantizationConfig, StructuredPruningConfig, compress
from hfcompress.errors import MissingBackendError
from hfcompress.modeling.layers.bitsandbytes import kind_of
from hfcompress.modeling.layers.torchao import TORCHAO_KINDS, TorchAOKind, TorchAOLinear
from tests.workshop import batches, logits, tiny_classifier

torchao = pytest.importorskip("torchao.quantization", reason="scripts/test.sh runs these with torchao beside .venv")

CONFIGS = {
    "torchao-int8": torchao.Int8WeightOnlyConfig,
    "torchao-int8-dynamic": torchao.Int8DynamicActivationInt8WeightConfig,
}


def linear(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(33, 17, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", TORCHAO_KINDS)
def test_a_layer_computes_what_torchaos_own_does(kind: TorchAOKind, dtype: torch.dtype) -> None:
    layer, data = linear(dtype), torch.randn(2, 5, 33, dtype=dtype)
    ours = TorchAOLinear.from_float(layer, kind)
    theirs = nn.Sequential(layer)
    torchao.quantize_(theirs, CONFIGS[kind]())
    with torch.no_grad():
        assert torch.equal(ours(data), theirs(data))
    assert torch.equal(ours.dense(), theirs[0].weight.dequantize())
    assert {name: tensor.dtype for name, tensor in ours.state_dict().items()} == {
        "qdata": torch.int8,
        "scale": torch.float32,
        "weight": dtype,
        "bias": dtype,
    }


@pytest.mark.parametrize("kind", TORCHAO_KINDS)
def test_gradients_reach_what_lies_before_the_layer(kind: TorchAOKind) -> None:
    layer = TorchAOLinear.from_float(linear(), kind)
    data = torch.randn(4, 33, requires_grad=True)
    outputs = layer(data)
    with torch.no_grad():
        torch.testing.assert_close(outputs, layer(data))
    outputs.sum().backward()
    torch.testing.assert_close(data.grad, layer.dense().sum(0).expand(4, -1))


def test_a_copy_has_weights_of_its_own() -> None:
    layer, data = TorchAOLinear.from_float(linear(), "torchao-int8"), torch.randn(2, 33)
    before = layer(data)
    other = copy.deepcopy(layer)
    other.qdata.zero_()
    assert torch.equal(layer(data), before) and torch.equal(other(data), other.bias.expand(2, -1))


@pytest.mark.parametrize("kind", TORCHAO_KINDS)
def test_a_pruned_and_factorised_model_reloads_and_is_saved_again(kind: TorchAOKind, tmp_path) -> None:
    data = batches(1)[0]
    steps = [
        StructuredPruningConfig(heads=0.5, neurons=0.4, multiple_of=2),
        LowRankConfig(keep=0.5, method="svd", targets=("ffn",), multiple_of=2),
        QuantizationConfig(weights=kind, embeddings="int8"),
    ]
    model = compress(tiny_classifier(), steps)
    before = logits(model, data)
    for place in ("once", "twice"):
        model.save_pretrained(tmp_path / place)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path / place)
        assert kind_of(model.bert.encoder.layer[0].attention.self.query) == kind
        assert torch.equal(logits(model, data), before)
    once, twice = ((tmp_path / place / "model.safetensors").read_bytes() for place in ("once", "twice"))
    assert once == twice


def test_engines_share_one_checkpoint(tmp_path) -> None:
    data = batches(1)[0]
    model = compress(tiny_classifier(), [QuantizationConfig(weights="nf4", ffn="torchao-int8", embeddings=None)])
    before = logits(model, data)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path), data), before)


def test_without_torchao_the_error_says_what_to_install(tmp_path, monkeypatch) -> None:
    compress(tiny_classifier(), [QuantizationConfig(weights="torchao-int8")]).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    for make in (
        lambda: AutoModelForSequenceClassification.from_pretrained(tmp_path),
        lambda: compress(tiny_classifier(), [QuantizationConfig(weights="torchao-int8")]),
    ):
        with pytest.raises(MissingBackendError, match=r"hfcompress\[torchao\]"):
            make()
