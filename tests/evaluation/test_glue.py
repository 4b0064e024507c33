"""The GLUE metric through the evaluate library, made directly and loaded from its file."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hfcompress.errors import DataError
from hfcompress.evaluation import glue
from hfcompress.evaluation.glue import Glue
from hfcompress.tasks import get_task

PREDICTIONS, REFERENCES = [1, 1, 0, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", ["cola", "sst2", "mrpc", "qqp", "mnli", "qnli", "rte", "wnli", "ax"])
def test_each_task_reports_its_own_metrics(name: str) -> None:
    found = Glue(name).compute(predictions=PREDICTIONS, references=REFERENCES)
    assert found is not None
    assert tuple(found) == get_task(name).metrics
    assert found.get("accuracy", 0.75) == 0.75
    assert found.get("f1", 4 / 6) == pytest.approx(4 / 6)
    assert found.get("matthews_correlation", 7 / 15) == pytest.approx(7 / 15)


def test_numbers_are_not_cut_to_integers() -> None:
    found = Glue("stsb").compute(predictions=[0.2, 0.4, 0.9], references=[1.0, 2.0, 4.5])
    assert found == {"pearson": pytest.approx(1.0), "spearmanr": pytest.approx(1.0)}


def test_batches_add_up() -> None:
    metric = Glue("mrpc")
    metric.add_batch(predictions=PREDICTIONS[:5], references=REFERENCES[:5])
    metric.add_batch(predictions=PREDICTIONS[5:], references=REFERENCES[5:])
    assert metric.compute() == Glue("mrpc").compute(predictions=PREDICTIONS, references=REFERENCES)


def test_undefined_is_not_zero() -> None:
    found = Glue("cola").compute(predictions=[1, 1, 1], references=[1, 0, 1])
    assert found is not None
    assert math.isnan(found["matthews_correlation"])


def test_evaluate_loads_the_file_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path))
    metric = evaluate.load(str(Path(glue.__file__)), "mrpc", cache_dir=str(tmp_path))
    assert metric.compute(predictions=PREDICTIONS, references=REFERENCES) == {
        "accuracy": 0.75,
        "f1": pytest.approx(4 / 6),
    }


@pytest.mark.parametrize("name", [None, "sst-2", "demo/movie-reviews"])
def test_another_task_is_refused(name: str | None) -> None:
    with pytest.raises(DataError, match=r"is no GLUE task; .*wnli"):
        Glue(name)
