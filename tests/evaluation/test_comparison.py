from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.errors import DataError
from hfcompress.evaluation import resampling
from hfcompress.evaluation.comparison import Answers, calibration_error, compare
from hfcompress.evaluation.metrics import METRICS
from hfcompress.tasks import get_task


def answers(predictions: list, references: list, confidences: list[float] | None = None) -> Answers:
    return Answers(predictions=predictions, references=references, confidences=confidences or [])


def test_flips_and_classes_are_counted() -> None:
    right = [0, 0, 0, 1, 1, 1]
    found = compare(
        answers([0, 0, 1, 1, 1, 0], right, [0.9] * 6), answers([0, 1, 0, 1, 0, 0], right, [0.9] * 6), get_task("mrpc")
    )
    assert (found.flips, found.flips_were_right, found.flips_are_right) == (3, 2, 1)
    assert [(each.label, each.examples) for each in found.classes] == [("not_equivalent", 3), ("equivalent", 3)]
    assert [each.before for each in found.classes] == pytest.approx([2 / 3, 2 / 3])
    assert [each.after for each in found.classes] == pytest.approx([2 / 3, 1 / 3])
    assert found.worst_class == found.classes[1]
    assert found.differences["accuracy"].value == pytest.approx(-1 / 6)


def test_the_same_answers_differ_in_nothing() -> None:
    right = [0, 1] * 50
    one = answers([0, 1, 1, 1] * 25, right, [0.8] * 100)
    found = compare(one, one, get_task("sst2"))
    assert found.flips == 0 and found.worst_class is None
    assert (found.differences["accuracy"].low, found.differences["accuracy"].high) == (0, 0)


def test_other_examples_are_refused() -> None:
    with pytest.raises(DataError, match="same examples"):
        compare(answers([0], [0]), answers([0], [1]), get_task("sst2"))
    with pytest.raises(DataError, match="same examples"):
        compare(answers([], []), answers([], []), get_task("sst2"))


def test_regression_has_differences_alone() -> None:
    generator = np.random.default_rng(0)
    right = generator.random(200)
    near, far = right + generator.normal(size=200) * 0.05, right + generator.normal(size=200) * 0.5
    found = compare(answers(near.tolist(), right.tolist()), answers(far.tolist(), right.tolist()), get_task("stsb"))
    assert found.flips is None and found.classes == () and math.isnan(found.calibration_after)
    for difference in found.differences.values():
        assert difference.low < difference.value < difference.high < 0


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    # Two models that are right on 80% and 76% of an endless population, half of their errors in common.
    generator = np.random.default_rng(1)
    task, covered = get_task("sst2"), 0
    for _ in range(200):
        shared, one, two = generator.random((3, 300))
        before = (shared > 0.1) & (one > 1 / 9)
        after = (shared > 0.1) & (two > 1 - 0.76 / 0.9)
        right = [1] * 300
        found = compare(answers((before * 1).tolist(), right), answers((after * 1).tolist(), right), task)
        difference = found.differences["accuracy"]
        covered += difference.low <= -0.04 <= difference.high
    assert 180 <= covered <= 199


labels = st.integers(0, 2)


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(labels, labels), min_size=1, max_size=30))
def test_metrics_of_tables_are_the_metrics(rows: list[tuple[int, int]]) -> None:
    right, said = [each[0] for each in rows], [each[1] for each in rows]
    table = np.zeros((1, 3, 3))
    np.add.at(table[0], (right, said), 1)
    for name in ("accuracy", "matthews_correlation"):
        assert resampling._OF_CONFUSIONS[name](table)[0] == pytest.approx(METRICS[name](said, right), nan_ok=True)
    two = [min(each, 1) for each in right], [min(each, 1) for each in said]
    table = np.zeros((1, 2, 2))
    np.add.at(table[0], two, 1)
    assert resampling._f1(table)[0] == pytest.approx(METRICS["f1"](two[1], two[0]), nan_ok=True)


def test_metrics_of_values_are_the_metrics() -> None:
    generator = np.random.default_rng(2)
    right, said = generator.random((2, 1, 40)).round(1)
    for name, function in resampling._OF_VALUES.items():
        known = (right > 0.5) * 1 if name == "roc_auc" else right
        assert function(known, said)[0] == pytest.approx(METRICS[name](said[0].tolist(), known[0].tolist()))
    assert math.isnan(resampling._pearson(right, np.ones((1, 40)))[0])


def test_draws_by_counts_are_draws_of_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(3)
    right, before, after = (generator.integers(0, 2, size=120).tolist() for _ in range(3))
    counted = resampling.drawn_differences("f1", right, before, after)
    monkeypatch.setattr(resampling, "_OF_CONFUSIONS", {})
    monkeypatch.setattr(resampling, "DRAWS", 300)
    drawn = resampling.drawn_differences("f1", right, before, after)
    assert len(drawn) == 300 and drawn.mean() == pytest.approx(counted.mean(), abs=4 * drawn.std() / 300**0.5)
    assert drawn.std() == pytest.approx(counted.std(), rel=0.15)


def test_calibration_error_of_known_cases() -> None:
    assert calibration_error(answers([1] * 10, [1] * 8 + [0] * 2, [0.8] * 10)) == pytest.approx(0)
    assert calibration_error(answers([1] * 10, [1] * 5 + [0] * 5, [1.0] * 10)) == pytest.approx(0.5)
    # Two bins that are wrong in opposite directions do not make up for one another.
    both = answers([1] * 4, [1, 1, 0, 0], [0.6, 0.6, 0.9, 0.9])
    assert calibration_error(both) == pytest.approx((0.4 + 0.9) / 2)
    assert math.isnan(calibration_error(answers([0.5], [0.4])))
