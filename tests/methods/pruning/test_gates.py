from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfcompress.methods.pruning.gates import Gates, hard_concrete, open_probability, typical


@given(st.floats(-8, 8), st.floats(1e-6, 1 - 1e-6), st.floats(0, 4))
def test_gates_lie_between_0_and_1_and_open_with_their_odds(log_odds: float, uniform: float, more: float) -> None:
    noise = torch.tensor([uniform, uniform])
    low, high = hard_concrete(torch.tensor([log_odds, log_odds + more]), noise)
    assert 0 <= low <= high <= 1


@pytest.mark.parametrize("log_odds", [-3.0, -0.5, 0.0, 1.0, 3.0])
def test_the_probability_is_how_often_a_gate_is_not_closed(log_odds: float) -> None:
    uniform = torch.rand(40_000, generator=torch.Generator().manual_seed(0)).clamp(1e-6, 1 - 1e-6)
    drawn = hard_concrete(torch.full((40_000,), log_odds), uniform)
    assert (drawn > 0).float().mean().item() == pytest.approx(open_probability(torch.tensor(log_odds)).item(), abs=0.01)
    assert 0 <= typical(torch.tensor(log_odds)) <= 1


def test_the_multipliers_press_until_every_constraint_is_met() -> None:
    torch.manual_seed(0)
    shares = torch.cat([torch.full((1, 30), 1 / 30), torch.zeros(1, 30)], 1)
    shares = torch.cat([shares, shares.roll(30, 1)])
    gates = Gates(shares, torch.tensor([0.5, 0.2]), torch.device("cpu"))
    worth = torch.rand(60) * 0.01  # what a loss would say for each unit
    assert gates.removed().max() < 0.1
    for _ in range(600):
        (gates.penalty(1.0) - (worth * gates.draw()).sum()).backward()
        gates.update()
    torch.testing.assert_close(gates.removed().detach(), gates.wanted, rtol=0, atol=0.03)


def test_what_is_loaded_goes_on_where_it_was() -> None:
    made = [Gates(torch.full((1, 8), 1 / 8), torch.tensor([0.5]), torch.device("cpu")) for _ in range(2)]
    for _ in range(3):
        made[0].penalty(1.0).backward()
        made[0].update()
    made[1].load_state(made[0].state())
    for each in made:
        each.penalty(1.0).backward()
        each.update()
    assert all(torch.equal(value, made[1].state()[name]) for name, value in made[0].state().items())


def test_a_step_that_overflowed_in_float16_is_left_out() -> None:
    gates = Gates(torch.full((1, 8), 1 / 8), torch.tensor([0.5]), torch.device("cpu"))
    before = gates.state()
    (gates.penalty(1.0) * float("inf")).backward()
    gates.update()
    assert all(torch.equal(value, before[name]) for name, value in gates.state().items())
    gates.penalty(1.0).backward()
    gates.update()
    assert all(bool(value.isfinite().all()) for value in gates.state().values())
