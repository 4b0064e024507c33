"""GPTQ (Frantar et al. 2023): weights of few bits, rounded column by column so that what is left makes up for it.

The work is done by optimum and gptqmodel; the result is their stock checkpoint, which needs them and not hfcompress.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel

from hfcompress.configuration import Config
from hfcompress.errors import CompressionError, MissingBackendError
from hfcompress.methods.registry import Batch, Context, Method, register
from hfcompress.modeling.anatomy import (
    architecture_of,
    base_model,
    input_width,
    layer_lists,
    linear_layers,
    output_width,
)
from hfcompress.modeling.checkpoint import attach_stock
from hfcompress.modeling.structure import describe

_OUTPUTS = 32  # numbers of bits are packed into int32 down the outputs


class GPTQMethodConfig(Config):
    """How to quantize by GPTQ.

    Attributes:
        bits: Of each weight.
        group_size: How many neighbouring inputs share a scale; it must divide the width of every layer.
        damping: Share of the mean of the Hessian's diagonal that is added to it.
        by_activation: Goes through columns by falling size of what enters them; better, and slower to run.
    """

    bits: Literal[2, 3, 4, 8] = 4
    group_size: int = Field(64, ge=16)
    damping: float = Field(0.1, gt=0, lt=1)
    by_activation: bool = False


def gptq(model: PreTrainedModel, config: GPTQMethodConfig, context: Context) -> dict[str, Any]:
    """Quantizes the linear layers of a text decoder in place.

    Args:
        model: A float model as its config builds it.
        config: To how many bits.
        context: Calibration batches with `input_ids`; without padding in front.

    Returns:
        How many layers there are, and the kernel that runs them.

    Raises:
        CompressionError: No calibration data, or a model that is quantized, of another shape than its config says, or
            of a width that groups or the packing do not divide, or no kernel for it on this machine.
        MissingBackendError: optimum or gptqmodel is not installed.
    """
    quantizer_class = _require_gptq()
    prefix = _layers_of(model)
    _require_suitable(model, config)
    examples = [row for batch in context.calibration for row in _rows(batch)]
    if not examples:
        raise CompressionError(
            "gptq needs calibration data, and there is none",
            hint="Pass calibration=[batch, ...]: mappings of model inputs such as a tokenizer returns.",
        )
    quantizer = quantizer_class(
        bits=config.bits,
        dataset=examples,
        group_size=config.group_size,
        damp_percent=config.damping,
        desc_act=config.by_activation,
        block_name_to_quantize=prefix,
        module_name_preceding_first_block=[],
    )
    try:  # else it would be found out when all layers have been rounded
        quantizer.select_quant_linear(device_map={"": model.device}, pack=True)
    except (ValueError, NotImplementedError, ImportError) as error:
        raise CompressionError(f"no kernel here runs gptq of bits {config.bits} on {model.device}: {error}") from error
    training = model.training
    logging.getLogger("optimum.gptq").setLevel(logging.WARNING)  # it says two things of every layer
    quantizer.quantize_model(model)
    model.train(training)
    quantizer.dataset = None  # the texts are no part of the record
    attach_stock(model, quantizer.to_dict())
    kernels = [type(each).__name__ for each in model.modules() if isinstance(each, quantizer.quant_linear)]
    return {"layers": len(kernels), "bits": config.bits, "kernel": kernels[0], "examples": len(examples)}


def _require_gptq() -> Any:
    try:
        import gptqmodel  # noqa: F401
        from optimum.gptq import GPTQQuantizer
    except ImportError as error:
        raise MissingBackendError(
            "gptq needs optimum and gptqmodel, which are not installed",
            hint="pip install 'hfcompress[gptq]', in an environment of its own: bash scripts/environment_gptq.sh",
        ) from error
    return GPTQQuantizer


def _layers_of(model: PreTrainedModel) -> str:
    """Returns the path, in the whole model, of the one list of its layers."""
    lists = [path for stack in architecture_of(model).stacks for path in layer_lists(model, stack)]
    if len(lists) != 1 or model.main_input_name != "input_ids":
        raise CompressionError(
            f"gptq works on models that read text and have one stack of layers, not on {type(model).__name__}"
        )
    base = base_model(model)
    prefix = next(name for name, module in model.named_modules() if module is base)
    return f"{prefix}.{lists[0]}" if prefix else lists[0]


def _require_suitable(model: PreTrainedModel, config: GPTQMethodConfig) -> None:
    if vars(model).get("hf_quantizer") is not None:
        raise CompressionError("the model is quantized already", hint="Start from the float checkpoint.")
    if structure := describe(model):
        raise CompressionError(
            f"gptq stores a stock checkpoint, which cannot say that the model is compressed ({', '.join(structure)})",
            hint="Choose `quantization`, which can follow any method.",
        )
    for path, module in linear_layers(model).items():
        if input_width(module) % config.group_size:
            raise CompressionError(f"group_size must divide {input_width(module)}, the width of {path}")
        if output_width(module) % _OUTPUTS:
            raise CompressionError(f"{path} has {output_width(module)} outputs; gptq packs multiples of {_OUTPUTS}")


def _rows(batch: Batch) -> list[dict[str, torch.Tensor]]:
    """Returns the examples of a batch without padding, `(1, length)` each."""
    if "input_ids" not in batch:
        raise CompressionError(f"the calibration batches hold {', '.join(batch)}; the model reads input_ids")
    ids = batch["input_ids"].cpu()
    mask = batch.get("attention_mask", torch.ones_like(ids)).cpu().bool()
    rows = [row[keep] for row, keep in zip(ids, mask, strict=True)]
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows if len(row)]


register(
    Method(
        name="gptq",
        config=GPTQMethodConfig,
        summary="Stores linear layers in 8 to 2 bits by GPTQ, through optimum and gptqmodel.",
        apply=gptq,
        needs_float=True,
        quantizes=True,
    )
)
