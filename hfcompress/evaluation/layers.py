"""What each linear layer takes, in the original and in the compressed model, and why it gained less than it could."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from pydantic import Field

from hfcompress.evaluation.inference import inferring
from hfcompress.evaluation.records import STRICT, Count, Figure
from hfcompress.evaluation.usage import is_linear
from hfcompress.modeling.layers.bitsandbytes import kind_of
from hfcompress.modeling.layers.low_rank import LowRankLinear

if TYPE_CHECKING:
    import torch
    from torch import nn

Reason = Literal["", "dequantization", "two thin factors", "small matrix", "odd width", "not compressed", "other"]

_WARM_UP, _PASSES = 2, 10
# A layer that has this much of the speed that its operations promise is said to keep the promise.
_ENOUGH = 0.9
# Under so many operations a product costs what it takes to call it.
_FEW_OPERATIONS = 2 * 10**6
# Numbers that one AVX-512 instruction multiplies; what is left over takes instructions of its own.
_VECTOR = 16


class Counted(NamedTuple):
    """What can be counted of a layer: its kind, its outputs and inputs, and the operations of a pass."""

    kind: str
    shape: tuple[int, int]
    operations: int


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One linear layer of the original, and what stands in its place.

    Attributes:
        path: Its place in the model.
        kind: What stands there now: `linear`, `rank 64`, `int8`, `rank 64, int8`, ...
        original_shape: Outputs and inputs in the original.
        shape: Outputs and inputs now.
        original_operations: Operations of one pass in the original.
        operations: Operations now, those of quantized layers counted as if they were float.
        original_seconds: The median time of a pass that it took in the original.
        seconds: The median time that it takes now.
        reason: Why it has less speed than its operations promise; empty where it keeps the promise.
    """

    __pydantic_config__ = STRICT

    path: str
    kind: Annotated[str, Field(pattern=r"^[a-z0-9, -]{1,80}$")]
    original_shape: tuple[Count, Count]
    shape: tuple[Count, Count]
    original_operations: Count
    operations: Count
    original_seconds: Figure
    seconds: Figure
    reason: Reason

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> LayerCost:
        """Returns what `dataclasses.asdict` took apart, even where JSON made lists of its tuples."""
        shapes = {name: tuple(record[name]) for name in ("original_shape", "shape")}
        return cls(**{**record, **shapes})

    @property
    def promised(self) -> float:
        """How many times fewer operations there are."""
        return self.original_operations / self.operations if self.operations else 1.0

    @property
    def gained(self) -> float:
        """How many times as fast it is."""
        return self.original_seconds / self.seconds if self.seconds > 0 else 1.0


@dataclass
class _Seen:
    """A layer as one pass after another saw it."""

    module: nn.Module
    rows: int
    times: list[float]


def measure_layers(
    original: nn.Module, compressed: nn.Module, inputs: Mapping[str, torch.Tensor]
) -> tuple[LayerCost, ...]:
    """Times every linear layer of two models, pass by pass by turns.

    Args:
        original: The model to compare with.
        compressed: The other one; layers are matched by their place. Both are left in the mode they were in.
        inputs: Arguments of both.

    Returns:
        The layers that both have, in the original's order.
    """
    import numpy as np

    with inferring(original, compressed), _watched(original) as before, _watched(compressed) as after:
        for turn in range(_WARM_UP + _PASSES):
            if turn == _WARM_UP:
                for seen in (*before.values(), *after.values()):
                    seen.times.clear()
            for model in (original, compressed) if turn % 2 == 0 else (compressed, original):
                _begin_pass(before if model is original else after)
                model(**inputs)
    costs = []
    for path, old in before.items():
        new = after.get(path)
        if new is None or not old.rows or not new.rows:
            continue
        seconds = [float(np.median(seen.times)) for seen in (old, new)]
        counts = [_operations(seen) for seen in (old, new)]
        costs.append(
            LayerCost(
                path=path,
                kind=_kind(new.module),
                original_shape=_shape(old.module),
                shape=_shape(new.module),
                original_operations=counts[0],
                operations=counts[1],
                original_seconds=seconds[0],
                seconds=seconds[1],
                reason=_reason(old.module, new.module, counts, seconds),
            )
        )
    return tuple(costs)


def count_layers(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, Counted]:
    """Returns what can be counted of every linear layer that a pass goes through, by path."""
    with inferring(model), _watched(model) as found:
        _begin_pass(found)
        model(**inputs)
    return {
        path: Counted(_kind(seen.module), _shape(seen.module), _operations(seen))
        for path, seen in found.items()
        if seen.rows
    }


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, _Seen]]:
    """Times the calls of all linear layers while the context lasts; a layer that is called twice has their sum."""
    found: dict[str, _Seen] = {}
    handles = []
    inside: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if path.startswith(inside) and inside:
            continue  # the factors of a layer that is watched as one
        if not (is_linear(module) or kind_of(module) or isinstance(module, LowRankLinear)):
            continue
        inside = (*inside, f"{path}.")
        seen = found[path] = _Seen(module, 0, [])
        handles += _hooks(module, seen)
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _hooks(module: nn.Module, seen: _Seen) -> list[torch.utils.hooks.RemovableHandle]:
    began = [0.0]

    def before(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        seen.rows += given[0].numel() // given[0].shape[-1] if given else 0
        began[0] = time.perf_counter()

    def after(_: nn.Module, __: object, ___: object) -> None:
        seen.times[-1] += time.perf_counter() - began[0]

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]


def _begin_pass(found: Mapping[str, _Seen]) -> None:
    for seen in found.values():
        seen.rows = 0
        seen.times.append(0.0)


def _shape(module: nn.Module) -> tuple[int, int]:
    width_in, width_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(width_in, int) and isinstance(width_out, int):
        return width_out, width_in
    rows, columns = module.weight.shape  # pyright: ignore[reportGeneralTypeIssues]
    return int(columns), int(rows)  # GPT-2's layers are (in, out)


def _operations(seen: _Seen) -> int:
    outputs, inputs = _shape(seen.module)
    if isinstance(seen.module, LowRankLinear):
        return 2 * seen.rows * seen.module.multiplications
    return 2 * seen.rows * outputs * inputs


def _kind(module: nn.Module) -> str:
    if isinstance(module, LowRankLinear):
        packed = kind_of(module.up) or kind_of(module.down)
        return f"rank {module.rank}, {packed}" if packed else f"rank {module.rank}"
    return kind_of(module) or "linear"


def _reason(before: nn.Module, after: nn.Module, counts: list[int], seconds: list[float]) -> Reason:
    """Says why a layer has less speed than its operations promise: the first that fits."""
    promised = counts[0] / counts[1] if counts[1] else 1.0
    gained = seconds[0] / seconds[1] if seconds[1] > 0 else 1.0
    if gained >= _ENOUGH * promised:
        return ""
    if kind_of(after) or (isinstance(after, LowRankLinear) and "," in _kind(after)):
        return "dequantization"
    if isinstance(after, LowRankLinear) and not isinstance(before, LowRankLinear):
        return "two thin factors"
    if _shape(before) == _shape(after):
        return "not compressed"
    if counts[1] < _FEW_OPERATIONS:
        return "small matrix"
    if any(width % _VECTOR for width in _shape(after)):
        return "odd width"
    return "other"
