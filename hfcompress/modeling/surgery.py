"""Shrinks, splits and replaces the modules of a live model. It knows no method.

Every function changes the model in place, on any device, `meta` included; the caller ends with
`checkpoint.commit(model)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import CompressionError
from hfcompress.modeling.anatomy import (
    BESIDE,
    AttentionBlock,
    FeedForwardBlock,
    base_model,
    input_width,
    module_at,
    named_parts,
    output_width,
    put_module,
    tied_to,
)
from hfcompress.modeling.architectures import Projection
from hfcompress.modeling.layers.headwise import HeadwiseLinear
from hfcompress.modeling.layers.kept_heads import keep_heads
from hfcompress.modeling.layers.low_rank import LowRankLinear, PivotedLinear, balanced, part_from_others
from hfcompress.modeling.layers.removed import Constant, Nothing, attend_to_nothing


def _index(kept: Sequence[int]) -> torch.Tensor:
    """Returns indexes as int64, on the CPU where a load has `meta` as its default."""
    if isinstance(kept, range):  # a load asks for thousands
        return torch.arange(kept.start, kept.stop, kept.step, device="cpu")
    return torch.tensor(list(kept), device="cpu")


def _take(parameter: nn.Parameter, index: torch.Tensor, dim: int) -> nn.Parameter:
    if parameter.is_meta:  # nothing but the shape is there, and a load does this for every layer
        shape = [*parameter.shape[:dim], len(index), *parameter.shape[dim + 1 :]]
        taken = torch.empty(shape, dtype=parameter.dtype, device="meta")
    else:
        taken = parameter.detach().index_select(dim, index.to(parameter.device))
    return nn.Parameter(taken, requires_grad=parameter.requires_grad)


def select_outputs(module: Any, index: torch.Tensor) -> None:
    """Keeps the outputs `index` (int64, in order) of a linear-like module.

    Raises:
        CompressionError: The module is quantized, or of a class that is not linear.
    """
    if isinstance(module, PivotedLinear):
        _select_pivoted_outputs(module, index)
    elif isinstance(module, HeadwiseLinear):
        _select_heads(module, index)
    elif isinstance(module, LowRankLinear):
        select_outputs(module.up, index)
    elif isinstance(module, Conv1D):
        module.weight, module.bias = _take(module.weight, index, 1), _take(module.bias, index, 0)
        module.nf = len(index)
    else:
        _require_float(module)
        module.weight = _take(module.weight, index, 0)
        if module.bias is not None:
            module.bias = _take(module.bias, index, 0)
        module.out_features = len(index)


def _select_pivoted_outputs(module: PivotedLinear, index: torch.Tensor) -> None:
    """Finds other rows to make the rest of, for some of those so far may be among what goes."""
    _require_float(module.up)
    _require_float(module.down)
    bias: Any = module.bias
    if bias is not None:
        module.set_bias(_take(bias, index, 0))
    if module.down.weight.is_meta:
        module.up.weight = nn.Parameter(module.up.weight.new_empty(len(index) - module.rank, module.rank))
        module.places, module.up.out_features = module.places[: len(index)], len(index) - module.rank
        return
    rows, rest = module.down.weight.detach().double(), module.up.weight.detach().double()
    thin = torch.cat((torch.eye(module.rank).to(rest), rest))
    module.set_factors(thin.index_select(0, module.places[index.to(module.places.device)]), rows)


def _select_heads(module: HeadwiseLinear, index: torch.Tensor) -> None:
    """Keeps the components of heads whose outputs stay."""
    width, rank = module.out_features // module.heads, module.rank
    heads = index[::width] // width
    if not torch.equal(index, _rows(heads, width)):
        raise CompressionError(
            "some outputs of a head would go, and its factors make them all", hint="Cut first, and factorize after it."
        )
    select_outputs(module.up, index)
    select_outputs(module.down, _rows(heads, rank))
    module.heads = len(heads)


def select_inputs(module: Any, index: torch.Tensor) -> None:
    """Keeps the inputs `index` (int64, in order) of a linear-like module.

    Raises:
        CompressionError: The module is quantized, or of a class that is not linear.
    """
    if isinstance(module, LowRankLinear):
        select_inputs(module.down, index)
    elif isinstance(module, Conv1D):
        module.weight = _take(module.weight, index, 0)
        module.nx = len(index)
    else:
        _require_float(module)
        module.weight = _take(module.weight, index, 1)
        module.in_features = len(index)


def _require_float(module: nn.Module) -> None:
    if type(module) is not nn.Linear:
        raise CompressionError(
            f"{type(module).__name__} cannot be cut: only float linear layers can",
            hint="Prune and factorize before quantizing.",
        )


def _rows(kept: torch.Tensor, width: int) -> torch.Tensor:
    """Turns indexes of groups into indexes of their members: each group has `width` neighbours."""
    return (kept.unsqueeze(1) * width + torch.arange(width, device="cpu")).flatten()


def _select_projections(
    block: AttentionBlock | FeedForwardBlock, wanted: Sequence[tuple[Projection, torch.Tensor]]
) -> None:
    """Cuts projections that may be blocks of one fused module, each fused module once."""
    by_path: dict[str, dict[int, torch.Tensor]] = {}
    for projection, index in wanted:
        by_path.setdefault(projection.path, {})[projection.part] = index
    parts = {projection.path: projection.parts for projection, _ in wanted}
    for path, index_of_part in by_path.items():
        module = block.at(path)
        if parts[path] == 1:
            index = index_of_part[0]
        else:
            size = output_width(module) // parts[path]
            everything = torch.arange(size, device="cpu")
            index = torch.cat([part * size + index_of_part.get(part, everything) for part in range(parts[path])])
        if isinstance(module, PivotedLinear) and len(index) <= module.rank:
            _merge(block.base, block.path(path))  # so few outputs need no factors
            module = block.at(path)
        select_outputs(module, index)


def shrink_attention(block: AttentionBlock, kept: Sequence[int]) -> None:
    """Keeps some heads of an attention.

    Args:
        block: The attention.
        kept: Which key-value heads stay, ascending; each keeps the query heads that read it.

    Raises:
        CompressionError: No head would be left.
    """
    if not kept:
        raise CompressionError(f"{block.name}: at least one head must stay")
    head_dim, queries, spec = block.head_dim, block.queries_per_head, block.spec
    index = _index(kept)
    if spec.shared_bias != "none" and len(kept) < block.heads:
        keep_heads(block.module, index, spec.shared_bias)
    query_rows, key_rows = _rows(index, head_dim * queries), _rows(index, head_dim)
    wanted = [(each, query_rows if role == "query" else key_rows) for role, each in block.projections]
    _select_projections(block, wanted)
    select_inputs(block.at(spec.output), query_rows)
    quantities = {
        "heads": len(index) * queries,
        "kv_heads": len(index),
        "width": len(index) * queries * head_dim,
        "groups": queries,
    }
    for attribute, quantity in spec.counts.items():
        setattr(block.module, attribute, quantities[quantity])


def shrink_feed_forward(block: FeedForwardBlock, kept: Sequence[int]) -> None:
    """Keeps some neurons of a feed-forward block.

    Args:
        block: The block.
        kept: Which neurons stay, ascending.

    Raises:
        CompressionError: No neuron would be left.
    """
    if not kept:
        raise CompressionError(f"{block.name}: at least one neuron must stay")
    index = _index(kept)
    _select_projections(block, [(projection, index) for projection in block.inputs])
    select_inputs(block.at(block.spec.output), index)


def remove_block(block: AttentionBlock | FeedForwardBlock, inputs: torch.Tensor | None = None) -> None:
    """Takes out a whole attention or feed-forward block; the residual connection around it stays.

    Args:
        block: The block.
        inputs: What its output projection reads on average, `(in,)`: what becomes of that is added to the bias
            which the block leaves behind, where the family has a bias there.

    Raises:
        CompressionError: The layer does not run without the block, or its output projection is quantized.
    """
    require_removable(block)
    attends = isinstance(block, AttentionBlock)
    output: Any = block.at(block.spec.output)
    width = output.out_features if isinstance(output, LowRankLinear) else output_width(output)
    bias: Any = output.bias
    new = Constant(width, bias is not None, output.weight.device, output.weight.dtype)
    if new.bias is not None and not output.weight.is_meta:
        with torch.no_grad():
            new.bias.copy_(bias if inputs is None else output(inputs.to(new.bias)))
    projections = [each for _, each in block.projections] if attends else block.inputs
    for projection in projections:
        block.base.set_submodule(block.path(projection.path), Nothing())
    block.base.set_submodule(block.path(block.spec.output), new)
    if attends:
        attend_to_nothing(block.module)


def require_removable(block: AttentionBlock | FeedForwardBlock) -> None:
    """Raises CompressionError where `remove_block` would."""
    if block.stack.shared:
        raise CompressionError(f"{block.name}: its layer is run over and over: the block cannot go alone")
    decodes = isinstance(block, AttentionBlock) and getattr(block.base.config, "is_decoder", False)
    if not block.spec.removable or decodes:
        raise CompressionError(
            f"{block.name}: such a block cannot be taken out in this family: other parts need it",
            hint="Take out whole layers, or blocks of the other kind.",
        )
    output: Any = block.at(block.spec.output)
    last: Any = output.up if isinstance(output, LowRankLinear) else output
    if not isinstance(last, Conv1D):
        _require_float(last)


def factorize(
    model: PreTrainedModel,
    path: str,
    rank: int,
    factors: tuple[torch.Tensor, torch.Tensor] | None = None,
    *,
    pivoted: bool = False,
    heads: int | None = None,
) -> None:
    """Replaces a linear-like module by a low-rank one with the same bias.

    Args:
        model: The model.
        path: The module, relative to the base model.
        rank: Width between the factors.
        factors: `up` of shape `(out, rank)` and `down` of shape `(rank, in)`, or `(heads * rank, in)` where there are
            heads; left uninitialised when None.
        pivoted: Whether the rank's worth of outputs is computed from the inputs and the others from those.
        heads: How many the outputs fall into, where each has factors of its own; they are not pivoted.

    Raises:
        CompressionError: The module shares its weight with another one, is quantized, or is not linear.
    """
    old: Any = module_at(model, path)
    if not isinstance(old, Conv1D):
        _require_float(old)
    # An empty model is given back a structure that was allowed when it was made.
    tied = () if old.weight.is_meta else tied_to(model, path)
    if tied:
        raise CompressionError(
            f"{path} shares its weight with {', '.join(tied)} and cannot be factorized alone",
            hint="Leave it out of the targets.",
        )
    weight = old.weight
    form: dict[str, Any] = {
        "bias": old.bias is not None,
        "transposed": isinstance(old, Conv1D),
        "device": weight.device,
        "dtype": weight.dtype,
    }
    widths = input_width(old), output_width(old)
    if heads is not None:
        new = HeadwiseLinear(*widths, rank, heads, **form)
    else:
        new = (PivotedLinear if pivoted else LowRankLinear)(*widths, rank, **form)
    if old.bias is not None:
        new.set_bias(old.bias)
    if isinstance(new, PivotedLinear) and factors is not None:
        new.set_factors(*(factor.to(weight.device) for factor in factors))
    elif factors is not None:
        up, down = factors
        new.up.weight = nn.Parameter(up.to(weight).contiguous())
        new.down.weight = nn.Parameter(down.to(weight).contiguous())
    put_module(model, path, new.train(old.training))


def defactorize(model: PreTrainedModel, path: str) -> None:
    """Merges a low-rank module back into one of the stock class, with the product of its factors as weight.

    Args:
        model: The model.
        path: The module, relative to the base model.

    Raises:
        CompressionError: The module is not low-rank, or its factors are quantized.
    """
    _merge(model if path.startswith(BESIDE) else base_model(model), path.removeprefix(BESIDE))


def _merge(root: nn.Module, path: str) -> None:
    """Does what `defactorize` does with a path from any module: blocks may be of a copy of their layer alone."""
    old = root.get_submodule(path)
    if not isinstance(old, LowRankLinear):
        raise CompressionError(f"{path} is a {type(old).__name__}, not a low-rank layer: there is nothing to merge")
    _require_float(old.up)
    _require_float(old.down)
    parent = path.rpartition(".")[0]
    for name, alone in part_from_others(root.get_submodule(parent), old).items():
        root.set_submodule(f"{parent}.{name}".removeprefix("."), alone)
    up, down, bias = old.up.weight, old.down.weight, old.bias
    product = old.compose(up.detach().double(), down.detach().double()).to(up.dtype)
    with torch.device("meta"):
        # Only the module's form: a forward of GPT-2 reads other attributes of its layers than one of BERT.
        new: Any = (
            Conv1D(old.out_features, old.in_features)
            if old.transposed
            else nn.Linear(old.in_features, old.out_features, bias=bias is not None)
        )
    new.weight = nn.Parameter((product.T if old.transposed else product).contiguous(), requires_grad=up.requires_grad)
    if bias is not None:
        new.bias = bias
    root.set_submodule(path, new.train(old.training))


def in_two_factors(model: PreTrainedModel) -> list[str]:
    """Gives pivoted layers that are trained two factors of the same product, for as long as they are trained.

    In pivoted form most outputs are sums over others: a step of one weight moves many, so that a learning rate that
    suits the rest of the model ruins such layers. Two factors that share the singular values evenly have no such
    sums. Quantized layers, and those whose factors are frozen or carry adapters, stay as they are.

    Returns:
        The layers, relative to the base model, for `in_pivoted_form`.
    """
    paths: list[str] = []
    for path, old in list(named_parts(model)):
        if isinstance(old, PivotedLinear) and all(
            type(each) is nn.Linear and each.weight.requires_grad for each in (old.up, old.down)
        ):
            _replace_factors(model, path, LowRankLinear, balanced(*old.two_factors()))
            paths.append(path)
    return paths


def in_pivoted_form(model: PreTrainedModel, paths: Sequence[str]) -> None:
    """Gives layers their pivoted form back, with the same product; those that are no longer two factors stay."""
    parts = dict(named_parts(model))
    for path in paths:
        old: Any = parts.get(path)
        if type(old) is LowRankLinear and type(old.up) is nn.Linear and old.rank < old.out_features:
            _replace_factors(model, path, PivotedLinear, (old.up.weight.detach(), old.down.weight.detach()))


def _replace_factors(
    model: PreTrainedModel, path: str, kind: type[LowRankLinear], factors: tuple[torch.Tensor, torch.Tensor]
) -> None:
    old: Any = module_at(model, path)
    like: dict[str, Any] = {"device": old.down.weight.device, "dtype": old.down.weight.dtype}
    has_bias = old.bias is not None
    new = kind(old.in_features, old.out_features, old.rank, bias=has_bias, transposed=old.transposed, **like)
    if has_bias:
        new.set_bias(old.bias)
    if isinstance(new, PivotedLinear):
        new.set_factors(*factors)
    else:
        new.up.weight, new.down.weight = (nn.Parameter(each.to(old.down.weight).contiguous()) for each in factors)
    put_module(model, path, new.train(old.training))
