"""How well a model does a task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from hfcompress.errors import CompressionError, DataError
from hfcompress.evaluation.comparison import Answers
from hfcompress.evaluation.inference import inferring
from hfcompress.evaluation.metrics import answered, score
from hfcompress.tasks import Task, align_labels, kind_of
from hfcompress.tasks.catalog import GLUE_DATASET

if TYPE_CHECKING:
    from datasets import Dataset
    from evaluate import EvaluationModule
    from transformers import PreTrainedModel

_LOGITS = ("logits", "start_logits", "end_logits")
_RIGHT = {"labels", "start_positions", "end_positions"}


@dataclass(frozen=True, kw_only=True)
class Quality:
    """What a model scored.

    Attributes:
        metrics: The task's metrics by name; NaN where one is undefined on these predictions.
        primary: The metric that retention is computed on.
        examples: How many were measured.
        predictions: One an example, in the data's order, of the form that the task's kind gives: label ids of the
            task, numbers in regression.
        references: The right ones.
        confidences: The probability given to each prediction; nothing where answers are not label ids.
    """

    metrics: dict[str, float]
    primary: str
    examples: int
    predictions: list[Any]
    references: list[Any]
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
    tokenizer: Any,
    *,
    batch_size: int = 32,
    progress: bool = True,
    extra_metrics: Sequence[EvaluationModule] = (),
) -> Quality:
    """Measures a model on an encoded split.

    Args:
        model: A model with the head that the task's kind needs; it is left in the mode it was in.
        dataset: Rows from `preprocess(..., label2id=model.config.label2id)`.
        task: The task that the rows are of.
        tokenizer: Makes the batches; of images the image processor.
        batch_size: Rows a forward pass. Rows of similar length go together.
        progress: Whether to show a progress bar on standard error.
        extra_metrics: Loaded modules of `evaluate` that judge the answers too, such as `load_metric("rouge")` or
            `evaluate.load(...)`. They get predictions and references as the task's kind gives them.

    Returns:
        The metrics and the predictions.

    Raises:
        DataError: The rows are not encoded or have no labels, or the model's head does not fit the task.
        CompressionError: The model's outputs are not finite.
    """
    kind = kind_of(task)
    wanted = kind.encoded
    if not set(wanted) <= set(dataset.column_names):
        raise DataError(
            f"the rows to evaluate lack {' or '.join(map(repr, wanted))}; found: {', '.join(dataset.column_names)}",
            hint="Pass what `preprocess` returns.",
        )
    if len(dataset) == 0:
        raise DataError(f"task '{task.name}': there are no rows to evaluate")
    ids = align_labels(task, cast("Mapping[str, int]", model.config.label2id))
    kind.require_head(task, model)
    kept = _outputs(model, dataset, task, tokenizer, batch_size=batch_size, progress=progress)
    given = kind.answers(task, ids, dataset, kept)
    metrics = score_task(task, given.predictions, given.references, given.confidences)
    for module in extra_metrics:
        metrics |= _named(module, module.compute(predictions=given.predictions, references=given.references), metrics)
    return Quality(
        metrics=metrics,
        primary=task.metrics[0],
        examples=len(given.predictions),
        predictions=given.predictions,
        references=given.references,
        confidences=given.confidences,
    )


def score_task(
    task: Task, predictions: Sequence[Any], references: Sequence[Any], confidences: Sequence[float] = ()
) -> dict[str, float]:
    """Returns a task's metrics of some predictions, GLUE's as `evaluate` computes them.

    Args:
        task: The task.
        predictions: One answer an example.
        references: The right ones.
        confidences: The probability given to each prediction, for metrics of scores.
    """
    scores: dict[str, float] = {}
    if task.dataset == GLUE_DATASET:
        from hfcompress.evaluation.glue import Glue

        scores = Glue(task.dataset_config).compute(predictions=predictions, references=references) or {}
    given = Answers(predictions=list(predictions), references=list(references), confidences=list(confidences))
    for name in task.metrics:
        if name not in scores:
            scores |= score([name], answered(name, given), references)
    return scores


def _named(module: EvaluationModule, found: Any, known: Mapping[str, float]) -> dict[str, float]:
    """Returns the numbers that a module found, those whose names are taken with the module's name before them."""
    values = found if isinstance(found, Mapping) else {str(module.name): found}
    numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
    return {f"{module.name}_{name}" if name in known else name: value for name, value in numbers.items()}


def _outputs(
    model: PreTrainedModel, dataset: Dataset, task: Task, processor: Any, *, batch_size: int, progress: bool
) -> list[Any]:
    """Returns what the kind keeps of the outputs of every row, in the dataset's order."""
    import torch
    from tqdm import tqdm

    kind = kind_of(task)
    collate = kind.collator(processor)
    kept: list[Any] = [None] * len(dataset)
    with (
        inferring(model),
        tqdm(total=len(dataset), desc="Evaluating", unit="row", disable=not progress) as bar,
    ):
        for places in _batches(kind.lengths(dataset), kind.batch_size(processor, batch_size)):
            batch = {name: value.to(model.device) for name, value in collate(_rows(dataset, places)).items()}
            outputs = kind.ask(model, _without_labels(batch), processor, task)
            if isinstance(outputs, Mapping) and not all(
                torch.isfinite(outputs[name]).all() for name in _LOGITS if name in outputs
            ):
                raise CompressionError(
                    "the model's outputs are not finite, so it cannot be measured",
                    hint="Its weights were damaged by the last step: compress less, or train it further.",
                )
            for place, value in zip(places, kind.read(outputs, batch), strict=True):
                kept[place] = value
            bar.update(len(places))
    return kept


def _rows(dataset: Dataset, places: Sequence[int]) -> list[dict[str, Any]]:
    columns = dataset[places]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out what only a loss needs, which is computed from the logits where it is asked for."""
    return {name: value for name, value in batch.items() if name not in _RIGHT}


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yields row numbers, longest rows first: little padding, and memory runs out at once if it does."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), size):
        yield order[start : start + size]
