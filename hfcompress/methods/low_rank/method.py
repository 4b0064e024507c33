"""Low-rank factorization of a live model: what is known of its layers, their ranks, their factors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import are_labelled
from hfcompress.methods.low_rank import maths
from hfcompress.methods.low_rank.config import LowRankConfig, Method
from hfcompress.methods.low_rank.costs import costs_of
from hfcompress.methods.low_rank.curvature import output_curvature
from hfcompress.methods.low_rank.embeddings import factorize_table, score_moment, token_table
from hfcompress.methods.low_rank.fitting import Fitted, Group, Knowledge, fit, fit_group, matrix_of, named, pieces_of
from hfcompress.methods.low_rank.ranks import Curve, allocate, is_smaller, rank_for, rank_of_energy
from hfcompress.methods.low_rank.sensitivity import Probe, measure
from hfcompress.methods.registry import Batch, Context
from hfcompress.methods.replay import Replay, paired_statistics
from hfcompress.methods.statistics import LayerReader, input_fisher, layer_statistics, shared_inputs
from hfcompress.modeling import surgery
from hfcompress.modeling.anatomy import heads_by_projection, input_width, module_at, modules_of, output_width
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.layers.bitsandbytes import kind_of
from hfcompress.modeling.layers.headwise import compose_heads
from hfcompress.modeling.layers.low_rank import LowRankLinear
from hfcompress.modeling.sharing import readers_of_one_input, share

__all__ = ["Fitted", "Knowledge", "fit", "float_layers", "learn", "low_rank"]

# Shares of a layer's parameters at which its part in the loss is told.
_TOLD_AT = (0.6, 0.4, 0.2)


def low_rank(
    model: PreTrainedModel, config: LowRankConfig, context: Context, *, knowledge: Knowledge | None = None
) -> dict[str, Any]:
    """Factorises a model's layers in place; one that would not get smaller is left whole.

    Args:
        model: A float model of a supported family.
        config: What to factorise, and how far.
        context: Calibration data for all but plain `svd` and `nmf`.
        knowledge: What `learn` read off this model for the same method, where several models are made from it. What a
            first budget measured, which is returned as `sensitivity`, serves as its `measured` for another.

    Returns:
        The method used, the ranks by layer, the layers left whole, and with a budget the rise of the loss by layer
        and rank that it goes by.

    Raises:
        CompressionError: A target is quantized or not finite, or calibration data is missing.
        ValueError: The knowledge is that of another method.
    """
    if config.embeddings is not None:
        token_table(model)  # refuses before anything is done
    weighs = config.embeddings is not None and config.method in ("auto", "whitened")
    moment = score_moment(model, context.calibration) if weighs else None
    layers, done = float_layers(model, config)
    method = config.method_with(bool(context.calibration))
    if knowledge is None:
        knowledge = learn(model, list(layers), config, method, context.calibration)
    elif knowledge.method != method:
        raise ValueError(f"knowledge is that of {knowledge.method}, and the config asks for {method}")
    groups = groups_of(model, layers, config)
    ranks, measured = choose_ranks(model, groups, config, knowledge, context.calibration)
    plan = {group: rank for group in groups if (rank := ranks[group.name]) is not None}
    if config.sequential:
        _one_after_another(model, plan, config, knowledge, context.calibration)
    else:
        for group, rank in plan.items():
            factorize_group(model, group, rank, config, knowledge)
    findings: dict[str, Any] = {"method": method, "ranks": by_layer(plan)}
    if config.embeddings is not None:
        findings["embeddings"] = factorize_table(model, config.embeddings, config.multiple_of, moment)
    commit(model)
    findings["left_whole"] = [*done, *(path for group in groups if group not in plan for path in group.paths)]
    return findings | ({"sensitivity": measured} if measured else {})


def float_layers(model: PreTrainedModel, config: LowRankConfig) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Returns the targets' widths (outputs, inputs), and the targets that are factorised already.

    Raises:
        CompressionError: A target is quantized.
    """
    layers: dict[str, tuple[int, int]] = {}
    done: list[str] = []
    for path in modules_of(model, config.targets):
        module: Any = module_at(model, path)
        if isinstance(module, LowRankLinear):
            done.append(path)
        elif kind_of(module):
            raise CompressionError(f"{path} is quantized already", hint="Factorize before quantizing.")
        else:
            layers[path] = output_width(module), input_width(module)
    return layers, done


def groups_of(model: PreTrainedModel, layers: Mapping[str, tuple[int, int]], config: LowRankConfig) -> list[Group]:
    """Returns the layers that are factorised as one: those of one input where they share, else each alone."""
    together = readers_of_one_input(model, layers) if config.share else [(path,) for path in layers]
    heads = heads_of(model, layers, config)
    return [
        Group(paths, tuple(layers[path][0] for path in paths), layers[paths[0]][1], heads.get(paths[0], 1))
        for paths in together
    ]


def heads_of(model: PreTrainedModel, paths: Iterable[str], config: LowRankConfig) -> dict[str, int]:
    """Returns how many heads there are of each layer that is factorised head by head.

    Raises:
        CompressionError: It is to be done, and none of the targets has heads.
    """
    heads = heads_by_projection(model) if config.per_head else {}
    found = {path: heads[path] for path in paths if path in heads}
    if config.per_head and not found:
        raise CompressionError(
            "per_head finds no heads among the targets", hint="Name query, key, value or attention among them."
        )
    return found


def by_layer(plan: Mapping[Group, int]) -> dict[str, int]:
    """Returns the rank of every layer."""
    return {path: rank for group, rank in plan.items() for path in group.paths}


def learn(
    model: PreTrainedModel, paths: Sequence[str], config: LowRankConfig, method: Method, batches: Sequence[Batch]
) -> Knowledge:
    """Reads off the model what the factors of its layers are to be fitted to.

    Raises:
        CompressionError: A weight or what the calibration data give is not finite (the layer is named), or the method
            needs data and there is none.
    """
    for path in paths:
        with named(path):
            maths.require_finite(matrix_of(model, path))
    # A sequential update learns layer by layer, and needs this only to share out ranks.
    at_once = not config.sequential or config.energy is not None or config.budget is not None
    reads_inputs = at_once and (method == "whitened" or config.refit or config.correct_bias)
    weighs = config.weighs_outputs_with(method) and bool(paths)
    inputs, outputs, curvature = {}, {}, {}
    if reads_inputs and paths:
        narrow = () if config.refit or config.correct_bias else [path for path in paths if _is_narrow(model, path)]
        if weighs:
            with LayerReader(model, paths, batches, by_outputs=narrow) as reader:
                curvature = _curvature(model, paths, config, batches, reader)
            inputs, outputs = reader.statistics()
        else:
            inputs, outputs = layer_statistics(model, paths, batches, by_outputs=narrow)
    elif weighs:
        curvature = _curvature(model, paths, config, batches)
    return Knowledge(
        method=method,
        inputs=inputs,
        outputs=outputs,
        fisher=input_fisher(model, paths, batches) if method == "fisher" and paths else {},
        curvature=curvature,
    )


def _curvature(
    model: PreTrainedModel,
    paths: Sequence[str],
    config: LowRankConfig,
    batches: Sequence[Batch],
    reader: LayerReader | None = None,
) -> dict[str, torch.Tensor | maths.Pulled]:
    # A sequential update makes factors of another matrix than the layer's, and heads are weighed each by its outputs.
    apart = heads_of(model, paths, config)
    pulled = () if config.sequential else [path for path in paths if path not in apart and _is_tall(model, path)]
    return output_curvature(model, paths, batches, pulled=pulled, reader=reader)


def _is_tall(model: PreTrainedModel, path: str) -> bool:
    outputs, inputs = matrix_of(model, path).shape
    return outputs > inputs


def _is_narrow(model: PreTrainedModel, path: str) -> bool:
    """Tells whether a layer gives fewer numbers than it takes, in a precision that tells of small ones too."""
    matrix = matrix_of(model, path)
    return len(matrix) < matrix.shape[1] and matrix.dtype == torch.float32


def choose_ranks(
    model: PreTrainedModel,
    groups: Sequence[Group],
    config: LowRankConfig,
    knowledge: Knowledge,
    batches: Sequence[Batch],
) -> tuple[dict[str, int | None], Mapping[str, Mapping[int, float]]]:
    """Returns, by its first layer, each group's rank, None where it stays whole, and what a budget goes by."""
    if config.budget is not None:
        return _budgeted(model, groups, config, knowledge, batches)
    ranks: dict[str, int | None] = {}
    for group in groups:
        if config.energy is not None:
            with named(group.name):
                energies = _energies(model, group, knowledge)
            rank = rank_of_energy(energies, config.energy, config.multiple_of)
        else:
            rank = fixed_rank(*group.head_shape, config)
        ranks[group.name] = rank if is_smaller(*group.head_shape, rank, config.pivoted) else None
    return ranks, {}


def fixed_rank(outputs: int, inputs: int, config: LowRankConfig) -> int:
    """Returns the rank that `rank` or `keep` say for a layer of this size."""
    if config.rank is not None:
        return config.rank
    assert config.keep is not None
    return rank_for(outputs, inputs, config.keep, config.multiple_of, config.pivoted)


def _energies(model: PreTrainedModel, group: Group, knowledge: Knowledge) -> torch.Tensor:
    return torch.stack([maths.energies(*piece) for piece in pieces_of(model, group, knowledge)]).sum(0)


def _budgeted(
    model: PreTrainedModel,
    groups: Sequence[Group],
    config: LowRankConfig,
    knowledge: Knowledge,
    batches: Sequence[Batch],
) -> tuple[dict[str, int | None], Mapping[str, Mapping[int, float]]]:
    assert config.budget is not None
    if not batches:
        raise CompressionError(
            "a budget is shared out by what is measured on calibration data, and there is none",
            hint="Pass calibration=[batch, ...], or give keep, rank or energy.",
        )
    by = config.sensitivity_with(knowledge.method)
    if by == "loss" and not are_labelled(batches):
        raise CompressionError("sensitivity 'loss' needs calibration batches with labels", hint="Choose 'outputs'.")
    measured: Mapping[str, Mapping[int, float]] = {}
    if by != "curvature":
        measured = knowledge.measured or _measured(model, groups, config, knowledge, batches, by)
    curves = {
        group.name: Curve(
            *group.head_shape,
            _energies(model, group, knowledge),
            measured.get(group.name, {}),
            config.pivoted,
            group.heads,
        )
        for group in groups
    }
    costs = None
    if config.budget_of != "parameters":
        layers = {group.name: (group.outputs, group.inputs) for group in groups}
        heads = {group.name: group.heads for group in groups}
        costs = costs_of(model, layers, config.budget_of, batches[0], pivoted=config.pivoted, heads=heads)
    known = measured or {
        group.name: {rank: curves[group.name].loss(rank) for rank in _told_ranks(group, config)} for group in groups
    }
    return allocate(curves, config.budget, config.multiple_of, costs), known


def _told_ranks(group: Group, config: LowRankConfig) -> list[int]:
    """Returns the ranks at which it is said what a group's part in the loss is, the highest first."""
    ranks = {rank_for(*group.head_shape, keep, config.multiple_of, config.pivoted) for keep in _TOLD_AT}
    return sorted(ranks, reverse=True)


def _measured(
    model: PreTrainedModel,
    groups: Sequence[Group],
    config: LowRankConfig,
    knowledge: Knowledge,
    batches: Sequence[Batch],
    by: Literal["outputs", "loss"],
) -> dict[str, dict[int, float]]:
    """Returns, by group and rank, how much worse the model is with that group alone factorised."""
    probe = Probe(model, batches[: config.sensitivity_batches], by)

    def products(group: Group) -> Callable[[], dict[int, torch.Tensor]]:
        def make() -> dict[int, torch.Tensor]:
            made: dict[int, torch.Tensor] = {}
            factors = None
            for rank in _told_ranks(group, config):
                # The best product of a lower rank begins like that of a higher one, unless it is fitted on.
                if factors is None or config.refit or knowledge.method == "nmf":
                    factors = fit_group(model, group, rank, config, knowledge).factors
                up, down = factors
                down = down.unflatten(0, (group.heads, -1))[:, :rank].flatten(0, 1)
                made[rank] = compose_heads(up[:, :rank], down, group.heads)
            return made

        return make

    members = {group.name: group.paths for group in groups}
    return measure(model, {group.name: products(group) for group in groups}, probe, members)


def factorize_group(
    model: PreTrainedModel, group: Group, rank: int, config: LowRankConfig, knowledge: Knowledge
) -> None:
    """Puts factors in the place of a group of layers; the caller ends with `commit(model)`.

    Raises:
        CompressionError: A layer, which is named, is not finite or cannot be factorised.
    """
    fitted = fit_group(model, group, rank, config, knowledge)
    rank = fitted.factors[0].shape[1]
    if len(group.paths) > 1:
        share(model, group.paths, rank, fitted.factors)
    else:
        heads = group.heads if group.heads > 1 else None
        surgery.factorize(model, group.name, rank, fitted.factors, pivoted=config.pivoted, heads=heads)
    if fitted.shift is not None:
        for path, shift in zip(group.paths, fitted.shift.split(group.outputs), strict=True):
            made: Any = module_at(model, path)
            bias = made.bias
            made.set_bias(nn.Parameter(bias.detach() + shift.to(bias), requires_grad=bias.requires_grad))


def _one_after_another(
    model: PreTrainedModel,
    plan: Mapping[Group, int],
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
    by_name = {group.name: group for group in plan}
    waves = shared_inputs(model, list(by_name), batches[0])
    changed, reference = Replay(model, batches), Replay(copy.deepcopy(model), batches)
    try:
        for number, wave in enumerate(waves):
            statistics = paired_statistics(changed, reference, wave[0])
            knowledge = replace(known, inputs=dict.fromkeys(wave, statistics))
            for name in wave:
                factorize_group(model, by_name[name], plan[by_name[name]], config, knowledge)
            here = changed.layer_of(wave[0])
            following = changed.layer_of(waves[number + 1][0]) if number + 1 < len(waves) else None
            if here is not None and following is not None and following != here:
                changed.finish(here)
                reference.finish(here)
    finally:
        changed.close()
