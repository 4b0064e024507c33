from __future__ import annotations

from collections.abc import Callable

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.errors import CompressionError
from hfcompress.methods.low_rank.maths import energies, nonnegative, refit, retarget, truncate
from hfcompress.methods.low_rank.ranks import Curve, allocate, rank_for, rank_of_energy


def whitened_error(weight: torch.Tensor, product: torch.Tensor, moment: torch.Tensor) -> float:
    difference = (weight - product).double()
    return torch.trace(difference @ moment.double() @ difference.T).item()


def sample(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_plain_truncation_discards_the_smallest_singular_values() -> None:
    weight = sample(0, 20, 30)
    up, down = truncate(weight, 7)
    tail = torch.linalg.svdvals(weight)[7:].square().sum()
    assert torch.isclose((weight - up @ down).square().sum(), tail, rtol=1e-4)
    assert torch.isclose(energies(weight)[7:].sum().float(), tail, rtol=1e-4)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20)])
@pytest.mark.parametrize("rows", [200, 12])  # 12 rows leave the moments rank-deficient
def test_whitened_error_is_the_discarded_tail_of_the_whitened_matrix(rows: int, shape: tuple[int, int]) -> None:
    width = shape[1]
    inputs, weight = sample(1, rows, width) @ sample(2, width, width), sample(3, *shape)
    moment = inputs.T @ inputs / rows
    up, down = truncate(weight, 7, moment)
    tail = torch.linalg.svdvals(weight.double() @ inputs.double().T / rows**0.5)[7:].square().sum().item()
    assert whitened_error(weight, up @ down, moment) == pytest.approx(tail, rel=1e-4)
    assert energies(weight, moment)[7:].sum().item() == pytest.approx(tail, rel=1e-4)


@pytest.mark.parametrize("curved", [False, True])
def test_moments_of_the_outputs_say_as_much_as_those_of_the_inputs(curved: bool) -> None:
    inputs, weight, slopes = sample(1, 90, 30) @ sample(2, 30, 30), sample(3, 20, 30), sample(4, 60, 20)
    moment, curvature = inputs.T @ inputs / 90, slopes.T @ slopes / 60 if curved else None
    outputs = inputs @ weight.T
    gram = outputs.T @ outputs / 90
    wanted, found = truncate(weight, 7, moment, curvature), truncate(weight, 7, None, curvature, gram)
    torch.testing.assert_close(found[0] @ found[1], wanted[0] @ wanted[1], atol=1e-3, rtol=1e-3)
    wanted, found = energies(weight, moment, curvature), energies(weight, None, curvature, gram)
    torch.testing.assert_close(found, wanted, atol=1e-5 * wanted[0].item(), rtol=1e-4)


def test_no_method_and_no_neighbour_beats_the_whitened_product_on_its_inputs() -> None:
    inputs, weight = sample(4, 100, 16) * torch.logspace(0, 3, 16), sample(5, 12, 16)
    moment = inputs.T @ inputs / 100
    up, down = truncate(weight, 4, moment)
    best = whitened_error(weight, up @ down, moment)
    fisher = torch.diag(sample(6, 16).square())
    for other_up, other_down in (truncate(weight, 4), truncate(weight, 4, fisher), nonnegative(weight, 4)):
        assert best < whitened_error(weight, other_up @ other_down, moment)
        refitted = refit(weight, other_up, other_down, moment)
        after = whitened_error(weight, refitted[0] @ refitted[1], moment)
        assert best * (1 - 1e-6) <= after <= whitened_error(weight, other_up @ other_down, moment)
    generator = torch.Generator().manual_seed(7)
    for _ in range(50):
        nudged = (up + 0.01 * torch.randn(up.shape, generator=generator)) @ down
        assert best <= whitened_error(weight, nudged, moment)


def test_a_diagonal_moment_weighs_columns() -> None:
    """With a weight of one column alone that column is what is kept."""
    weight, importance = sample(8, 6, 5), torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    up, down = truncate(weight, 1, torch.diag(importance))
    torch.testing.assert_close((up @ down)[:, 2], weight[:, 2])


def test_refit_is_least_squares_on_the_inputs() -> None:
    inputs, weight = sample(9, 60, 10), sample(10, 7, 10)
    up, down = truncate(weight, 3)
    new, thin = refit(weight, up, down, inputs.T @ inputs / 60)
    wanted = torch.linalg.lstsq((inputs @ down.T).double(), (inputs @ weight.T).double()).solution.T
    torch.testing.assert_close((new @ thin).double(), wanted @ down.double(), atol=1e-4, rtol=1e-3)


def test_retargeting_is_least_squares_from_other_inputs() -> None:
    inputs, weight = sample(11, 80, 10), sample(12, 7, 10)
    others = inputs + 0.3 * sample(13, 80, 10)
    aim = retarget(weight, others.T @ others / 80, inputs.T @ others / 80, ridge=1e-12)
    wanted = torch.linalg.lstsq(others.double(), (inputs @ weight.T).double()).solution.T
    torch.testing.assert_close(aim, wanted, atol=1e-4, rtol=1e-3)


def test_retargeting_to_the_same_inputs_changes_nothing() -> None:
    inputs, weight = sample(14, 4, 10), sample(15, 7, 10)  # rank-deficient: most directions are not seen
    moment = inputs.T @ inputs / 4
    torch.testing.assert_close(retarget(weight, moment, moment), weight.double(), atol=1e-5, rtol=1e-5)


# Hostile numbers

ELEMENTS = st.sampled_from([0.0, 1.0, -1.0, 1e-12, 1e12, 3e-30, -7.5]) | st.floats(-1e6, 1e6, width=32)
hostile = arrays.arrays(
    np.float64, arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12), elements=ELEMENTS
)


def moments_of(matrix: torch.Tensor) -> torch.Tensor:
    rows = matrix.float() / max(1.0, float(matrix.abs().max()))
    return rows.T @ rows


def svd(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return truncate(weight, rank)


def whitened(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return truncate(weight, rank, moments_of(weight))


def fisher(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return truncate(weight, rank, torch.diag(weight.float().square().sum(0)))


def refitted(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    return refit(weight, *truncate(weight, rank), moments_of(weight))


def sequential(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    moment = moments_of(weight)
    return truncate(retarget(weight, moment, moment.flip(0)), rank, moment)


@pytest.mark.parametrize("method", [svd, whitened, fisher, nonnegative, refitted, sequential], ids=lambda f: f.__name__)
def test_hostile_matrices_come_out_finite(method: Callable) -> None:
    @given(matrix=hostile, rank=st.integers(1, 12), half=st.booleans())
    @settings(max_examples=500 if method in (svd, whitened, fisher, nonnegative) else 100, deadline=None)
    def check(matrix: np.ndarray, rank: int, half: bool) -> None:
        weight = torch.from_numpy(matrix).to(torch.bfloat16 if half else torch.float32)
        up, down = method(weight, rank)
        assert torch.isfinite(up).all() and torch.isfinite(down).all()
        assert up.shape == (len(weight), min(rank, *weight.shape))
        assert down.shape == (min(rank, *weight.shape), weight.shape[1])
        assert up.dtype == down.dtype == torch.float32

    check()


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (5, 7)])
def test_a_matrix_of_rank_one_is_found_again(shape: tuple[int, int]) -> None:
    weight = sample(16, shape[0], 1) @ sample(17, 1, shape[1])
    up, down = truncate(weight, 1)
    torch.testing.assert_close(up @ down, weight, atol=1e-5, rtol=1e-5)


def test_non_negative_factors_are_what_is_promised() -> None:
    weight = sample(20, 12, 16)
    up, down = nonnegative(weight, 6)
    plain_up, plain_down = truncate(weight, 6)
    assert (up >= 0).all()
    assert (plain_up @ plain_down - weight).norm() < (up @ down - weight).norm() < weight.norm()


def test_an_ill_conditioned_matrix_keeps_what_is_large() -> None:
    left, right = (torch.linalg.qr(sample(seed, 16, 16).double()).Q for seed in (18, 19))
    scales = torch.logspace(0, -12, 16, dtype=torch.float64)
    weight = (left * scales) @ right
    up, down = truncate(weight, 8)
    assert (weight - up.double() @ down.double()).norm() < 2e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", [truncate, nonnegative])
def test_what_is_not_finite_is_refused(method: Callable, bad: float) -> None:
    with pytest.raises(CompressionError, match="the weight holds values that are not finite"):
        method(torch.tensor([[1.0, bad]]), 1)


def test_moments_that_are_not_finite_are_refused() -> None:
    with pytest.raises(CompressionError, match="the second moment holds values that are not finite"):
        truncate(torch.ones(2, 2), 1, torch.full((2, 2), float("nan")))


# Ranks


@given(st.integers(1, 64), st.integers(1, 64), st.floats(0.01, 0.99), st.integers(1, 16))
def test_the_rank_keeps_no_more_than_asked(out: int, inputs: int, keep: float, multiple: int) -> None:
    rank = rank_for(out, inputs, keep, multiple)
    assert rank >= 1
    assert rank == 1 or rank * (out + inputs) <= keep * out * inputs


@given(st.lists(st.floats(0, 1e6, width=32), min_size=1, max_size=40), st.floats(0.01, 0.99), st.integers(1, 16))
def test_the_rank_of_an_energy_is_the_least_that_keeps_it(values: list[float], share: float, multiple: int) -> None:
    sizes = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    rank = rank_of_energy(sizes, share, multiple)
    assert 1 <= rank <= len(sizes)
    assert sizes[:rank].sum() >= share * sizes.sum() * (1 - 1e-12)
    one_less = rank - multiple
    assert one_less < 1 or rank == len(sizes) or sizes[:one_less].sum() < share * sizes.sum()


def curve(seed: int, size: int = 24, steep: float = 1.0) -> Curve:
    spectrum = torch.rand(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Curve(size, size, spectrum.sort(descending=True).values, {8: 0.1 * steep, 4: 0.4 * steep, 2: 1.0 * steep})


def test_a_curve_passes_through_what_was_measured_and_never_rises() -> None:
    made = curve(0)
    assert [made.loss(rank) for rank in (8, 4, 2, 24)] == pytest.approx([0.1, 0.4, 1.0, 0.0])
    losses = [made.loss(rank) for rank in range(1, 25)]
    assert losses == sorted(losses, reverse=True)
    assert made.loss(1) > 1.0
    assert [rank for _, _, rank in made.options(4)] == [2, 6, 10, None]


def test_noise_that_says_less_is_better_is_not_believed() -> None:
    made = Curve(8, 8, torch.ones(8, dtype=torch.float64), {4: 0.3, 2: -0.1})
    assert made.loss(2) == made.loss(4) == pytest.approx(0.3)


@pytest.mark.parametrize("budget", [0.3, 0.4, 0.6])
def test_no_other_ranks_of_the_budget_cost_less(budget: float) -> None:
    """Against every combination of three small layers, up to the last piece."""
    curves = {str(seed): curve(seed, size=16, steep=5.0**seed) for seed in range(3)}
    chosen = allocate(curves, budget, 1)
    limit = budget * 3 * 16 * 16
    options = [each.options(1) for each in curves.values()]

    def cost(rank_of: dict[str, int | None]) -> tuple[int, float]:
        picked = [next(o for o in each.options(1) if o[2] == rank_of[name]) for name, each in curves.items()]
        return sum(o[0] for o in picked), sum(o[1] for o in picked)

    size, loss = cost(chosen)
    best = min(
        a[1] + b[1] + c[1] for a in options[0] for b in options[1] for c in options[2] if a[0] + b[0] + c[0] <= limit
    )
    assert size <= limit
    assert loss <= best * 1.1 + 1e-9


def test_a_budget_below_the_lowest_ranks_is_refused() -> None:
    with pytest.raises(CompressionError, match=r"a budget of 0\.1 is too small"):
        allocate({"a": curve(0)}, 0.1, 8)
