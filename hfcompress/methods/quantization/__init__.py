"""Weights at rest in few bits, given or found part by part."""

from __future__ import annotations

from hfcompress.methods.quantization.config import QuantizationConfig
from hfcompress.methods.quantization.kinds import LinearKind
from hfcompress.methods.quantization.method import quantization
from hfcompress.methods.quantization.recovery import QLoRAConfig, QLoRAPart
from hfcompress.methods.registry import Method, register

__all__ = ["LinearKind", "QLoRAConfig", "QLoRAPart", "QuantizationConfig", "quantization"]

register(
    Method(
        name="quantization",
        config=QuantizationConfig,
        summary="Stores linear layers in 8 bits or fewer, and embeddings row by row; mixed by what each part loses.",
        apply=quantization,
        needs_float=True,
        quantizes=True,
    )
)

register(
    Method(
        name="qlora",
        config=QLoRAConfig,
        summary="Trains adapters on a quantized model, and keeps them apart, merges them, or quantizes again.",
        part=QLoRAPart,
        needs_float=False,
        quantizes=True,
        trains_quantized=True,
    )
)
