"""Gates that learn which units to close: hard-concrete variables under a Lagrangian (Louizos 2018, Xia et al. 2022).

Each unit is multiplied by a random gate between 0 and 1 that is exactly 0 or 1 most of the time. How likely it is
open is learnt with the weights, while two multipliers push the expected cost towards the target: they grow for as
long as it is missed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn

TEMPERATURE = 2 / 3
LOW, HIGH = -0.1, 1.1  # a gate's range before it is cut to 0 and 1
LIKELY_OPEN = 0.95  # at first
# The multipliers and the gates need far larger steps than weights; the CoFi paper uses the same.
RATE = 0.1


def hard_concrete(log_odds: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Draws gates: `(units,)` from as many numbers of (0, 1)."""
    noise = uniform.log() - (-uniform).log1p()
    stretched = ((noise + log_odds) / TEMPERATURE).sigmoid() * (HIGH - LOW) + LOW
    return stretched.clamp(0, 1)


def typical(log_odds: torch.Tensor) -> torch.Tensor:
    """Returns the gates without noise, `(units,)`."""
    return (log_odds.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def open_probability(log_odds: torch.Tensor) -> torch.Tensor:
    """Returns how likely each gate is not 0, `(units,)`."""
    return (log_odds - TEMPERATURE * math.log(-LOW / HIGH)).sigmoid()


class Gates:
    """Gates of all units of a model, with their multipliers and their optimizer.

    Args:
        shares: For each constraint the share of the whole that each unit costs, `(constraints, units)`.
        wanted: For each constraint the share to remove, `(constraints,)`.
        device: Where they live.

    Attributes:
        log_odds: `(units,)`.
        multipliers: `(constraints, 2)`, of the miss and of its square.
    """

    def __init__(self, shares: torch.Tensor, wanted: torch.Tensor, device: torch.device) -> None:
        self.shares, self.wanted = shares.float().to(device), wanted.float().to(device)
        start = math.log(LIKELY_OPEN / (1 - LIKELY_OPEN))
        self.log_odds = nn.Parameter(torch.full((shares.shape[1],), start, device=device))
        self.multipliers = nn.Parameter(torch.zeros(len(shares), 2, device=device))
        groups = [{"params": [self.log_odds]}, {"params": [self.multipliers], "maximize": True}]
        self._optimizer = torch.optim.Adam(groups, lr=RATE)
        for parameter in (self.log_odds, self.multipliers):  # so that there is a state to load into
            self._optimizer.state[parameter] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }

    def draw(self) -> torch.Tensor:
        """Draws the gates of one forward pass, `(units,)`."""
        small = torch.finfo(torch.float32).eps
        return hard_concrete(self.log_odds, torch.rand_like(self.log_odds).clamp(small, 1 - small))

    def removed(self) -> torch.Tensor:
        """Returns the share that the gates are expected to remove, by constraint, `(constraints,)`."""
        return self.shares @ (1 - open_probability(self.log_odds))

    def penalty(self, progress: float) -> torch.Tensor:
        """Returns the Lagrangian's term for missing a part `progress` of the target."""
        miss = self.removed() - self.wanted * progress
        return (self.multipliers[:, 0] * miss + self.multipliers[:, 1] * miss.square()).sum()

    def update(self) -> None:
        """Steps by the gradients: the gates down, the multipliers up; then forgets the gradients."""
        for parameter in (self.log_odds, self.multipliers):
            if parameter.grad is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= torch.distributed.get_world_size()
        gradients = [each.grad for each in (self.log_odds, self.multipliers) if each.grad is not None]
        if all(bool(torch.isfinite(each).all()) for each in gradients):
            self._optimizer.step()  # else a step in float16 overflowed, which the weights' optimizer leaves out too
        self._optimizer.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        """Returns everything that learns."""
        found = {"log_odds": self.log_odds.detach(), "multipliers": self.multipliers.detach()}
        for name in ("log_odds", "multipliers"):
            found |= {f"{name}_{key}": value for key, value in self._optimizer.state[getattr(self, name)].items()}
        return {name: value.cpu().clone() for name, value in found.items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes back what `state` returned."""
        with torch.no_grad():
            for name in ("log_odds", "multipliers"):
                getattr(self, name).copy_(state[name])
                for key, value in self._optimizer.state[getattr(self, name)].items():
                    value.copy_(state[f"{name}_{key}"])


def split(values: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    """Splits a value for each unit by layer."""
    return list(values.split(list(counts)))
