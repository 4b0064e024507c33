"""What several seeds come to: how far a figure moves when nothing but chance is changed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from hfcompress.errors import DataError
from hfcompress.evaluation.comparison import Answers, Difference
from hfcompress.evaluation.metrics import answered, retention
from hfcompress.evaluation.quality import score_task
from hfcompress.evaluation.records import STRICT, Figure
from hfcompress.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Spread:
    """One figure with every seed.

    Attributes:
        values: In the order of the seeds.
        mean: Their mean; NaN where one is undefined.
        deviation: Their standard deviation (n - 1); NaN of fewer than two.
    """

    __pydantic_config__ = STRICT

    values: tuple[Figure, ...]
    mean: Figure
    deviation: Figure

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Returns the spread of values."""
        mean = math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        deviation = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else math.nan
        return cls(values=tuple(values), mean=mean, deviation=deviation)


@dataclass(frozen=True, kw_only=True)
class SeededRow:
    """One step, done with every seed.

    Attributes:
        name: The step.
        metrics: By metric.
        retention: Of the first metric, each against the original of the same seed.
        differences: By metric the mean change against the original of the same seed. Its 95% interval is over draws
            of seeds and of examples at once (paired bootstrap); empty for the original.
    """

    __pydantic_config__ = STRICT

    name: str
    metrics: dict[str, Spread]
    retention: Spread
    differences: dict[str, Difference]


@dataclass(frozen=True, kw_only=True)
class Seeds:
    """All steps with every seed.

    Attributes:
        seeds: As the recipe names them; the checkpoint that is published is the first one's.
        rows: One for each row of the report, in its order.
    """

    __pydantic_config__ = STRICT

    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    rows: tuple[SeededRow, ...]


def over_seeds(seeds: Sequence[int], names: Sequence[str], answers: Sequence[Sequence[Answers]], task: Task) -> Seeds:
    """Sums up what all seeds answered.

    Args:
        seeds: The seeds.
        names: The steps, the original first.
        answers: For each seed the answers after each step, all to the same examples.
        task: What was asked.

    Raises:
        DataError: They are not answers to the same examples.
    """
    references = answers[0][0].references
    if any(each.references != references for own in answers for each in own) or not references:
        raise DataError(f"task '{task.name}': not all seeds were measured on the same examples")
    scores = [
        [score_task(task, each.predictions, each.references, each.confidences) for each in own] for own in answers
    ]
    rows = []
    for place, name in enumerate(names):
        own = [each[place] for each in scores]
        first = task.metrics[0]
        rows.append(
            SeededRow(
                name=name,
                metrics={metric: Spread.of([score[metric] for score in own]) for metric in task.metrics},
                retention=Spread.of([retention(each[place][first], each[0][first], first) for each in scores]),
                differences={metric: _difference(metric, place, answers, scores) for metric in task.metrics}
                if place
                else {},
            )
        )
    return Seeds(seeds=tuple(seeds), rows=tuple(rows))


def _difference(
    metric: str, place: int, answers: Sequence[Sequence[Answers]], scores: Sequence[Sequence[dict[str, float]]]
) -> Difference:
    from hfcompress.evaluation.resampling import drawn_changes, drawn_means, interval

    pairs = [(answered(metric, own[0]), answered(metric, own[place])) for own in answers]
    changes = [own[place][metric] - own[0][metric] for own in scores]
    value = math.fsum(changes) / len(changes)
    low, high = interval(drawn_means(drawn_changes(metric, answers[0][0].references, pairs)), value)
    return Difference(value=value, low=low, high=high)
