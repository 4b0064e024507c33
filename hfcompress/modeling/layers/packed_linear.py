"""Linear layers of 8, 4 and 2 bit, ternary and binary weights, packed into bytes; a scale for every run of a row."""

from __future__ import annotations

from functools import cache
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

PackedKind = Literal["packed-8", "packed-4", "packed-2", "ternary", "binary"]
PACKED_KINDS: tuple[PackedKind, ...] = get_args(PackedKind)

_GROUP = 64  # inputs of a row that share a scale, where it divides their number; a whole row otherwise


class _Form(NamedTuple):
    """How the weights of a kind are written.

    Attributes:
        levels: The values that a weight may have, in units of its scale, ascending and one apart (binary: two).
        in_a_byte: How many weights a byte holds.
        starts: Where the search for a group's scale begins, in units of the mean size of its weights; below 0 in
            units of the largest. Near the scales with the least squared error for normally distributed weights.
        rounds: How often it goes on from there.
    """

    levels: tuple[float, ...]
    in_a_byte: int
    starts: tuple[float, ...]
    rounds: int


_FORMS: dict[PackedKind, _Form] = {
    "packed-8": _Form(tuple(map(float, range(-127, 128))), 1, (-1 / 127,), 0),
    "packed-4": _Form(tuple(map(float, range(-7, 8))), 2, (-1 / 7, -0.9 / 7, -0.8 / 7, -0.7 / 7), 1),
    "packed-2": _Form((-1.5, -0.5, 0.5, 1.5), 4, (1.25,), 2),
    "ternary": _Form((-1.0, 0.0, 1.0), 5, (1.5,), 2),
    "binary": _Form((-0.5, 0.5), 8, (2.0,), 0),
}


def group_size(in_features: int, kind: PackedKind) -> int:
    """Returns how many neighbouring inputs share a scale."""
    return in_features if kind == "packed-8" or in_features % _GROUP else _GROUP


def scales_of(weight: torch.Tensor, kind: PackedKind) -> torch.Tensor:
    """Finds the scale of every group: where rounding to the kind's levels has a small squared error.

    8 bits span the largest weight. With fewer, rounding and least squares by turns lead downhill from a start that
    suits normally distributed weights; for binary ones the start is the optimum (Rastegari et al. 2016, XNOR-Net).

    Args:
        weight: Float, `(out, in)`.
        kind: How it will be rounded.

    Returns:
        float16 `(out, groups)`; 0 for a group of zeros.
    """
    form = _FORMS[kind]
    groups = weight.detach().float().unflatten(-1, (-1, group_size(weight.shape[-1], kind)))
    mean, largest = groups.abs().mean(-1), groups.abs().amax(-1)
    best, least = mean.new_zeros(mean.shape), torch.full_like(mean, torch.inf)
    for start in form.starts:
        scale = start * mean if start > 0 else -start * largest
        for _ in range(form.rounds):
            levels = _nearest(groups, scale, form)
            scale = (groups * levels).sum(-1) / levels.square().sum(-1).clamp_min(1e-12)
        if len(form.starts) == 1:
            best = scale
            break
        error = (_nearest(groups, scale, form) * scale.unsqueeze(-1) - groups).square().sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best.clamp(0, 65504).half()


def _nearest(groups: torch.Tensor, scales: torch.Tensor, form: _Form) -> torch.Tensor:
    """Returns the nearest level of each weight: `(..., groups, size)`."""
    scale = scales.float().unsqueeze(-1)
    lowest, highest = form.levels[0], form.levels[-1]
    steps = groups / torch.where(scale > 0, scale, 1) - lowest
    return steps.round().clamp(0, highest - lowest) + lowest


def rounded(weight: torch.Tensor, kind: PackedKind) -> torch.Tensor:
    """Returns what a weight `(out, in)` becomes by packing, in its own dtype."""
    scales = scales_of(weight, kind)
    groups = weight.detach().float().unflatten(-1, (scales.shape[-1], -1))
    return (_nearest(groups, scales, _FORMS[kind]) * scales.float().unsqueeze(-1)).flatten(-2).to(weight.dtype)


def pack(codes: torch.Tensor, kind: PackedKind) -> torch.Tensor:
    """Writes numbers of levels `(out, in)` as bytes, uint8 `(out, ceil(in / in a byte))`: digits of one number."""
    form = _FORMS[kind]
    missing = -codes.shape[-1] % form.in_a_byte
    digits = nn.functional.pad(codes.int(), (0, missing)).unflatten(-1, (-1, form.in_a_byte))
    places = torch.tensor([len(form.levels) ** place for place in range(form.in_a_byte)], device=codes.device)
    return (digits * places).sum(-1).to(torch.uint8)


@cache
def _digits(kind: PackedKind) -> torch.Tensor:
    """Returns the levels that each byte stands for, float32 `(256, in a byte)`."""
    form = _FORMS[kind]
    numbers = torch.arange(256)
    places = [(numbers // len(form.levels) ** place) % len(form.levels) for place in range(form.in_a_byte)]
    return torch.tensor(form.levels)[torch.stack(places, dim=-1)]


class PackedLinear(nn.Linear):
    """A linear layer whose weight is bytes; no float copy of it exists, in the file or here.

    Args:
        in_features: Inputs.
        out_features: Outputs.
        bias: Whether there is a bias, which stays float.
        kind: How the weights are written.
        device: Where the buffers are made.
        dtype: What the layer computes in.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    packed_kind: PackedKind

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kind: PackedKind,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.packed_kind = in_features, out_features, kind
        width = -(-in_features // _FORMS[kind].in_a_byte)
        groups = in_features // group_size(in_features, kind)
        self.register_buffer("codes", torch.zeros(out_features, width, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(out_features, groups, dtype=torch.float16, device=device))
        # Families ask a layer's weight for its dtype; this one carries it.
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))
        parameter = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype), requires_grad=False)
        self.register_parameter("bias", parameter if bias else None)

    @classmethod
    def from_float(cls, linear: nn.Module, kind: PackedKind, scales: torch.Tensor | None = None) -> PackedLinear:
        """Packs the weight of a linear or transposed (`Conv1D`) layer, which itself is left as it was.

        Args:
            linear: The layer.
            kind: How its weights are written.
            scales: Float16 `(out, groups)`; None to find them.
        """
        old = cast(Any, linear)
        weight = old.weight.detach().T if isinstance(linear, Conv1D) else old.weight.detach()
        outputs, inputs = weight.shape
        form = {"kind": kind, "device": weight.device, "dtype": weight.dtype}
        made = cls(inputs, outputs, old.bias is not None, **form)
        made.scales.copy_(scales_of(weight, kind) if scales is None else scales)
        groups = weight.float().unflatten(-1, (made.scales.shape[-1], -1))
        levels = _nearest(groups, made.scales, _FORMS[kind]).flatten(-2)
        made.codes.copy_(pack(levels - _FORMS[kind].levels[0], kind))
        if old.bias is not None:
            made.bias = nn.Parameter(old.bias.detach(), requires_grad=False)
        return made.train(linear.training)

    def reset_parameters(self) -> None:
        """Does nothing: there is no weight to draw."""

    def dense(self) -> torch.Tensor:
        """Returns the float weight, `(out_features, in_features)`, in the dtype that the layer computes in."""
        levels = _digits(self.packed_kind).to(self.codes.device)[self.codes.int()].flatten(-2)
        groups = levels[:, : self.in_features].unflatten(-1, (self.scales.shape[-1], -1))
        return (groups * self.scales.float().unsqueeze(-1)).flatten(-2).to(self.weight.dtype)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`."""
        return nn.functional.linear(inputs, self.dense(), self.bias)

    def extra_repr(self) -> str:
        """Shows shape and kind."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, kind={self.packed_kind}"


class RoundingLinear(nn.Linear):
    """A linear layer in training that computes with what its weight will be when it is packed.

    The gradient passes the rounding as if it were not there (Bengio et al. 2013, the straight-through estimator).
    An existing layer becomes one by its class alone, so that no name of a parameter changes. A layer with a `step`
    learns its scales too: see `learn_steps`.
    """

    rounding: PackedKind

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`."""
        return nn.functional.linear(inputs, under_rounding(self, self.weight), self.bias)


class RoundingConv1D(Conv1D):
    """`RoundingLinear` for GPT-2's transposed layers."""

    rounding: PackedKind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `(..., nx)` to `(..., nf)`."""
        return nn.functional.linear(x, under_rounding(self, self.weight.T), self.bias)


def learn_steps(layer: nn.Module, kind: PackedKind) -> None:
    """Gives a layer scales that are learned beside its weight (Esser et al. 2020, LSQ).

    They begin where rounding has a small squared error. What is learned is the factor to that, `step`: an optimizer
    such as Adam takes steps of one size, whatever the gradient's, which would be far too large for scales themselves.
    """
    weight = cast(Any, layer).weight
    weight = weight.T if isinstance(layer, Conv1D) else weight
    start = scales_of(weight, kind).float()
    layer.register_buffer("step_start", start)
    layer.register_parameter("step", nn.Parameter(torch.ones_like(start)))


def learned_scales(layer: nn.Module) -> torch.Tensor | None:
    """Returns the scales that a layer has learned as they will be stored, float16 `(out, groups)`; or None."""
    step = getattr(layer, "step", None)
    return None if step is None else (cast(Any, layer).step_start * step.detach()).clamp(0, 65504).half()


def forget_steps(layer: nn.Module) -> None:
    """Takes away what `learn_steps` gave."""
    if getattr(layer, "step", None) is not None:
        del layer.step, layer.step_start


def under_rounding(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """Returns what a layer in training computes with: its weight `(out, in)`, rounded, with gradients."""
    kind = cast(Any, layer).rounding
    if getattr(layer, "step", None) is None:
        return weight + (rounded(weight, kind) - weight).detach()
    form = _FORMS[kind]
    step = cast(Any, layer).step
    # The gradient of a scale sums over its whole group; so weighted, it is of the size of a weight's.
    share = (weight.shape[-1] / step.shape[-1] * max(1.0, form.levels[-1])) ** -0.5
    factor = step * share + (step - step * share).detach()
    scales = (cast(Any, layer).step_start * factor).clamp(0, 65504)
    scales = (scales + (scales.half().float() - scales).detach()).unsqueeze(-1)  # as it will be stored
    lowest, highest = form.levels[0], form.levels[-1]
    places = weight.float().unflatten(-1, (step.shape[-1], -1)) / torch.where(scales > 0, scales, 1)
    # Weights that are rounded further than half a step, beyond the outermost levels, get no gradient.
    places = places.clamp(lowest - 0.5, highest + 0.5) - lowest
    levels = places + (places.round().clamp(0, highest - lowest) - places).detach() + lowest
    return (levels * scales).flatten(-2).to(weight.dtype)
