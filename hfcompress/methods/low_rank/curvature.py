"""What a model's predictions say of each direction of a layer's outputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import evaluating
from hfcompress.methods.low_rank.maths import Pulled
from hfcompress.methods.registry import Batch
from hfcompress.methods.statistics import LayerReader, each_batch
from hfcompress.modeling.anatomy import module_at

_SEED = 0
# Tokens at once: a language model predicts a whole vocabulary at each, and several copies of that are needed.
_TOKENS = 4096
# How sure of its likeliest answer a model may be on average. Where it is surer, its gradients come from the few rows
# that it doubts, and say nothing of changes as large as the loss of half the parameters.
_SURE = 0.6


def output_curvature(
    model: PreTrainedModel,
    paths: Sequence[str],
    batches: Sequence[Batch],
    *,
    pulled: Collection[str] = (),
    reader: LayerReader | None = None,
) -> dict[str, torch.Tensor | Pulled]:
    """Sums, per prediction, the second moments of the gradients that reach a layer's outputs.

    The gradients are those of the loss on answers drawn from the model's own predictions, so that with the second
    moments of the inputs these are the two Kronecker factors of the Fisher information (Martens and Grosse 2015), and
    half of `tr(C D S Dᵀ)` is the divergence, in nats a prediction, that a small change D of the weights brings about.
    A model that is very sure is asked at the temperature at which it is less so (`temperature_of`).
    Of a model without a head it is a squared change of its hidden states, relative to their size. Labels are not read.
    A layer that the predictions do not depend on has a curvature of zero.

    Args:
        model: The model.
        paths: Linear layers, relative to the base model.
        batches: Model inputs.
        pulled: Those of them of which it is enough to know what the curvature is to the inputs: of a layer with more
            outputs than inputs that is sooner made, and sooner used.
        reader: Reads off the same passes; entered by the caller.

    Returns:
        For each path float32 `(out, out)`, or what that is to its inputs.

    Raises:
        CompressionError: No batches, a layer that is never run, or gradients that are not finite (it is named).
    """
    sums = {path: _Gradients(path in pulled) for path in paths}
    total, temperatures = 0, []
    generator = torch.Generator().manual_seed(_SEED)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack, torch.enable_grad(), evaluating(model):
        for parameter in wanted:  # theirs are not needed: a third of the work
            parameter.requires_grad_(False)
            stack.callback(parameter.requires_grad_, True)
        for path in paths:
            module = module_at(model, path)
            stack.callback(module.register_forward_hook(sums[path].watch_outputs).remove)
            if path in pulled:
                stack.callback(module.register_forward_pre_hook(sums[path].watch_inputs).remove)
        for batch in each_batch(model, batches, "curvature"):
            for part in _parts(batch):
                if reader is not None:
                    reader.batch = part
                loss, count = _drawn_loss(model, part, generator, temperatures)
                if loss.requires_grad:
                    loss.backward()
                total += count
    return {path: found.curvature(path, total, model.device) for path, found in sums.items()}


class _Gradients:
    """Sums of the gradients that pass one layer: second moments where it ends, or where it begins."""

    def __init__(self, pulled: bool) -> None:
        self._pulled = pulled
        self._width = 0
        self._moment: torch.Tensor | None = None
        self._squares: torch.Tensor | float = 0.0

    def watch_outputs(self, module: nn.Module, arguments: Any, output: torch.Tensor) -> torch.Tensor:
        """Is a forward hook."""
        output = _followed(output)
        if self._pulled:
            output.register_hook(self._add_squares)
        else:
            self._width = output.shape[-1]
            output.register_hook(self._add)
        return output

    def watch_inputs(self, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Is a forward pre-hook: other layers read the same tensor, and what comes back from them is not wanted."""
        own = _followed(arguments[0].view_as(arguments[0]))
        self._width = own.shape[-1]
        own.register_hook(self._add)
        return own, *arguments[1:]

    def curvature(self, path: str, count: int, device: torch.device) -> torch.Tensor | Pulled:
        """Returns what has been found, per prediction.

        Raises:
            CompressionError: The layer was never run, or the gradients are not finite.
        """
        if not self._width:
            raise CompressionError(f"{path} was never run on the calibration batches")
        moment = torch.zeros(self._width, self._width, device=device) if self._moment is None else self._moment
        if not (torch.isfinite(moment).all() and math.isfinite(self._squares)):
            raise CompressionError(f"{path}: the gradients on the calibration batches are not finite")
        return Pulled(moment / count, float(self._squares) / count) if self._pulled else moment / count

    def _add(self, gradient: torch.Tensor) -> None:
        rows = gradient.detach().flatten(0, -2).float()
        rows = rows[rows.any(1)]  # no loss comes back to padding, nor to what a classifier's last layer says of words
        found = rows.T @ rows
        self._moment = found if self._moment is None else self._moment.add_(found)

    def _add_squares(self, gradient: torch.Tensor) -> None:
        self._squares += gradient.detach().float().square().sum()


def _followed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.requires_grad else tensor.detach().requires_grad_()


def _parts(batch: Batch) -> Iterator[Batch]:
    """Cuts a batch of long texts into smaller ones."""
    ids = batch.get("input_ids")
    if ids is None or ids.dim() != 2 or ids.numel() <= _TOKENS:
        yield batch
        return
    rows = max(1, _TOKENS // ids.shape[1])
    for start in range(0, len(ids), rows):
        yield {name: value[start : start + rows] for name, value in batch.items()}


def temperature_of(logits: torch.Tensor) -> float:
    """Returns the least temperature, from 1 to 100, at which the likeliest answer has 0.6 or less on average.

    Args:
        logits: `(..., classes)`.
    """
    low, high = 1.0, 100.0
    if logits.softmax(-1).amax(-1).mean() <= _SURE:
        return low
    for _ in range(20):
        middle = (low * high) ** 0.5
        if (logits / middle).softmax(-1).amax(-1).mean() > _SURE:
            low = middle
        else:
            high = middle
    return high


def _drawn_loss(
    model: PreTrainedModel, batch: Batch, generator: torch.Generator, temperatures: list[float]
) -> tuple[torch.Tensor, int]:
    """Returns the loss on answers drawn from what the model predicts, summed, and how many there are.

    The first batch fills `temperatures`, one for each of the outputs, for all.
    """
    outputs: Any = model(**{name: value for name, value in batch.items() if name != "labels"})
    found = [outputs[name] for name in ("logits", "start_logits", "end_logits") if outputs.get(name) is not None]
    if not found:
        hidden = next(each for each in outputs.to_tuple() if isinstance(each, torch.Tensor) and each.dim() > 1)
        rows = _rows(hidden, batch)
        return (rows * _noise(rows, generator)).sum() / rows.detach().square().sum(-1).mean().sqrt(), len(rows)
    rows = [_rows(logits, batch) for logits in found]
    if not temperatures:
        temperatures += [temperature_of(each.detach()) for each in rows]
    losses = [_of_logits(each, heat, generator) for each, heat in zip(rows, temperatures, strict=True)]
    return torch.stack(losses).sum(), len(rows[0])


def _of_logits(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> torch.Tensor:
    if logits.shape[-1] == 1:  # a number, as good as one of unit variance
        return (logits * _noise(logits, generator)).sum()
    logs = (logits / temperature).log_softmax(-1)
    drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator).to(logs.device)
    return -logs.gather(-1, drawn).sum()


def _noise(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=generator).to(like)


def _rows(outputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Returns `(..., classes)` as float32 rows without those of padding, gradients kept."""
    mask = batch.get("attention_mask")
    if outputs.dim() == 3 and mask is not None and mask.dim() == 2 and mask.shape == outputs.shape[:2] and mask.any():
        return outputs[mask.bool()].float()
    return outputs.flatten(0, -2).float()
