"""A linear layer as the product of two thin ones."""

from __future__ import annotations

import torch
from torch import nn


def _on_meta(
    in_features: int, out_features: int, *, bias: bool, device: torch.device | None, dtype: torch.dtype | None
) -> nn.Linear:
    """Makes a linear layer without drawing random values for it: on `meta` that takes most of the time."""
    linear = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.out_features = in_features, out_features
    linear.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
    vector = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
    linear.register_parameter("bias", vector)
    return linear


class LowRankLinear(nn.Module):
    """Computes `up(down(x))`: a linear layer whose weight is `up.weight @ down.weight`.

    Both factors are plain `nn.Linear`, so that PEFT, bitsandbytes and exporters see what they know.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        rank: Width between the factors.
        bias: Whether `up` has a bias.
        transposed: Whether the layer that this stands for is one of GPT-2's, whose weight is `(in, out)`.
        device: Where the parameters are made.
        dtype: The parameters' dtype.
    """

    weight: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        bias: bool,
        transposed: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.transposed = transposed
        make = _on_meta if device is not None and device.type == "meta" else nn.Linear
        self.down = make(in_features, rank, bias=False, device=device, dtype=dtype)
        self.up = make(rank, out_features, bias=bias, device=device, dtype=dtype)
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.down.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.up.out_features

    @property
    def rank(self) -> int:
        """Width between the factors."""
        return self.down.out_features

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of `up`: some families initialise a layer's bias by this name."""
        return self.up.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`."""
        return self.up(self.down(inputs))

    def extra_repr(self) -> str:
        """Shows the shape that the two factors stand for."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
