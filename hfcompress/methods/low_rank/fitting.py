"""The factors of a layer, or of several that share one: what they are fitted to, and the fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import CompressionError
from hfcompress.methods.low_rank import maths
from hfcompress.methods.low_rank.config import LowRankConfig, Method
from hfcompress.methods.statistics import InputStatistics
from hfcompress.modeling.anatomy import module_at


@dataclass(frozen=True)
class Group:
    """Layers that are factorised as one, their matrices one below the other; mostly a layer alone.

    Attributes:
        paths: The layers, relative to the base model.
        outputs: Their widths.
        inputs: The width of what they read.
        heads: How many the outputs fall into, where each has factors of its own.
    """

    paths: tuple[str, ...]
    outputs: tuple[int, ...]
    inputs: int
    heads: int = 1

    @property
    def name(self) -> str:
        """The first layer's path."""
        return self.paths[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs of all of them, and inputs."""
        return sum(self.outputs), self.inputs

    @property
    def head_shape(self) -> tuple[int, int]:
        """Outputs of one head, which are all where heads are not told apart, and inputs."""
        return sum(self.outputs) // self.heads, self.inputs

    def matrix(self, model: PreTrainedModel) -> torch.Tensor:
        """Returns the weights as `(outputs of all, inputs)`; those of a layer alone are no copy."""
        matrices = [matrix_of(model, path) for path in self.paths]
        return matrices[0] if len(matrices) == 1 else torch.cat(matrices)


def matrix_of(model: PreTrainedModel, path: str) -> torch.Tensor:
    """Returns a layer's weight as `(out, in)`."""
    module: Any = module_at(model, path)
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What factors are fitted to.

    Attributes:
        method: What makes the factors.
        inputs: Statistics by layer, where something is fitted to outputs.
        outputs: Second moments of what a layer gives without its bias, `(out, out)`: they say enough of layers with
            fewer outputs than inputs, and are sooner made.
        fisher: Fisher information by layer and input.
        curvature: That of the loss by layer's outputs, `(out, out)` or what it is to the inputs, where their errors
            are weighed.
        measured: By layer and rank how much worse the model is with that layer alone factorised, where a budget of the
            same config has measured it before.
    """

    method: Method
    inputs: Mapping[str, InputStatistics] = field(default_factory=dict)
    outputs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    fisher: Mapping[str, torch.Tensor] = field(default_factory=dict)
    curvature: Mapping[str, torch.Tensor | maths.Pulled] = field(default_factory=dict)
    measured: Mapping[str, Mapping[int, float]] = field(default_factory=dict)

    def weighting(self, group: Group) -> torch.Tensor | None:
        """Returns the matrix by which the method weighs the error of a group; None for the identity."""
        if self.method == "whitened":
            return None if self.gram_of(group) is not None else self.inputs[group.name].second_moment
        if self.method != "fisher":
            return None
        # A column of matrices that stand one below the other is weighed by what the loss says of all of it.
        return torch.stack([self.fisher[path] for path in group.paths]).sum(0).diag()

    def gram_of(self, group: Group) -> torch.Tensor | None:
        """Returns the second moments of a group's outputs, where they stand for those of the inputs."""
        return None if group.name in self.inputs else self.outputs.get(group.name)

    def curvature_of(self, group: Group, model: PreTrainedModel) -> maths.Curvature | None:
        """Returns the curvature by the outputs of each layer of a group, where their errors are weighed.

        Where of one of them only that is known which it is to the inputs, it is given of all together.
        """
        if not self.curvature:
            return None
        known = {path: self.curvature[path] for path in group.paths}
        whole = [each for each in known.values() if isinstance(each, torch.Tensor)]
        if len(whole) == len(known):
            return whole
        pulled = [
            each if isinstance(each, maths.Pulled) else maths.pull(matrix_of(model, path), each)
            for path, each in known.items()
        ]
        return maths.Pulled(torch.stack([each.moment for each in pulled]).sum(0), sum(each.trace for each in pulled))


class Piece(NamedTuple):
    """One matrix to factorise, and what its error is weighed by; as `fit` takes them."""

    weight: torch.Tensor
    weighting: torch.Tensor | None
    curvature: maths.Curvature | None
    gram: torch.Tensor | None


def pieces_of(model: PreTrainedModel, group: Group, knowledge: Knowledge) -> list[Piece]:
    """Returns a group's matrix, or that of each head where they have factors of their own.

    Raises:
        ValueError: Heads, where of the curvature only that is known which all outputs are to the inputs.
    """
    weight, weighting = group.matrix(model), knowledge.weighting(group)
    curvature, gram = knowledge.curvature_of(group, model), knowledge.gram_of(group)
    if group.heads == 1:
        return [Piece(weight, weighting, curvature, gram)]
    if isinstance(curvature, maths.Pulled):
        raise ValueError(f"{group.name}: of the outputs of a head alone the curvature is not known")
    whole = None if curvature is None else curvature[0]
    return [
        Piece(weight[rows], weighting, *(None if each is None else each[rows, rows] for each in (whole, gram)))
        for rows in _equal_slices(len(weight), group.heads)
    ]


def _equal_slices(size: int, count: int) -> list[slice]:
    return [slice(start, start + size // count) for start in range(0, size, size // count)]


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """The factors of a group of layers.

    Attributes:
        factors: `up`, that of one layer below that of the other, and `down`; those of heads below each other too.
        shift: What their biases must rise by, `(out,)`, or None.
    """

    factors: maths.Factors
    shift: torch.Tensor | None = None


def fit(
    weight: torch.Tensor,
    rank: int,
    method: str,
    *,
    weighting: torch.Tensor | None = None,
    curvature: maths.Curvature | None = None,
    gram: torch.Tensor | None = None,
    inputs: InputStatistics | None = None,
    refit: bool = False,
    shift: bool = False,
) -> Fitted:
    """Factorises one matrix.

    Args:
        weight: `(out, in)`, finite.
        rank: At least 1.
        method: `nmf`, or any other for singular values.
        weighting: `(in, in)`, by which the error is weighed; None for the identity.
        curvature: `(out, out)`, or its blocks, or what it is to the inputs, by which the error of the outputs is
            weighed; None for the identity.
        gram: `(out, out)`, second moments of the outputs, in the place of `weighting` and `inputs`.
        inputs: Statistics of what enters the layer.
        refit: Fit `up` again to the outputs.
        shift: Find out what a bias should take over.

    Raises:
        CompressionError: Weight or statistics are not finite.
        ValueError: A curvature is known by the inputs alone, and they are not what they were.
    """
    if isinstance(curvature, maths.Pulled) and inputs is not None and inputs.cross_moment is not None:
        raise ValueError("other inputs need another matrix, and of its outputs the curvature is not known")
    known = inputs.centred() if inputs is not None and shift else inputs
    aim = weight
    if method == "whitened" and known is not None:
        weighting = known.second_moment
        if known.cross_moment is not None:
            aim = maths.retarget(weight, known.second_moment, known.cross_moment)
    if method == "nmf":
        factors = maths.nonnegative(weight, rank)
    else:
        factors = maths.truncate(aim, rank, weighting, curvature, gram)
    if refit and known is not None:
        factors = maths.refit(aim, *factors, known.second_moment)
    if not shift or inputs is None:
        return Fitted(factors=factors)
    mean = inputs.mean.double()
    original = mean if inputs.reference_mean is None else inputs.reference_mean.double()
    up, down = (factor.double() for factor in factors)
    return Fitted(factors=factors, shift=(weight.double() @ original - up @ (down @ mean)).float())


def fit_group(model: PreTrainedModel, group: Group, rank: int, config: LowRankConfig, knowledge: Knowledge) -> Fitted:
    """Factorises the matrices of a group of layers as a config says.

    Raises:
        CompressionError: As `fit`; names the first layer.
    """
    have_bias = all(getattr(module_at(model, path), "bias", None) is not None for path in group.paths)
    form: dict[str, Any] = {"refit": config.refit, "shift": config.correct_bias and have_bias}
    with named(group.name):
        inputs = knowledge.inputs.get(group.name)
        pieces = pieces_of(model, group, knowledge)
        fitted = [fit(rank=rank, method=knowledge.method, inputs=inputs, **each._asdict(), **form) for each in pieces]
    if len(fitted) == 1:
        return fitted[0]
    up, down = (torch.cat(each) for each in zip(*(one.factors for one in fitted), strict=True))
    shifts = [one.shift for one in fitted if one.shift is not None]
    return Fitted(factors=(up, down), shift=torch.cat(shifts) if shifts else None)


class named:
    """Puts a layer's name before what an error says."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, CompressionError):
            raise CompressionError(f"{self.path}: {error.message}", hint=error.hint) from None
