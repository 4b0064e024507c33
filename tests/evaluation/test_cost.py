"""Speed: medians of turns, and an interval that means something."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hfcompress.errors import ConfigError
from hfcompress.evaluation import measure_speed
from hfcompress.evaluation.cost import _ratio_of_medians, measure_grid

INPUTS = {"input_ids": torch.zeros(4, 16, dtype=torch.long)}


class Sleeper(nn.Module):
    """Takes a known time and writes down its turns."""

    def __init__(self, name: str, seconds: float, turns: list[str]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.name, self.seconds, self.turns = name, seconds, turns

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        assert not self.training
        assert torch.is_inference_mode_enabled()
        self.turns.append(self.name)
        time.sleep(self.seconds)
        return self.weight


def test_the_ratio_is_original_over_compressed() -> None:
    turns: list[str] = []
    original, compressed = Sleeper("A", 0.02, turns), Sleeper("B", 0.01, turns)
    speed = measure_speed(original, compressed, INPUTS, repeats=6)
    assert speed.low <= speed.ratio <= speed.high
    # No pass is shorter than it sleeps; how much longer it is, a busy machine decides.
    assert speed.original_seconds >= 0.02 and speed.compressed_seconds >= 0.01
    assert speed.ratio == pytest.approx(speed.original_seconds / speed.compressed_seconds)
    assert (speed.batch_size, speed.sequence_length, speed.repeats) == (4, 16, 6)
    assert speed.threads == torch.get_num_threads()
    assert "".join(turns[6:]) == "ABBAABBAABBA"
    assert original.training
    assert compressed.training


def test_a_real_model_is_timed_beside_itself(model: Any) -> None:
    inputs = {name: torch.ones(2, 16, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    speed = measure_speed(model, model, inputs, repeats=15)
    assert speed.original_seconds > 0 and speed.compressed_seconds > 0
    assert speed.low <= speed.ratio <= speed.high


def test_the_interval_is_narrow_when_times_agree_and_wide_when_not() -> None:
    steady = np.tile([2.0, 1.0], (20, 1))
    assert _ratio_of_medians(steady) == (2.0, 2.0, 2.0)
    noisy = steady * np.random.default_rng(1).uniform(0.5, 1.5, size=(20, 2))
    ratio, low, high = _ratio_of_medians(noisy)
    assert low < ratio < high
    assert high - low > 0.3


def test_the_interval_is_the_same_every_time() -> None:
    times = np.random.default_rng(2).uniform(1, 2, size=(20, 2))
    assert _ratio_of_medians(times) == _ratio_of_medians(times)


def test_a_grid_times_both_models_at_every_place() -> None:
    order: list[str] = []
    slow, fast = Sleeper("A", 0.01, order), Sleeper("B", 0.0, order)

    def inputs(batch_size: int, length: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(batch_size, length, dtype=torch.long)}

    grid = measure_grid(slow, fast, inputs, batch_sizes=(1, 4), sequence_lengths=(8, 16), repeats=3)
    assert [(each.batch_size, each.sequence_length) for each in grid] == [(1, 8), (1, 16), (4, 8), (4, 16)]
    assert all(each.repeats == 3 and each.ratio > 1 for each in grid)
    assert order.count("A") == order.count("B") == 4 * 6
    assert measure_grid(slow, fast, inputs, batch_sizes=(), sequence_lengths=(8,)) == ()


def test_a_slow_machine_slows_both_and_does_not_widen_the_interval() -> None:
    weather = np.random.default_rng(3).uniform(1, 10, size=(21, 1))
    assert _ratio_of_medians(weather * np.array([[3.0, 1.0]])) == pytest.approx((3.0, 3.0, 3.0))


@pytest.mark.parametrize(
    ("inputs", "repeats", "said"),
    [
        (INPUTS, 2, "repeats: must be at least 3, not 2"),
        ({}, 5, "inputs: must hold 'input_ids'"),
        ({"input_ids": torch.zeros(4)}, 5, "of two dimensions"),
    ],
)
def test_what_cannot_be_measured_is_refused(inputs: dict[str, torch.Tensor], repeats: int, said: str) -> None:
    model = Sleeper("A", 0, [])
    with pytest.raises(ConfigError, match=said):
        measure_speed(model, model, inputs, repeats=repeats)
