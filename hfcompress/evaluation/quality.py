"""How well a model does a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from hfcompress.errors import CompressionError, DataError
from hfcompress.evaluation.comparison import CONFIDENCE_DIGITS, Answers
from hfcompress.evaluation.inference import inferring
from hfcompress.evaluation.metrics import score
from hfcompress.tasks import Task, align_labels
from hfcompress.tasks.catalog import GLUE_DATASET

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Predictions = list[int] | list[float]


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a model scored.

    Attributes:
        metrics: The task's metrics by name; NaN where one is undefined on these predictions.
        primary: The metric that retention is computed on.
        examples: How many rows were measured.
        predictions: One a row, in the dataset's order: label ids of the task, or numbers in regression.
        references: The right ones.
        confidences: The probability given to each prediction; nothing in regression.
    """

    metrics: dict[str, float]
    primary: str
    examples: int
    predictions: Predictions
    references: Predictions
    confidences: list[float]

    @property
    def answers(self) -> Answers:
        """The answers, for a comparison with another model's."""
        return Answers(predictions=self.predictions, references=self.references, confidences=self.confidences)

    @property
    def value(self) -> float:
        """The primary metric."""
        return self.metrics[self.primary]


def evaluate_quality(
    model: PreTrainedModel,
    dataset: Dataset,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 32,
    progress: bool = True,
) -> Quality:
    """Measures a model on a tokenized split.

    Args:
        model: A model with a sequence-classification head; it is left in the mode it was in.
        dataset: Rows from `preprocess(..., label2id=model.config.label2id)`.
        task: The task that the rows are of.
        tokenizer: Pads the batches.
        batch_size: Rows a forward pass. Rows of similar length go together.
        progress: Whether to show a progress bar on standard error.

    Returns:
        The metrics and the predictions.

    Raises:
        DataError: The rows are not tokenized or have no labels, or the model's head does not fit the task.
        CompressionError: The model's outputs are not finite.
    """
    if "labels" not in dataset.column_names or "input_ids" not in dataset.column_names:
        raise DataError(
            f"the rows to evaluate lack 'input_ids' or 'labels'; found: {', '.join(dataset.column_names)}",
            hint="Pass what `preprocess` returns.",
        )
    if len(dataset) == 0:
        raise DataError(f"task '{task.name}': there are no rows to evaluate")
    ids = align_labels(task, cast("Mapping[str, int]", model.config.label2id))
    outputs = 1 if task.kind == "regression" else len(task.labels)
    if model.config.num_labels != outputs:
        raise DataError(f"task '{task.name}' needs {outputs} outputs; the model has {model.config.num_labels}")
    logits = _predict(model, dataset, tokenizer, batch_size=batch_size, progress=progress)
    references = list(dataset["labels"])
    confidences: list[float] = []
    if task.kind == "regression":
        predictions = logits[:, 0].tolist()
    else:
        # Back to the task's own ids: F1 asks which class is the positive one.
        task_ids = {model_id: task_id for task_id, model_id in enumerate(ids)}
        predictions = [task_ids[number] for number in logits.argmax(-1).tolist()]
        references = [task_ids[number] for number in references]
        confidences = [round(share, CONFIDENCE_DIGITS) for share in logits.double().softmax(-1).amax(-1).tolist()]
    return Quality(
        metrics=score_task(task, predictions, references),
        primary=task.metrics[0],
        examples=len(predictions),
        predictions=predictions,
        references=references,
        confidences=confidences,
    )


def score_task(task: Task, predictions: Predictions, references: Predictions) -> dict[str, float]:
    """Returns a task's metrics of some predictions, GLUE's as `evaluate` computes them."""
    if task.dataset != GLUE_DATASET:
        return score(task.metrics, predictions, references)
    from hfcompress.evaluation.glue import Glue

    scores = Glue(task.dataset_config).compute(predictions=predictions, references=references)
    assert scores is not None
    return scores


def _predict(
    model: PreTrainedModel,
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int,
    progress: bool,
) -> torch.Tensor:
    """Returns the logits of every row, in the dataset's order: (rows, outputs), float32, on the CPU."""
    import torch
    from tqdm import tqdm

    inputs = [name for name in tokenizer.model_input_names if name in dataset.column_names]
    rows = dataset.select_columns(inputs)
    parts: list[torch.Tensor] = []
    order: list[int] = []
    with (
        inferring(model),
        tqdm(total=len(dataset), desc="Evaluating", unit="row", disable=not progress) as bar,
    ):
        for places in _batches(dataset, batch_size):
            batch = tokenizer.pad(rows[places], return_tensors="pt").to(model.device)
            logits = model(**batch).logits.float().cpu()
            if not torch.isfinite(logits).all():
                raise CompressionError(
                    "the model's outputs are not finite, so it cannot be measured",
                    hint="Its weights were damaged by the last step: compress less, or train it further.",
                )
            parts.append(logits)
            order.extend(places)
            bar.update(len(places))
    return torch.cat(parts)[torch.tensor(order).argsort()]


def _batches(dataset: Dataset, size: int) -> Iterator[Sequence[int]]:
    """Yields row numbers, longest rows first: little padding, and memory runs out at once if it does."""
    lengths = [len(row) for row in dataset["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), size):
        yield order[start : start + size]
