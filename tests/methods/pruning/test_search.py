from __future__ import annotations

from itertools import combinations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hfcompress.methods.pruning.search import rearrange, select_by_cost

LAYERS = st.lists(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=30), min_size=1, max_size=5)


@given(LAYERS, st.integers(1, 8), st.floats(0, 1), st.randoms(use_true_random=False))
def test_what_is_kept_fits_the_budget_and_uses_it(layers: list, multiple: int, share: float, random) -> None:
    scores = [torch.tensor(layer) for layer in layers]
    costs = [random.choice([1.0, 3.0, 700.0]) for _ in layers]
    least = sum(min(multiple, len(layer)) * cost for layer, cost in zip(layers, costs, strict=True))
    whole = sum(len(layer) * cost for layer, cost in zip(layers, costs, strict=True))
    budget = least + share * (whole - least)
    kept = select_by_cost(scores, costs, budget, [multiple] * len(layers))
    spent = sum(len(index) * cost for index, cost in zip(kept, costs, strict=True))
    assert spent <= budget * (1 + 1e-6)
    for index, layer, cost in zip(kept, scores, costs, strict=True):
        assert len(index) and index.tolist() == sorted(set(index.tolist()))
        assert len(index) % multiple == 0 or len(index) == len(layer)
        missing = min(multiple, len(layer) - len(index))
        assert not missing or spent + missing * cost > budget * (1 - 1e-6)
        dropped = torch.ones(len(layer), dtype=torch.bool).index_fill(0, index, False)
        assert not dropped.any() or layer[index].min() >= layer[dropped].max()


def test_units_compete_by_score_for_what_they_cost() -> None:
    kept = select_by_cost([torch.tensor([9.0, 5.0]), torch.tensor([3.0, 2.0])], [4.0, 1.0], 6.0, [1, 1])
    assert [index.tolist() for index in kept] == [[0], [0, 1]]  # 2 for 1 is better than 5 for 4


def joint(gradients: torch.Tensor, kept: torch.Tensor) -> float:
    gone = torch.ones(gradients.shape[1], dtype=torch.bool).index_fill(0, kept, False)
    return gradients[:, gone].sum(1).square().sum().item()


@given(st.integers(2, 8), st.integers(1, 6), st.integers(0, 10_000), st.integers(0, 8))
def test_rearranging_keeps_the_number_and_is_never_worse(units: int, examples: int, seed: int, kept: int) -> None:
    gradients = torch.randn(examples, units, generator=torch.Generator().manual_seed(seed)).double()
    before = gradients.square().sum(0).argsort(descending=True)[: min(kept, units)].sort().values
    after = rearrange(gradients, before)
    assert len(after) == len(before) and after.tolist() == sorted(set(after.tolist()))
    assert joint(gradients, after) <= joint(gradients, before) + 1e-9


def test_rearranging_comes_near_the_best_choice() -> None:
    before, after, best = 0.0, 0.0, 0.0
    for seed in range(8):
        gradients = torch.randn(20, 8, generator=torch.Generator().manual_seed(seed))
        gradients[:, 4:] += gradients[:, :4]  # related units, which the diagonal knows nothing of
        start = gradients.square().sum(0).argsort(descending=True)[:4].sort().values
        before += joint(gradients, start)
        after += joint(gradients, rearrange(gradients, start))
        best += min(joint(gradients, torch.tensor(choice)) for choice in combinations(range(8), 4))
    assert after - best < 0.5 * (before - best)


def test_units_that_cancel_go_together() -> None:
    alike = torch.tensor([[1.0, -1.0, 0.5, 0.6], [2.0, -2.0, 0.5, 0.6]])
    assert rearrange(alike, torch.tensor([0, 1])).tolist() == [2, 3]
