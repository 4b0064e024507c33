from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest

from hfcompress.errors import DataError
from hfcompress.evaluation.comparison import Answers, compare
from hfcompress.evaluation.resampling import drawn_changes, drawn_differences, drawn_means
from hfcompress.evaluation.seeds import Spread, over_seeds
from hfcompress.tasks import get_task

TASK = get_task("sst2")
GENERATOR = np.random.default_rng(0)
RIGHT = GENERATOR.integers(0, 2, 200).tolist()


def answers(share: float, references: list[int] = RIGHT) -> Answers:
    said = [each if GENERATOR.random() < share else 1 - each for each in references]
    return Answers(predictions=said, references=references, confidences=[0.9] * len(said))


def accuracy(given: Answers) -> float:
    return sum(a == b for a, b in zip(given.predictions, given.references, strict=True)) / len(given.references)


def test_means_and_deviations_are_those_of_the_seeds() -> None:
    runs = [[answers(0.9), answers(0.7)] for _ in range(3)]
    found = over_seeds([5, 6, 7], ["original", "small"], runs, TASK)
    assert found.seeds == (5, 6, 7) and [row.name for row in found.rows] == ["original", "small"]
    scores = [accuracy(run[1]) for run in runs]
    known = found.rows[1].metrics["accuracy"]
    assert known.values == pytest.approx(scores)
    assert (known.mean, known.deviation) == pytest.approx((np.mean(scores), np.std(scores, ddof=1)))
    kept = [accuracy(run[1]) / accuracy(run[0]) for run in runs]
    assert found.rows[1].retention.values == pytest.approx(kept)
    change = found.rows[1].differences["accuracy"]
    assert change.value == pytest.approx(np.mean([accuracy(after) - accuracy(before) for before, after in runs]))
    assert change.low < change.value < change.high < 0
    assert found.rows[0].differences == {} and found.rows[0].retention.values == (1.0, 1.0, 1.0)


def test_seeds_that_answer_alike_have_the_interval_of_one() -> None:
    before, after = answers(0.9), answers(0.7)
    (_, row) = over_seeds([1, 2], ["a", "b"], [[before, after]] * 2, TASK).rows
    assert asdict(row.differences["accuracy"]) == pytest.approx(
        asdict(compare(before, after, TASK).differences["accuracy"])
    )


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews_correlation", "spearmanr", "rouge1"])
def test_all_seeds_are_scored_on_the_same_draws(metric: str) -> None:
    right = [str(each) for each in RIGHT] if metric == "rouge1" else RIGHT
    first, second, third = (
        [str(a) for a in x] if metric == "rouge1" else x for x in (answers(s).predictions for s in (0.9, 0.7, 0.8))
    )
    changes = drawn_changes(metric, right, [(first, second), (first, third), (first, second)])
    assert changes.shape[0] == 3 and (changes[0] == changes[2]).all() and not (changes[0] == changes[1]).all()
    alone = drawn_differences(metric, right, first, second)
    # Draws of more models at once are others, and come to the same.
    assert changes[0].mean() == pytest.approx(alone.mean(), abs=0.01)
    assert changes[0].std() == pytest.approx(alone.std(), rel=0.1)


def test_the_spread_of_seeds_widens_the_interval() -> None:
    draws = np.zeros((3, 2000)) + np.array([[-0.1], [0.0], [0.1]])
    means = drawn_means(draws)
    assert means.shape == (2000,) and means.mean() == pytest.approx(0, abs=0.01)
    assert means.std() == pytest.approx(math.sqrt(2 / 3) * 0.1 / math.sqrt(3), rel=0.1)


def test_what_is_undefined_with_one_seed_has_no_mean() -> None:
    found = Spread.of([0.5, math.nan])
    assert math.isnan(found.mean) and math.isnan(found.deviation) and math.isnan(Spread.of([0.5]).deviation)


def test_other_examples_are_refused() -> None:
    other = answers(0.9, RIGHT[1:])
    with pytest.raises(DataError, match="the same examples"):
        over_seeds([1, 2], ["a"], [[answers(0.9)], [other]], TASK)
