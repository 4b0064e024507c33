"""How loss and metrics went while a step trained, from what its Trainer logged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hfcompress.evaluation.records import STRICT, Count, Figure

# What Trainer puts before the names of what it evaluates, and trackers draw in a group of its own.
EVALUATED = "eval_"
_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One value over the steps of a training.

    Attributes:
        name: `loss`, `loss_<term>` for a term that a method added, or a metric.
        steps: The optimizer steps done at each point.
        values: The value at each; a loss is the mean since the point before, and NaN where it was not finite.
    """

    __pydantic_config__ = STRICT

    name: str
    steps: tuple[Count, ...]
    values: tuple[Figure, ...]


@dataclass(frozen=True, kw_only=True)
class Training:
    """What was seen while one step trained.

    Attributes:
        losses: The whole loss, then its terms.
        metrics: The task's metrics on the first `examples` rows of the evaluation split; empty where they were
            not measured.
        examples: Those rows; 0 where none were measured.
    """

    __pydantic_config__ = STRICT

    losses: tuple[Curve, ...]
    metrics: tuple[Curve, ...]
    examples: Count

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> Training:
        """Returns what `dataclasses.asdict` took apart, even where JSON made lists of its tuples."""

        def curves(values: Sequence[Mapping[str, Any]]) -> tuple[Curve, ...]:
            return tuple(
                Curve(name=each["name"], steps=tuple(each["steps"]), values=tuple(_finite(v) for v in each["values"]))
                for each in values
            )

        return cls(losses=curves(record["losses"]), metrics=curves(record["metrics"]), examples=int(record["examples"]))


def training_of(log: Sequence[Mapping[str, Any]], examples: int) -> Training:
    """Reads curves out of a Trainer's log history.

    Args:
        log: `trainer.state.log_history`; a resumed training's holds what was logged before it was cut off.
        examples: How many rows the metrics were measured on.
    """
    points: dict[str, dict[int, float]] = {}
    for entry in log:
        for name, value in entry.items():
            if name == "loss" or name.startswith(("loss_", EVALUATED)):
                points.setdefault(name, {})[int(entry["step"])] = _finite(value)
    losses, metrics = [], []
    for name, values in points.items():
        kind = metrics if name.startswith(EVALUATED) else losses
        curve = Curve(name=name.removeprefix(EVALUATED), steps=tuple(values), values=tuple(values.values()))
        kind.append(curve)
    return Training(losses=tuple(losses), metrics=tuple(metrics), examples=examples if metrics else 0)


def _finite(value: float | None) -> float:
    number = math.nan if value is None else float(value)
    return float(f"{number:.{_DIGITS}g}") if math.isfinite(number) else math.nan
