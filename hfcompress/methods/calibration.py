"""One pass over calibration batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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
