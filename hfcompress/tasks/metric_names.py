"""Metrics by the names that `evaluate` gives them, and which of them a task's answers can be judged by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from hfcompress.configuration import suggest
from hfcompress.errors import DataError
from hfcompress.tasks.kinds import kind_of
from hfcompress.tasks.task import Task

# Where `evaluate` has another name than we, or one for several figures.
NAMES_OF_EVALUATE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "mse": ("mean_squared_error",),
        "mae": ("mean_absolute_error",),
        "pearsonr": ("pearson",),
        "squad": ("exact_match", "token_f1"),
        "seqeval": ("overall_f1", "overall_precision", "overall_recall", "overall_accuracy"),
        "rouge": ("rouge1", "rouge2", "rougeL", "rougeLsum"),
    }
)
OF_TWO_CLASSES = frozenset({"f1", "precision", "recall", "roc_auc"})


def expanded(names: Sequence[str]) -> tuple[str, ...]:
    """Returns our names for metrics that may be named as `evaluate` names them."""
    return tuple(dict.fromkeys(own for name in names for own in NAMES_OF_EVALUATE.get(name, (name,))))


def judged_by(task: Task, names: Sequence[str]) -> Task:
    """Returns a task that is judged by further metrics, after its own.

    Args:
        task: The task.
        names: Names of ours or of `evaluate`.

    Raises:
        DataError: A name is not known, or its metric cannot judge the answers of this kind of task.
    """
    kind = kind_of(task)
    for name in names:
        if not set(expanded([name])) <= set(kind.metrics):
            known = [*kind.metrics, *(each for each, own in NAMES_OF_EVALUATE.items() if set(own) <= set(kind.metrics))]
            raise DataError(
                f"metrics: '{name}' is none that answers of {kind.name} are judged by; {suggest(name, known)}; "
                "in Python `evaluate_quality(extra_metrics=[...])` takes any module of `evaluate`"
            )
        if name in OF_TWO_CLASSES and len(task.labels) > 2:
            raise DataError(f"metrics: '{name}' is of two classes, and the task has {len(task.labels)}")
    return replace(task, metrics=tuple(dict.fromkeys([*task.metrics, *expanded(names)])))
