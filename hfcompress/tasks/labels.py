"""A task's labels and a model's, matched by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from hfcompress.errors import DataError
from hfcompress.tasks.task import Task

_GENERIC = re.compile(r"LABEL_\d+", re.IGNORECASE)


def align_labels(task: Task, label2id: Mapping[str, int] | None) -> tuple[int, ...]:
    """Returns the model's id of every label of the task, in the task's order.

    Names are compared without regard to case. A model that was never told names (`LABEL_0`, `LABEL_1`,
    ...) is taken to use the task's order.

    Returns:
        One id a label; nothing where answers are not labels.

    Raises:
        DataError: The names are not the task's, or the ids are not 0, 1, 2, ...
    """
    if not task.labels:
        return ()
    if label2id is None:
        return tuple(range(len(task.labels)))
    if sorted(label2id.values()) != list(range(len(task.labels))):
        raise _mismatch(task, label2id)
    if are_generic(label2id):
        return tuple(range(len(task.labels)))
    by_name = {name.lower(): number for name, number in label2id.items()}
    if set(by_name) != {name.lower() for name in task.labels}:
        raise _mismatch(task, label2id)
    return tuple(by_name[name.lower()] for name in task.labels)


def are_generic(label2id: Mapping[str, int]) -> bool:
    """Tells whether a model was never told the names of its labels."""
    return all(_GENERIC.fullmatch(name) for name in label2id)


def _mismatch(task: Task, label2id: Mapping[str, int]) -> DataError:
    return DataError(
        f"the model's labels ({', '.join(f'{name}={number}' for name, number in label2id.items())}) "
        f"are not those of task '{task.name}' ({', '.join(task.labels)})",
        hint="Choose a model fine-tuned on this task, or fine-tune one without a classification head first.",
    )
