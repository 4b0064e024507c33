"""Linear layers of 8 and 4 bit weights by bitsandbytes: made, read and kept safe on CPU.

Two faults of bitsandbytes 0.50 on CPUs with AVX512-BF16 are cured in `settle`: an evaluation forward repacks
4-bit weights in place, so that a later save writes a file that no longer means the same; and widths that are
no multiple of 32 (outputs) or 64 (inputs) crash. Both come from one optional kernel, which is switched off.
"""

from __future__ import annotations

import logging
from typing import Any, Literal, cast, get_args

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from hfcompress.errors import MissingBackendError

Kind = Literal["int8", "nf4", "fp4", "nf4-double", "fp4-double"]
KINDS: tuple[Kind, ...] = get_args(Kind)

# What one quantized `weight` becomes in a file, over all kinds.
SERIALIZED_NAMES = (
    "weight",
    "SCB",
    "weight_format",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    "weight.quant_state.bitsandbytes__nf4",
    "weight.quant_state.bitsandbytes__fp4",
)


def require_bitsandbytes() -> Any:
    """Imports bitsandbytes, lazily: it takes seconds.

    Raises:
        MissingBackendError: It is not installed.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise MissingBackendError(
            "8 and 4 bit linear layers need bitsandbytes, which is not installed",
            hint="pip install 'bitsandbytes>=0.50.2'",
        ) from error
    # Its int8 path warns on every call of every layer that inputs are cast to float16.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes


def kind_of(module: nn.Module) -> Kind | None:
    """Returns how a linear layer is quantized, or None; imports nothing."""
    name = type(module).__name__
    if name == "Linear8bitLt":
        return "int8"
    if name == "Linear4bit":
        weight = cast(Any, module.weight)
        return cast(Kind, f"{weight.quant_type}-double" if weight.compress_statistics else weight.quant_type)
    return None


def empty_linear(in_features: int, out_features: int, *, bias: bool, kind: Kind, dtype: torch.dtype) -> nn.Module:
    """Makes a quantized layer on `meta`, ready for its stored weights."""
    bnb = require_bitsandbytes()
    with torch.device("meta"):
        if kind == "int8":
            module = bnb.nn.Linear8bitLt(in_features, out_features, bias, has_fp16_weights=False)
            module.weight.data = module.weight.data.to(torch.int8)
        else:
            module = bnb.nn.Linear4bit(
                in_features,
                out_features,
                bias,
                compute_dtype=dtype,
                compress_statistics=kind.endswith("-double"),
                quant_type=kind.removesuffix("-double"),
            )
            packed = (in_features * out_features + 1) // 2
            module.weight.data = torch.empty(packed, 1, dtype=torch.uint8)
    module.source_cls = nn.Linear  # transformers' own conversions read it
    module.requires_grad_(False)
    return settle(module)


def quantize_linear(linear: nn.Linear, kind: Kind) -> nn.Module:
    """Quantizes a float layer; the layer itself is left as it was, its bias is shared."""
    bnb = require_bitsandbytes()
    weight = linear.weight.detach()
    module = empty_linear(
        linear.in_features, linear.out_features, bias=linear.bias is not None, kind=kind, dtype=weight.dtype
    )
    if kind == "int8":
        made = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        made = bnb.nn.Params4bit(
            weight,
            requires_grad=False,
            compress_statistics=kind.endswith("-double"),
            quant_type=kind.removesuffix("-double"),
            module=module,
        )
    module.weight = made.to(weight.device)
    if linear.bias is not None:
        module.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    module.train(linear.training)
    return module


def settle(module: nn.Module) -> nn.Module:
    """Switches off the kernel that repacks 4-bit weights in place; every path to a live layer ends here."""
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
    return module


class LoadBitsAndBytes(ConversionOps):
    """Gathers the tensors of one stored weight and hands them to transformers' operation for its kind."""

    def __init__(self, hf_quantizer: Any) -> None:
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """Returns the `weight` parameter that the stored tensors stand for."""
        from transformers.integrations import bitsandbytes as integration

        if len(input_dict) == 1:  # a float weight beside the quantized ones
            return input_dict
        eight = "SCB" in input_dict
        operation = integration.Bnb8bitDeserialize if eight else integration.Bnb4bitDeserialize
        loaded = operation(self.hf_quantizer).convert(input_dict, **kwargs)
        if not eight:
            module = kwargs["model"].get_submodule(kwargs["full_layer_name"].rpartition(".")[0])
            stored, built = tuple(loaded["weight"].quant_state.shape), (module.out_features, module.in_features)
            if stored != built:
                raise ValueError(f"the stored 4-bit weight has shape {stored}, the structure says {built}")
        return loaded
