"""Low-rank layers that read one input, and so can share the factor that reads it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.modeling import surgery
from hfcompress.modeling.anatomy import (
    attention_blocks,
    base_model,
    feed_forward_blocks,
    find,
    input_width,
    module_at,
    output_width,
)
from hfcompress.modeling.architectures import architectures
from hfcompress.modeling.layers.low_rank import LowRankLinear, SharedLinear, followers_of


def readers_of_one_input(model: PreTrainedModel, paths: Iterable[str]) -> list[tuple[str, ...]]:
    """Puts layers together that read one and the same tensor: queries, keys and values, or inputs of gated neurons.

    Of an attention that looks elsewhere for its keys and values, those two alone. Which they are is read off the
    family; in one that is not known every layer is alone.

    Args:
        model: The model.
        paths: The layers that may be put together, relative to the base model.

    Returns:
        Every layer once, in the order given; those put together are children of one module.
    """
    together: dict[str, tuple[str, ...]] = {}
    wanted = list(dict.fromkeys(paths))
    groups: list[list[str]] = []
    if model.config.model_type in architectures():
        for attention in attention_blocks(model):
            spec, looks_elsewhere = attention.spec, attention.spec is not attention.stack.attentions[0]
            readers = (spec.key, spec.value) if looks_elsewhere else (spec.query, spec.key, spec.value)
            groups.append([attention.path(each.path) for each in readers])
        groups += [[block.path(each.path) for each in block.inputs] for block in feed_forward_blocks(model)]
    for group in groups:
        alike: dict[tuple[str, int], list[str]] = {}
        for path in dict.fromkeys(group):
            if path in wanted:
                width = input_width(module_at(model, path))
                alike.setdefault((path.rpartition(".")[0], width), []).append(path)
        together |= {path: tuple(members) for members in alike.values() for path in members}
    return list(dict.fromkeys(together.get(path, (path,)) for path in wanted))


def leaders_of(model: PreTrainedModel) -> dict[str, str]:
    """Returns, for each layer that reads the factor of one beside it, the name of that one among its siblings."""
    leaders: dict[str, str] = {}
    for parent, module in base_model(model).named_modules():
        for name, child in module.named_children():
            followers = followers_of(module, child) if isinstance(child, LowRankLinear) else {}
            leaders |= {f"{parent}.{each}".removeprefix("."): name for each in followers}
    return leaders


def share(
    model: PreTrainedModel, paths: Sequence[str], rank: int, factors: tuple[torch.Tensor, torch.Tensor] | None = None
) -> None:
    """Replaces layers by low-rank ones that read one `down` factor; the first holds it.

    The caller ends with `commit(model)`.

    Args:
        model: The model.
        paths: The layers, relative to the base model: children of one module with inputs of one width.
        rank: Width between the factors.
        factors: `up` of all layers, one below the other, `(outs, rank)`, and `down` `(rank, in)`; left uninitialised
            when None.

    Raises:
        CompressionError: As `surgery.factorize`.
    """
    base = base_model(model)
    leader, *others = paths
    widths = [output_width(base.get_submodule(path)) for path in paths]
    ups = [None] * len(paths) if factors is None else factors[0].split(widths)
    for path, up in zip(paths, ups, strict=True):
        surgery.factorize(model, path, rank, None if up is None or factors is None else (up, factors[1]))
    for path in others:
        _follow(base, path, leader)


def follow(model: PreTrainedModel, path: str, leader: str) -> None:
    """Replaces a layer by one that reads the `down` factor of a low-rank layer beside it, itself uninitialised.

    Raises:
        CompressionError: There is no low-rank layer of that name which reads inputs of the same width.
    """
    base = base_model(model)
    beside = f"{path.rpartition('.')[0]}.{leader}".removeprefix(".")
    module = find(base, beside)
    old = base.get_submodule(path)
    if type(module) is not LowRankLinear or beside == path or module.in_features != input_width(old):
        raise CompressionError(f"{path} cannot share the factor of {beside}, which is no low-rank layer of that width")
    surgery.factorize(model, path, module.rank)
    _follow(base, path, beside)


def _follow(base: nn.Module, path: str, leader: str) -> None:
    made, first = base.get_submodule(path), base.get_submodule(leader)
    assert isinstance(made, LowRankLinear) and isinstance(first, LowRankLinear)
    new = SharedLinear(first, made.up, transposed=made.transposed)
    new.train(made.training)
    base.set_submodule(path, new)
