from __future__ import annotations

import math

import pytest

from hfcompress.evaluation.glue_average import TASKS, glue_average
from hfcompress.tasks import get_task

ONE = {name: dict.fromkeys(get_task(name).metrics, 0.1 * place) for place, name in enumerate(TASKS)}


def test_tasks_count_alike_however_many_metrics_or_halves_they_have() -> None:
    assert glue_average(ONE) == (pytest.approx(0.4), TASKS)
    scores = {
        "rte": {"accuracy": 0.6},
        "mrpc": {"accuracy": 0.8, "f1": 0.9, "precision": 0.0},
        "mnli": {"accuracy": 0.7},
        "mnli-mm": {"accuracy": 0.5},
        "ax": {"matthews_correlation": 0.0},
    }
    average, tasks = glue_average(scores)
    assert average == pytest.approx((0.6 + 0.85 + 0.6) / 3) and tasks == ("mrpc", "mnli", "rte")


def test_nothing_and_what_is_undefined_have_no_average() -> None:
    assert math.isnan(glue_average({})[0]) and glue_average({"ax": {"matthews_correlation": 0.5}})[1] == ()
    assert math.isnan(glue_average(ONE | {"cola": {"matthews_correlation": math.nan}})[0])
