from __future__ import annotations

import itertools
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hfcompress.modeling.layers.packed_linear import (
    PACKED_KINDS,
    PackedKind,
    PackedLinear,
    RoundingLinear,
    group_size,
    pack,
    rounded,
    scales_of,
)

VALUES = {"packed-8": 255, "packed-4": 15, "packed-2": 4, "ternary": 3, "binary": 2}
BITS = {"packed-8": 8, "packed-4": 4, "packed-2": 2, "ternary": 1.6, "binary": 1}


def linear(inputs: int, outputs: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs)


@pytest.mark.parametrize("kind", PACKED_KINDS)
@pytest.mark.parametrize("inputs", [1, 7, 64, 100, 192])
def test_the_bytes_hold_what_rounding_gave(kind: PackedKind, inputs: int) -> None:
    layer = linear(inputs, 24)
    packed = PackedLinear.from_float(layer, kind)
    assert torch.equal(packed.dense(), rounded(layer.weight, kind))
    assert packed.codes.shape == (24, -(-inputs * BITS[kind] // 8))
    assert set(packed.state_dict()) == {"codes", "scales", "weight", "bias"} and packed.weight.numel() == 1
    data = torch.randn(3, inputs)
    torch.testing.assert_close(packed(data), nn.functional.linear(data, rounded(layer.weight, kind), layer.bias))
    for group in packed.dense().unflatten(-1, (-1, group_size(inputs, kind))).flatten(0, 1):
        assert len(group.unique()) <= VALUES[kind]


@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_rounding_twice_is_rounding_once(kind: PackedKind) -> None:
    once = rounded(linear(128, 16).weight, kind)
    if kind == "packed-8":  # the largest weight of a row is hit up to the rounding of its scale
        torch.testing.assert_close(rounded(once, kind), once, rtol=2e-3, atol=1e-4)
    elif kind == "binary":
        torch.testing.assert_close(rounded(once, kind), once)


@pytest.mark.parametrize("kind", [kind for kind in get_args(PackedKind) if kind != "packed-8"])
def test_the_scale_is_near_the_best_there_is(kind: PackedKind) -> None:
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 2, 32).unsqueeze(1)
    error = (rounded(weight, kind) - weight).square().sum(-1)
    levels = torch.tensor({4: [-1.5, -0.5, 0.5, 1.5], 3: [-1.0, 0, 1], 2: [-0.5, 0.5]}.get(VALUES[kind], range(-7, 8)))
    best = torch.full((32,), torch.inf)
    for share in torch.linspace(0.01, 3, 1000):
        grid = share * weight.abs().mean(-1, keepdim=True) * levels
        nearest = (weight.unsqueeze(-1) - grid.unsqueeze(1)).square().amin(-1)
        best = torch.minimum(best, nearest.sum(-1))
    assert (error <= 1.2 * best).all() and error.sum() <= 1.05 * best.sum()


@given(st.sampled_from(PACKED_KINDS), st.integers(1, 70), st.sampled_from([0.0, 1e-9, 1e-3, 1.0, 1e4]))
@settings(deadline=None, max_examples=60)
def test_any_weight_comes_out_finite(kind: PackedKind, inputs: int, size: float) -> None:
    layer = linear(inputs, 3)
    with torch.no_grad():
        layer.weight.mul_(size)
        layer.weight[0] = 0
    dense = PackedLinear.from_float(layer, kind).dense()
    assert torch.isfinite(dense).all() and dense[0].abs().max() == 0
    assert (scales_of(layer.weight, kind)[0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_the_rounding(dtype: torch.dtype) -> None:
    layer = linear(64, 8).to(dtype)
    plain = linear(64, 8).to(dtype)
    layer.__class__, layer.rounding = RoundingLinear, "ternary"
    with torch.no_grad():
        plain.weight.copy_(rounded(layer.weight, "ternary"))
    data = torch.randn(5, 64, dtype=dtype)
    torch.testing.assert_close(layer(data), plain(data))
    layer(data).square().sum().backward()
    plain(data).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


def test_all_bytes_are_read_as_they_were_written() -> None:
    for kind, per_byte in (("binary", 8), ("ternary", 5), ("packed-2", 4)):
        values = torch.tensor(list(itertools.islice(itertools.product(range(VALUES[kind]), repeat=per_byte), 256)))
        layer = PackedLinear.from_float(linear(per_byte, len(values)), kind)
        layer.codes.copy_(pack(values, kind))
        layer.scales.fill_(1)
        lowest = {"binary": -0.5, "ternary": -1.0, "packed-2": -1.5}[kind]
        assert torch.equal(layer.dense(), values + lowest)
