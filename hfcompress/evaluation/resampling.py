"""Metrics of many resamples at once, for intervals over examples."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hfcompress.evaluation.additive import Additive
from hfcompress.evaluation.metrics import METRICS

if TYPE_CHECKING:
    Array = np.ndarray

DRAWS = 2000
_CELLS = 4_000_000  # numbers held at once


def drawn_differences(
    metric: str, references: Sequence[Any], before: Sequence[Any], after: Sequence[Any], *, seed: int = 0
) -> np.ndarray:
    """Draws the examples anew, with replacement, and computes the metric's change on each draw.

    Both models are scored on the same draw, so that what is easy or hard in it cancels out.

    Args:
        metric: A name from `METRICS`.
        references: The right answers.
        before: The original's answers, in the same order.
        after: The compressed model's.
        seed: Of the draws.

    Returns:
        `DRAWS` differences, after - before; NaN on a draw where the metric is undefined.
    """
    generator = np.random.default_rng(seed)
    found = METRICS[metric]
    if isinstance(found, Additive):
        return _by_sums(found, references, before, after, generator)
    if metric in _OF_CONFUSIONS:
        return _by_counts(_OF_CONFUSIONS[metric], references, before, after, generator)
    score = _OF_VALUES.get(metric) or _one_by_one(metric)
    columns = np.array([references, before, after], dtype=float)
    parts = []
    for size in _chunks(DRAWS, len(references)):
        picked = columns[:, generator.integers(columns.shape[1], size=(size, columns.shape[1]))]
        parts.append(score(picked[0], picked[2]) - score(picked[0], picked[1]))
    return np.concatenate(parts)


def _by_sums(
    metric: Additive,
    references: Sequence[Any],
    before: Sequence[Any],
    after: Sequence[Any],
    generator: np.random.Generator,
) -> np.ndarray:
    """Draws how often each example is taken, and adds up what it counts for."""
    examples = len(references)
    counts = [metric.counts(answers, references) for answers in (before, after)]
    parts = []
    for size in _chunks(DRAWS, examples):
        taken = generator.multinomial(examples, np.full(examples, 1 / examples), size=size)
        old, new = (metric.of_sums(taken @ each) for each in counts)
        parts.append(new - old)
    return np.concatenate(parts)


def _by_counts(
    score: Callable[[Array], Array],
    references: Sequence[float],
    before: Sequence[float],
    after: Sequence[float],
    generator: np.random.Generator,
) -> np.ndarray:
    """Draws how often each (right answer, answer before, answer after) occurs: the same as drawing examples."""
    cases = np.array([references, before, after], dtype=np.int64)
    classes = int(cases.max()) + 1
    kinds, counts = np.unique(cases, axis=1, return_counts=True)
    total = int(counts.sum())
    parts = []
    for size in _chunks(DRAWS, max(classes**2, len(counts))):
        drawn = generator.multinomial(total, counts / total, size=size)
        tables = np.zeros((2, size, classes, classes))
        for kind, (right, old, new) in enumerate(kinds.T):
            tables[0, :, right, old] += drawn[:, kind]
            tables[1, :, right, new] += drawn[:, kind]
        parts.append(score(tables[1]) - score(tables[0]))
    return np.concatenate(parts)


def _chunks(total: int, width: int) -> Iterator[int]:
    size = max(1, _CELLS // width)
    for start in range(0, total, size):
        yield min(size, total - start)


# Of confusion tables: (draws, right classes, answered classes) -> (draws,)


def _accuracy(tables: Array) -> Array:
    return np.trace(tables, axis1=1, axis2=2) / tables.sum((1, 2))


def _f1(tables: Array) -> Array:
    hits = tables[:, 1, 1] if tables.shape[1] > 1 else np.zeros(len(tables))
    whole = tables[:, 1, :].sum(1) + tables[:, :, 1].sum(1) if tables.shape[1] > 1 else hits
    return _divided(2 * hits, whole)


def _matthews(tables: Array) -> Array:
    total = tables.sum((1, 2))
    right, answered = tables.sum(2), tables.sum(1)
    covariance = np.trace(tables, axis1=1, axis2=2) * total - (right * answered).sum(1)
    spread = (total**2 - (right**2).sum(1)) * (total**2 - (answered**2).sum(1))
    return _divided(covariance, np.sqrt(spread))


# Of values: (draws, examples) twice -> (draws,)


def _pearson(references: Array, predictions: Array) -> Array:
    x = references - references.mean(1, keepdims=True)
    y = predictions - predictions.mean(1, keepdims=True)
    return _divided((x * y).sum(1), np.sqrt((x**2).sum(1) * (y**2).sum(1)))


def _spearman(references: Array, predictions: Array) -> Array:
    from scipy.stats import rankdata

    return _pearson(np.asarray(rankdata(references, axis=1)), np.asarray(rankdata(predictions, axis=1)))


def _one_by_one(metric: str) -> Callable[[Array, Array], Array]:
    def score(references: Array, predictions: Array) -> Array:
        pairs = zip(predictions.tolist(), references.tolist(), strict=True)
        return np.array([METRICS[metric](answers, right) for answers, right in pairs])

    return score


def _divided(value: Array, by: Array) -> Array:
    return np.divide(value, by, out=np.full(len(value), np.nan), where=by > 0)


_OF_CONFUSIONS = {"accuracy": _accuracy, "f1": _f1, "matthews_correlation": _matthews}
_OF_VALUES = {"pearson": _pearson, "spearmanr": _spearman}
