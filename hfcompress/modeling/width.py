"""Cuts the hidden width of a whole model: every matrix that reads or writes the residual stream, at once.

Which dimensions of which tensors those are is not written down for any family: a stock model of the new width, built
without memory, shows them by its shapes. So the result is always what the stock config of that width builds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import CompressionError
from hfcompress.modeling.anatomy import (
    AttentionBlock,
    architecture_of,
    attention_blocks,
    base_model,
    feed_forward_blocks,
    prefix_of,
)
from hfcompress.modeling.structure import describe
from hfcompress.modeling.surgery import shrink_attention

# Tensors of these widths are what kernels are fastest at.
_MULTIPLE = 8
# The config's field with the width of the embeddings. Where it is the hidden width, some families have no layer
# between the two (ELECTRA, DeBERTa), so that both must be cut; others have one all the same (ALBERT).
_EMBEDDINGS = "embedding_size"


def width_step(model: PreTrainedModel) -> int:
    """Returns the number that every hidden width of the model's family is a multiple of.

    Where the stock config has no field for the width of a head, a narrower model has fewer heads of the same width
    in every layer.

    Raises:
        CompressionError: The width cannot be cut in this family, or the model is not of stock shapes.
        UnsupportedModelError: The family is not known.
    """
    if describe(model):
        raise CompressionError(
            "the hidden width can be cut only where the stock config says all shapes, and this model has been "
            f"compressed otherwise ({', '.join(describe(model))})",
            hint="Cut the width first.",
        )
    steps = {_step(block) for block in attention_blocks(model)}
    return math.lcm(*steps) if steps else _MULTIPLE


def heads_are_shared(model: PreTrainedModel) -> bool:
    """Tells whether heads that follow the width must be the same ones in every layer.

    One table has the position bias of each of them for all layers (MPNet).
    """
    blocks = attention_blocks(model)
    return any(block.spec.head_dim_field is None and block.spec.shared_bias != "none" for block in blocks)


def _step(block: AttentionBlock) -> int:
    if block.spec.head_dim_field is None:
        return block.head_dim
    divided = block.spec.heads_divide == "hidden_size"
    return math.lcm(_MULTIPLE, block.query_heads) if divided else _MULTIPLE


def residual_tensors(model: PreTrainedModel, width: int | None = None) -> dict[str, tuple[int, ...]]:
    """Returns the tensors that read or write the residual stream, each with the dimensions that do.

    Tied tensors are listed once. Those of an attention whose heads follow the width are listed without the heads.

    Args:
        model: A model of stock shapes.
        width: A width that the stock config can say; the next smaller one if None.

    Raises:
        CompressionError: As in `width_step`, or the stock config cannot say the width.
    """
    return _plan(model, _fresh(model, width or _width(model) - width_step(model)))[0]


def _fresh(model: PreTrainedModel, width: int) -> PreTrainedModel:
    """Builds a stock model of another width and with the same tensors on `meta`.

    Raises:
        CompressionError: There is none.
    """
    config = copy.deepcopy(model.config)
    _say(config, model, width)
    fresh = _stock(model, config)
    if any(_unlike(model, fresh)) and getattr(config, _EMBEDDINGS, None) == _width(model):
        setattr(config, _EMBEDDINGS, width)
        fresh = _stock(model, config)
    missing, further = _unlike(model, fresh)
    if missing or further:
        other = f"has no {missing[0]}, and this one has" if missing else f"has {further[0]}, and this one has none"
        raise CompressionError(
            f"a stock model {width} wide {other}: what is cut could not be loaded again",
            hint="Choose another width, or leave the width as it is.",
        )
    return fresh


def _stock(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return type(model)(config)
    except (ValueError, RuntimeError, AssertionError) as error:
        raise CompressionError(f"no stock model of this family is {config.hidden_size} wide: {error}") from None


def _unlike(model: PreTrainedModel, fresh: PreTrainedModel) -> tuple[list[str], list[str]]:
    """Returns the names of tensors that only the model has, and of those that only the fresh one has.

    Parts that models of the class may be without are not told.
    """
    own, stock = ({name for name, _ in named_tensors(each)} for each in (model, fresh))
    optional = tuple(f"{prefix_of(model)}{path}." for path in architecture_of(model).detachable)
    return sorted(own - stock), sorted(name for name in stock - own if not f"{name}.".startswith(optional))


def _say(config: Any, model: PreTrainedModel, width: int) -> None:
    for block in attention_blocks(model):
        if block.spec.head_dim_field is None:
            setattr(config, block.spec.heads, width // block.head_dim)
        else:
            setattr(config, block.spec.head_dim_field, block.head_dim)
    for block in feed_forward_blocks(model):
        if getattr(config, block.spec.neurons) is None:  # else it is a multiple of the width
            setattr(config, block.spec.neurons, block.neurons)
    if getattr(config, "pooler_hidden_size", None) == config.hidden_size:
        config.pooler_hidden_size = width
    config.hidden_size = width


_Plan = dict[str, tuple[int, ...]]


def _plan(model: PreTrainedModel, fresh: PreTrainedModel) -> tuple[_Plan, _Plan]:
    """Returns, of each tensor, the dimensions that the hidden width is, and those that are all layers' heads."""
    heads, stream, by_head = _head_dimensions(model), (_width(model), _width(fresh)), _head_counts(model, fresh)
    shapes = {name: tensor.shape for name, tensor in named_tensors(fresh)}
    plan: tuple[_Plan, _Plan] = ({}, {})
    seen: set[int] = set()
    for name, tensor in named_tensors(model):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if len(shapes[name]) != tensor.dim():
            raise CompressionError(f"{name} has no counterpart in a stock model of another width")
        for dim, (was, becomes) in enumerate(zip(tensor.shape, shapes[name], strict=True)):
            if was == becomes or (name, dim) in heads:
                continue
            if (was, becomes) not in (stream, by_head):
                raise CompressionError(
                    f"{name}: dimension {dim} would change from {was} to {becomes} with the hidden width: this "
                    "family's width cannot be cut"
                )
            own = plan[0 if (was, becomes) == stream else 1]
            own[name] = (*own.get(name, ()), dim)
    return plan


def _width(model: PreTrainedModel) -> int:
    return int(model.config.hidden_size)


def _head_counts(model: PreTrainedModel, fresh: PreTrainedModel) -> tuple[int, int] | None:
    if not heads_are_shared(model):
        return None
    before, after = (attention_blocks(each)[0].stock_heads for each in (model, fresh))
    return before, after


def _head_dimensions(model: PreTrainedModel) -> set[tuple[str, int]]:
    """Returns the dimensions that are cut with the heads."""
    base = base_model(model)
    prefix = prefix_of(model)
    found: set[tuple[str, int]] = set()
    for block in attention_blocks(model):
        if block.spec.head_dim_field is None:
            paths = {block.path(each.path): 0 for _, each in block.projections} | {block.path(block.spec.output): 1}
            for path, dim in paths.items():
                transposed = isinstance(base.get_submodule(path), Conv1D)
                found.add((f"{prefix}{path}.weight", 1 - dim if transposed else dim))
                if dim == 0:
                    found.add((f"{prefix}{path}.bias", 0))
    return found


def named_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields all parameters and buffers, those held in several places under each of their names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def cut_width(model: PreTrainedModel, kept: torch.Tensor, heads: Mapping[str, Sequence[int]] | None = None) -> None:
    """Keeps some dimensions of the residual stream, in place; the caller ends with `commit(model)`.

    Args:
        model: A model of stock shapes.
        kept: Which dimensions stay, int64, ascending; as many as a multiple of `width_step`.
        heads: For each attention, by name, the heads that stay where they follow the width: as many as fill it, and
            where `heads_are_shared` the same ones everywhere.

    Raises:
        CompressionError: The stock config cannot say the width. Nothing was changed then.
    """
    step, before = width_step(model), int(model.config.hidden_size)
    if not len(kept) or len(kept) % step or len(kept) > before:
        raise CompressionError(f"the hidden width must be a multiple of {step} up to {before}, not {len(kept)}")
    if len(kept) == before:
        return
    fresh = _fresh(model, len(kept))
    plan, by_head = _plan(model, fresh)
    following = [block for block in attention_blocks(model) if block.spec.head_dim_field is None]
    stays = _heads_that_stay(model, following, len(kept), heads or {})
    for block, stay in zip(following, stays, strict=True):
        # A bias that all layers share is cut with the heads: nothing has to be picked out of it.
        shrink_attention(replace(block, spec=replace(block.spec, shared_bias="none")), stay)
    cut_tensors(model, plan, kept)
    if by_head:
        cut_tensors(model, by_head, torch.tensor(stays[0]))
    configs = {id(own): own for module in model.modules() if (own := getattr(module, "config", None)) is not None}
    for config in configs.values():
        if getattr(config, "hidden_size", None) == before:
            _say(config, model, len(kept))
            if hasattr(fresh.config, _EMBEDDINGS):
                setattr(config, _EMBEDDINGS, getattr(fresh.config, _EMBEDDINGS))
    for name, module in model.named_modules():
        _copy_numbers(fresh.get_submodule(name), module)


def _heads_that_stay(
    model: PreTrainedModel, blocks: Sequence[AttentionBlock], width: int, heads: Mapping[str, Sequence[int]]
) -> list[list[int]]:
    stays = [list(heads.get(block.name, range(width // block.head_dim))) for block in blocks]
    for block, stay in zip(blocks, stays, strict=True):
        if len(stay) * block.head_dim != width:
            raise CompressionError(f"{block.name}: {width // block.head_dim} heads must stay, not {len(stay)}")
        if heads_are_shared(model) and stay != stays[0]:
            raise CompressionError(
                f"{block.name}: one position bias serves the heads of all layers: those that stay must be the same"
            )
    return stays


def cut_tensors(model: PreTrainedModel, plan: Mapping[str, Sequence[int]], kept: torch.Tensor) -> None:
    """Keeps some indexes of dimensions of tensors, in every place that holds them: what is tied stays so.

    Args:
        model: The model.
        plan: By name, the dimensions of each tensor; of one held in several places one name is enough.
        kept: Which indexes stay, int64.
    """
    made: dict[int, Any] = {}
    tensors = dict(named_tensors(model))
    for name, dims in plan.items():
        old = tensors[name]
        new = old.detach()
        for dim in dims:
            new = new.index_select(dim, kept.to(new.device))
        is_parameter = isinstance(old, nn.Parameter)
        made[id(old)] = nn.Parameter(new, requires_grad=old.requires_grad) if is_parameter else new
    for name, old in list(tensors.items()):
        if id(old) in made:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, made[id(old)])


def _copy_numbers(stock: nn.Module, module: nn.Module) -> None:
    """Takes over widths, scales and the like that a forward computes with."""
    for attribute, value in vars(stock).items():
        number = isinstance(value, int | float | tuple) and not isinstance(value, bool)
        if number and attribute in vars(module) and vars(module)[attribute] != value:
            setattr(module, attribute, value)
