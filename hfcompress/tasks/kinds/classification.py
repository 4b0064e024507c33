"""Sentences and pairs of them: one of the labels, or one number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfcompress.errors import DataError
from hfcompress.tasks.checks import check_classes, check_numbers, check_texts
from hfcompress.tasks.kinds.base import Given, Kind, Labelled
from hfcompress.tasks.task import Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel

CONFIDENCE_DIGITS = 4


class _Sentences(Kind):
    """What both have in common: how texts are read."""

    auto_class = "AutoModelForSequenceClassification"
    pipeline_tag = "text-classification"
    columns = ("text",)

    def sources(self, task: Task, rows: Dataset) -> list[str] | list[tuple[str, str]]:
        """Returns the texts, or the pairs of them."""
        texts = [list(rows[name]) for name in task.columns]
        return list(zip(*texts, strict=True)) if task.pair else texts[0]

    def encode(self, dataset: Dataset, task: Task, processor: Any, *, max_length: int) -> Dataset:
        """Tokenizes one text or a pair of them, cut off at `max_length`."""

        def tokenize(rows: dict[str, list[Any]]) -> dict[str, Any]:
            texts = dict(zip(("text", "text_pair"), (rows[name] for name in task.columns), strict=False))
            encoded = dict(processor(**texts, truncation=True, max_length=max_length))
            encoded["labels"] = [self.label_of(task, label) for label in rows[task.label]]
            return encoded

        # In memory, because a tokenizer's hash changes once it has been called: a cache on disk would only grow.
        return dataset.map(
            tokenize,
            batched=True,
            remove_columns=dataset.column_names,
            keep_in_memory=True,
            desc=f"Tokenizing {task.name}",
        )

    def label_of(self, task: Task, label: Any) -> int | float:
        """Returns the label of a row as it is learnt."""
        raise NotImplementedError

    def collator(self, processor: Any) -> Any:
        """Pads as the tokenizer does."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(processor)

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[Any]:
        """Keeps the logits: (labels,), float32."""
        return list(outputs.logits.float().cpu())


class Classification(Labelled, _Sentences):
    """One of the labels."""

    name = "classification"
    metrics = ("accuracy", "f1", "f1_macro", "matthews_correlation", "precision", "recall", "roc_auc")
    defaults = ("accuracy",)

    def check(self, task: Task, split: Dataset, where: str, *, training: bool) -> None:
        """Texts, and ids of labels."""
        for column in task.columns:
            check_texts(split, column, where)
        check_classes(task, split, where, training=training)

    def named(self, task: Task, split: Dataset) -> Dataset:
        """Makes the label column a `ClassLabel`."""
        return named_labels(task, split)

    def label_of(self, task: Task, label: Any) -> int | float:
        """Returns the id.

        Raises:
            DataError: It is none of the task's.
        """
        if not 0 <= label < len(task.labels):
            raise DataError(
                f"column '{task.label}' holds {label}; the labels of task '{task.name}' are 0 to "
                f"{len(task.labels) - 1}",
                hint="GLUE's test splits have no labels (-1); measure on the validation split.",
            )
        return int(label)

    def with_label_ids(self, rows: Dataset, ids: Sequence[int]) -> Dataset:
        """Translates each row's label."""
        return translated(rows, ids)

    def answers(self, task: Task, ids: Sequence[int], rows: Dataset, kept: Sequence[Any]) -> Given:
        """Returns the task's label ids."""
        return label_answers(ids, list(rows["labels"]), kept)


class Regression(_Sentences):
    """One number."""

    name = "regression"
    metrics = ("pearson", "spearmanr", "mean_squared_error", "mean_absolute_error", "r_squared")
    defaults = ("pearson", "spearmanr")
    flips = False

    def check(self, task: Task, split: Dataset, where: str, *, training: bool) -> None:
        """Texts, and finite numbers."""
        for column in task.columns:
            check_texts(split, column, where)
        check_numbers(split, task.label, where)

    def label_of(self, task: Task, label: Any) -> int | float:
        """Returns the number."""
        return float(label)

    def head_fits(self, task: Task, config: Any) -> bool:
        """Tells whether the head has one output."""
        return config.num_labels == 1

    def head(self, task: Task) -> dict[str, Any]:
        """Returns the options of a head with one output."""
        names = {"num_labels": 1, "id2label": {0: "score"}, "label2id": {"score": 0}}
        return {**names, "problem_type": "regression"}

    def require_head(self, task: Task, model: PreTrainedModel) -> None:
        """Refuses a head with more than one output.

        Raises:
            DataError: It has more.
        """
        if model.config.num_labels != 1:
            raise DataError(f"task '{task.name}' needs 1 outputs; the model has {model.config.num_labels}")

    def answers(self, task: Task, ids: Sequence[int], rows: Dataset, kept: Sequence[Any]) -> Given:
        """Returns the numbers."""
        return Given([float(row[0]) for row in kept], list(rows["labels"]), [])


def named_labels(task: Task, split: Dataset) -> Dataset:
    """Returns a split whose label column is a `ClassLabel` with the task's names."""
    from datasets import ClassLabel

    if task.label not in split.column_names or isinstance(split.features[task.label], ClassLabel):
        return split
    return split.cast_column(task.label, ClassLabel(names=list(task.labels)))


def translated(rows: Dataset, ids: Sequence[int]) -> Dataset:
    """Returns rows whose one label is a model's id."""
    if list(ids) == sorted(ids):
        return rows
    return rows.map(lambda row: {"labels": ids[row["labels"]]}, keep_in_memory=True)


def label_answers(ids: Sequence[int], labels: Sequence[int], kept: Sequence[torch.Tensor]) -> Given:
    """Turns logits into label ids of the task, with the probability of each."""
    import torch

    logits = torch.stack(list(kept))
    # Back to the task's own ids: F1 asks which class is the positive one.
    task_ids = {model_id: task_id for task_id, model_id in enumerate(ids)}
    return Given(
        [task_ids[number] for number in logits.argmax(-1).tolist()],
        [task_ids[number] for number in labels],
        [round(share, CONFIDENCE_DIGITS) for share in logits.double().softmax(-1).amax(-1).tolist()],
    )
