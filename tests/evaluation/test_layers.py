"""What is counted and timed of single layers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hfcompress.evaluation.cost import speed_inputs
from hfcompress.evaluation.layers import LayerCost, count_layers, measure_layers
from hfcompress.evaluation.usage import count_operations
from hfcompress.methods.low_rank import LowRankConfig
from hfcompress.methods.registry import Context, method_of
from hfcompress.modeling.layers.bitsandbytes import quantize_linear
from tests.workshop import tiny_classifier

INPUTS = speed_inputs(17, 2, 8)
ROWS = 16


def test_layers_of_two_models_are_matched_counted_and_timed() -> None:
    original = tiny_classifier()
    compressed = copy.deepcopy(original)
    method = method_of(LowRankConfig(targets=("ffn",), keep=0.5))
    assert method.apply is not None
    method.apply(compressed, LowRankConfig(targets=("ffn",), keep=0.5), Context())
    attention = compressed.bert.encoder.layer[1].attention.self
    attention.query = quantize_linear(attention.query, "int8")
    found = {each.path: each for each in measure_layers(original, compressed, INPUTS)}
    assert len(found) == 14 and next(iter(found)) == "bert.encoder.layer.0.attention.self.query"
    up = found["bert.encoder.layer.0.intermediate.dense"]
    rank = int(up.kind.removeprefix("rank "))
    assert up.original_shape == up.shape == (96, 64)
    assert (up.original_operations, up.operations) == (2 * ROWS * 96 * 64, 2 * ROWS * rank * (96 + 64))
    assert up.promised == up.original_operations / up.operations
    assert found["bert.encoder.layer.1.attention.self.query"].kind == "int8"
    assert found["bert.encoder.layer.0.attention.self.key"].kind == "linear"
    assert found["classifier"].original_operations == 2 * 2 * 2 * 64, "it reads one token of each row"
    assert all(each.seconds > 0 and each.original_seconds > 0 for each in found.values())
    counted = count_layers(compressed, INPUTS)
    assert {path: tuple(each) for path, each in counted.items()} == {
        each.path: (each.kind, each.shape, each.operations) for each in found.values()
    }
    attended = count_operations(compressed, INPUTS) - sum(each.operations for each in counted.values())
    assert attended == 2 * 2 * (2 * 2 * 4 * 8 * 8 * 16), "what is left are the products of two layers' attention"


def cost(**changes: object) -> LayerCost:
    values = {
        "path": "a",
        "kind": "linear",
        "original_shape": (8, 8),
        "shape": (4, 8),
        "original_operations": 100,
        "operations": 50,
        "original_seconds": 2.0,
        "seconds": 1.0,
        "reason": "",
    }
    return LayerCost(**(values | changes))  # type: ignore[arg-type]


def test_a_record_is_read_as_it_was() -> None:
    known = cost()
    assert LayerCost.of_record({**vars(known), "shape": [4, 8], "original_shape": [8, 8]}) == known
    assert (known.promised, known.gained) == (2.0, 2.0)


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(layer(x).sum() for layer in self.layers)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (nn.Linear(512, 2000), "odd width" if 2000 % 16 else "other"),
        (nn.Linear(512, 1001), "odd width"),
        (nn.Linear(512, 16), "small matrix"),
        (nn.Linear(512, 2048), "not compressed"),
        (quantize_linear(nn.Linear(512, 2048), "int8"), "dequantization"),
    ],
)
def test_what_keeps_no_promise_is_told_why(now: nn.Module, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfcompress.evaluation import layers

    before = nn.Linear(512, 2048)
    inputs = {"x": torch.randn(8 if reason == "small matrix" else 64, 512)}
    # How fast this machine is is no matter here: no layer gains enough.
    monkeypatch.setattr(layers, "_ENOUGH", 1e9)
    (found,) = measure_layers(Stack(before), Stack(now), inputs)
    assert found.reason == reason
    monkeypatch.setattr(layers, "_ENOUGH", 0.0)
    (found,) = measure_layers(Stack(before), Stack(now), inputs)
    assert found.reason == ""
