"""A linear layer as the product of two thin ones."""

from __future__ import annotations

import copy
import weakref
from typing import Any, cast

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

    Attributes:
        followers: How many layers beside it (`SharedLinear`) read its `down` too.
    """

    weight: torch.Tensor
    followers: int = 0
    # For the followers: the inputs, what `down` made of them, what that depends on, and how many have yet to take it.
    _left: tuple[Any, torch.Tensor, tuple[Any, ...], int] | None = None

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
    def own_factors(self) -> tuple[str, ...]:
        """The factors that are this module's own."""
        return "down", "up"

    @property
    def multiplications(self) -> int:
        """How many a position takes; as many as its own factors hold numbers."""
        return self.rank * (self.in_features + self.up.out_features)

    @property
    def multiplications_per_output(self) -> float:
        """How many of them go when an output does."""
        return self.rank

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of `up`: some families initialise a layer's bias by this name."""
        return self.up.bias

    def set_bias(self, bias: nn.Parameter) -> None:
        """Takes over a bias, `(out_features,)`."""
        self.up.bias = bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`."""
        hidden = self.down(inputs)
        if self.followers:
            self._leave(inputs, hidden)
        return self.up(hidden)

    def reduce(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps `(..., in_features)` to `(..., rank)`, for a follower.

        What this layer's own pass made of the same tensor is taken, if it is there and nothing has changed since.
        """
        left, self._left = self._left, None
        if left is None:
            return self.down(inputs)
        seen, hidden, state, followers = left
        seen = seen() if isinstance(seen, weakref.ref) else seen
        if seen is not inputs or (state and state != self._state(inputs)):
            return self.down(inputs)
        if followers > 1:
            self._left = (*left[:3], followers - 1)
        return hidden

    def _leave(self, inputs: torch.Tensor, hidden: torch.Tensor) -> None:
        """Leaves `hidden` for the followers: until the last of them has taken it, or the inputs are gone."""
        if torch.compiler.is_compiling():  # it follows a plain reference, and of that the last follower leaves nothing
            self._left = (inputs, hidden, (), self.followers)
            return
        this = weakref.ref(self)

        def forget(gone: weakref.ref[torch.Tensor]) -> None:
            layer = this()
            if layer is not None and layer._left is not None and layer._left[0] is gone:
                layer._left = None

        self._left = (weakref.ref(inputs, forget), hidden, self._state(inputs), self.followers)

    def _state(self, inputs: torch.Tensor) -> tuple[Any, ...]:
        """Returns what must be as it was for `down` to give the same."""
        tensors = (inputs, *self.down.parameters())
        versions = [0 if each.is_inference() else each._version for each in tensors]
        return id(self.down), torch.is_grad_enabled(), self.down.training, *versions

    def __getstate__(self) -> dict[str, Any]:
        """Leaves what is on its way to a follower out of copies and pickles."""
        return vars(self) | {"_left": None}

    def compose(self, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """Returns the matrix `(out, in)` that weights of the two factors stand for."""
        return up @ down

    def extra_repr(self) -> str:
        """Shows the shape that the two factors stand for."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class SharedLinear(LowRankLinear):
    """A low-rank layer that reads the `down` factor of another one beside it, the leader.

    The factor is stored once, by the leader's name. Where both read one tensor in one pass, as queries, keys and values
    do, and the leader comes first, it is multiplied once too; else each multiplies for itself, which gives the same.

    Args:
        leader: The layer whose `down` is read. It is a plain attribute, not a submodule: copies and pickles of a model
            take the reference along, and whatever is put in the place of the factor is read from then on.
        up: The layer's own factor, `(out, rank)`, with the layer's bias.
        transposed: As in `LowRankLinear`.
    """

    def __init__(self, leader: LowRankLinear, up: nn.Linear, *, transposed: bool = False) -> None:
        nn.Module.__init__(self)
        vars(self)["_leader"] = leader
        self.transposed = transposed
        self.up = up
        self.register_buffer("weight", torch.zeros(1, device=up.weight.device, dtype=up.weight.dtype))
        leader.followers += 1

    @property
    def leader(self) -> LowRankLinear:
        """The layer whose `down` is read."""
        return cast(LowRankLinear, vars(self)["_leader"])

    @property
    def down(self) -> nn.Linear:  # type: ignore[override]
        """The leader's factor."""
        return self.leader.down

    @property
    def own_factors(self) -> tuple[str, ...]:
        """The factors that are this module's own."""
        return ("up",)

    @property
    def multiplications(self) -> int:
        """How many a position takes beside the leader's; as many as its own factor holds numbers."""
        return self.rank * self.out_features

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`."""
        return self.up(self.leader.reduce(inputs))


def followers_of(parent: nn.Module, leader: nn.Module) -> dict[str, SharedLinear]:
    """Returns a module's children, by name, that read the `down` of one of them."""
    children = parent.named_children()
    return {name: each for name, each in children if isinstance(each, SharedLinear) and each.leader is leader}


def part_from_others(parent: nn.Module, layer: LowRankLinear) -> dict[str, LowRankLinear]:
    """Makes ready for a low-rank layer to go: its followers, if it has any, need a factor of their own.

    Returns:
        What is to stand in the followers' places, by name among the parent's children.
    """
    if isinstance(layer, SharedLinear):
        layer.leader.followers -= 1
    alone: dict[str, LowRankLinear] = {}
    for name, follower in followers_of(parent, layer).items():
        shape, bias = (follower.in_features, follower.out_features, follower.rank), follower.bias is not None
        new = LowRankLinear(*shape, bias=bias, transposed=follower.transposed, device=torch.device("meta"))
        new.up, new.down, new.weight = follower.up, copy.deepcopy(follower.down), follower.weight
        alone[name] = new.train(follower.training)
    return alone


def pivot(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Says the product of two thin matrices by `rank` of its own rows and what the others are made of.

    Which rows is chosen by the row pivots of an LU decomposition, so that the others are made of them with small
    numbers. The product stays the same, and `rank * rank` numbers are saved (Zhao et al. 2025, PIFA).

    Args:
        up: `(out, rank)`, rank below out.
        down: `(rank, in)`.

    Returns:
        `rest` `(out - rank, rank)`, `rows` `(rank, in)`, both float64, and `places` `(out,)`, int64, such that
        `torch.cat((rows, rest @ rows))[places]` is `up @ down`.
    """
    rank = up.shape[1]
    permutation, lower, _ = torch.linalg.lu(up.double())
    order = permutation.argmax(0)
    # up[order] is lower @ upper, so that its last rows are lower[rank:] @ inverse(lower[:rank]) of its first.
    rest = torch.linalg.solve_triangular(lower[:rank], lower[rank:], upper=False, left=False, unitriangular=True)
    return rest, up.double()[order[:rank]] @ down.double(), order.argsort()


def balanced(up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Says a product by two factors that share its singular values evenly: columns of one and rows of the other.

    Args:
        up: `(out, rank)`.
        down: `(rank, in)`.

    Returns:
        Factors of the same shapes and the same product, float64.
    """
    left, upper = torch.linalg.qr(up.double())
    right, lower = torch.linalg.qr(down.double().T)
    turned, values, back = torch.linalg.svd(upper @ lower.T)
    roots = values.sqrt()
    return left @ turned * roots, roots.unsqueeze(1) * back @ right.T


def _reorder(outputs: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Puts entry `places[i]` of the last dimension in place i.

    On CPUs `gather` with one index for all rows takes a tenth of the time of `index_select` along the last dimension.
    Graphs keep the latter, which compilers know how to merge and exporters write as one small table.
    """
    if torch.compiler.is_compiling():
        return outputs.index_select(-1, places)
    return outputs.gather(-1, places.expand_as(outputs))


class PivotedLinear(LowRankLinear):
    """Computes `rank` of its outputs from its inputs by `down`, and the others from those by `up`.

    It is a low-rank layer with `rank * rank` numbers less than two factors have (Zhao et al. 2025, PIFA), so that any
    rank below full is smaller than the matrix.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        rank: How many outputs are computed from the inputs; below `out_features`.
        bias: Whether the layer has a bias; it is the layer's own, neither factor has one.
        transposed: As in `LowRankLinear`.
        device: Where the parameters are made.
        dtype: The parameters' dtype.

    Attributes:
        places: Buffer, int64 `(out_features,)`: where each output is among those of `down` followed by those of `up`.
    """

    places: torch.Tensor

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
        form = {"transposed": transposed, "device": device, "dtype": dtype}
        super().__init__(in_features, out_features - rank, rank, bias=False, **form)
        own = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_parameter("own_bias", own)
        self.register_buffer("places", torch.arange(out_features, device=device))

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return len(self.places)

    @property
    def bias(self) -> torch.Tensor | None:
        """The bias of all outputs."""
        return self.own_bias

    def set_bias(self, bias: nn.Parameter) -> None:
        """Takes over a bias, `(out_features,)`."""
        self.own_bias = bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`."""
        pivots = self.down(inputs)
        outputs = _reorder(torch.cat((pivots, self.up(pivots)), dim=-1), self.places)
        # Under autocast a linear layer's bias does not turn its outputs back to float32 either.
        return outputs if self.own_bias is None else outputs + self.own_bias.to(outputs.dtype)

    def compose(self, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        """Returns the matrix `(out, in)` that weights of the two factors stand for."""
        return torch.cat((down, up @ down)).index_select(0, self.places)

    def two_factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns `(out, rank)` and `(rank, in)`, float64, whose product is the matrix: some rows of one are unit."""
        down, rest = self.down.weight.detach().double(), self.up.weight.detach().double()
        units = torch.eye(self.rank, dtype=torch.float64, device=rest.device)
        return torch.cat((units, rest)).index_select(0, self.places), down

    def set_factors(self, up: torch.Tensor, down: torch.Tensor) -> None:
        """Takes over a product of two thin matrices, `(out, rank)` and `(rank, in)`, and its number of outputs."""
        rest, rows, places = pivot(up, down)
        for factor, value in ((self.up, rest), (self.down, rows)):
            trains = factor.weight.requires_grad
            factor.weight = nn.Parameter(value.to(factor.weight).contiguous(), requires_grad=trains)
        self.up.out_features = len(rest)
        self.places = places.to(self.places.device)
