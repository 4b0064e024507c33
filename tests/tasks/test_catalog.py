"""The catalogue agrees with nyu-mll/glue."""

from __future__ import annotations

from dataclasses import replace

import pytest
import transformers

from hfcompress.errors import DataError
from hfcompress.evaluation.metrics import METRICS
from hfcompress.tasks import KINDS, get_task, task_names

# Copied from the data set's own features, so that a slip in the catalogue shows.
GLUE_LABELS = {
    "cola": ("unacceptable", "acceptable"),
    "sst2": ("negative", "positive"),
    "mrpc": ("not_equivalent", "equivalent"),
    "qqp": ("not_duplicate", "duplicate"),
    "stsb": (),
    "mnli": ("entailment", "neutral", "contradiction"),
    "qnli": ("entailment", "not_entailment"),
    "rte": ("entailment", "not_entailment"),
    "wnli": ("not_entailment", "entailment"),
    "ax": ("entailment", "neutral", "contradiction"),
}


def test_all_glue_tasks_and_the_demo_are_there() -> None:
    others = {"mnli-mm", "wikitext-2", "wikitext-2-masked", "wnut17", "squad", "mnist", "xsum", "librispeech"}
    assert set(task_names()) == {*GLUE_LABELS, "demo/movie-reviews", *others}
    # Whisper writes capitals and stops, which no known data of this kind have: they are described in a recipe.
    assert {get_task(name).kind for name in task_names()} == set(KINDS) - {"speech_to_text"}


def test_mnli_is_judged_on_either_half_of_its_data() -> None:
    matched, mismatched = get_task("mnli"), get_task("mnli-mm")
    assert (matched.evaluation_split, mismatched.evaluation_split) == ("validation_matched", "validation_mismatched")
    assert replace(mismatched, name="mnli", evaluation_split="validation_matched") == matched


def test_tasks_name_metrics_and_labels_of_their_kind() -> None:
    for name in task_names():
        task, kind = get_task(name), KINDS[get_task(name).kind]
        assert set(task.metrics) <= set(kind.metrics) and bool(task.labels) == kind.labelled
        assert getattr(transformers, kind.auto_class)


def test_every_metric_of_a_kind_is_known() -> None:
    for kind in KINDS.values():
        assert set(kind.defaults) <= set(kind.metrics) <= set(METRICS)


def test_wnut_labels_stand_in_the_order_of_the_data() -> None:
    assert get_task("wnut17").labels[:5] == (
        "O",
        "B-corporation",
        "I-corporation",
        "B-creative-work",
        "I-creative-work",
    )
    assert len(get_task("wnut17").labels) == 13


@pytest.mark.parametrize("name", GLUE_LABELS)
def test_glue_labels_and_their_order(name: str) -> None:
    task = get_task(name)
    assert task.labels == GLUE_LABELS[name]
    assert (task.dataset, task.dataset_config) == ("nyu-mll/glue", name)
    assert task.kind == ("classification" if task.labels else "regression")


def test_official_metrics() -> None:
    named = {name: get_task(name).metrics for name in GLUE_LABELS}
    assert named.pop("cola") == named.pop("ax") == ("matthews_correlation",)
    assert named.pop("mrpc") == named.pop("qqp") == ("accuracy", "f1")
    assert named.pop("stsb") == ("pearson", "spearmanr")
    assert set(named.values()) == {("accuracy",)}


def test_splits_that_are_not_the_usual_ones() -> None:
    assert get_task("mnli").evaluation_split == "validation_matched"
    assert (get_task("ax").training_split, get_task("ax").evaluation_split) == (None, "test")


def test_an_unknown_name_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(DataError, match=r"'sst-2' is not known; did you mean 'sst2'\? allowed: .*wnli"):
        get_task("sst-2")
