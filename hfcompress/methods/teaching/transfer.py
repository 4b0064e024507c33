"""Rows that only the teacher has an answer to: unlabelled data, and changed copies of rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from hfcompress.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_NO_LABEL = -100


def transfer_set(
    train: Dataset,
    unlabelled: Dataset | None = None,
    *,
    transform: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
) -> Dataset:
    """Adds to a training set what a student can learn from its teacher alone (TinyBERT, arXiv 1909.10351).

    The rows that are added are labelled -100, so that the loss on labels leaves them out. They are made once: a
    teacher cache knows them like any others.

    Args:
        train: Encoded rows, with a class as `labels`, or without that column where `hard` is 0.
        unlabelled: Further encoded rows; columns that `train` has not, and labels, are left out.
        transform: Changes a copy of each row, labelled or not: words exchanged, masked, left out. It gets a row as a
            mapping without labels and returns it.

    Returns:
        The rows of `train`, then those of `unlabelled`, then the changed copies of all.

    Raises:
        DataError: `unlabelled` lacks a column, or labels are of a kind that has no value for none.
    """
    from datasets import Value, concatenate_datasets

    labelled = "labels" in train.column_names
    if labelled:
        kind = train.features["labels"]
        if not (hasattr(kind, "names") or "int" in getattr(kind, "dtype", "")):
            raise DataError(
                "only rows whose labels are classes can stand beside rows without one",
                hint="Leave the column 'labels' out, and set hard: 0.",
            )
        train = train.cast_column("labels", Value("int64"))
    inputs = [name for name in train.column_names if name != "labels"]
    parts = [train]
    if unlabelled is not None:
        if missing := [name for name in inputs if name not in unlabelled.column_names]:
            raise DataError(f"the unlabelled rows lack {', '.join(missing)}", hint="Encode them as the others.")
        parts.append(_without_labels(unlabelled.select_columns(inputs), train, labelled))
    if transform is not None:
        bare = concatenate_datasets([each.select_columns(inputs) for each in parts])
        parts.append(_without_labels(bare.map(transform, desc="Changing rows"), train, labelled))
    return concatenate_datasets(parts)


def _without_labels(rows: Dataset, train: Dataset, labelled: bool) -> Dataset:
    made: Any = rows
    if labelled:
        made = made.add_column("labels", [_NO_LABEL] * len(rows))
    return made.select_columns(train.column_names).cast(train.features)
