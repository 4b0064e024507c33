"""Linear layers of 8 and 4 bit weights by bitsandbytes: made, read and kept right on CPU.

A third fault is silent: where the number of inputs is no multiple of the block size, bitsandbytes quantizes blocks
that run on across rows, and its CPU kernel reads them back as if each row began a new one, so that weights come
out with the scale of another block. `dequantize` reads them as they were written; `settle` makes such layers use it.

Two faults of bitsandbytes 0.50 on CPUs with AVX512-BF16 are cured in `settle`: an evaluation forward repacks
4-bit weights in place, so that a later save writes a file that no longer means the same; and widths that are
no multiple of 32 (outputs) or 64 (inputs) crash. Both come from one optional kernel, which is switched off.
"""

from __future__ import annotations

import copy
import logging
import math
from functools import cache
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps

from hfcompress.errors import CompressionError, MissingBackendError
from hfcompress.modeling.layers.packed_linear import PackedKind, PackedLinear
from hfcompress.modeling.layers.torchao import TorchAOKind, TorchAOLinear

Kind = Literal["int8", "nf4", "fp4", "nf4-double", "fp4-double"]
KINDS: tuple[Kind, ...] = get_args(Kind)
ComputeDtype = Literal["float32", "bfloat16", "float16"]
COMPUTE_DTYPES: tuple[ComputeDtype, ...] = get_args(ComputeDtype)
_DTYPE_NAMES: dict[torch.dtype, ComputeDtype] = {getattr(torch, name): name for name in COMPUTE_DTYPES}

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


def kind_of(module: nn.Module) -> Kind | PackedKind | TorchAOKind | None:
    """Returns how a linear layer is quantized, or None; imports nothing."""
    if isinstance(module, PackedLinear):
        return module.packed_kind
    if isinstance(module, TorchAOLinear):
        return module.torchao_kind
    name = type(module).__name__
    if name == "Linear8bitLt":
        return "int8"
    if name == "Linear4bit":
        weight = cast(Any, module.weight)
        return cast(Kind, f"{weight.quant_type}-double" if weight.compress_statistics else weight.quant_type)
    return None


class Numerics(NamedTuple):
    """How a layer computes, where that is not as usual.

    Attributes:
        threshold: Inputs of a size over this one, and their weights, are multiplied in float16 by an int8 layer
            (Dettmers et al. 2022, LLM.int8); 0 for none.
        compute_dtype: What a 4-bit layer computes in; None for the dtype of the model.
    """

    threshold: float = 0.0
    compute_dtype: ComputeDtype | None = None

    def of(self, kind: Kind) -> Numerics:
        """Returns the part of it that a kind of layer heeds."""
        return Numerics(self.threshold, None) if kind == "int8" else Numerics(0.0, self.compute_dtype)


def numerics_of(module: nn.Module, dtype: torch.dtype) -> Numerics:
    """Returns how a quantized layer computes in a model of this dtype."""
    layer = cast(Any, module)
    if kind_of(module) == "int8":
        return Numerics(threshold=float(layer.state.threshold))
    computes = getattr(layer, "compute_dtype", None)
    return Numerics(compute_dtype=None if computes in (None, dtype) else _DTYPE_NAMES[computes])


def empty_linear(
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    kind: Kind,
    dtype: torch.dtype,
    numerics: Numerics = Numerics(),  # noqa: B008 a tuple
) -> nn.Module:
    """Makes a quantized layer on `meta`, ready for its stored weights."""
    bnb = require_bitsandbytes()
    with torch.device("meta"):
        if kind == "int8":
            form = {"has_fp16_weights": False, "threshold": numerics.threshold}
            module = bnb.nn.Linear8bitLt(in_features, out_features, bias, **form)
            module.weight.data = module.weight.data.to(torch.int8)
        else:
            module = bnb.nn.Linear4bit(
                in_features,
                out_features,
                bias,
                compute_dtype=getattr(torch, numerics.compute_dtype) if numerics.compute_dtype else dtype,
                compress_statistics=kind.endswith("-double"),
                quant_type=kind.removesuffix("-double"),
            )
            packed = (in_features * out_features + 1) // 2
            module.weight.data = torch.empty(packed, 1, dtype=torch.uint8)
    module.source_cls = nn.Linear  # transformers' own conversions read it
    module.requires_grad_(False)
    return settle(module)


def quantize_linear(linear: nn.Linear, kind: Kind, numerics: Numerics = Numerics()) -> nn.Module:  # noqa: B008
    """Quantizes a float layer; the layer itself is left as it was, its bias is shared."""
    bnb = require_bitsandbytes()
    weight = linear.weight.detach()
    form = {"bias": linear.bias is not None, "kind": kind, "dtype": weight.dtype, "numerics": numerics.of(kind)}
    module = empty_linear(linear.in_features, linear.out_features, **form)
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


def dequantize(module: nn.Module) -> torch.Tensor:
    """Returns the float weight, `(out, in)`, that a quantized layer computes with.

    On CPU, bitsandbytes' own `dequantize_4bit` mixes up scales where a block of 64 runs over the end of a row.
    """
    if isinstance(module, PackedLinear | TorchAOLinear):
        return module.dense()
    from bitsandbytes import functional

    weight = cast(Any, module.weight)
    if kind_of(module) == "int8":
        state = cast(Any, module).state
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else state.SCB
        return functional.int8_vectorwise_dequant(weight.data, scales)
    flat = copy.copy(weight.quant_state)
    flat.shape = torch.Size((1, math.prod(weight.quant_state.shape)))  # one row: blocks run on, as they were written
    return functional.dequantize_4bit(weight.data, flat).view(weight.quant_state.shape)


class _BlocksAcrossRows:
    """A mixin over bitsandbytes' 4-bit layer for inputs that are no multiple of the block size."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`."""
        module = cast(Any, self)
        if inputs.device.type != "cpu":
            return super().forward(inputs)  # type: ignore[misc]
        dtype = module.compute_dtype or inputs.dtype
        bias = None if module.bias is None else module.bias.to(dtype)
        outputs = nn.functional.linear(inputs.to(dtype), dequantize(module).to(dtype), bias)
        return outputs.to(inputs.dtype)


@cache
def _by_blocks(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (_BlocksAcrossRows, cls), {"__module__": __name__})


def settle(module: nn.Module) -> nn.Module:
    """Keeps a 4-bit layer right on CPU; every path to a live layer ends here.

    It switches off the kernel that repacks weights in place, and gives layers whose blocks run across rows a
    forward that knows it.
    """
    if hasattr(module, "support_avx512bf16_for_cpu"):
        vars(module)["support_avx512bf16_for_cpu"] = False
        across = cast(Any, module).in_features % cast(Any, module).weight.blocksize
        if across and not isinstance(module, _BlocksAcrossRows):
            module.__class__ = _by_blocks(type(module))
    return module


def runs_without_cure(module: nn.Module) -> bool:
    """Tells whether a 4-bit layer's widths are among those that bitsandbytes alone gets right on every CPU."""
    layer = cast(Any, module)
    return layer.in_features % layer.weight.blocksize == 0 and layer.out_features % 32 == 0


def settle_all(model: nn.Module) -> None:
    """Settles every layer of a live model, whoever loaded it.

    Raises:
        CompressionError: The kernel has run before this was called: it rounds the scales of 4-bit weights to
            bfloat16 in place, which no one can undo.
    """
    for name, module in model.named_modules():
        settle(module)
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise CompressionError(
                f"{name}: a forward on this CPU has repacked the 4-bit weights and rounded their scales",
                hint="Load the model again, and call hfcompress.modeling.layers.bitsandbytes.settle_all(model) "
                "before its first forward.",
            )


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
            state = cast(Any, loaded["weight"]).quant_state
            stored, built = tuple(state.shape), (module.out_features, module.in_features)
            if stored != built:
                raise ValueError(f"the stored 4-bit weight has shape {stored}, the structure says {built}")
            kind = f"{state.quant_type}-double" if state.nested else state.quant_type
            if kind != kind_of(module):
                raise ValueError(f"the stored 4-bit weight is {kind}, the structure says {kind_of(module)}")
        return loaded
