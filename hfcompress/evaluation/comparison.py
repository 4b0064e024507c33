"""A compressed model's answers beside the original's, example by example: what the mean does not show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hfcompress.errors import DataError
from hfcompress.evaluation.metrics import score
from hfcompress.evaluation.records import STRICT, Count, Figure
from hfcompress.tasks import Task

_BINS = 15
CONFIDENCE_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model answered on a split, in the split's order.

    Attributes:
        predictions: Label ids of the task, or numbers in regression.
        references: The right ones.
        confidences: The probability that the model gave to its own answer; nothing in regression. Rounded, so
            that what is computed from a record is what was computed in the run.
    """

    __pydantic_config__ = STRICT

    predictions: list[int] | list[float]
    references: list[int] | list[float]
    confidences: list[float]


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
        label: The class.
        examples: How many examples are of it.
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
        flips: How many examples are answered otherwise; None in regression.
        flips_were_right: How many of the flips the original had right.
        flips_are_right: How many of them this model has right.
        classes: Change by class; empty in regression.
        calibration_before: The original's expected calibration error, 15 bins of equal width (Guo et al. 2017);
            NaN in regression.
        calibration_after: This model's.
    """

    __pydantic_config__ = STRICT

    differences: dict[str, Difference]
    flips: Count | None
    flips_were_right: Count | None
    flips_are_right: Count | None
    classes: tuple[ClassChange, ...]
    calibration_before: Figure
    calibration_after: Figure

    @property
    def worst_class(self) -> ClassChange | None:
        """The class that lost most, or None where none lost."""
        lost = [each for each in self.classes if each.after < each.before]
        return min(lost, key=lambda each: each.after - each.before, default=None)


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
    if task.kind == "regression":
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
    return Comparison(
        differences=differences,
        flips=len(flipped),
        flips_were_right=sum(before == right for right, before, _ in flipped),
        flips_are_right=sum(after == right for right, _, after in flipped),
        classes=tuple(_class_change(label, place, triples) for place, label in enumerate(task.labels)),
        calibration_before=calibration_error(original),
        calibration_after=calibration_error(compressed),
    )


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
    import numpy as np

    from hfcompress.evaluation.resampling import drawn_differences

    references = original.references
    before, after = (score([metric], each.predictions, references)[metric] for each in (original, compressed))
    drawn = drawn_differences(metric, references, original.predictions, compressed.predictions)
    drawn = drawn[np.isfinite(drawn)]
    # An interval over the few draws where a metric happens to be defined would be one of those draws alone.
    usual = math.isfinite(after - before) and len(drawn) >= 1000
    low, high = np.quantile(drawn, [0.025, 0.975]) if usual else (math.nan, math.nan)
    return Difference(value=after - before, low=float(low), high=float(high))


def _class_change(label: str, place: int, triples: Sequence[tuple[float, float, float]]) -> ClassChange:
    own = [(before == place, after == place) for right, before, after in triples if right == place]
    return ClassChange(
        label=label,
        examples=len(own),
        before=sum(before for before, _ in own) / len(own) if own else math.nan,
        after=sum(after for _, after in own) / len(own) if own else math.nan,
    )
