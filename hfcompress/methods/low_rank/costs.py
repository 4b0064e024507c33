"""What a layer costs at every rank: parameters, bytes, multiply-adds, or time on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import evaluating
from hfcompress.methods.low_rank.fitting import matrix_of
from hfcompress.methods.low_rank.ranks import LEAST, Cost, is_smaller, rank_for, size_of
from hfcompress.methods.registry import Batch
from hfcompress.modeling.anatomy import module_at
from hfcompress.modeling.layers.headwise import HeadwiseLinear
from hfcompress.modeling.layers.low_rank import LowRankLinear, PivotedLinear, SharedLinear

Measure = Literal["parameters", "bytes", "flops", "latency"]

_POINTS = 6
_REPEATS = 9


def costs_of(
    model: PreTrainedModel,
    layers: Mapping[str, tuple[int | tuple[int, ...], int]],
    measure: Measure,
    batch: Batch,
    *,
    pivoted: bool,
    heads: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Cost]:
    """Returns what each layer costs at a rank, and whole where the rank is None.

    Args:
        model: The model, its layers still whole.
        layers: Widths (outputs, inputs) of the layers, by path. Where several share a factor, the outputs of each, by
            the path of the first.
        measure: What is counted. FLOPs and time are those of a forward pass of `batch`: a layer that sees more
            positions costs more. Time is measured layer by layer, each rank beside the whole layer.
        batch: Model inputs.
        pivoted: Whether the factors are pivoted.
        heads: How many heads the outputs of a layer fall into, where each has factors of its own.

    Raises:
        CompressionError: A layer takes no part in a forward pass of the batch.
    """
    widths = {path: (outs if isinstance(outs, tuple) else (outs,), inputs) for path, (outs, inputs) in layers.items()}
    totals = {path: (sum(outputs), inputs) for path, (outputs, inputs) in widths.items()}
    places = torch.int64.itemsize if pivoted and measure == "bytes" else 0
    if measure in ("parameters", "bytes"):
        positions = {}
        units = {path: matrix_of(model, path).element_size() if measure == "bytes" else 1 for path in layers}
    else:
        units = positions = _positions(model, list(layers), batch)
    if measure != "latency":
        return {
            path: _counted(shape, units[path], places * shape[0], pivoted, heads.get(path, 1))
            for path, shape in totals.items()
        }
    timed: dict[Any, Cost] = {}
    costs: dict[str, Cost] = {}
    for path, shape in widths.items():
        module: Any = module_at(model, path)
        form = (module.bias is not None, module.weight.dtype, module.weight.device)
        kind = (*shape, positions[path], *form, heads.get(path, 1))
        if kind not in timed:
            timed[kind] = _timed(*kind, pivoted=pivoted)
        costs[path] = timed[kind]
    return costs


def _counted(shape: tuple[int, int], unit: int, extra: int, pivoted: bool, heads: int) -> Cost:
    whole, part = unit * shape[0] * shape[1], (shape[0] // heads, shape[1])
    return lambda rank: whole if rank is None else unit * heads * size_of(*part, rank, pivoted) + extra


def _positions(model: PreTrainedModel, paths: Sequence[str], batch: Batch) -> dict[str, int]:
    """Counts the positions, padding included, that each layer sees in one forward pass."""
    counts = dict.fromkeys(paths, 0)

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            counts[path] += arguments[0].numel() // arguments[0].shape[-1]

        return hook

    with ExitStack() as stack, torch.no_grad(), evaluating(model):
        for path in paths:
            stack.callback(module_at(model, path).register_forward_pre_hook(watch(path)).remove)
        model(**{name: value.to(model.device) for name, value in batch.items()})
    for path, count in counts.items():
        if not count:
            raise CompressionError(f"{path} was never run on the calibration batches")
    return counts


def _timed(
    outputs: tuple[int, ...],
    inputs: int,
    positions: int,
    bias: bool,
    dtype: torch.dtype,
    device: torch.device,
    heads: int,
    *,
    pivoted: bool,
) -> Cost:
    """Times a layer of this shape, or several of one input, whole and at a few ranks, by turns."""
    part = sum(outputs) // heads
    lowest, highest = (rank_for(part, inputs, keep, 1, pivoted) for keep in (LEAST, 0.99))
    ranks = sorted({round(rank) for rank in np.linspace(lowest, highest, _POINTS)})
    ranks = [rank for rank in ranks if is_smaller(part, inputs, rank, pivoted)]
    form: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
    choices: list[Sequence[nn.Module]] = [[nn.Linear(inputs, each, **form) for each in outputs]]
    for rank in ranks:
        if heads > 1:
            choices.append([HeadwiseLinear(inputs, outputs[0], rank, heads, **form)])
            continue
        leader = (PivotedLinear if pivoted else LowRankLinear)(inputs, outputs[0], rank, **form)
        followers = [SharedLinear(leader, nn.Linear(rank, each, **form)) for each in outputs[1:]]
        choices.append([leader, *followers])
    rows = torch.randn(positions, inputs, device=device, dtype=dtype)
    with torch.inference_mode():
        for choice in choices:
            _seconds(choice, rows)
        times = np.array([[_seconds(choice, rows) for choice in choices] for _ in range(_REPEATS)])
    whole = float(np.median(times[:, 0]))
    # Each rank against the whole layer of the same turn: what else the machine does then counts for both.
    shares = np.median(times[:, 1:] / times[:, :1], axis=0) if ranks else np.zeros(0)
    return lambda rank: whole if rank is None else whole * float(np.interp(rank, ranks, shares))


def _seconds(layers: Sequence[nn.Module], rows: torch.Tensor) -> float:
    started = time.perf_counter()
    for layer in layers:
        layer(rows)
    if rows.device.type == "cuda":
        torch.cuda.synchronize(rows.device)
    return time.perf_counter() - started
