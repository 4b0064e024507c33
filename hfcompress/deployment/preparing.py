"""Turns what only PyTorch can run into what every engine can, in a loaded model."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.modeling.architectures import architectures
from hfcompress.modeling.layers.bitsandbytes import dequantize, kind_of
from hfcompress.modeling.layers.quantized_embedding import Bits, QuantizedEmbedding
from hfcompress.modeling.layers.tied import LowRankEmbedding, TiedLookup, TiedOutput
from hfcompress.modeling.tables import plan_tables, quantize_tables

Embeddings = Literal["float", "int8", "int4"]


class Lookup(nn.Module):
    """A quantized embedding in operations that every engine takes: gather, cast, multiply.

    Args:
        codes: int8 `(rows, columns)`, or uint8 `(rows, columns / 2)` of packed pairs.
        scales: float32 `(rows, groups)`.
        bits: 8 or 4.
        scale: What looked up rows are multiplied by.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bits: Bits, scale: float = 1.0) -> None:
        super().__init__()
        self.bits = bits
        self.scale = scale
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def of(cls, table: QuantizedEmbedding, scale: float | None = None) -> Lookup:
        """Shares the tensors of a quantized embedding; `scale` stands in for its own."""
        return cls(table.codes, table.scales, table.bits, table.scale if scale is None else scale)

    @property
    def weight(self) -> torch.Tensor:
        """The scales: families read device and dtype off an embedding's weight."""
        return self.scales

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Looks up integers of any shape; returns `(*indices.shape, columns)`, float32."""
        codes, scales = nn.functional.embedding(indices, self.codes), nn.functional.embedding(indices, self.scales)
        rows = self._floats(codes, scales)
        return rows if self.scale == 1.0 else rows * self.scale

    def lookup(self, indices: torch.Tensor) -> torch.Tensor:
        """As `forward`, for a low-rank table that holds this one."""
        return self(indices)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the products of `(..., columns)` with every row."""
        return nn.functional.linear(hidden, self.dense())

    def dense(self) -> torch.Tensor:
        """Returns the float table, `(rows, columns)`, without what its rows are multiplied by."""
        return self._floats(self.codes, self.scales)

    def _floats(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        codes = codes.float()
        if self.bits == 4:
            high = torch.floor(codes / 16)  # exact in float32: a byte over a power of two
            codes = torch.stack((high, codes - 16 * high), -1).flatten(-2) - 8
        if scales.shape[-1] == 1:
            return codes * scales
        return (codes.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)


class Output(nn.Module):
    """An output layer that reads the table of a `Lookup`, whose tensors are stored once."""

    def __init__(self, lookup: Lookup, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.lookup = lookup
        self.bias = bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps `(..., columns)` to `(..., rows)`."""
        return nn.functional.linear(hidden, self.lookup.dense(), self.bias)


def prepare(model: PreTrainedModel, embeddings: Embeddings, *, outputs_apart: bool = False) -> dict[str, list[str]]:
    """Turns what only PyTorch can run into what every engine can, in place.

    Quantized linear layers become float ones of the values that they hold: what they round of the inputs, in 8 bit,
    is not traced. Embedding tables that are quantized stay so; with `embeddings` the float ones become so too.

    Args:
        model: A model in float32.
        embeddings: What becomes of float tables.
        outputs_apart: Whether an output layer that is tied to a quantized table gets a weight of its own, which the
            engine can then quantize and multiply with as with any other.

    Returns:
        The paths of the layers that became float, and of the tables that are quantized now.

    Raises:
        CompressionError: A table to quantize does more than look up, or is tied to another module than its class says.
    """
    if embeddings != "float" and model.config.model_type in architectures():
        quantize_tables(model, plan_tables(model, embeddings, None))
    in_float: list[str] = []
    tables: dict[int, tuple[str, nn.Module]] = {}
    for name, module in list(model.named_modules()):
        if kind_of(module) is not None:
            model.set_submodule(name, _linear(module, dequantize(module)))
            in_float.append(name)
        elif isinstance(module, Conv1D):
            model.set_submodule(name, _linear(module, module.weight.detach().T))
        elif isinstance(module, QuantizedEmbedding):
            tables[id(module)] = (name, Lookup.of(module))
            model.set_submodule(name, tables[id(module)][1])
        elif isinstance(module, LowRankEmbedding):
            tables[id(module)] = (name, module)
    _settle_readers(model, tables, outputs_apart)
    done = [name for name, module in tables.values() if isinstance(module, Lookup)]
    return {"dequantized": in_float, "quantized_embeddings": done}


def _linear(module: Any, weight: torch.Tensor) -> nn.Linear:
    """Makes a float layer of a weight `(out, in)` and a module's bias."""
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
    linear.weight = nn.Parameter(weight.detach().float().contiguous(), requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach().float(), requires_grad=False)
    return linear.eval()


class _LowRankOutput(nn.Module):
    """An output layer that reads a low-rank table: the tracer needs it to own the table."""

    def __init__(self, table: LowRankEmbedding, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.table = table
        self.bias = bias

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        scores = self.table.project(hidden)
        return scores if self.bias is None else scores + self.bias


def _settle_readers(model: PreTrainedModel, tables: dict[int, tuple[str, nn.Module]], apart: bool) -> None:
    """Gives modules that read another's compressed table something that can be traced."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, TiedOutput | TiedLookup):
            continue
        old = cast(Any, module.table)
        table = tables[id(old)][1]
        if isinstance(module, TiedLookup):
            scale = module.scale
            made = Lookup.of(old, scale) if isinstance(old, QuantizedEmbedding) else _ScaledLookup(table, scale)
        elif isinstance(table, LowRankEmbedding):
            made = _LowRankOutput(table, module.bias)
        else:
            made = _output(cast(Lookup, table), module.bias, None if not apart else old.dense())
        model.set_submodule(name, made.eval())


class _ScaledLookup(nn.Module):
    def __init__(self, table: Any, scale: float) -> None:
        super().__init__()
        self.table = table
        self.scale = scale

    @property
    def weight(self) -> torch.Tensor:
        return self.table.weight

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        return self.table.lookup(indices) * self.scale


def _output(lookup: Lookup, bias: nn.Parameter | None, weight: torch.Tensor | None) -> nn.Module:
    if weight is None:
        return Output(lookup, bias)
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    linear.bias = bias  # type: ignore[assignment]
    return linear
