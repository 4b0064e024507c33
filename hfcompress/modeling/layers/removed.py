"""What stands where a whole attention or feed-forward block was taken out: a constant, and nothing before it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn


class Nothing(nn.Module):
    """A projection without outputs."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns `(..., 0)` for `(..., in)`."""
        return hidden[..., :0]


class Constant(nn.Module):
    """An output projection without inputs: its bias is all it gives.

    Args:
        out_features: Width of what it gives.
        bias: Whether it has a bias; without one it gives zeros.
        device: Of the bias.
        dtype: Of the bias.

    Attributes:
        weight: None; some stock forwards look at it.
    """

    bias: nn.Parameter | None

    def __init__(
        self, out_features: int, bias: bool, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.out_features = out_features
        self.register_parameter("weight", None)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns `(..., out_features)` for `(..., anything)`."""
        shape = (*hidden.shape[:-1], self.out_features)
        return hidden.new_zeros(shape) if self.bias is None else self.bias.to(hidden.dtype).expand(shape)

    def extra_repr(self) -> str:
        """Shows the width."""
        return f"{self.out_features}, bias={self.bias is not None}"


class WithoutHeads:
    """A mixin over a stock attention class: it attends to nothing."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        """Returns what the output projection gives where the attention holds it, else `(..., 0)`; and no weights."""
        own = (each for each in self.children() if isinstance(each, Constant))  # type: ignore[attr-defined]
        return next(own, Nothing())(hidden_states), None


@cache
def _without_heads(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"{cls.__name__}WithoutHeads", (WithoutHeads, cls), {"__module__": __name__})


def attend_to_nothing(attention: nn.Module) -> None:
    """Turns a stock attention, whose projections have been taken out, into one without heads."""
    attention._buffers.pop("kept_heads", None)  # of heads that it kept before
    attention.__class__ = _without_heads(type(attention))
