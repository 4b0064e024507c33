"""The maths of mending a projection: ridge regression from what it gets onto what it should give."""

from __future__ import annotations

import torch

# Relative to the mean square of the inputs. From 1e-4 to 1e-1 the results hardly differ.
RIDGE = 1e-2


class Moments:
    """Sums over positions of what a projection gets and what it should give.

    Attributes:
        inputs: Sum of `x xᵀ`, float64 `(in, in)`.
        cross: Sum of `t xᵀ`, float64 `(out, in)`.
        sum_in: Sum of `x`, float64 `(in,)`.
        sum_out: Sum of `t`, float64 `(out,)`.
        count: Number of positions.
    """

    def __init__(self, in_features: int, out_features: int, device: torch.device) -> None:
        self.inputs = torch.zeros(in_features, in_features, dtype=torch.float64, device=device)
        self.cross = torch.zeros(out_features, in_features, dtype=torch.float64, device=device)
        self.sum_in = torch.zeros(in_features, dtype=torch.float64, device=device)
        self.sum_out = torch.zeros(out_features, dtype=torch.float64, device=device)
        self.count = 0

    def add(self, inputs: torch.Tensor, wanted: torch.Tensor) -> None:
        """Takes up positions: x `(positions, in)` and t `(positions, out)`."""
        inputs, wanted = inputs.detach().float(), wanted.detach().float()
        with torch.autocast(inputs.device.type, enabled=False):  # of sums the last digits count
            self.inputs += inputs.T @ inputs
            self.cross += wanted.T @ inputs
        self.sum_in += inputs.double().sum(0)
        self.sum_out += wanted.double().sum(0)
        self.count += len(inputs)


def refit(
    weight: torch.Tensor, bias: torch.Tensor | None, moments: Moments, ridge: float = RIDGE
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Finds the weight and bias whose outputs are nearest to what is wanted.

    Minimises `E |V x + c - t|²` over V and c, plus a ridge that holds V to `weight`: the fewer the examples, the
    nearer the result is to plain pruning.

    Args:
        weight: The weight to begin with, `(out, in)`.
        bias: The bias to begin with, `(out,)`; without one c is 0.
        moments: Of the inputs x and the wanted outputs t, at least one position.
        ridge: Over 0, relative to the mean square of the inputs.

    Returns:
        V `(out, in)`, and c `(out,)` or None; float32.
    """
    inputs, cross = moments.inputs / moments.count, moments.cross / moments.count
    mean_in, mean_out = moments.sum_in / moments.count, moments.sum_out / moments.count
    if bias is not None:
        inputs = inputs - torch.outer(mean_in, mean_in)
        cross = cross - torch.outer(mean_out, mean_in)
    start = weight.double()
    scale = inputs.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    missed = cross - start @ inputs
    inputs.diagonal().add_(ridge * scale)
    fitted = start + torch.linalg.solve(inputs, missed.T).T
    return fitted.float(), None if bias is None else (mean_out - fitted @ mean_in).float()
