"""The kinds of quantized layers, whoever runs them: made from float ones, and spread over a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import CompressionError
from hfcompress.modeling.anatomy import ROLE_GROUPS, base_model, modules_of, spread_over_linears
from hfcompress.modeling.layers.bitsandbytes import Kind, Numerics, kind_of, quantize_linear, require_bitsandbytes
from hfcompress.modeling.layers.packed_linear import PACKED_KINDS, PackedKind, PackedLinear
from hfcompress.modeling.layers.torchao import TORCHAO_KINDS, TorchAOKind, TorchAOLinear, require_torchao

LinearKind = Literal[Kind, PackedKind, TorchAOKind]

# Of a weight's own number, whatever the scales add; ternary weights take 1.6.
BITS = {"int8": 8, "int4": 4, "nf4": 4, "fp4": 4, "nf4-double": 4, "fp4-double": 4}
BITS |= {"packed-8": 8, "packed-4": 4, "packed-2": 2, "ternary": 2, "binary": 1}
BITS |= {"torchao-int8": 8, "torchao-int8-dynamic": 8}
_FLOAT = "float"  # an explicit null, which goes over what is said for more layers


def quantize_layer(module: nn.Module, kind: LinearKind, numerics: Numerics) -> nn.Module:
    """Returns a quantized layer in the place of a linear or transposed (`Conv1D`) one, which is left as it was."""
    if kind in PACKED_KINDS:
        return PackedLinear.from_float(module, cast(PackedKind, kind))
    linear = _as_linear(module)
    if kind in TORCHAO_KINDS:
        return TorchAOLinear.from_float(linear, cast(TorchAOKind, kind))
    return quantize_linear(linear, cast(Kind, kind), numerics)


def require_engine(kind: LinearKind) -> None:
    """Raises `MissingBackendError` where what runs a kind of layer is not installed."""
    if kind in TORCHAO_KINDS:
        require_torchao()
    elif kind not in PACKED_KINDS:
        require_bitsandbytes()


def spread(
    model: PreTrainedModel,
    everywhere: str | None,
    by_group: Mapping[str, str | None],
    by_role: Mapping[Any, str | None],
) -> dict[str, str]:
    """Returns what is meant for each linear layer of the base model; layers that stay in float are left out.

    Args:
        model: The model.
        everywhere: What is meant for every layer, or None.
        by_group: What is meant for attention or feed-forward blocks; None says nothing.
        by_role: What is meant for the layers of a role or a group; None for float. Roles go over groups.

    Raises:
        CompressionError: A role has no layer of its own in this model.
    """
    ordered = sorted(by_role.items(), key=lambda item: item[0] not in ROLE_GROUPS)
    for role, _ in ordered:
        if not modules_of(model, (role,)):
            raise CompressionError(
                f"roles: {role} has no layer of its own in a model of type '{model.config.model_type}'",
                hint="Where several roles are one layer it goes by the first of them: query.",
            )
    meant = spread_over_linears(model, everywhere, by_group)
    for role, kind in ordered:
        meant |= spread_over_linears(model, None, {role: kind or _FLOAT})
    return {path: kind for path, kind in meant.items() if kind != _FLOAT}


def require_float(model: PreTrainedModel) -> None:
    """Raises `CompressionError` where a model is quantized already, by us or by another library."""
    kinds = ((name, kind_of(module)) for name, module in base_model(model).named_modules())
    held = next((f"{name} is {kind}" for name, kind in kinds if kind), None)
    engine: Any = vars(model).get("hf_quantizer")
    if held or engine is not None:
        said = held or getattr(engine.quantization_config, "quant_method", type(engine).__name__)
        raise CompressionError(f"the model is quantized already ({said})", hint="Start from the float checkpoint.")


def _as_linear(module: nn.Module) -> nn.Linear:
    """Returns GPT-2's transposed layers as linear ones, which is all that engines quantize; others as they are."""
    if not isinstance(module, Conv1D):
        assert isinstance(module, nn.Linear)
        return module
    weight = module.weight.detach().T.contiguous()
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0])
    linear.weight, linear.bias = nn.Parameter(weight), module.bias
    return linear.train(module.training)
