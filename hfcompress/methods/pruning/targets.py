"""How much is removed: shares of heads and neurons each, or one share of what all of them cost together."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.pruning.search import select, select_by_cost
from hfcompress.methods.pruning.units import Measure, Units, head_units, neuron_units, total_cost
from hfcompress.modeling.measure import tensor_bytes


def rounded_down(share: float) -> str:
    """Returns a share as text that is no more than it is: what is said to be reachable must be."""
    return f"{math.floor(share * 1000) / 1000:.3f}"


@dataclass(frozen=True, kw_only=True)
class Target(ABC):
    """What is to be removed from a model.

    Attributes:
        groups: The units in question by kind, `heads` or `neurons`, layer by layer.
        multiples: For each kind the number of units that are kept or removed together.
    """

    groups: Mapping[str, Sequence[Units]]
    multiples: Mapping[str, int]

    @property
    def units(self) -> list[Units]:
        """The units of all groups, one group after the other."""
        return [each for group in self.groups.values() for each in group]

    @abstractmethod
    def choose(self, scores: Sequence[torch.Tensor], progress: float = 1.0) -> list[torch.Tensor]:
        """Chooses what stays.

        Args:
            scores: For each of `units` float `(count,)`.
            progress: How much of the target is to be reached, from 0 to 1.

        Returns:
            For each of `units` the kept ones, int64, ascending.
        """

    @abstractmethod
    def require_reachable(self) -> None:
        """Raises CompressionError where more is asked than can go: a block of units stays in every layer."""

    def constraints(self) -> list[tuple[list[float], float]]:
        """Returns what must hold of a choice: for each of `units` the share that one unit costs, and the share to go.

        Raises:
            CompressionError: What is to go is no sum over units.
        """
        raise CompressionError(
            f"importance 'l0' cannot work towards a {type(self).__name__.lower()} target",
            hint="Set heads, neurons, flops, parameters or bytes.",
        )

    def findings(self, kept: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Returns what the target has to say of a choice."""
        return {}

    def require_telling(self, scores: Sequence[torch.Tensor]) -> None:
        """Raises CompressionError where scores are not finite, or the same for all units of a kind."""
        start = 0
        for name, group in self.groups.items():
            together = torch.cat([score.flatten().float() for score in scores[start : start + len(group)]])
            start += len(group)
            if not torch.isfinite(together).all():
                raise CompressionError(
                    f"the importance of {name} is not finite", hint="Check weights and data for NaN."
                )
            if len(together) > 1 and (together == together[0]).all():
                raise CompressionError(
                    f"all {name} are equally important ({together[0].item():g}): nothing says which to remove",
                    hint="Use other calibration data, or another importance.",
                )

    def _least(self, name: str) -> list[int]:
        return [min(self.multiples[name], each.count) for each in self.groups[name]]


@dataclass(frozen=True, kw_only=True)
class Shares(Target):
    """A share of the units of each kind.

    Attributes:
        shares: By kind.
    """

    shares: Mapping[str, float]

    def choose(self, scores: Sequence[torch.Tensor], progress: float = 1.0) -> list[torch.Tensor]:
        """Chooses among the units of each kind."""
        kept: list[torch.Tensor] = []
        for name, group in self.groups.items():
            layers = scores[len(kept) : len(kept) + len(group)]
            kept += select(layers, self.shares[name] * progress, self.multiples[name])
        return kept

    def constraints(self) -> list[tuple[list[float], float]]:
        """Returns one constraint for each kind."""
        found = []
        for name, group in self.groups.items():
            total = sum(each.count for each in group)
            own = [[1 / total if other == name else 0.0] * len(layers) for other, layers in self.groups.items()]
            found.append(([cost for costs in own for cost in costs], self.shares[name]))
        return found

    def require_reachable(self) -> None:
        """Raises CompressionError where a layer would be left without units."""
        for name, group in self.groups.items():
            total, least = sum(each.count for each in group), sum(self._least(name))
            size = max(self._least(name))
            if 0 < total * self.shares[name] <= size / 2:
                raise CompressionError(
                    f"{name}: {self.shares[name]:g} of {total} is no more than half of the {size} that go together, so "
                    f"that nothing would go; a share over {size / 2 / total:.3g} removes something"
                )
            if round(total * (1 - self.shares[name])) < least:
                raise CompressionError(
                    f"{name}: {self.shares[name]:g} of {total} cannot be removed, since every layer keeps at least "
                    f"{self.multiples[name]}; reachable: up to {rounded_down((total - least) / total)}"
                )


@dataclass(frozen=True, kw_only=True)
class Budget(Target):
    """A share of what all blocks cost, or of what they and the rest of the model cost.

    Attributes:
        measure: What is counted.
        share: How much of it is to go.
        rest: What the rest of the model costs, where the share is of that too.
    """

    measure: Measure
    share: float
    rest: float = 0.0

    def choose(self, scores: Sequence[torch.Tensor], progress: float = 1.0) -> list[torch.Tensor]:
        """Chooses among units of both kinds by score per cost."""
        costs = [each.costs(self.measure) for each in self.units]
        multiples = [self.multiples[name] for name, group in self.groups.items() for _ in group]
        blocks = total_cost(self.units, self.measure)
        budget = blocks - (blocks + self.rest) * self.share * progress - sum(fixed for _, fixed in costs)
        return select_by_cost(scores, [unit for unit, _ in costs], budget, multiples)

    def constraints(self) -> list[tuple[list[float], float]]:
        """Returns the one constraint of the whole cost."""
        total = total_cost(self.units, self.measure) + self.rest
        return [([each.costs(self.measure)[0] / total for each in self.units], self.share)]

    def require_reachable(self) -> None:
        """Raises CompressionError where the least that stays costs more than is left."""
        total = total_cost(self.units, self.measure) + self.rest
        stays = self.rest
        for name, group in self.groups.items():
            for each, least in zip(group, self._least(name), strict=True):
                unit, fixed = each.costs(self.measure)
                stays += least * unit + fixed
        if stays > total * (1 - self.share):
            others = " and nothing else of the model goes" if self.rest else ""
            most = rounded_down(max(0.0, 1 - stays / total))
            raise CompressionError(
                f"{self.measure}: {self.share:g} cannot be removed, since every layer keeps a head and "
                f"{self.multiples['neurons']} neurons{others}; reachable: up to {most}"
            )

    def findings(self, kept: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Returns the share that was removed, where it is not that of the FLOPs, which is told anyway."""
        if self.measure == "flops":
            return {}
        gone = sum(
            (each.count - len(index)) * each.costs(self.measure)[0]
            for each, index in zip(self.units, kept, strict=True)
        )
        return {f"{self.measure}_removed": round(gone / (total_cost(self.units, self.measure) + self.rest), 4)}


def target_of(
    model: PreTrainedModel,
    *,
    heads: float = 0,
    neurons: float = 0,
    flops: float = 0,
    parameters: float = 0,
    bytes: float = 0,
    multiple_of: int,
) -> Target:
    """Makes the target that a config asks for; shares of 0 ask for nothing.

    Raises:
        CompressionError: The model is quantized.
        UnsupportedModelError: The model's family is not known.
    """
    multiples = {"heads": 1, "neurons": multiple_of}
    measures: dict[Measure, float] = {"flops": flops, "parameters": parameters, "bytes": bytes}
    for measure, share in measures.items():
        if share:
            both = {"heads": head_units(model), "neurons": neuron_units(model)}
            rest = 0.0
            if measure == "bytes":
                rest = tensor_bytes(model) - total_cost([*both["heads"], *both["neurons"]], "bytes")
            return Budget(groups=both, multiples=multiples, measure=measure, share=share, rest=rest)
    groups = {}
    if heads:
        groups["heads"] = head_units(model)
    if neurons:
        groups["neurons"] = neuron_units(model)
    return Shares(groups=groups, multiples=multiples, shares={"heads": heads, "neurons": neurons})
