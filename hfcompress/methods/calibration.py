"""One pass over calibration batches: what goes into a model's linear layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.registry import Batch
from hfcompress.modeling.anatomy import base_model


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


def input_second_moments(
    model: PreTrainedModel, paths: Sequence[str], batches: Sequence[Batch]
) -> Mapping[str, torch.Tensor]:
    """Averages `x xᵀ` over every position that enters a linear layer.

    Padding positions count like any other: they are what the layer sees. Layers that read the same tensor
    (query, key and value) share one accumulator.

    Args:
        model: The model.
        paths: The layers, relative to the base model.
        batches: Model inputs.

    Returns:
        For each path a float32 matrix `(in, in)`; layers with one input share one tensor.

    Raises:
        CompressionError: No batches, or activations that are not finite (the layer is named).
    """
    base = base_model(model)
    moments: dict[str, torch.Tensor] = {}
    leader: dict[str, str] = {}
    counts: dict[str, int] = {}
    latest: list[tuple[str, torch.Tensor]] = []

    def watch(path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            inputs = arguments[0]
            for other, seen in latest:
                if seen is inputs and counts.get(path) is None:
                    leader[path] = other
                    return
            latest[:] = [(path, inputs)]
            rows = inputs.detach().flatten(0, -2).float()
            if path not in moments:
                moments[path] = torch.zeros(rows.shape[1], rows.shape[1], device=rows.device)
            moments[path].addmm_(rows.T, rows)
            counts[path] = counts.get(path, 0) + len(rows)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for path in paths:
            handle = base.get_submodule(path).register_forward_pre_hook(watch(path))
            stack.callback(handle.remove)
        for _ in run_batches(model, batches, description="calibration"):
            latest.clear()
    for path, moment in moments.items():
        moment.div_(counts[path])
        if not torch.isfinite(moment).all():
            raise CompressionError(f"{path}: the calibration activations are not finite")
    missing = [path for path in paths if path not in moments and path not in leader]
    if missing:
        raise CompressionError(f"{missing[0]} was never run on the calibration batches")
    return {path: moments[leader.get(path, path)] for path in paths}
