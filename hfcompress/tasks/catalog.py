"""The tasks by name: GLUE with its diagnostic set, and the demo."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hfcompress.configuration import suggest
from hfcompress.errors import DataError
from hfcompress.tasks.task import Task

GLUE_DATASET = "nyu-mll/glue"


def _glue(
    name: str,
    columns: tuple[str, ...],
    labels: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    *,
    evaluation_split: str = "validation",
    training_split: str | None = "train",
) -> Task:
    return Task(
        name=name,
        kind="classification" if labels else "regression",
        columns=columns,
        label="label",
        labels=labels,
        metrics=metrics,
        evaluation_split=evaluation_split,
        training_split=training_split,
        dataset=GLUE_DATASET,
        dataset_config=name,
    )


_SENTENCES = ("sentence1", "sentence2")
_NLI = ("entailment", "neutral", "contradiction")
_RTE = ("entailment", "not_entailment")

_TASKS = (
    _glue("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    _glue("sst2", ("sentence",), ("negative", "positive")),
    _glue("mrpc", _SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    _glue("stsb", _SENTENCES, (), ("pearson", "spearmanr")),
    _glue("mnli", ("premise", "hypothesis"), _NLI, evaluation_split="validation_matched"),
    _glue("qnli", ("question", "sentence"), _RTE),
    _glue("rte", _SENTENCES, _RTE),
    _glue("wnli", _SENTENCES, ("not_entailment", "entailment")),
    _glue(
        "ax",
        ("premise", "hypothesis"),
        _NLI,
        ("matthews_correlation",),
        evaluation_split="test",
        training_split=None,
    ),
    Task(
        name="demo/movie-reviews",
        kind="classification",
        columns=("sentence",),
        label="label",
        labels=("negative", "positive"),
        metrics=("accuracy", "f1"),
        evaluation_split="validation",
        dataset="movie review sentences rated for VADER (Hutto and Gilbert, 2014)",
        dataset_config=None,
    ),
)

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _TASKS})


def task_names() -> tuple[str, ...]:
    """Returns the names of all tasks."""
    return tuple(TASKS)


def get_task(name: str) -> Task:
    """Returns the task of that name.

    Raises:
        DataError: There is none; the message holds the nearest name and all of them.
    """
    if name not in TASKS:
        raise DataError(f"task '{name}' is not known; {suggest(name, TASKS)}")
    return TASKS[name]
