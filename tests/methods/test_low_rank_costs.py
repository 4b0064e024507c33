"""Budgets of parameters, bytes, multiply-adds and time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hfcompress import LowRankConfig
from hfcompress.methods.low_rank import low_rank
from hfcompress.methods.low_rank.costs import costs_of
from hfcompress.methods.low_rank.ranks import Curve, allocate, size_of
from hfcompress.methods.registry import Context
from hfcompress.modeling.anatomy import base_model, input_width, modules_of, output_width
from tests.workshop import batches, tiny_classifier

SHAPES = {"a": (16, 12), "b": (16, 12)}


def flat(steep: float = 1.0) -> Curve:
    return Curve(16, 12, steep * torch.linspace(12, 1, 12, dtype=torch.float64), pivoted=True)


def layers_of(model: Any, *targets: str) -> dict[str, tuple[int, int]]:
    base = base_model(model)
    found = {path: base.get_submodule(path) for path in modules_of(model, targets)}
    return {path: (output_width(each), input_width(each)) for path, each in found.items()}


def test_a_layer_that_costs_more_gets_the_lower_rank() -> None:
    costs = {"a": lambda rank: 10.0 * (192 if rank is None else size_of(16, 12, rank, True))}
    costs["b"] = lambda rank: 1.0 * (192 if rank is None else size_of(16, 12, rank, True))
    even, uneven = allocate({"a": flat(), "b": flat()}, 0.7, 1), allocate({"a": flat(), "b": flat()}, 0.7, 1, costs)
    assert (uneven["a"] or 12) < (even["a"] or 12) + 1
    assert (uneven["b"] or 12) > (even["b"] or 12) - 1
    assert uneven != even
    assert sum(costs[path](rank) for path, rank in uneven.items()) <= 0.7 * 11 * 192


def test_a_rank_that_costs_no_less_is_no_choice() -> None:
    """Steps, as time has them: of the ranks on one step only the highest is a choice."""
    options = flat().options(1, lambda rank: 5.0 if rank is None else float(rank // 3))
    assert [rank for _, _, rank in options] == [2, 5, 8, 11, None]
    slow = flat().options(1, lambda rank: 5.0 if rank is None else 7.0)
    assert slow == [(5.0, 0.0, None)]


@pytest.mark.parametrize("pivoted", [False, True])
def test_bytes_and_flops_are_counted(pivoted: bool) -> None:
    model, batch = tiny_classifier(), batches(1)[0]
    layers = layers_of(model, "linear")
    positions = batch["input_ids"].numel()
    path = "encoder.layer.0.intermediate.dense"
    for measure, unit in (("parameters", 1), ("bytes", 4), ("flops", positions)):
        cost = costs_of(model, layers, measure, batch, pivoted=pivoted)[path]  # type: ignore[arg-type]
        places = 8 * 96 if pivoted and measure == "bytes" else 0
        assert cost(None) == unit * 64 * 96
        assert cost(5) == unit * size_of(96, 64, 5, pivoted) + places
    pooler = costs_of(model, layers, "flops", batch, pivoted=pivoted)["pooler.dense"]
    assert pooler(None) == len(batch["input_ids"]) * 64 * 64


@pytest.mark.parametrize("measure", ["bytes", "flops"])
def test_a_budget_is_kept_in_its_own_unit(measure: Any) -> None:
    model, data = tiny_classifier(), batches(2)
    layers = layers_of(model, "ffn")
    config = LowRankConfig(targets=("ffn",), budget=0.7, budget_of=measure, pivoted=True)
    costs = costs_of(model, layers, measure, data[0], pivoted=True)
    found = low_rank(model, config, Context(calibration=data))
    assert set(found["ranks"]) | set(found["left_whole"]) == set(layers)
    kept = sum(costs[path](found["ranks"].get(path)) for path in layers)
    assert kept <= 0.7 * sum(cost(None) for cost in costs.values())


def test_time_is_measured_for_each_shape_once() -> None:
    model = tiny_classifier()
    costs = costs_of(model, layers_of(model, "ffn"), "latency", batches(1)[0], pivoted=False)
    same = [costs[f"encoder.layer.{index}.intermediate.dense"] for index in range(2)]
    assert same[0] is same[1]
    assert all(cost(None) > 0 and cost(8) > 0 for cost in costs.values())


def test_a_budget_of_time_is_shared_out() -> None:
    """Layers wide enough to take less time with a fifth of their parameters."""
    model, data = tiny_classifier(hidden_size=256, intermediate_size=2048), batches(1)
    config = LowRankConfig(targets=("ffn",), budget=0.9, budget_of="latency")
    assert low_rank(model, config, Context(calibration=data))["ranks"]
