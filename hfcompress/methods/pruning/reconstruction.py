"""Mends a block's output projection after units were removed, by least squares on calibration activations.

Layers are gone through in order. Beside the model as it was runs the one that is being pruned, so each projection
is fitted on the inputs that it will really get. What it should give is what brings the residual stream back to the
original's: so it makes up for what the layers before it got wrong too. Each layer is run by itself, so the whole
costs a few passes over the data however deep the model is. Where layers cannot be run by themselves (one layer run
over and over, say) each projection is fitted on the original model's inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal, cast

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import evaluating, run_batches
from hfcompress.methods.pruning.importance import largest_first
from hfcompress.methods.pruning.refitting import Moments, refit
from hfcompress.methods.pruning.stream import Norm, StreamWatch
from hfcompress.methods.pruning.units import Units
from hfcompress.methods.registry import Batch
from hfcompress.methods.statistics import real_positions
from hfcompress.modeling.anatomy import (
    AttentionBlock,
    FeedForwardBlock,
    attention_blocks,
    base_model,
    blocks_and_gaps,
    feed_forward_blocks,
)


@dataclass(frozen=True)
class Fit:
    """A mended projection.

    Attributes:
        weight: `(out, inputs that are left)`, float32.
        bias: `(out,)`, float32, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Reconstruction:
    """The mended projections.

    Attributes:
        mode: `layers` where each was fitted on what it gets in the pruned model, `blocks` where on what it got in
            the original one.
        fits: By position in the list of units; none for a block that never ran (cross-attention without an encoder).
    """

    mode: Literal["layers", "blocks"]
    fits: Mapping[int, Fit]


def reconstruct(
    model: PreTrainedModel, units: Sequence[Units], kept: Sequence[torch.Tensor], batches: Sequence[Batch]
) -> Reconstruction:
    """Fits the output projections of all blocks that lose units. The model is left as it is.

    Args:
        model: The model, not pruned yet.
        units: Its units.
        kept: For each of them what will be kept, int64, ascending.
        batches: Model inputs; positions that their attention mask covers are left out.

    Returns:
        The new weights.

    Raises:
        CompressionError: No batches, or activations that are not finite.
    """
    batches = [batches[number] for number in largest_first(batches)]
    plan = _Plan(model, units, kept, batches)
    with torch.no_grad(), evaluating(model), _without_cache(model):
        calls = _record(model, plan)
        if calls is not None and _can_be_replayed(model, calls):
            return Reconstruction("layers", _by_layers(model, plan, calls))
        return Reconstruction("blocks", _by_blocks(model, plan))


@dataclass
class _Plan:
    model: PreTrainedModel
    units: Sequence[Units]
    kept: Sequence[torch.Tensor]
    batches: Sequence[Batch]
    layers: dict[str, list[int]] = field(init=False)  # positions of each layer's units, in the order they run

    def __post_init__(self) -> None:
        self.layers = {block.layer: [] for block in blocks_and_gaps(self.model)}  # all: each gets what the last gave
        for position, each in enumerate(self.units):
            self.layers[each.block.layer].append(position)

    def loses(self, position: int) -> bool:
        return len(self.kept[position]) < self.units[position].count

    def add(self, moments: Moments, inputs: torch.Tensor, wanted: torch.Tensor, batch: int) -> None:
        real = real_positions(self.model, inputs, self.batches[batch])
        if real is not None:
            inputs, wanted = inputs[real], wanted[real]
        moments.add(inputs.flatten(0, -2), wanted.flatten(0, -2))


def _fit(units: Units, moments: Moments, start: torch.Tensor) -> Fit:
    if not moments.count:
        raise CompressionError(f"{units.block.name}: the calibration data is padding only")
    if not torch.isfinite(moments.inputs).all() or not torch.isfinite(moments.cross).all():
        raise CompressionError(f"{units.block.name}: the calibration activations are not finite")
    bias = units.entry.bias
    return Fit(*refit(start, None if bias is None else bias.detach(), moments))


# Layer by layer, beside the original


@dataclass(frozen=True)
class _Call:
    """How the model called a layer: all but the hidden states is the same when it is pruned."""

    hidden: torch.Tensor
    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]

    def run(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        output = layer(hidden, *self.arguments, **self.keywords)
        return output if isinstance(output, torch.Tensor) else output[0]


_Calls = dict[str, list[_Call]]
_NOTHING = torch.empty(0)


def _record(
    model: PreTrainedModel, plan: _Plan, after: str | None = None, given: Sequence[torch.Tensor] = ()
) -> _Calls | None:
    """Notes how every layer is called; of the hidden states only what starts a stack, and all of one batch.

    Args:
        model: The model.
        plan: What is removed from it.
        after: A layer that gives `given` instead, batch by batch: a decoder is called with what its encoder gave.
        given: Hidden states.
    """
    calls: _Calls = {layer: [] for layer in plan.layers}
    starts = {layer for before, layer in zip([None, *calls], calls, strict=False) if _stack(before) != _stack(layer)}
    plain = True

    def watch(layer: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            nonlocal plain
            if not arguments or not isinstance(arguments[0], torch.Tensor):
                plain = False
                return
            noted = arguments[0] if layer in starts or not calls[layer] else _NOTHING
            calls[layer].append(_Call(noted, arguments[1:], keywords))

        return hook

    base, instead = base_model(model), iter(given)

    def exchange(module: nn.Module, arguments: Any, output: Any) -> Any:
        return next(instead) if isinstance(output, torch.Tensor) else (next(instead), *output[1:])

    with ExitStack() as stack:
        if after is not None:
            stack.callback(base.get_submodule(after).register_forward_hook(exchange).remove)
        for layer in calls:
            stack.callback(base.get_submodule(layer).register_forward_pre_hook(watch(layer), with_kwargs=True).remove)
        for _ in run_batches(model, plan.batches, description="calibration"):
            pass
    once = all(len(each) == len(plan.batches) for each in calls.values())
    return calls if plain and once else None


def _stack(layer: str | None) -> str:
    return "" if layer is None else layer.rpartition(".")[0]


def _can_be_replayed(model: PreTrainedModel, calls: _Calls) -> bool:
    """Runs one batch through the layers by themselves: each must give what the next one got."""
    base = base_model(model)
    layers = list(calls)
    for layer, after in pairwise(layers):
        if _stack(layer) != _stack(after):
            continue
        call = calls[layer][0]
        got, wanted = call.run(base.get_submodule(layer), call.hidden), calls[after][0].hidden
        if got.shape != wanted.shape or not torch.allclose(got, wanted, rtol=1e-3, atol=1e-4):
            return False
    return True


class _Reached(Exception):
    """What a layer does after this point is not needed."""


def _run_until(entry: nn.Module, layer: nn.Module, call: _Call, hidden: torch.Tensor) -> torch.Tensor:
    """Runs a layer up to a module, and returns what that is given."""
    seen: list[torch.Tensor] = []

    def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        seen.append(arguments[0])
        raise _Reached

    handle = entry.register_forward_pre_hook(hook)
    try:
        call.run(layer, hidden)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


def _by_layers(model: PreTrainedModel, plan: _Plan, calls: _Calls) -> dict[int, Fit]:
    fits: dict[int, Fit] = {}
    original: list[torch.Tensor] = []
    pruned: list[torch.Tensor] = []
    previous: str | None = None
    called = calls
    blocks = [*attention_blocks(model), *feed_forward_blocks(model)]
    for layer, positions in tqdm(plan.layers.items(), desc="reconstructing", leave=False):
        if _stack(layer) != _stack(previous):
            # What is left of a decoder will read what is left of its encoder.
            if previous is not None and model.config.is_encoder_decoder:
                called = cast(_Calls, _record(model, plan, previous, pruned))
            original = [call.hidden for call in calls[layer]]
            calls[layer] = [replace(call, hidden=_NOTHING) for call in calls[layer]]
            pruned = list(original)
        previous = layer
        own_blocks = [block for block in blocks if block.layer == layer]
        wanted, norms = _run_original(model, plan, layer, own_blocks, calls[layer], original)
        made = copy.deepcopy(base_model(model).get_submodule(layer))
        watch = StreamWatch(made, own_blocks)
        for position in positions:
            own = _in_copy(plan.units[position], made)
            own.shrink(plan.kept[position])
            if not wanted.get(position):
                continue
            weight, _ = own.weight_and_gradient()
            moments = Moments(weight.shape[1], weight.shape[0], weight.device)
            for index, (call, hidden) in enumerate(zip(called[layer], pruned, strict=True)):
                with watch.watching():
                    inputs = _run_until(own.entry, made, call, hidden)
                stream = watch.before(own.block.spec.output, norms[position], hidden)
                plan.add(moments, inputs, wanted[position][index] - stream, index)
            fits[position] = _fit(own, moments, weight)
            own.assign(fits[position].weight, fits[position].bias)
        del wanted
        for index, call in enumerate(called[layer]):
            pruned[index] = call.run(made, pruned[index])
    return fits


def _run_original(
    model: PreTrainedModel,
    plan: _Plan,
    layer: str,
    blocks: Sequence[AttentionBlock | FeedForwardBlock],
    calls: Sequence[_Call],
    hidden: list[torch.Tensor],
) -> tuple[dict[int, list[torch.Tensor]], dict[int, Norm | None]]:
    """Runs a layer of the original on its batches, and puts what it gives in the place of what it got.

    Returns:
        By unit position what its output projections gave, with the stream that this was added to where that is
        known; and by unit position where the norms are, which says whether it is.
    """
    wanted: dict[int, list[torch.Tensor]] = {position: [] for position in plan.layers[layer] if plan.loses(position)}
    norms: dict[int, Norm | None] = {}
    module = base_model(model).get_submodule(layer)
    watch = StreamWatch(module, blocks)

    def note(position: int) -> Any:
        return lambda module, arguments, output: wanted[position].append(output)

    with ExitStack() as stack:
        for position in wanted:
            stack.callback(plan.units[position].entry.register_forward_hook(note(position)).remove)
        for index, call in enumerate(calls):
            given = hidden[index]
            with watch.watching():
                hidden[index] = call.run(module, given)
            norm = None if index else watch.norm(given, hidden[index])
            for position, seen in wanted.items():
                units = plan.units[position]
                name = units.block.spec.output
                if not index:  # the first factor of a low-rank layer does not write to the stream
                    norms[position] = norm if units.entry is units.block.at(name) else None
                if seen:
                    seen[-1] = seen[-1] + watch.before(name, norms[position], given)
    return wanted, norms


def _in_copy(units: Units, layer: nn.Module) -> Units:
    """Returns the same units in a copy of their layer."""
    holder = nn.Module()
    holder.add_module("layer", layer)
    return Units(replace(units.block, base=cast(Any, holder), layer="layer"))


# Block by block, on the original's inputs


def _by_blocks(model: PreTrainedModel, plan: _Plan) -> dict[int, Fit]:
    moments: dict[int, Moments] = {}
    starts: dict[int, torch.Tensor] = {}
    batch = -1

    def opening(module: nn.Module, *_: Any) -> None:
        nonlocal batch
        batch += 1

    def watch(position: int, inputs: torch.Tensor) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            kept = arguments[0].index_select(-1, inputs.to(arguments[0].device))
            plan.add(moments[position], kept, output, batch)

        return hook

    with ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(opening).remove)
        for position, each in enumerate(plan.units):
            if plan.loses(position):
                inputs = each.inputs_of(plan.kept[position])
                weight, _ = each.weight_and_gradient()
                starts[position] = weight.index_select(1, inputs.to(weight.device))
                moments[position] = Moments(len(inputs), len(weight), weight.device)
                stack.callback(each.entry.register_forward_hook(watch(position, inputs)).remove)
        for _ in run_batches(model, plan.batches, description="reconstructing"):
            pass
    return {
        position: _fit(plan.units[position], each, starts[position]) for position, each in moments.items() if each.count
    }


@contextmanager
def _without_cache(model: PreTrainedModel) -> Iterator[None]:
    """A decoder's cache would grow with every call of a layer."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None))}
    before = [(config, config.use_cache) for config in configs.values() if hasattr(config, "use_cache")]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value
