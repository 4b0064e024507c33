"""A projection into attention heads, each head by two thin factors of its own."""

from __future__ import annotations

import torch
from torch import nn

from hfcompress.modeling.layers.low_rank import LowRankLinear


class HeadwiseLinear(LowRankLinear):
    """A low-rank layer whose outputs fall into heads, each made of components that are the head's alone.

    All heads together have `heads * rank` components, and a matrix `(out_features, rank)` makes the outputs of them:
    it would be `heads` times wider if every output were made of all.

    Args:
        in_features: Width of the input.
        out_features: Width of the output, a multiple of `heads`.
        rank: Components of one head.
        heads: How many there are.
        bias: Whether `up` has a bias.
        transposed: As in `LowRankLinear`.
        device: Where the parameters are made.
        dtype: The parameters' dtype.

    Raises:
        ValueError: The outputs do not fall into so many heads.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        heads: int,
        *,
        bias: bool,
        transposed: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if out_features % heads:
            raise ValueError(f"{out_features} outputs do not fall into {heads} heads")
        form = {"bias": bias, "transposed": transposed, "device": device, "dtype": dtype}
        super().__init__(in_features, out_features, rank * heads, **form)
        self.heads = heads
        weight = self.up.weight
        self.up.weight = nn.Parameter(weight[:, :rank].detach().clone(), requires_grad=weight.requires_grad)
        self.up.in_features = rank

    @property
    def rank(self) -> int:
        """Components of one head."""
        return self.down.out_features // self.heads

    @property
    def multiplications(self) -> int:
        """How many a position takes; as many as its own factors hold numbers."""
        return self.rank * (self.heads * self.in_features + self.out_features)

    @property
    def multiplications_per_output(self) -> float:
        """How many of them go with an output: a head's components go with it."""
        return self.multiplications / self.out_features

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`."""
        components = self.down(inputs).unflatten(-1, (self.heads, -1))
        if type(self.up) is not nn.Linear or self.up._forward_hooks or self.up._forward_pre_hooks:
            return self._by_calling(components)
        rows = components.reshape(-1, *components.shape[-2:]).transpose(0, 1)
        weight = self.up.weight.view(self.heads, -1, rows.shape[-1]).transpose(1, 2)
        if self.up.bias is None:
            outputs = torch.bmm(rows, weight)
        else:
            outputs = torch.baddbmm(self.up.bias.view(self.heads, 1, -1), rows, weight)
        return outputs.transpose(0, 1).reshape(*inputs.shape[:-1], -1)

    def _by_calling(self, components: torch.Tensor) -> torch.Tensor:
        """Lets `up` make every output of each head's components, and takes of them that head's own.

        An adapter, a quantized layer, and what watches the calls of one know no heads.
        """
        every = self.up(components.flatten(0, -2)).view(*components.shape[:-1], self.heads, -1)
        return every.diagonal(dim1=-3, dim2=-2).transpose(-1, -2).flatten(-2)

    def compose(self, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """Returns the matrix `(out, in)` that weights of the two factors stand for."""
        return compose_heads(up, down, self.heads)

    def extra_repr(self) -> str:
        """Shows the shape that the factors stand for."""
        return f"{super().extra_repr()}, heads={self.heads}"


def compose_heads(up: torch.Tensor, down: torch.Tensor, heads: int) -> torch.Tensor:
    """Multiplies the factors of each head, `(out, rank)` and `(heads * rank, in)`, to `(out, in)`."""
    return torch.bmm(up.unflatten(0, (heads, -1)), down.unflatten(0, (heads, -1))).flatten(0, 1)
