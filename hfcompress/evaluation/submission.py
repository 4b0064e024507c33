"""Answers to GLUE's test sets, in the files that its server takes (gluebenchmark.com/faq)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hfcompress.configuration import suggest
from hfcompress.errors import ConfigError, DataError, Problem
from hfcompress.evaluation.quality import evaluate_quality
from hfcompress.tasks import Task, preprocess

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

# Which split goes into which file.
_FILES: Mapping[str, Mapping[str, str]] = {
    "cola": {"test": "CoLA.tsv"},
    "sst2": {"test": "SST-2.tsv"},
    "mrpc": {"test": "MRPC.tsv"},
    "qqp": {"test": "QQP.tsv"},
    "stsb": {"test": "STS-B.tsv"},
    "mnli": {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
    "qnli": {"test": "QNLI.tsv"},
    "rte": {"test": "RTE.tsv"},
    "wnli": {"test": "WNLI.tsv"},
    "ax": {"test": "AX.tsv"},
}
# These are answered with the label's name, all others with its number.
_BY_NAME = frozenset({"mnli", "qnli", "rte", "ax"})
_LOWEST, _HIGHEST = 0.0, 5.0  # STS-B's scale, which the server holds answers to


def files_of(task: Task) -> Mapping[str, str]:
    """Returns the file of each test split.

    Raises:
        ConfigError: GLUE has no such task.
    """
    if task.name not in _FILES:
        problem = Problem(("--submission",), f"'{task.name}' is no GLUE task; {suggest(task.name, _FILES)}")
        raise ConfigError("the command", (problem,))
    return _FILES[task.name]


def write_submission(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    task: Task,
    splits: Mapping[str, Dataset],
    *,
    max_length: int = 128,
    batch_size: int = 32,
    progress: bool = True,
) -> list[Path]:
    """Answers a task's test splits.

    Args:
        folder: Where the files go; it is made, and files of these names in it are replaced.
        model: A model with the task's head; for `ax` one of MNLI.
        tokenizer: The model's.
        task: A GLUE task.
        splits: Its data, of which the test splits are read; their labels are not.
        max_length: Tokens after which a text is cut.
        batch_size: Rows of a forward pass.
        progress: Whether to show progress bars.

    Returns:
        The files.

    Raises:
        ConfigError: GLUE has no such task.
        DataError: A test split is not in the data, or the model's head does not fit the task.
    """
    files = files_of(task)
    missing = [split for split in files if split not in splits]
    if missing:
        raise DataError(
            f"task '{task.name}': no split {', '.join(missing)} in the data; found: {', '.join(splits)}",
            hint="GLUE's test splits are part of nyu-mll/glue on the Hub.",
        )
    label2id = cast("dict[str, int]", model.config.label2id) if task.labels else None
    written = []
    for split, name in files.items():
        rows = splits[split]
        encoded = preprocess(_unlabelled(rows, task), task, tokenizer, max_length=max_length, label2id=label2id)
        found = evaluate_quality(model, encoded, task, tokenizer, batch_size=batch_size, progress=progress)
        numbers = rows["idx"] if "idx" in rows.column_names else range(len(rows))
        lines = [f"{number}\t{answer}" for number, answer in zip(numbers, _said(task, found.predictions), strict=True)]
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f".{name}.partial"
        partial.write_text("\n".join(["index\tprediction", *lines]) + "\n", encoding="utf-8")
        os.replace(partial, folder / name)
        written.append(folder / name)
    return written


def _unlabelled(rows: Dataset, task: Task) -> Dataset:
    """Returns rows that all have one and the same label: what stands in the data is -1, or nothing."""
    if task.label in rows.column_names:
        rows = rows.remove_columns(task.label)
    return rows.add_column(task.label, [0 if task.labels else 0.0] * len(rows))  # type: ignore[call-arg]


def _said(task: Task, predictions: Sequence[Any]) -> list[str]:
    if not task.labels:
        return [f"{min(max(value, _LOWEST), _HIGHEST):.3f}" for value in predictions]
    return [task.labels[label] if task.name in _BY_NAME else str(label) for label in predictions]
