"""One pass over calibration batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.registry import Batch


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Runs the body in evaluation mode and puts every module's mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def checked_batches(batches: Iterable[Batch]) -> list[Batch]:
    """Returns batches of calibration data as a list.

    Raises:
        CompressionError: One is no mapping of names to tensors with a row for each example.
    """
    if isinstance(batches, Mapping):
        raise CompressionError(
            "calibration is one batch where there should be several", hint="Pass calibration=[batch, ...]."
        )
    listed = list(batches)
    for number, batch in enumerate(listed):
        if not isinstance(batch, Mapping) or not batch:
            raise CompressionError(
                f"calibration batch {number} is a {type(batch).__name__}, not a mapping of model inputs",
                hint='Pass what a tokenizer returns with return_tensors="pt", padding=True.',
            )
        for name, value in batch.items():
            least = 2 if name == "input_ids" else 1  # the rows of a data set are one example each
            if not isinstance(value, torch.Tensor) or value.dim() < least or len(value) == 0:
                shape = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
                raise CompressionError(
                    f"calibration batch {number}: '{name}' should be a tensor with a row for each example, not {shape}",
                    hint="Collate examples to batches of tensors, and leave out what is None.",
                )
    return listed


def labels_of(batch: Batch) -> torch.Tensor | None:
    """Returns what a batch says is right: its `labels`, or where the answers to its questions start; else None."""
    return batch.get("labels", batch.get("start_positions"))


def are_labelled(batches: Sequence[Batch]) -> bool:
    """Tells whether there are batches, and a model can give its loss on all of them."""
    return bool(batches) and all(labels_of(batch) is not None for batch in batches)


def examples_in(batch: Batch) -> int:
    """Returns how many examples a batch holds: positions, say, may be given once for all of them."""
    labels = labels_of(batch)
    return max(map(len, batch.values())) if labels is None else len(labels)


def run_batches(model: PreTrainedModel, batches: Sequence[Batch], *, description: str) -> Iterator[Any]:
    """Yields the model's outputs batch by batch, in evaluation mode, with a progress bar.

    Raises:
        CompressionError: There are no batches.
    """
    if not batches:
        raise CompressionError(
            "this needs calibration data, and there is none",
            hint="Pass calibration=[batch, ...]: mappings of model inputs such as a tokenizer returns.",
        )
    with evaluating(model):
        for batch in tqdm(batches, desc=description, leave=False):
            yield model(**{name: value.to(model.device) for name, value in batch.items()})
