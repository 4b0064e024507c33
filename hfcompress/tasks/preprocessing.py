"""From rows of text and label ids to what a model reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfcompress.errors import DataError
from hfcompress.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_GENERIC = re.compile(r"LABEL_\d+", re.IGNORECASE)


def preprocess(
    dataset: Dataset,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    label2id: Mapping[str, int] | None,
) -> Dataset:
    """Tokenizes a split and translates its labels to the model's.

    Args:
        dataset: Rows with the task's columns, as `load_data` returns them.
        task: The task.
        tokenizer: The model's tokenizer. Texts are truncated, and not padded.
        max_length: The most tokens a row may have, special tokens included.
        label2id: The model's label ids by name (`model.config.label2id`), or None to keep the data's.

    Returns:
        The tokenizer's outputs and `labels` (integers, or floats in regression), row for row.

    Raises:
        DataError: A column is missing, the labels do not match by name, or `max_length` is more than
            the tokenizer allows.
    """
    missing = [name for name in (*task.columns, task.label) if name not in dataset.column_names]
    if missing:
        raise DataError(
            f"task '{task.name}' needs column {_quoted(missing)}; the data has {_quoted(dataset.column_names)}"
        )
    if not 1 <= max_length <= tokenizer.model_max_length:
        raise DataError(
            f"max_length {max_length} must be from 1 to {tokenizer.model_max_length}, "
            "the longest input of this tokenizer"
        )
    ids = align_labels(task, label2id)

    def encode(rows: dict[str, list[Any]]) -> dict[str, Any]:
        texts = dict(zip(("text", "text_pair"), (rows[name] for name in task.columns), strict=False))
        encoded = dict(tokenizer(**texts, truncation=True, max_length=max_length))
        encoded["labels"] = [_translate(task, ids, label) for label in rows[task.label]]
        return encoded

    # In memory, because a tokenizer's hash changes once it has been called: a cache on disk would only grow.
    return dataset.map(
        encode,
        batched=True,
        remove_columns=dataset.column_names,
        keep_in_memory=True,
        desc=f"Tokenizing {task.name}",
    )


def align_labels(task: Task, label2id: Mapping[str, int] | None) -> tuple[int, ...]:
    """Returns the model's id of every label of the task, in the task's order.

    Names are compared without regard to case. A model that was never told names (`LABEL_0`, `LABEL_1`,
    ...) is taken to use the task's order.

    Returns:
        One id a label; nothing in regression.

    Raises:
        DataError: The names are not the task's, or the ids are not 0, 1, 2, ...
    """
    if not task.labels:
        return ()
    if label2id is None:
        return tuple(range(len(task.labels)))
    if sorted(label2id.values()) != list(range(len(task.labels))):
        raise _mismatch(task, label2id)
    if all(_GENERIC.fullmatch(name) for name in label2id):
        return tuple(range(len(task.labels)))
    by_name = {name.lower(): number for name, number in label2id.items()}
    if set(by_name) != {name.lower() for name in task.labels}:
        raise _mismatch(task, label2id)
    return tuple(by_name[name.lower()] for name in task.labels)


def _translate(task: Task, ids: tuple[int, ...], label: int | float) -> int | float:
    if not task.labels:
        return float(label)
    if not 0 <= label < len(ids):
        raise DataError(
            f"column '{task.label}' holds {label}; the labels of task '{task.name}' are 0 to {len(ids) - 1}",
            hint="GLUE's test splits have no labels (-1); measure on the validation split.",
        )
    return ids[int(label)]


def _mismatch(task: Task, label2id: Mapping[str, int]) -> DataError:
    return DataError(
        f"the model's labels ({', '.join(f'{name}={number}' for name, number in label2id.items())}) "
        f"are not those of task '{task.name}' ({', '.join(task.labels)})",
        hint="Choose a model fine-tuned on this task, or fine-tune one without a classification head first.",
    )


def _quoted(names: list[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)
