"""Which units stay: pure functions over scores, costs and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def cubic_share(target: float, step: int, begin: int, end: int) -> float:
    """Share removed at a step: rises from 0 to `target`, fast first (Zhu and Gupta 2017)."""
    if step < begin:
        return 0.0
    if step >= end:
        return target
    return target * (1 - (1 - (step - begin) / (end - begin)) ** 3)


def window(begin: float, end: float, steps: int) -> tuple[int, int]:
    """Returns after which step of a training pruning begins, and after which it is done; 1 at least, and after that.

    Args:
        begin: Share of the training after which the first goes.
        end: Share after which the last has gone.
        steps: Of the training.
    """
    last = max(1, int(end * steps))
    return min(int(begin * steps), last - 1), last


def _blocks(scores: torch.Tensor, multiple_of: int) -> tuple[torch.Tensor, list[tuple[float, int]]]:
    """Ranks a layer's units; returns the order, and of each block of neighbours in it mean score and size."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order, [(scores[block].double().mean().item(), len(block)) for block in order.split(multiple_of)]


def select(scores: Sequence[torch.Tensor], removed: float, multiple_of: int = 1) -> list[torch.Tensor]:
    """Chooses the most important units over all layers together.

    Units of a layer are taken from the most important down, in blocks of `multiple_of`; blocks of all layers
    compete by their mean score. Every layer keeps at least one block.

    Args:
        scores: For each layer float `(units,)`, comparable between layers.
        removed: Share of all units to remove; the number kept is the nearest that whole blocks allow.
        multiple_of: Size of a block; the last block of a layer may be smaller.

    Returns:
        For each layer the kept units, int64, ascending.
    """
    wanted = round(sum(map(len, scores)) * (1 - removed))
    ranked = [_blocks(layer, multiple_of) for layer in scores]
    waiting = [
        (-score, index, size)
        for index, (_, blocks) in enumerate(ranked)
        for score, size in blocks[1:]
    ]  # fmt: skip
    counts = [blocks[0][1] for _, blocks in ranked]
    kept = sum(counts)
    for _, index, size in sorted(waiting, key=lambda block: block[:2]):
        if kept + size / 2 > wanted:
            break
        counts[index] += size
        kept += size
    return [order[:count].sort().values for (order, _), count in zip(ranked, counts, strict=True)]


def select_by_cost(
    scores: Sequence[torch.Tensor], costs: Sequence[float], budget: float, multiples: Sequence[int]
) -> list[torch.Tensor]:
    """Chooses the units that are worth most for what they cost, of all kinds and layers together.

    As in `select`, but blocks compete by score per cost, and one that no longer fits is passed over: what is kept
    costs at most `budget`, as long as the least that may be kept (a block in each layer) does.

    Args:
        scores: For each layer float `(units,)`, comparable between all of them.
        costs: For each layer what one of its units costs.
        budget: What all kept units may cost.
        multiples: For each layer the size of a block.

    Returns:
        For each layer the kept units, int64, ascending.
    """
    ranked = [_blocks(layer, multiple) for layer, multiple in zip(scores, multiples, strict=True)]
    waiting = [
        (-score / costs[index], index, size)
        for index, (_, blocks) in enumerate(ranked)
        for score, size in blocks[1:]
    ]  # fmt: skip
    counts = [blocks[0][1] for _, blocks in ranked]
    spent = sum(count * cost for count, cost in zip(counts, costs, strict=True))
    full: set[int] = set()
    for _, index, size in sorted(waiting, key=lambda block: block[:2]):
        price = size * costs[index]
        if index in full or spent + price > budget * (1 + 1e-9):
            full.add(index)  # later blocks of the layer matter less than this one
            continue
        counts[index] += size
        spent += price
    return [order[:count].sort().values for (order, _), count in zip(ranked, counts, strict=True)]


def keep_the_best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the `count` most important of a layer's units, int64, ascending."""
    return torch.argsort(scores, descending=True, stable=True)[:count].sort().values


def knapsack(losses: Sequence[np.ndarray], prices: Sequence[np.ndarray], budget: float, bins: int = 4000) -> list[int]:
    """Takes one choice of each group, so that all together cost at most a budget and lose least.

    Dynamic programming over the budget in `bins` equal parts; prices are rounded up, so that the budget holds.

    Args:
        losses: For each group what each choice loses, `(choices,)`.
        prices: For each group what each choice costs, `(choices,)`.
        budget: What the choices may cost together.
        bins: Parts of the budget.

    Returns:
        For each group the index of the choice; where nothing fits, of the cheapest.
    """
    cheapest = [int(price.argmin()) for price in prices]
    if budget <= 0:
        return cheapest
    best = np.zeros(bins + 1)  # the least loss of the groups so far, by what may be spent
    taken: list[np.ndarray] = []
    sizes = [np.ceil(price / budget * bins - 1e-9).astype(int).clip(0) for price in prices]
    for loss, size in zip(losses, sizes, strict=True):
        after, pick = np.full(bins + 1, np.inf), np.zeros(bins + 1, dtype=int)
        for choice in np.flatnonzero(size <= bins):
            reached = np.full(bins + 1, np.inf)
            reached[size[choice] :] = best[: bins + 1 - size[choice]] + loss[choice]
            better = reached < after
            after[better], pick[better] = reached[better], choice
        best = after
        taken.append(pick)
    if not np.isfinite(best[bins]):
        return cheapest
    chosen: list[int] = []
    left = bins
    for pick, size in zip(reversed(taken), reversed(sizes), strict=True):
        chosen.append(int(pick[left]))
        left -= int(size[chosen[-1]])
    return chosen[::-1]


def rearrange(gradients: torch.Tensor, kept: torch.Tensor, passes: int = 3) -> torch.Tensor:
    """Exchanges kept and removed units of a layer so that what is removed matters least as a whole.

    Minimises the sum over examples of `(sum over removed units of the derivative)²`: the quadratic form of the
    block of the empirical Fisher matrix that belongs to the layer (Kwon et al. 2022, block-wise rearrangement).
    Each kept unit in turn, from the least important, takes the place of the removed one that gains most by it;
    so the result is never worse than `kept`.

    Args:
        gradients: Derivatives of each example's loss by a factor on each unit, `(examples, units)`.
        kept: The units kept to begin with, int64; as many are kept in the end.
        passes: How often to go over the units, at most.

    Returns:
        The kept units, int64, ascending.
    """
    derivatives = gradients.double()
    fisher = derivatives.T @ derivatives
    own = fisher.diagonal().clone()
    removed = torch.ones(len(own), dtype=torch.bool)
    removed[kept] = False
    if removed.all() or not removed.any():
        return kept.sort().values
    together = fisher[:, removed].sum(1)  # of each unit with all that is removed
    tolerance = 1e-12 * own.sum()
    for _ in range(passes):
        changed = False
        for unit in own.argsort().tolist():
            if removed[unit]:
                continue
            removed[unit] = True
            together += fisher[unit]
            change = torch.where(removed, own - 2 * together, torch.inf)
            back = int(change.argmin())
            if change[back] >= change[unit] - tolerance:
                back = unit
            removed[back] = False
            together -= fisher[back]
            changed |= back != unit
        if not changed:
            break
    return (~removed).nonzero().flatten()
