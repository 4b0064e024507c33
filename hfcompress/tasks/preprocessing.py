"""From rows of data to what a model reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfcompress.errors import DataError
from hfcompress.tasks.kinds import kind_of
from hfcompress.tasks.labels import align_labels
from hfcompress.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["align_labels", "preprocess"]


def preprocess(
    dataset: Dataset,
    task: Task,
    tokenizer: Any,
    *,
    max_length: int,
    label2id: Mapping[str, int] | None,
) -> Dataset:
    """Tokenizes a split and translates its labels to the model's.

    Args:
        dataset: Rows with the task's columns, as `load_data` returns them.
        task: The task.
        tokenizer: The model's tokenizer, or its image processor. Nothing is padded.
        max_length: The most tokens a row may have, special tokens included.
        label2id: The model's label ids by name (`model.config.label2id`), or None to keep the data's.

    Returns:
        What the model reads and `labels`. One row for each row of the data; language models get one for each block
        of text, question answering one for each window of a context.

    Raises:
        DataError: A column is missing, the labels do not match by name, or `max_length` is more than
            the tokenizer allows.
    """
    wanted = [*task.columns, task.label] if task.label else list(task.columns)
    missing = [name for name in wanted if name not in dataset.column_names]
    if missing:
        raise DataError(
            f"task '{task.name}' needs column {_quoted(missing)}; the data has {_quoted(dataset.column_names)}"
        )
    longest = getattr(tokenizer, "model_max_length", None)
    if longest is not None and not 1 <= max_length <= longest:
        raise DataError(f"max_length {max_length} must be from 1 to {longest}, the longest input of this tokenizer")
    ids = align_labels(task, label2id)
    kind = kind_of(task)
    return kind.with_label_ids(kind.encode(dataset, task, tokenizer, max_length=max_length), ids)


def _quoted(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
