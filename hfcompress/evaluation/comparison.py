"""A compressed model's answers beside the original's, example by example: what the mean does not show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hfcompress.errors import DataError
from hfcompress.evaluation.additive import entities
from hfcompress.evaluation.groups import GroupChange, group_changes, worst_group
from hfcompress.evaluation.metrics import METRICS, answered
from hfcompress.evaluation.records import STRICT, Count, Figure, Values
from hfcompress.tasks import Task, kind_of

_BINS = 15


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model answered on a split, in the split's order.

    Attributes:
        predictions: Label ids of the task, numbers in regression, or what its kind answers with.
        references: The right ones.
        confidences: The probability that the model gave to its own answer; nothing where answers are not label
            ids. Rounded, so that what is computed from a record is what was computed in the run.
        groups: Each example's group, by column of the data.
    """

    __pydantic_config__ = STRICT

    predictions: Values
    references: Values
    confidences: list[float]
    groups: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A metric's change against the original.

    Attributes:
        value: This model's metric - the original's.
        low: The lower end of its 95% interval over the examples; NaN where the metric is mostly undefined.
        high: Its upper end.
    """

    __pydantic_config__ = STRICT

    value: Figure
    low: Figure
    high: Figure


@dataclass(frozen=True, kw_only=True)
class ClassChange:
    """What became of the examples of one class.

    Attributes:
        label: The class, or the type of entity.
        examples: How many examples, or entities, are of it.
        before: The share of them that the original got right; NaN where there are none.
        after: The share that this model gets right.
    """

    __pydantic_config__ = STRICT

    label: str
    examples: Count
    before: Figure
    after: Figure


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model against the original, on the same examples.

    Attributes:
        differences: By metric.
        flips: How many examples are answered otherwise; None where answers are numbers.
        flips_were_right: How many of the flips the original had right.
        flips_are_right: How many of them this model has right.
        classes: Change by class, or by type of entity; empty where there are none.
        calibration_before: The original's expected calibration error, 15 bins of equal width (Guo et al. 2017);
            NaN where answers are not label ids.
        calibration_after: This model's.
        groups: Change by group, where the recipe names columns.
    """

    __pydantic_config__ = STRICT

    differences: dict[str, Difference]
    flips: Count | None
    flips_were_right: Count | None
    flips_are_right: Count | None
    classes: tuple[ClassChange, ...]
    calibration_before: Figure
    calibration_after: Figure
    groups: tuple[GroupChange, ...] = ()

    @property
    def worst_class(self) -> ClassChange | None:
        """The class that lost most, or None where none lost."""
        lost = [each for each in self.classes if each.after < each.before]
        return min(lost, key=lambda each: each.after - each.before, default=None)

    @property
    def worst_group(self) -> GroupChange | None:
        """The group that lost most, of those that are large enough to tell; None where none lost."""
        return worst_group(self.groups)


def compare(original: Answers, compressed: Answers, task: Task) -> Comparison:
    """Compares two models' answers to the same examples.

    Args:
        original: The original's.
        compressed: The other model's, in the same order.
        task: What was asked.

    Raises:
        DataError: They are not answers to the same examples.
    """
    if original.references != compressed.references or not original.references:
        raise DataError(f"task '{task.name}': the two models were not measured on the same examples")
    differences = {name: _difference(name, original, compressed) for name in task.metrics}
    if not kind_of(task).flips:
        return Comparison(
            differences=differences,
            flips=None,
            flips_were_right=None,
            flips_are_right=None,
            classes=(),
            calibration_before=math.nan,
            calibration_after=math.nan,
        )
    triples = list(zip(original.references, original.predictions, compressed.predictions, strict=True))
    flipped = [(right, before, after) for right, before, after in triples if before != after]
    rights = [(_is_right(before, right), _is_right(after, right)) for right, before, after in triples]
    return Comparison(
        differences=differences,
        flips=len(flipped),
        flips_were_right=sum(_is_right(before, right) for right, before, _ in flipped),
        flips_are_right=sum(_is_right(after, right) for right, _, after in flipped),
        classes=_class_changes(task, triples),
        calibration_before=calibration_error(original),
        calibration_after=calibration_error(compressed),
        groups=group_changes(original.groups, rights),
    )


def _is_right(prediction: Any, reference: Any) -> bool:
    if isinstance(prediction, str) and not isinstance(reference, str):
        return METRICS["exact_match"]([prediction], [reference]) == 1
    return prediction == reference


def calibration_error(answers: Answers) -> float:
    """Returns how far a model's confidence is from its accuracy, over bins of confidence; NaN without answers."""
    import numpy as np

    if not answers.confidences:
        return math.nan
    sure = np.array(answers.confidences)
    right = np.array(answers.predictions) == np.array(answers.references)
    bins = np.clip(np.ceil(sure * _BINS).astype(int) - 1, 0, _BINS - 1)  # (0, 1/15], (1/15, 2/15], ...
    gaps = np.bincount(bins, weights=right - sure, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(sure))


def _difference(metric: str, original: Answers, compressed: Answers) -> Difference:
    from hfcompress.evaluation.resampling import drawn_differences, interval

    references = original.references
    given = [answered(metric, each) for each in (original, compressed)]
    before, after = (METRICS[metric](each, references) for each in given)
    low, high = interval(drawn_differences(metric, references, *given), after - before)
    return Difference(value=after - before, low=low, high=high)


def _class_changes(task: Task, triples: Sequence[tuple[Any, Any, Any]]) -> tuple[ClassChange, ...]:
    if triples and isinstance(triples[0][0], list):
        return _entity_changes(task, triples) if task.labels else ()
    return tuple(_class_change(label, place, triples) for place, label in enumerate(task.labels))


def _entity_changes(task: Task, triples: Sequence[tuple[Any, Any, Any]]) -> tuple[ClassChange, ...]:
    """What became of the entities of each type: how many of those that are there are found."""
    types = dict.fromkeys(label.partition("-")[2] for label in task.labels if label != "O")
    there = dict.fromkeys(types, 0)
    found = {kind: [0, 0] for kind in types}
    for right, before, after in triples:
        known, *said = (entities(tags) for tags in (right, before, after))
        for entity in known:
            there[entity[0]] += 1
            for place, each in enumerate(said):
                found[entity[0]][place] += entity in each
    shares = {kind: [count / there[kind] if there[kind] else math.nan for count in found[kind]] for kind in types}
    return tuple(
        ClassChange(label=kind, examples=there[kind], before=shares[kind][0], after=shares[kind][1]) for kind in types
    )


def _class_change(label: str, place: int, triples: Sequence[tuple[Any, Any, Any]]) -> ClassChange:
    own = [(before == place, after == place) for right, before, after in triples if right == place]
    return ClassChange(
        label=label,
        examples=len(own),
        before=sum(before for before, _ in own) / len(own) if own else math.nan,
        after=sum(after for _, after in own) / len(own) if own else math.nan,
    )
