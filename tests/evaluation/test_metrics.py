"""The metrics against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from hfcompress.errors import DataError
from hfcompress.evaluation.metrics import METRICS, score

# 2 true positives, 1 false positive, 1 false negative, 4 true negatives.
REFERENCES = [1, 1, 1, 0, 0, 0, 0, 0]
PREDICTIONS = [1, 1, 0, 1, 0, 0, 0, 0]


def test_class_metrics_by_hand() -> None:
    found = score(("accuracy", "f1", "matthews_correlation"), PREDICTIONS, REFERENCES)
    assert found == {
        "accuracy": pytest.approx(6 / 8),
        "f1": pytest.approx(2 * 2 / (2 * 2 + 1 + 1)),
        "matthews_correlation": pytest.approx((2 * 4 - 1 * 1) / math.sqrt(3 * 3 * 5 * 5)),
    }


def test_f1_is_of_class_one() -> None:
    flipped = [1 - value for value in PREDICTIONS], [1 - value for value in REFERENCES]
    assert score(("f1",), *flipped)["f1"] == pytest.approx(2 * 4 / (2 * 4 + 1 + 1))


def test_correlations_by_hand() -> None:
    # Deviations (-1.5, -0.5, 0.5, 1.5) and (-2.5, -0.5, 3.5, -0.5): products sum to 5, squares to 5 and 19.
    found = score(("pearson", "spearmanr"), [1.0, 2.0, 3.0, 4.0], [0.0, 2.0, 6.0, 2.0])
    assert found["pearson"] == pytest.approx(5 / math.sqrt(5 * 19))
    # Ranks (1, 2, 3, 4) and (1, 2.5, 4, 2.5): products of deviations 3, squares 5 and 4.5.
    assert found["spearmanr"] == pytest.approx(3 / math.sqrt(5 * 4.5))


def test_matthews_of_three_classes() -> None:
    # Right 4 of 6; predicted (2, 2, 2), true (2, 2, 2): (4*6 - 12) / sqrt((36-12) * (36-12)).
    found = score(("matthews_correlation",), [0, 0, 1, 2, 2, 1], [0, 0, 1, 1, 2, 2])
    assert found["matthews_correlation"] == pytest.approx(12 / 24)


@pytest.mark.parametrize(
    ("name", "predictions", "references"),
    [
        ("matthews_correlation", [1, 1, 1], [0, 1, 1]),
        ("matthews_correlation", [0, 1, 1], [1, 1, 1]),
        ("f1", [0, 0, 0], [0, 0, 0]),
        ("pearson", [2.5, 2.5, 2.5], [1.0, 2.0, 3.0]),
        ("spearmanr", [1.0, 2.0, 3.0], [2.5, 2.5, 2.5]),
        ("pearson", [1.0], [2.0]),
    ],
)
def test_what_is_undefined_is_not_a_number(name: str, predictions: list, references: list) -> None:
    assert math.isnan(score((name,), predictions, references)[name])


def test_f1_of_a_model_that_never_finds_the_class_is_zero() -> None:
    assert score(("f1",), [0, 0, 0], [0, 1, 0]) == {"f1": 0.0}


@pytest.mark.parametrize(("predictions", "references"), [([], []), ([1], [1, 0])])
def test_rows_must_be_there_and_match(predictions: list[int], references: list[int]) -> None:
    with pytest.raises(DataError, match="as many predictions as references"):
        score(("accuracy",), predictions, references)


def test_an_unknown_metric_is_answered_with_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"did you mean 'accuracy'\?") as caught:
        score(("acuracy",), [1], [1])
    assert all(name in str(caught.value) for name in METRICS)
