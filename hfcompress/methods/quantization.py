"""Weights at rest in 8 and 4 bit: bitsandbytes for linear layers, a per-row table for embeddings."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.configuration import Config
from hfcompress.errors import CompressionError
from hfcompress.methods.registry import Context, Method, register
from hfcompress.modeling.anatomy import base_model, spread_over_linears
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.layers.bitsandbytes import Kind, kind_of, quantize_linear
from hfcompress.modeling.tables import TableKind, plan_tables, quantize_tables


class QuantizationConfig(Config):
    """How to quantize.

    Attributes:
        weights: Linear layers of the base model: `int8`, `nf4` or `fp4` (`-double`: their scales are quantized
            too), or None to leave them as they are. Task heads stay in float.
        attention: The same for attention alone, over `weights`.
        ffn: The same for feed-forward blocks alone, over `weights`.
        embeddings: Embedding tables: `int8`, `int4`, or None. An output layer that is tied to a table reads the
            quantized one.
        embedding_group_size: How many neighbours in a row of a table share a scale; None for a whole row of
            8-bit numbers and 32 of 4-bit ones.
    """

    weights: Kind | None = "int8"
    attention: Kind | None = None
    ffn: Kind | None = None
    embeddings: TableKind | None = "int8"
    embedding_group_size: int | None = Field(None, ge=8)


def quantization(model: PreTrainedModel, config: QuantizationConfig, context: Context) -> dict[str, Any]:
    """Quantizes a model in place.

    Args:
        model: A float model.
        config: Which parts, and to what.
        context: Not used: nothing here needs data.

    Returns:
        How many layers of each kind there are, and the linear layers left in float.

    Raises:
        CompressionError: The model is quantized already, an embedding is tied to other modules than its class says,
            or a group does not divide an embedding's width.
        MissingBackendError: bitsandbytes is not installed.
    """
    base = base_model(model)
    done = [name for name, module in base.named_modules() if kind_of(module)]
    if done:
        raise CompressionError(
            f"the model is quantized already ({done[0]} is {kind_of(base.get_submodule(done[0]))})",
            hint="Start from the float checkpoint.",
        )
    tables = plan_tables(model, config.embeddings, config.embedding_group_size)
    groups: dict[str, Kind | None] = {"attention": config.attention, "ffn": config.ffn}
    kinds: dict[str, Kind] = spread_over_linears(model, config.weights, groups)
    for path, kind in kinds.items():
        base.set_submodule(path, quantize_linear(_as_linear(base.get_submodule(path)), kind))
    quantize_tables(model, tables)
    commit(model)
    in_float = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    counted: dict[str, int] = {}
    for kind in kinds.values():
        counted[kind] = counted.get(kind, 0) + 1
    return {"linear_layers": counted, "embeddings": config.embeddings, "left_in_float": in_float}


def _as_linear(module: nn.Module) -> nn.Linear:
    """Returns GPT-2's transposed layers as linear ones, which is all that is quantized; others as they are."""
    if not isinstance(module, Conv1D):
        assert isinstance(module, nn.Linear)
        return module
    weight = module.weight.detach().T.contiguous()
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight), module.bias
    return linear.train(module.training)


register(
    Method(
        name="quantization",
        config=QuantizationConfig,
        summary="Stores linear layers in 8 or 4 bit by bitsandbytes, and embeddings in 8 or 4 bit row by row.",
        apply=quantization,
        needs_float=True,
        quantizes=True,
    )
)
