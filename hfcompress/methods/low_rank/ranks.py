"""How large the factors may be: layer by layer, or all layers together by what each of them costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

import torch

from hfcompress.errors import CompressionError

# What a layer costs at a rank, or whole where that is None.
Cost = Callable[[int | None], float]

# The lowest share of its parameters that a budget may leave a layer.
LEAST = 0.2


def size_of(out_features: int, in_features: int, rank: int, pivoted: bool = False) -> int:
    """Returns how many numbers two factors hold; pivoted, they need `rank * rank` less."""
    return rank * (out_features + in_features) - (rank * rank if pivoted else 0)


def is_smaller(out_features: int, in_features: int, rank: int, pivoted: bool = False) -> bool:
    """Tells whether two factors hold fewer numbers than the matrix."""
    fits = rank < min(out_features, in_features) or not pivoted
    return fits and size_of(out_features, in_features, rank, pivoted) < out_features * in_features


def rank_for(out_features: int, in_features: int, keep: float, multiple_of: int, pivoted: bool = False) -> int:
    """Returns the rank at which the factors hold at most `keep` of the matrix's numbers (at least 1)."""
    wanted, width = keep * out_features * in_features, out_features + in_features
    exact = int((width - math.sqrt(width * width - 4 * wanted)) / 2 if pivoted else wanted / width)
    return max(exact // multiple_of * multiple_of, min(exact, multiple_of), 1)


def rank_of_energy(energies: torch.Tensor, share: float, multiple_of: int) -> int:
    """Returns the smallest rank that keeps a share of the energy, rounded up to a multiple.

    Args:
        energies: Squared singular values, descending.
        share: Of their sum, in (0, 1).
        multiple_of: What the rank is a multiple of, where the matrix is large enough.
    """
    kept = energies.cumsum(0)
    exact = int((kept < share * kept[-1]).sum()) + 1
    return min(-(-exact // multiple_of) * multiple_of, len(energies))


@dataclass(frozen=True)
class Curve:
    """What a layer's factorization costs at every rank.

    Attributes:
        out_features: Width of the outputs.
        in_features: Width of the inputs.
        energies: Squared singular values of the (whitened) matrix, descending.
        measured: Ranks and the rise of the model's loss with this layer alone factorised at each; where there are
            none the energies themselves are twice that rise.
        pivoted: Whether the factors are pivoted.
        heads: How many such layers there are, whose energies are summed: the heads of a projection.
    """

    out_features: int
    in_features: int
    energies: torch.Tensor
    measured: Mapping[int, float] = field(default_factory=dict)
    pivoted: bool = False
    heads: int = 1

    def loss(self, rank: int) -> float:
        """Returns the rise of the loss at a rank: measured, or read between two measured ranks.

        In between it goes with the discarded energy, which is known at every rank.
        """
        tail = self._tail
        if not self.measured:
            return tail[rank] * float(self.energies.sum()) / 2
        points = [(0.0, 0.0)]
        for at in sorted(self.measured, reverse=True):
            # A rise that is negative, or smaller than at a higher rank, is noise.
            points.append((tail[at], max(points[-1][1], self.measured[at])))
        here = tail[rank]
        for (left, low), (right, high) in pairwise(points):
            if here <= right or (right, high) == points[-1]:
                return low + (high - low) * (here - left) / (right - left) if right > left else high
        raise AssertionError("a curve has at least one measured rank")

    @cached_property
    def _tail(self) -> list[float]:
        total = self.energies.sum().clamp_min(torch.finfo(torch.float64).tiny)
        left = (total - torch.cat((torch.zeros_like(total)[None], self.energies.cumsum(0)))) / total
        return left.clamp_min(0).tolist()

    def options(self, multiple_of: int, cost: Cost | None = None) -> list[tuple[float, float, int | None]]:
        """Returns cost, loss and rank of every choice, ascending; the last one leaves the layer whole.

        None is below the lowest rank that was measured: there the loss rises faster than any line. A rank that costs
        no less than a higher one, or than the whole layer, is no choice.

        Args:
            multiple_of: What ranks are multiples of, from the lowest on.
            cost: What is counted; parameters where it is None.
        """
        if cost is None:
            cost = self._parameters
        shape = self.out_features, self.in_features
        lowest = min(self.measured, default=rank_for(*shape, LEAST, multiple_of, self.pivoted))
        ranks = range(lowest, len(self.energies), multiple_of)
        choices: list[tuple[float, float, int | None]] = [(cost(None), 0.0, None)]
        for rank in reversed(ranks):
            if is_smaller(*shape, rank, self.pivoted) and cost(rank) < choices[-1][0]:
                choices.append((cost(rank), self.loss(rank), rank))
        return choices[::-1]

    def _parameters(self, rank: int | None) -> int:
        shape = self.out_features, self.in_features
        return self.heads * (shape[0] * shape[1] if rank is None else size_of(*shape, rank, self.pivoted))


def allocate(
    curves: Mapping[str, Curve], budget: float, multiple_of: int, costs: Mapping[str, Cost] | None = None
) -> dict[str, int | None]:
    """Shares one budget among layers so that the sum of their losses is least.

    Every layer starts at the lowest rank that was measured; what is left goes, piece by piece, where a unit of
    cost lowers the loss most. Pieces are edges of each layer's lower convex hull, so that up to the last piece no other
    choice of that size has a smaller sum.

    Args:
        curves: The layers.
        budget: Share of what they all cost that may be kept.
        multiple_of: What ranks are multiples of.
        costs: What each costs; parameters where it is None.

    Returns:
        Each layer's rank, None for one that stays whole.

    Raises:
        CompressionError: Not even those fit.
    """
    costs = costs or {}
    options = {path: curve.options(multiple_of, costs.get(path)) for path, curve in curves.items()}
    whole, least = (sum(choices[at][0] for choices in options.values()) for at in (-1, 0))
    left = budget * whole - least
    if left < 0:
        raise CompressionError(
            f"a budget of {budget} is too small: with every layer at the lowest rank it may have, or whole where that "
            f"costs less, {least / whole:.3f} is left",
            hint="Raise the budget, or give keep.",
        )
    chosen = dict.fromkeys(options, 0)
    edges = [(path, start, end) for path, choices in options.items() for start, end in _hull(choices)]

    def gain(edge: tuple[str, int, int]) -> float:
        (size, loss, _), (larger, lower, _) = (options[edge[0]][at] for at in edge[1:])
        return (loss - lower) / (larger - size)

    closed: set[str] = set()
    for path, start, end in sorted(edges, key=gain, reverse=True):
        if path in closed:
            continue
        choices = options[path]
        fitting = [at for at in range(start, end + 1) if choices[at][0] - choices[start][0] <= left]
        left -= choices[fitting[-1]][0] - choices[start][0]
        chosen[path] = fitting[-1]
        if fitting[-1] < end:
            closed.add(path)
    return {path: options[path][at][2] for path, at in chosen.items()}


def _hull(choices: Sequence[tuple[float, float, int | None]]) -> list[tuple[int, int]]:
    """Returns the edges of the lower convex hull, as indexes of neighbouring corners."""
    corners: list[int] = []
    for index, (size, loss, _) in enumerate(choices):
        while len(corners) >= 2:
            (first, high, _), (second, middle, _) = choices[corners[-2]], choices[corners[-1]]
            if (middle - high) * (size - first) < (loss - high) * (second - first):
                break
            corners.pop()
        corners.append(index)
    return list(pairwise(corners))
