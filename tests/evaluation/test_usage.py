from __future__ import annotations

import pytest
import torch
from torch import nn

from hfcompress import QuantizationConfig, compress
from hfcompress.evaluation.cost import speed_inputs
from hfcompress.evaluation.usage import QUANTIZED, REST, count_operations, measure_usage, peak_memory, time_parts
from tests.workshop import tiny_classifier

BATCH, TOKENS, WIDTH, LAYERS, INNER = 2, 8, 64, 2, 96
INPUTS = speed_inputs(17, BATCH, TOKENS)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_operations_are_those_of_the_closed_form(attention: str) -> None:
    model = tiny_classifier(attn_implementation=attention)
    layer = 2 * BATCH * TOKENS * (4 * WIDTH**2 + 2 * WIDTH * INNER) + 4 * BATCH * TOKENS**2 * WIDTH
    head = 2 * BATCH * (WIDTH**2 + WIDTH * 2)  # pooler and classifier
    assert count_operations(model, INPUTS) == LAYERS * layer + head


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.filterwarnings("ignore")
def test_quantized_layers_have_the_operations_of_float_ones(kind: str) -> None:
    model = tiny_classifier()
    wanted = count_operations(model, INPUTS)
    compress(model, [QuantizationConfig(weights=kind, embeddings=None)])  # type: ignore[arg-type]
    before = model(**INPUTS).logits
    assert count_operations(model, INPUTS) == wanted
    assert torch.equal(model(**INPUTS).logits, before), "counting left something behind"
    parts = time_parts(model, INPUTS)
    assert parts[QUANTIZED] > 0 and parts[REST] > 0 and sum(parts.values()) == pytest.approx(1)


def test_memory_is_weights_and_what_is_alive_at_once() -> None:
    model = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 8, bias=False))

    class Taking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return self.inner(values)

    weights = (16 * 32 + 32 * 8) * 4
    # The widest moment holds the hidden values (4 x 32) and the outputs (4 x 8); the inputs were there before.
    assert peak_memory(Taking(), {"values": torch.ones(4, 16)}) == weights + 4 * (32 + 8) * 4


def test_usage_is_measured_on_what_is_loaded() -> None:
    loaded = []

    def load() -> nn.Module:
        loaded.append(tiny_classifier())
        return loaded[-1]

    usage = measure_usage(load, INPUTS)
    assert len(loaded) == 3 and usage.load_seconds > 0
    assert usage.operations == count_operations(loaded[0], INPUTS)
    assert usage.memory == peak_memory(loaded[0], INPUTS) > sum(p.numel() * 4 for p in loaded[0].parameters())
