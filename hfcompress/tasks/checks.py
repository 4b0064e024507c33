"""What columns of a split must hold, refused before anything is learnt from them."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from hfcompress.errors import DataError
from hfcompress.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset

_NO_LABELS = "Use a split, or a copy of the data, that has labels."


def check_texts(split: Dataset, column: str, where: str) -> None:
    """Refuses a column that is not text in every row.

    Raises:
        DataError: It is not.
    """
    if getattr(split.features[column], "dtype", None) not in ("string", "large_string"):
        raise DataError(f"{where}: column '{column}' must hold text, not {split.features[column]}")
    nulls = split.data.column(column).null_count
    if nulls:
        raise DataError(f"{where}: column '{column}' has no text in {nulls} rows")


def check_numbers(split: Dataset, column: str, where: str) -> None:
    """Refuses a column that does not hold a finite number in every row.

    Raises:
        DataError: It does not.
    """
    for row, value in enumerate(split[column]):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{where}: column '{column}' must hold finite numbers; row {row} holds {value!r}")
    if set(split[column]) == {-1}:
        raise DataError(f"{where}: every label is -1, which stands for none", hint=_NO_LABELS)


def check_classes(task: Task, split: Dataset, where: str, *, training: bool) -> None:
    """Refuses labels that are not ids of the task's classes, and training data of one class alone.

    Raises:
        DataError: They are not.
    """
    check_names(task, getattr(split.features[task.label], "names", None), where)
    counts = Counter(split[task.label])
    strange = [value for value in counts if type(value) is not int or not 0 <= value < len(task.labels)]
    if strange == [-1]:
        raise DataError(
            f"{where}: {counts[-1]} of {len(split)} rows have label -1, which stands for none",
            hint=_NO_LABELS,
        )
    if strange:
        raise DataError(
            f"{where}: column '{task.label}' holds {strange[0]!r} in {counts[strange[0]]} rows; "
            f"allowed: 0 to {len(task.labels) - 1} ({', '.join(task.labels)})"
        )
    if training and len(counts) == 1:
        (only,) = counts
        raise DataError(f"{where}: every row is '{task.labels[only]}', so there is nothing to learn")


def check_names(task: Task, names: list[str] | None, where: str) -> None:
    """Refuses data that name their classes otherwise than the task, or in another order.

    Raises:
        DataError: They do.
    """
    if names is not None and tuple(names) != task.labels:
        raise DataError(
            f"{where}: column '{task.label}' names its classes {', '.join(names)}; "
            f"the task needs {', '.join(task.labels)}, in this order"
        )
