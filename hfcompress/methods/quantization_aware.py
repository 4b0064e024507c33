"""Weights of 8, 4 and 2 bit, ternary or binary: rounded at once, or learned under rounding (TernaryBERT, LSQ)."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.configuration import Config
from hfcompress.errors import CompressionError
from hfcompress.methods.registry import Context, Method, register
from hfcompress.methods.training import Part, Rows
from hfcompress.modeling.anatomy import base_model, spread_over_linears
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.layers.bitsandbytes import kind_of
from hfcompress.modeling.layers.packed_linear import (
    PackedKind,
    PackedLinear,
    RoundingConv1D,
    RoundingLinear,
    forget_steps,
    learn_steps,
    learned_scales,
)
from hfcompress.modeling.tables import TableKind, plan_tables, quantize_tables


class QuantizationAwareConfig(Config):
    """How few values a weight may have.

    Attributes:
        weights: Linear layers of the base model: `packed-8`, `packed-4`, `packed-2`, `ternary` or `binary`, or None
            to leave them as they are. Task heads stay as they are. With a `training` step the layers
            learn under this rounding from the first step on, best with distillation (Zhang et al. 2020, TernaryBERT);
            without one the weights are rounded as they are.
        attention: The same for attention alone, over `weights`.
        ffn: The same for feed-forward blocks alone, over `weights`.
        scales: In training, `fitted` to the weights anew at every step, or `learned` beside them (Esser et al. 2020,
            LSQ).
        embeddings: Embedding tables: `int8`, `int4`, or None; rounded row by row at the end.
        embedding_group_size: As in `quantization`.
    """

    weights: PackedKind | None = "packed-4"
    attention: PackedKind | None = None
    ffn: PackedKind | None = None
    scales: Literal["fitted", "learned"] = "fitted"
    embeddings: TableKind | None = "int8"
    embedding_group_size: int | None = Field(None, ge=8)


def quantization_aware(model: PreTrainedModel, config: QuantizationAwareConfig, context: Context) -> dict[str, Any]:
    """Rounds and packs a model's linear layers at once, in place.

    Args:
        model: A model whose linear layers are float.
        config: Which layers, and to how many values.
        context: Not used: nothing here needs data.

    Returns:
        How many layers of each kind there are.

    Raises:
        CompressionError: A layer is quantized already, nothing is to be quantized, or scales are to be learned.
    """
    if config.scales == "learned":
        raise CompressionError(
            "scales: learned exists only in training", hint="Add `training` to the step, or choose 'fitted'."
        )
    return _pack(model, _kinds(model, config), config)


def _kinds(model: PreTrainedModel, config: QuantizationAwareConfig) -> dict[str, PackedKind]:
    base = base_model(model)
    groups: dict[str, PackedKind | None] = {"attention": config.attention, "ffn": config.ffn}
    kinds: dict[str, PackedKind] = spread_over_linears(model, config.weights, groups)
    if not kinds:
        raise CompressionError("weights, attention and ffn name no layer: there is nothing to quantize")
    for name in kinds:
        if kind_of(base.get_submodule(name)):
            raise CompressionError(f"{name} is quantized already", hint="Start from the float checkpoint.")
    return kinds


def _pack(model: PreTrainedModel, kinds: dict[str, PackedKind], config: QuantizationAwareConfig) -> dict[str, Any]:
    base = base_model(model)
    tables = plan_tables(model, config.embeddings, config.embedding_group_size)
    counted: dict[str, int] = {}
    for name, kind in kinds.items():
        layer = base.get_submodule(name)
        scales = learned_scales(layer)
        forget_steps(layer)
        base.set_submodule(name, PackedLinear.from_float(layer, kind, scales))
        counted[kind] = counted.get(kind, 0) + 1
    quantize_tables(model, tables)
    commit(model)
    return {"linear_layers": counted, "embeddings": config.embeddings}


class QuantizationAwarePart(Part):
    """Lets layers compute with rounded weights while they train, and packs them when training ends."""

    quantizes = True

    def __init__(self, config: QuantizationAwareConfig, context: Context | None = None) -> None:
        self.config = config
        self._kinds: dict[str, PackedKind] = {}

    def before_training(self, model: PreTrainedModel, rows: Rows | None) -> None:
        """Gives layers the scales that they learn, so that the optimizer and every checkpoint have them.

        Raises:
            CompressionError: A layer is quantized already or cannot be trained so, or nothing is to be quantized.
        """
        self._kinds = _kinds(model, self.config)
        plan_tables(model, self.config.embeddings, self.config.embedding_group_size)  # what cannot be is said now
        base = base_model(model)
        for name, kind in self._kinds.items():
            layer = base.get_submodule(name)
            if type(layer) not in _ROUNDING:
                raise CompressionError(f"{name} is a {type(layer).__name__}, which cannot be trained under rounding")
            if self.config.scales == "learned":
                learn_steps(layer, kind)

    def begin(self, model: PreTrainedModel, total_steps: int, device: torch.device) -> None:
        """Has every layer round its weight before it uses it; no name of a weight changes."""
        if not self._kinds:
            self.before_training(model, None)
        base = base_model(model)
        for name, kind in self._kinds.items():
            layer = cast(Any, base.get_submodule(name))
            layer.__class__, layer.rounding = _ROUNDING[type(layer)], kind

    def end(self, model: PreTrainedModel) -> dict[str, Any]:
        """Packs what was learned; the outputs stay what they were under rounding."""
        base = base_model(model)
        for name in self._kinds:
            layer = cast(Any, base.get_submodule(name))
            layer.__class__ = next(plain for plain, own in _ROUNDING.items() if own is type(layer))
            del layer.rounding
        return _pack(model, self._kinds, self.config)


_ROUNDING: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: RoundingLinear, Conv1D: RoundingConv1D}


register(
    Method(
        name="quantization_aware",
        config=QuantizationAwareConfig,
        summary="Packs linear layers to 8, 4 or 2 bit, ternary or binary weights, at once or learned in training.",
        apply=quantization_aware,
        part=QuantizationAwarePart,
        quantizes=True,
    )
)
