"""A task's training data for an export: batches to calibrate on, and a score to hold, on two parts of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from hfcompress.deployment.heads import head_of
from hfcompress.errors import DataError
from hfcompress.tasks import Given, Task, align_labels, kind_of, load_data, preprocess
from hfcompress_runtime import Pipeline

Measure = Callable[[str, Given], float]
SCORED_EXAMPLES = 1024
_SIZE = 16
# What is better when it is smaller is judged by its inverse.
_LOSSES = ("perplexity", "bits_per_byte", "masked_perplexity", "wer", "cer")
_LEAST = 1e-3  # of a loss: a share of errors may be none


def calibration_data(
    directory: Path,
    task: Task,
    data: str | None,
    *,
    examples: int,
    max_length: int,
    measure: Measure,
    progress: bool = True,
) -> tuple[list[dict[str, torch.Tensor]], Callable[[Pipeline], float]]:
    """Reads training data of a task for an export.

    Args:
        directory: The checkpoint that is exported.
        task: Any kind of task.
        data: A local folder with its data; None for where the task says.
        examples: Rows to calibrate on; up to `SCORED_EXAMPLES` others are for the score.
        max_length: Tokens after which a text is cut.
        measure: Returns a metric, by its name, of a model's answers.
        progress: Whether to show progress.

    Returns:
        Batches of model inputs, and a function that judges an exported graph by the task's first metric; of
        perplexities by the inverse, so that higher is better.

    Raises:
        DataError: The task has no training data, or they do not fit it or the checkpoint.
        UnsupportedModelError: The checkpoint's head cannot be exported.
    """
    from transformers import AutoConfig

    kind = kind_of(task)
    if task.training_split is None:
        raise DataError(f"task '{task.name}' has no training data to calibrate on", hint="Choose a task that has.")
    config: Any = AutoConfig.from_pretrained(directory)
    head_of(config)
    if not kind.has_head(config):
        raise DataError(
            f"{directory}: its head is {', '.join(config.architectures or ['nothing'])}; task '{task.name}' needs one "
            f"that {kind.auto_class} loads"
        )
    processor = kind.load_processor(directory)
    label2id = cast("dict[str, int]", config.label2id) if task.labels else None
    ids = align_labels(task, label2id)
    split = load_data(task, data, progress=progress)[task.training_split].shuffle(seed=0)
    split = split.select(range(min(len(split), examples + SCORED_EXAMPLES)))
    rows = preprocess(split, task, processor, max_length=max_length, label2id=label2id)
    edge = max(_SIZE, min(examples, len(rows) // 2))
    if edge >= len(rows):
        raise DataError(f"task '{task.name}' has {len(rows)} training rows: too few to calibrate on some of them")
    collate = kind.collator(processor)
    held = rows.select(range(edge, len(rows)))
    batches = [collate(_rows(rows, start, min(start + _SIZE, edge))) for start in range(0, edge, _SIZE)]

    def score(pipeline: Pipeline) -> float:
        kept: list[Any] = []
        # The graph hears what fills up shorter sounds.
        size = 1 if pipeline.manifest.reads == "sounds" else _SIZE
        for start in range(0, len(held), size):
            batch = collate(_rows(held, start, min(start + size, len(held))))
            kept += kind.read(_outputs(pipeline, batch, task), batch)
        given = kind.answers(task, ids, held, kept)
        name = task.metrics[0]
        value = measure(name, given)
        return 1 / max(value, _LEAST) if name in _LOSSES else value

    return batches, score


def _outputs(pipeline: Pipeline, batch: Mapping[str, torch.Tensor], task: Task) -> Any:
    """Returns what a graph says of a batch, in the form that its kind of task reads."""
    arrays = {name: batch[name].numpy() for name in pipeline.manifest.inputs if name in batch}
    if pipeline.manifest.reads == "sounds":
        return {"texts": pipeline.texts(arrays)}
    if task.generation is not None:
        return [text.strip() for text in pipeline.texts(arrays, task.generation.tokens)]
    found = pipeline.outputs(arrays)
    return SimpleNamespace(**{name: torch.from_numpy(each) for name, each in found.items()})


def _rows(dataset: Any, start: int, end: int) -> list[dict[str, Any]]:
    columns = dataset[start:end]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
