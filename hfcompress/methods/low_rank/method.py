"""Low-rank factorization of a live model: what is known of its layers, their ranks, their factors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import CompressionError
from hfcompress.methods.low_rank import maths
from hfcompress.methods.low_rank.config import LowRankConfig
from hfcompress.methods.low_rank.costs import costs_of
from hfcompress.methods.low_rank.curvature import output_curvature
from hfcompress.methods.low_rank.embeddings import factorize_table, score_moment, token_table
from hfcompress.methods.low_rank.ranks import Curve, allocate, is_smaller, rank_for, rank_of_energy
from hfcompress.methods.low_rank.sensitivity import Probe, measure
from hfcompress.methods.registry import Batch, Context
from hfcompress.methods.statistics import (
    InputStatistics,
    Replay,
    input_fisher,
    input_statistics,
    paired_statistics,
    shared_inputs,
)
from hfcompress.modeling import surgery
from hfcompress.modeling.anatomy import base_model, input_width, modules_of, output_width
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.layers.bitsandbytes import kind_of
from hfcompress.modeling.layers.low_rank import LowRankLinear

# Shares of a layer's parameters at which its part in the loss is measured.
_MEASURED_AT = (0.6, 0.4, 0.2)


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What the factors of a layer are fitted to.

    Attributes:
        method: One of `svd`, `whitened`, `fisher`, `nmf`.
        inputs: Statistics by layer, where something is fitted to outputs.
        fisher: Fisher information by layer and input.
        curvature: That of the loss by layer's outputs, `(out, out)`, where their errors are weighed.
    """

    method: str
    inputs: Mapping[str, InputStatistics] = field(default_factory=dict)
    fisher: Mapping[str, torch.Tensor] = field(default_factory=dict)
    curvature: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def weighting(self, path: str) -> torch.Tensor | None:
        """Returns the matrix by which the method weighs the error of a layer; None for the identity."""
        if self.method == "whitened":
            return self.inputs[path].second_moment
        return torch.diag(self.fisher[path]) if self.method == "fisher" else None


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A layer's factors.

    Attributes:
        factors: `up` and `down`.
        shift: What its bias must rise by, `(out,)`, or None.
    """

    factors: maths.Factors
    shift: torch.Tensor | None = None


def fit(
    weight: torch.Tensor,
    rank: int,
    method: str,
    *,
    weighting: torch.Tensor | None = None,
    curvature: torch.Tensor | None = None,
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
        curvature: `(out, out)`, by which the error of the outputs is weighed; None for the identity.
        inputs: Statistics of what enters the layer.
        refit: Fit `up` again to the outputs.
        shift: Find out what a bias should take over.

    Raises:
        CompressionError: Weight or statistics are not finite.
    """
    maths.require_finite(weight, weighting)
    known = inputs.centred() if inputs is not None and shift else inputs
    aim = weight
    if method == "whitened" and known is not None:
        weighting = known.second_moment
        if known.cross_moment is not None:
            aim = maths.retarget(weight, known.second_moment, known.cross_moment)
    factors = maths.nonnegative(weight, rank) if method == "nmf" else maths.truncate(aim, rank, weighting, curvature)
    if refit and known is not None:
        factors = maths.refit(aim, *factors, known.second_moment)
    if not shift or inputs is None:
        return Fitted(factors=factors)
    mean = inputs.mean.double()
    original = mean if inputs.reference_mean is None else inputs.reference_mean.double()
    up, down = (factor.double() for factor in factors)
    return Fitted(factors=factors, shift=(weight.double() @ original - up @ (down @ mean)).float())


def low_rank(
    model: PreTrainedModel, config: LowRankConfig, context: Context, *, knowledge: Knowledge | None = None
) -> dict[str, Any]:
    """Factorises a model's layers in place; one that would not get smaller is left whole.

    Args:
        model: A float model of a supported family.
        config: What to factorise, and how far.
        context: Calibration data for all but plain `svd` and `nmf`.
        knowledge: What `learn` read off this model for the same method, where several models are made from it.

    Returns:
        The method used, the ranks by layer, the layers left whole, and with a budget what was measured.

    Raises:
        CompressionError: A target is quantized or not finite, or calibration data is missing.
    """
    if config.embeddings is not None:
        token_table(model)  # refuses before anything is done
    weighs = config.embeddings is not None and config.method in ("auto", "whitened")
    moment = score_moment(model, context.calibration) if weighs else None
    layers, done = float_layers(model, config)
    method = config.method
    if method == "auto":
        method = "whitened" if context.calibration or config.sequential else "svd"
    if knowledge is None:
        knowledge = learn(model, list(layers), config, method, context.calibration)
    ranks, measured = choose_ranks(model, layers, config, knowledge, context.calibration)
    plan = {path: rank for path, rank in ranks.items() if rank is not None}
    if config.sequential:
        _one_after_another(model, plan, config, knowledge, context.calibration)
    else:
        for path, rank in plan.items():
            factorize_layer(model, path, rank, config, knowledge)
    findings: dict[str, Any] = {"method": method, "ranks": plan}
    if config.embeddings is not None:
        findings["embeddings"] = factorize_table(model, config.embeddings, config.multiple_of, moment)
    commit(model)
    findings["left_whole"] = [*done, *(path for path, rank in ranks.items() if rank is None)]
    return findings | ({"sensitivity": measured} if measured else {})


def float_layers(model: PreTrainedModel, config: LowRankConfig) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Returns the targets' widths (outputs, inputs), and the targets that are factorised already.

    Raises:
        CompressionError: A target is quantized.
    """
    base = base_model(model)
    layers: dict[str, tuple[int, int]] = {}
    done: list[str] = []
    for path in modules_of(model, config.targets):
        module = base.get_submodule(path)
        if isinstance(module, LowRankLinear):
            done.append(path)
        elif kind_of(module):
            raise CompressionError(f"{path} is quantized already", hint="Factorize before quantizing.")
        else:
            layers[path] = output_width(module), input_width(module)
    return layers, done


def _matrix(model: PreTrainedModel, path: str) -> torch.Tensor:
    """Returns a layer's weight as `(out, in)`."""
    module: Any = base_model(model).get_submodule(path)
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def learn(
    model: PreTrainedModel, paths: Sequence[str], config: LowRankConfig, method: str, batches: Sequence[Batch]
) -> Knowledge:
    """Reads off the model what the factors of its layers are to be fitted to.

    Raises:
        CompressionError: A weight or what the calibration data give is not finite (the layer is named), or the method
            needs data and there is none.
    """
    for path in paths:
        with _named(path):
            maths.require_finite(_matrix(model, path))
    # A sequential update learns layer by layer, and needs this only to share out ranks.
    at_once = not config.sequential or config.energy is not None or config.budget is not None
    reads_inputs = at_once and (method == "whitened" or config.refit or config.correct_bias)
    return Knowledge(
        method=method,
        inputs=input_statistics(model, paths, batches) if reads_inputs and paths else {},
        fisher=input_fisher(model, paths, batches) if method == "fisher" and paths else {},
        curvature=output_curvature(model, paths, batches) if config.weigh_outputs and paths else {},
    )


def choose_ranks(
    model: PreTrainedModel,
    layers: Mapping[str, tuple[int, int]],
    config: LowRankConfig,
    knowledge: Knowledge,
    batches: Sequence[Batch],
) -> tuple[dict[str, int | None], dict[str, dict[int, float]]]:
    """Returns each layer's rank, None where it stays whole, and what was measured for it."""
    if config.budget is not None:
        return _budgeted(model, layers, config, knowledge, batches)
    ranks: dict[str, int | None] = {}
    for path, (outputs, inputs) in layers.items():
        if config.energy is not None:
            with _named(path):
                energies = _energies(model, path, knowledge)
            rank = rank_of_energy(energies, config.energy, config.multiple_of)
        else:
            rank = fixed_rank(outputs, inputs, config)
        ranks[path] = rank if is_smaller(outputs, inputs, rank, config.pivoted) else None
    return ranks, {}


def fixed_rank(outputs: int, inputs: int, config: LowRankConfig) -> int:
    """Returns the rank that `rank` or `keep` say for a layer of this size."""
    if config.rank is not None:
        return config.rank
    assert config.keep is not None
    return rank_for(outputs, inputs, config.keep, config.multiple_of, config.pivoted)


def _energies(model: PreTrainedModel, path: str, knowledge: Knowledge) -> torch.Tensor:
    return maths.energies(_matrix(model, path), knowledge.weighting(path), knowledge.curvature.get(path))


def _budgeted(
    model: PreTrainedModel,
    layers: Mapping[str, tuple[int, int]],
    config: LowRankConfig,
    knowledge: Knowledge,
    batches: Sequence[Batch],
) -> tuple[dict[str, int | None], dict[str, dict[int, float]]]:
    assert config.budget is not None
    if not batches:
        raise CompressionError(
            "a budget is shared out by what is measured on calibration data, and there is none",
            hint="Pass calibration=[batch, ...], or give keep, rank or energy.",
        )
    if config.sensitivity == "loss" and "labels" not in batches[0]:
        raise CompressionError("sensitivity 'loss' needs calibration batches with labels", hint="Choose 'outputs'.")
    measured = {} if config.sensitivity == "curvature" else _measured(model, layers, config, knowledge, batches)
    curves = {
        path: Curve(*layers[path], _energies(model, path, knowledge), measured.get(path, {}), config.pivoted)
        for path in layers
    }
    costs = None
    if config.budget_of != "parameters":
        costs = costs_of(model, layers, config.budget_of, batches[0], pivoted=config.pivoted)
    return allocate(curves, config.budget, config.multiple_of, costs), measured


def _measured(
    model: PreTrainedModel,
    layers: Mapping[str, tuple[int, int]],
    config: LowRankConfig,
    knowledge: Knowledge,
    batches: Sequence[Batch],
) -> dict[str, dict[int, float]]:
    """Returns, by layer and rank, how much worse the model is with that layer alone factorised."""
    assert config.sensitivity != "curvature"
    probe = Probe(model, batches[: config.sensitivity_batches], config.sensitivity)

    def products(path: str) -> Callable[[], dict[int, torch.Tensor]]:
        def make() -> dict[int, torch.Tensor]:
            ranks = {rank_for(*layers[path], keep, config.multiple_of, config.pivoted) for keep in _MEASURED_AT}
            made: dict[int, torch.Tensor] = {}
            for rank in sorted(ranks, reverse=True):
                up, down = _fitted(model, path, rank, config, knowledge).factors
                made[rank] = up @ down
            return made

        return make

    return measure(model, {path: products(path) for path in layers}, probe)


def _fitted(model: PreTrainedModel, path: str, rank: int, config: LowRankConfig, knowledge: Knowledge) -> Fitted:
    has_bias = getattr(base_model(model).get_submodule(path), "bias", None) is not None
    with _named(path):
        return fit(
            _matrix(model, path),
            rank,
            knowledge.method,
            weighting=knowledge.weighting(path),
            curvature=knowledge.curvature.get(path),
            inputs=knowledge.inputs.get(path),
            refit=config.refit,
            shift=config.correct_bias and has_bias,
        )


class _named:
    """Puts a layer's name before what an error says."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, CompressionError):
            raise CompressionError(f"{self.path}: {error.message}", hint=error.hint) from None


def factorize_layer(model: PreTrainedModel, path: str, rank: int, config: LowRankConfig, knowledge: Knowledge) -> None:
    """Puts factors in the place of one layer; the caller ends with `commit(model)`.

    Raises:
        CompressionError: The layer, which is named, is not finite or cannot be factorised.
    """
    fitted = _fitted(model, path, rank, config, knowledge)
    up, _ = fitted.factors
    surgery.factorize(model, path, up.shape[1], fitted.factors, pivoted=config.pivoted)
    made: Any = base_model(model).get_submodule(path)
    if fitted.shift is not None:
        bias = made.bias
        made.set_bias(nn.Parameter(bias.detach() + fitted.shift.to(bias), requires_grad=bias.requires_grad))


def _one_after_another(
    model: PreTrainedModel,
    plan: Mapping[str, int],
    config: LowRankConfig,
    known: Knowledge,
    batches: Sequence[Batch],
) -> None:
    """Factorises layers in the order in which they run, each against what reaches it by then."""
    if not plan:
        return
    if not batches:
        raise CompressionError(
            "a sequential update needs calibration data, and there is none",
            hint="Pass calibration=[batch, ...]: mappings of model inputs such as a tokenizer returns.",
        )
    groups = shared_inputs(model, list(plan), batches[0])
    changed, reference = Replay(model, batches), Replay(copy.deepcopy(model), batches)
    try:
        for number, group in enumerate(groups):
            statistics = paired_statistics(changed, reference, group[0])
            knowledge = replace(known, inputs=dict.fromkeys(group, statistics))
            for path in group:
                factorize_layer(model, path, plan[path], config, knowledge)
            here = changed.layer_of(group[0])
            following = changed.layer_of(groups[number + 1][0]) if number + 1 < len(groups) else None
            if here is not None and following is not None and following != here:
                changed.finish(here)
                reference.finish(here)
    finally:
        changed.close()
