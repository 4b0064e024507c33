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
    return drawn_changes(metric, references, [(before, after)], seed=seed)[0]


def drawn_changes(
    metric: str, references: Sequence[Any], pairs: Sequence[tuple[Sequence[Any], Sequence[Any]]], *, seed: int = 0
) -> np.ndarray:
    """Does what `drawn_differences` does for several pairs of models, all on the same draws.

    Returns:
        (pairs, `DRAWS`) differences.
    """
    generator = np.random.default_rng(seed)
    found = METRICS[metric]
    if isinstance(found, Additive):
        return _by_sums(found, references, pairs, generator)
    if metric in _OF_CONFUSIONS:
        return _by_counts(_OF_CONFUSIONS[metric], references, pairs, generator)
    score = _OF_VALUES.get(metric) or _one_by_one(metric)
    columns = np.array([references, *(each for pair in pairs for each in pair)], dtype=float)
    parts = []
    for size in _chunks(DRAWS, len(references)):
        picked = columns[:, generator.integers(columns.shape[1], size=(size, columns.shape[1]))]
        scores = [score(picked[0], each) for each in picked[1:]]
        parts.append([after - before for before, after in zip(scores[::2], scores[1::2], strict=True)])
    return np.concatenate(parts, axis=1)


def drawn_means(changes: np.ndarray, *, seed: int = 1) -> np.ndarray:
    """Draws the seeds anew too, with replacement, for each draw of the examples, and returns the mean change.

    Args:
        changes: (seeds, draws) differences, from `drawn_changes`.
        seed: Of these draws.

    Returns:
        (draws,) means over the seeds that are drawn.
    """
    seeds, draws = changes.shape
    picked = np.random.default_rng(seed).integers(seeds, size=(seeds, draws))
    return np.take_along_axis(changes, picked, axis=0).mean(0)


def interval(drawn: np.ndarray, value: float) -> tuple[float, float]:
    """Returns the ends of the 95% interval of draws around a value; NaN where the metric is mostly undefined."""
    drawn = drawn[np.isfinite(drawn)]
    # An interval over the few draws where a metric happens to be defined would be one of those draws alone.
    if not np.isfinite(value) or len(drawn) < DRAWS // 2:
        return np.nan, np.nan
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(low), float(high)


def _by_sums(
    metric: Additive,
    references: Sequence[Any],
    pairs: Sequence[tuple[Sequence[Any], Sequence[Any]]],
    generator: np.random.Generator,
) -> np.ndarray:
    """Draws how often each example is taken, and adds up what it counts for."""
    examples = len(references)
    counts = [[metric.counts(answers, references) for answers in pair] for pair in pairs]
    parts = []
    for size in _chunks(DRAWS, examples):
        taken = generator.multinomial(examples, np.full(examples, 1 / examples), size=size)
        parts.append([metric.of_sums(taken @ new) - metric.of_sums(taken @ old) for old, new in counts])
    return np.concatenate(parts, axis=1)


def _by_counts(
    score: Callable[[Array], Array],
    references: Sequence[float],
    pairs: Sequence[tuple[Sequence[float], Sequence[float]]],
    generator: np.random.Generator,
) -> np.ndarray:
    """Draws how often each (right answer, answer before, answer after, ...) occurs: the same as drawing examples."""
    cases = np.array([references, *(each for pair in pairs for each in pair)], dtype=np.int64)
    classes = int(cases.max()) + 1
    kinds, counts = np.unique(cases, axis=1, return_counts=True)
    total = int(counts.sum())
    parts = []
    for size in _chunks(DRAWS, max(classes**2, len(counts))):
        drawn = generator.multinomial(total, counts / total, size=size)
        changes = []
        for place in range(1, len(cases), 2):
            tables = np.zeros((2, size, classes, classes))
            for kind, (right, old, new) in enumerate(kinds[[0, place, place + 1]].T):
                tables[0, :, right, old] += drawn[:, kind]
                tables[1, :, right, new] += drawn[:, kind]
            changes.append(score(tables[1]) - score(tables[0]))
        parts.append(changes)
    return np.concatenate(parts, axis=1)


def _chunks(total: int, width: int) -> Iterator[int]:
    size = max(1, _CELLS // width)
    for start in range(0, total, size):
        yield min(size, total - start)


# Of confusion tables: (draws, right classes, answered classes) -> (draws,)


def _accuracy(tables: Array) -> Array:
    return np.trace(tables, axis1=1, axis2=2) / tables.sum((1, 2))


def _f1(tables: Array) -> Array:
    hits = _hits(tables)
    whole = tables[:, 1, :].sum(1) + tables[:, :, 1].sum(1) if tables.shape[1] > 1 else hits
    return _divided(2 * hits, whole)


def _f1_macro(tables: Array) -> Array:
    """Of the classes that are there or said in a draw; the others have no F1."""
    hits = np.diagonal(tables, axis1=1, axis2=2)
    whole = tables.sum(1) + tables.sum(2)
    shares = np.divide(2 * hits, whole, out=np.zeros_like(whole), where=whole > 0)
    return _divided(shares.sum(1), (whole > 0).sum(1))


def _precision(tables: Array) -> Array:
    hits, said = _hits(tables), tables[:, :, 1].sum(1) if tables.shape[1] > 1 else np.zeros(len(tables))
    return _divided(hits, said)


def _recall(tables: Array) -> Array:
    hits, there = _hits(tables), tables[:, 1, :].sum(1) if tables.shape[1] > 1 else np.zeros(len(tables))
    return _divided(hits, there)


def _hits(tables: Array) -> Array:
    return tables[:, 1, 1] if tables.shape[1] > 1 else np.zeros(len(tables))


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


def _roc_auc(references: Array, scores: Array) -> Array:
    """The share of pairs of an example of class 1 and another that are in the right order (Mann and Whitney)."""
    from scipy.stats import rankdata

    right = references == 1
    ranks = (np.asarray(rankdata(scores, axis=1)) * right).sum(1)
    ones = right.sum(1)
    return _divided(ranks - ones * (ones + 1) / 2, ones * (right.shape[1] - ones))


def _r_squared(references: Array, predictions: Array) -> Array:
    left = ((references - predictions) ** 2).sum(1)
    return 1 - _divided(left, ((references - references.mean(1, keepdims=True)) ** 2).sum(1))


def _one_by_one(metric: str) -> Callable[[Array, Array], Array]:
    def score(references: Array, predictions: Array) -> Array:
        pairs = zip(predictions.tolist(), references.tolist(), strict=True)
        return np.array([METRICS[metric](answers, right) for answers, right in pairs])

    return score


def _divided(value: Array, by: Array) -> Array:
    return np.divide(value, by, out=np.full(len(value), np.nan), where=by > 0)


_OF_CONFUSIONS = {
    "accuracy": _accuracy,
    "f1": _f1,
    "f1_macro": _f1_macro,
    "precision": _precision,
    "recall": _recall,
    "matthews_correlation": _matthews,
}
_OF_VALUES = {"pearson": _pearson, "spearmanr": _spearman, "roc_auc": _roc_auc, "r_squared": _r_squared}
