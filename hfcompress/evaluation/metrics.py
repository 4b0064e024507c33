"""The metrics by name, each as its field defines it, and not a number where it is undefined."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from hfcompress.configuration import suggest
from hfcompress.errors import DataError
from hfcompress.evaluation.additive import ADDITIVE

Values = Sequence[Any]


class Answered(Protocol):
    """What a model answered, with the probability that it gave to each answer, where it has one."""

    @property
    def predictions(self) -> Values:
        """The answers."""
        ...

    @property
    def confidences(self) -> Sequence[float]:
        """The probability of each."""
        ...


def answered(metric: str, answers: Answered) -> Values:
    """Returns what a metric judges: the answers, or where it wants scores the probability of class 1 of two."""
    if metric not in _OF_SCORES:
        return answers.predictions
    pairs = zip(answers.predictions, answers.confidences, strict=True)
    return [sure if prediction == 1 else 1 - sure for prediction, sure in pairs]


def score(names: Sequence[str], predictions: Values, references: Values) -> dict[str, float]:
    """Computes metrics of a task's predictions.

    Args:
        names: Names from `METRICS`.
        predictions: One answer an example, of the form that the task's kind gives.
        references: The right ones, in the same order.

    Returns:
        The metrics by name; NaN where a metric is undefined on these rows.

    Raises:
        DataError: A name is not known, there are no rows, or the lengths differ.
    """
    for name in names:
        if name not in METRICS:
            raise DataError(f"metric '{name}' is not known; {suggest(name, METRICS)}")
    if len(predictions) != len(references) or not len(references):
        raise DataError(
            f"metrics need as many predictions as references and at least one: "
            f"got {len(predictions)} and {len(references)}"
        )
    return {name: METRICS[name](predictions, references) for name in names}


def accuracy(predictions: Values, references: Values) -> float:
    """Returns the share of right predictions."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(references, predictions))


def f1(predictions: Values, references: Values) -> float:
    """Returns the F1 of class 1; NaN where class 1 is neither there nor predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, zero_division=math.nan))  # pyright: ignore[reportArgumentType]


def precision(predictions: Values, references: Values) -> float:
    """Returns the share of right ones among those said to be of class 1; NaN where there are none."""
    from sklearn.metrics import precision_score

    found = precision_score(references, predictions, zero_division=math.nan)  # pyright: ignore[reportArgumentType]
    return float(found)


def recall(predictions: Values, references: Values) -> float:
    """Returns the share of those of class 1 that are found; NaN where there are none."""
    from sklearn.metrics import recall_score

    return float(recall_score(references, predictions, zero_division=math.nan))  # pyright: ignore[reportArgumentType]


def roc_auc(predictions: Values, references: Values) -> float:
    """Returns the area under the ROC curve; NaN where there is but one class.

    Args:
        predictions: The score, such as the probability, of class 1.
        references: Classes 0 and 1.
    """
    from sklearn.metrics import roc_auc_score

    if _constant(references):
        return math.nan
    return float(roc_auc_score(references, predictions))


def r_squared(predictions: Values, references: Values) -> float:
    """Returns the coefficient of determination; NaN where the right values are constant."""
    from sklearn.metrics import r2_score

    if _constant(references):
        return math.nan
    return float(r2_score(references, predictions))


def f1_macro(predictions: Values, references: Values) -> float:
    """Returns the mean F1 of all classes that are there or predicted."""
    from sklearn.metrics import f1_score

    return float(f1_score(references, predictions, average="macro"))  # pyright: ignore[reportArgumentType]


def mean_squared_error(predictions: Values, references: Values) -> float:
    """Returns the mean squared difference."""
    return math.fsum((one - other) ** 2 for one, other in zip(predictions, references, strict=True)) / len(references)


def mean_absolute_error(predictions: Values, references: Values) -> float:
    """Returns the mean absolute difference."""
    return math.fsum(abs(one - other) for one, other in zip(predictions, references, strict=True)) / len(references)


def matthews_correlation(predictions: Values, references: Values) -> float:
    """Returns Matthews' correlation coefficient; NaN where either side is constant.

    scikit-learn, and with it the GLUE leaderboard, calls the undefined coefficient 0; a model that
    collapsed to one class should not look like one that guesses.
    """
    from sklearn.metrics import matthews_corrcoef

    if _constant(predictions) or _constant(references):
        return math.nan
    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: Values, references: Values) -> float:
    """Returns Pearson's correlation; NaN where either side is constant, as one row is."""
    from scipy.stats import pearsonr

    if _constant(predictions) or _constant(references):
        return math.nan
    coefficient, _ = pearsonr(predictions, references)
    return float(coefficient)  # pyright: ignore[reportArgumentType]


def spearmanr(predictions: Values, references: Values) -> float:
    """Returns Spearman's rank correlation; NaN where either side is constant."""
    from scipy import stats

    if _constant(predictions) or _constant(references):
        return math.nan
    coefficient, _ = stats.spearmanr(predictions, references)
    return float(coefficient)  # pyright: ignore[reportArgumentType]


def _constant(values: Values) -> bool:
    return all(value == values[0] for value in values)


_FUNCTIONS = (
    accuracy,
    f1,
    f1_macro,
    precision,
    recall,
    roc_auc,
    r_squared,
    matthews_correlation,
    pearson,
    spearmanr,
    mean_squared_error,
    mean_absolute_error,
)

METRICS: Mapping[str, Callable[[Values, Values], float]] = MappingProxyType(
    {function.__name__: function for function in _FUNCTIONS} | {metric.name: metric for metric in ADDITIVE}
)
_OF_SCORES = {"roc_auc"}
_LESS_IS_BETTER = {"mean_squared_error", "mean_absolute_error"} | {
    metric.name for metric in ADDITIVE if metric.less_is_better
}


def retention(value: float, original: float, metric: str = "") -> float:
    """Returns the share of the original's metric that is left; NaN where there is none above 0.

    Where less is better, as with a perplexity, it is the original's value / this one.
    """
    part, whole = (original, value) if less_is_better(metric) else (value, original)
    return part / whole if whole > 0 else math.nan


def less_is_better(name: str) -> bool:
    """Tells whether a smaller value of that metric is the better one."""
    return name in _LESS_IS_BETTER
