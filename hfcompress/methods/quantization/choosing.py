"""Which part of a model gets how many bits: the least loss for the bytes that are saved. Plain numbers only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """What a part costs in one kind.

    Attributes:
        bytes: Its size.
        loss: By how much the model is worse with it.
    """

    bytes: int
    loss: float


@dataclass(frozen=True)
class Move:
    """A part goes from the kind that it has to a smaller one.

    Attributes:
        part: Its name.
        kind: What it becomes.
        saved: Bytes that this saves.
        loss: The loss that it adds.
    """

    part: str
    kind: str
    saved: int
    loss: float


def moves(costs: Mapping[str, Mapping[str, Cost]], now: Mapping[str, int]) -> list[Move]:
    """Orders all that can be saved by loss for each byte, least first.

    The first moves of the list, however many, lose less than any other choice of as many bytes, as far as losses add
    up: each part goes down the lower convex hull of its costs (Shoham and Gersho 1988).

    Args:
        costs: For each part its cost by kind.
        now: The bytes of each part as it is, where it loses nothing.
    """
    found: list[tuple[float, Move]] = []
    for part, kinds in costs.items():
        size, loss = now[part], 0.0
        while smaller := {kind: cost for kind, cost in kinds.items() if cost.bytes < size}:
            slopes = {kind: (cost.loss - loss) / (size - cost.bytes) for kind, cost in smaller.items()}
            kind = min(smaller, key=lambda each: (slopes[each], smaller[each].bytes))
            cost = smaller[kind]
            found.append((slopes[kind], Move(part, kind, size - cost.bytes, cost.loss - loss)))
            size, loss = cost.bytes, cost.loss
    # Sorting is stable, and the slopes of one part rise: its moves stay in their order.
    return [move for _, move in sorted(found, key=lambda item: item[0])]


def within(path: Sequence[Move], total: int, most: int) -> int | None:
    """Returns how many moves bring `total` bytes down to `most`; None where all of them do not."""
    for count in range(len(path) + 1):
        if total - sum(move.saved for move in path[:count]) <= most:
            return count
    return None


def after(path: Sequence[Move]) -> dict[str, str]:
    """Returns the kind of every part that moves change."""
    return {move.part: move.kind for move in path}
