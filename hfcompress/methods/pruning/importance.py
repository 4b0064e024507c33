"""How much each unit matters: statistics from one pass over calibration data, and scores from statistics."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import examples_in, run_batches
from hfcompress.methods.digests import feed, model_digest
from hfcompress.methods.pruning.units import Units
from hfcompress.methods.registry import Batch
from hfcompress.methods.statistics import real_rows, remembering
from hfcompress.methods.training import sums_over_rows


def taylor(gradients: torch.Tensor) -> torch.Tensor:
    """Mean size of the derivative by a factor on each unit (Michel et al. 2019): `(examples, units)` to `(units,)`."""
    return gradients.abs().mean(0)


def fisher(gradients: torch.Tensor) -> torch.Tensor:
    """Diagonal of the empirical Fisher matrix (Kwon et al. 2022): `(examples, units)` to `(units,)`."""
    return gradients.square().mean(0)


def magnitude(units: Units) -> torch.Tensor:
    """Squared size of the weights that read each unit, `(units,)`."""
    return units.fold(units.weight_and_gradient()[0].float().square().sum(0))


def kept_gradients(
    model: PreTrainedModel, units: Sequence[Units], batches: Sequence[Batch], folder: Path | None
) -> list[torch.Tensor]:
    """Takes `mask_gradients` from a folder where the same model and data have been there before; stores them if not.

    They hold for any target: a second share, a time instead of FLOPs, cost no further pass.
    """
    return _kept("gradients", mask_gradients, model, units, batches, folder)


def kept_energies(
    model: PreTrainedModel, units: Sequence[Units], batches: Sequence[Batch], folder: Path | None
) -> list[torch.Tensor]:
    """Does the same with `output_energies`."""
    return _kept("energies", output_energies, model, units, batches, folder)


def _kept(
    kind: str,
    collect: Callable[[PreTrainedModel, Sequence[Units], Sequence[Batch]], list[torch.Tensor]],
    model: PreTrainedModel,
    units: Sequence[Units],
    batches: Sequence[Batch],
    folder: Path | None,
) -> list[torch.Tensor]:
    if folder is None:
        return collect(model, units, batches)
    file = statistics_file(kind, model, batches, folder)
    names = [_stored_name(each) for each in units]
    if file.is_file():
        with safe_open(file, "pt") as stored:
            if set(names) <= set(stored.keys()):
                return [stored.get_tensor(name) for name in names]
    found = collect(model, units, batches)
    store_statistics(file, units, found)
    return found


def statistics_file(kind: str, model: PreTrainedModel, batches: Sequence[Batch], folder: Path) -> Path:
    """Returns where `gradients` or `energies` of a model and its data are kept."""
    hasher = hashlib.sha256(model_digest(model).encode())
    device = model.device.type
    computed = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype
    feed(hasher, [str(computed), _problem(model, batches)])
    for batch in batches:
        for name in sorted(batch):
            hasher.update(name.encode())
            feed(hasher, batch[name])
    return folder / f"{kind}-{hasher.hexdigest()[:24]}.safetensors"


def _problem(model: PreTrainedModel, batches: Sequence[Batch]) -> str | None:
    """Returns by which loss a model of whole examples is judged: what its config says, or the first pass will say."""
    said, labels = getattr(model.config, "problem_type", None), batches[0].get("labels") if batches else None
    if said or labels is None or model.config.num_labels is None:
        return said
    if model.config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if labels.is_floating_point() else "single_label_classification"


def store_statistics(file: Path, units: Sequence[Units], statistics: Sequence[torch.Tensor]) -> None:
    """Writes what was collected for each of some units, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    save_file({_stored_name(each): found for each, found in zip(units, statistics, strict=True)}, partial)
    os.replace(partial, file)


def _stored_name(units: Units) -> str:
    return f"{'heads' if units.are_heads else 'neurons'} of {units.block.name}"


class _NotByExample(Exception):
    """A block's inputs do not have the batch's examples in their first dimension."""


def mask_gradients(model: PreTrainedModel, units: Sequence[Units], batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Takes the derivative of each example's loss by a factor on each unit.

    Every example gets factors of its own, all 1, so that one backward pass through a batch tells its examples
    apart; no gradient of a weight is computed. Where a block mixes the examples of a batch they are run one by one.
    Of a loss that is a mean over tokens an example has the share that its tokens have in the batch.

    Args:
        model: The model; in evaluation mode while this runs.
        units: The units.
        batches: Model inputs with `labels`.

    Returns:
        For each of `units` float32 `(examples, count)`, on the CPU.

    Raises:
        CompressionError: No batches, no loss, or derivatives that are not finite.
    """
    try:
        return _mask_gradients(model, units, batches)
    except _NotByExample:
        return _mask_gradients(model, units, [one for batch in batches for one in _one_by_one(batch)])


def largest_first(batches: Sequence[Batch]) -> list[int]:
    """Returns the order in which a pass over batches takes least memory.

    What one batch leaves free then holds the next, where growing ones would each need room of their own.
    """
    sizes = [max(value.numel() for value in batch.values()) for batch in batches]
    return sorted(range(len(batches)), key=lambda number: -sizes[number])


def _one_by_one(batch: Batch) -> Iterator[Batch]:
    count = examples_in(batch)
    for index in range(count):
        yield {name: value[index : index + 1] if len(value) == count else value for name, value in batch.items()}


def _mask_gradients(model: PreTrainedModel, units: Sequence[Units], batches: Sequence[Batch]) -> list[torch.Tensor]:
    rows: list[list[torch.Tensor]] = [[torch.empty(0)] * len(batches) for _ in units]
    order = largest_first(batches)
    with _frozen(model), unit_factors(model, units) as factors:
        passes = run_batches(model, [batches[number] for number in order], description="scoring")
        for outputs, number in zip(passes, order, strict=True):
            loss = outputs.get("loss")
            if loss is None:
                raise CompressionError("the model returns no loss for the calibration batches")
            examples = 1 if sums_over_rows(model) else len(factors[0])  # else the loss is a mean over the batch
            found = torch.autograd.grad(loss * examples, factors, allow_unused=True)
            for kept, factor, gradient in zip(rows, factors, found, strict=True):
                gradient = torch.zeros_like(factor) if gradient is None else gradient.detach()
                kept[number] = gradient.float().cpu()
    gradients = [torch.cat(each) for each in rows]
    for each, gradient in zip(units, gradients, strict=True):
        if not torch.isfinite(gradient).all():
            raise CompressionError(
                f"{each.block.name}: importance is not finite", hint="Check weights and calibration data for NaN."
            )
    return gradients


@contextmanager
def unit_factors(model: nn.Module, units: Sequence[Units]) -> Iterator[list[torch.Tensor]]:
    """Multiplies every example's units by factors of its own, all 1, inside the body.

    Args:
        model: The model, which is called with named inputs, of which the first has the batch's examples.
        units: The units.

    Yields:
        The factors of the last forward pass, for each of `units` `(examples, count)`: leaves of its graph.
    """
    factors: list[torch.Tensor] = []

    def opening(module: nn.Module, arguments: Any, batch: Batch) -> None:
        size = examples_in(batch)
        factors[:] = [torch.ones(size, each.count, device=each.entry.weight.device).requires_grad_() for each in units]

    def by_example(index: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            inputs, factor = arguments[0], units[index].spread(factors[index])
            # A single example may be laid out in any way: choices or windows in the first dimension, say.
            if len(factor) != 1 and (inputs.dim() < 3 or len(inputs) != len(factor)):
                raise _NotByExample
            between = [1] * (inputs.dim() - 2)
            return (inputs * factor.view(len(factor), *between, -1).to(inputs.dtype),)

        return hook

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(opening, with_kwargs=True).remove)
        for index, each in enumerate(units):
            stack.callback(each.entry.register_forward_pre_hook(by_example(index)).remove)
        yield factors


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Computes no gradients of weights inside the body."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def output_energies(model: PreTrainedModel, units: Sequence[Units], batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Averages the squared size of what each unit adds to its block's output, input by input, over all but padding.

    Args:
        model: The model.
        units: The units.
        batches: Model inputs; they need no labels.

    Returns:
        For each of `units` float32 `(count,)`, on the CPU.

    Raises:
        CompressionError: No batches, or activations that are not finite.
    """
    totals, counts, current = [torch.zeros(each.count) for each in units], [0] * len(units), {}

    def watch(number: int, each: Units) -> Any:
        norms = each.weight_and_gradient()[0].float().square().sum(0)

        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            rows = real_rows(model, arguments[0], current)
            totals[number] += each.fold(rows.float().square().sum(0) * norms).cpu()
            counts[number] += len(rows)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for number, each in enumerate(units):
            stack.callback(each.entry.register_forward_pre_hook(watch(number, each)).remove)
        stack.callback(model.register_forward_pre_hook(remembering(current), with_kwargs=True).remove)
        for _ in run_batches(model, batches, description="scoring"):
            pass
    for each, total in zip(units, totals, strict=True):
        if not torch.isfinite(total).all():
            raise CompressionError(
                f"{each.block.name}: importance is not finite", hint="Check weights and calibration data for NaN."
            )
    return [total / max(1, count) for total, count in zip(totals, counts, strict=True)]
