"""Shrinks, splits and replaces the modules of a live model. It knows no method.

Every function changes the model in place, on any device, `meta` included; the caller ends with
`checkpoint.commit(model)`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import CompressionError
from hfcompress.modeling.anatomy import AttentionBlock, FeedForwardBlock, base_model, input_width, output_width
from hfcompress.modeling.architectures import Projection
from hfcompress.modeling.layers.kept_heads import keep_heads
from hfcompress.modeling.layers.low_rank import LowRankLinear


def _take(parameter: nn.Parameter, index: torch.Tensor, dim: int) -> nn.Parameter:
    taken = parameter.detach().index_select(dim, index.to(parameter.device))
    return nn.Parameter(taken, requires_grad=parameter.requires_grad)


def select_outputs(module: nn.Module, index: torch.Tensor) -> None:
    """Keeps the outputs `index` (int64, in order) of a linear-like module.

    Raises:
        CompressionError: The module is quantized, or of a class that is not linear.
    """
    if isinstance(module, LowRankLinear):
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


def select_inputs(module: nn.Module, index: torch.Tensor) -> None:
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
    return (kept.unsqueeze(1) * width + torch.arange(width)).flatten()


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
        size = output_width(module) // parts[path]
        everything = torch.arange(size)
        index = torch.cat([part * size + index_of_part.get(part, everything) for part in range(parts[path])])
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
    index = torch.tensor(list(kept))
    if spec.shares_bias and len(kept) < block.heads:
        keep_heads(block.module, index)
    query_rows, key_rows = _rows(index, head_dim * queries), _rows(index, head_dim)
    _select_projections(block, [(spec.query, query_rows), (spec.key, key_rows), (spec.value, key_rows)])
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
    index = torch.tensor(list(kept))
    _select_projections(block, [(projection, index) for projection in block.spec.inputs])
    select_inputs(block.at(block.spec.output), index)


def factorize(
    model: PreTrainedModel, path: str, rank: int, factors: tuple[torch.Tensor, torch.Tensor] | None = None
) -> None:
    """Replaces a linear-like module by a low-rank one with the same bias.

    Args:
        model: The model.
        path: The module, relative to the base model.
        rank: Width between the factors.
        factors: `up` of shape `(out, rank)` and `down` of shape `(rank, in)`; left uninitialised when None.
    """
    base = base_model(model)
    old = base.get_submodule(path)
    weight = old.weight
    new = LowRankLinear(
        input_width(old),
        output_width(old),
        rank,
        bias=old.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    if old.bias is not None:
        new.up.bias = old.bias
    if factors is not None:
        up, down = factors
        new.up.weight = nn.Parameter(up.to(weight).contiguous())
        new.down.weight = nn.Parameter(down.to(weight).contiguous())
    new.train(old.training)
    base.set_submodule(path, new)
