"""What of a live model is float: embedding tables, made small in place, and the dtype of all the rest."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.modeling.anatomy import base_model, embedding_paths
from hfcompress.modeling.layers.packed_linear import PackedLinear
from hfcompress.modeling.layers.quantized_embedding import Bits, QuantizedEmbedding
from hfcompress.modeling.layers.tied import LowRankEmbedding, TiedLookup
from hfcompress.modeling.layers.torchao import TorchAOLinear
from hfcompress.modeling.ties import is_table, replace_table, scale_of, tied_readers

TableKind = Literal["int8", "int4"]


def cast_floats(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Gives the float tensors of a model another dtype in place.

    Scales of what is quantized keep theirs, and so what they mean; so does what no file holds, such as the frequencies
    of rotary positions.
    """
    for module in model.modules():
        tensors: dict[str, torch.Tensor] = dict(module.named_parameters(recurse=False))
        stored = {name: each for name, each in module.named_buffers(recurse=False)}
        if isinstance(module, (PackedLinear, TorchAOLinear, QuantizedEmbedding)):
            stored = {"weight": module.weight}  # says what is computed in
        tensors |= {name: each for name, each in stored.items() if name not in module._non_persistent_buffers_set}
        for tensor in tensors.values():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)


def plan_tables(model: PreTrainedModel, kind: TableKind | None, group_size: int | None) -> dict[str, tuple[Bits, int]]:
    """Returns bits and group size of every table that can be quantized, by path; those that are already are left out.

    Args:
        model: The model.
        kind: `int8` or `int4`; None for no table at all.
        group_size: How many neighbours in a row share a scale; None for a whole row of 8-bit numbers and 32 of
            4-bit ones.

    Raises:
        CompressionError: A table does more than look up, is tied to other modules than its class says, or its width
            is not divided by the group.
    """
    if kind is None:
        return {}
    base = base_model(model)
    bits: Bits = 8 if kind == "int8" else 4
    tables: dict[str, tuple[Bits, int]] = {}
    readers: list[Any] = []
    for path in embedding_paths(model):
        table: Any = base.get_submodule(path)
        if isinstance(table, TiedLookup) or any(table is reader for reader in readers):
            continue  # BART lists the decoder's table too, which reads the shared one
        if isinstance(table, LowRankEmbedding):
            path, table = f"{path}.table", table.table
        elif not isinstance(table, QuantizedEmbedding):
            if not is_table(table):
                raise CompressionError(
                    f"{path} is a {type(table).__name__}, which does more than look up", hint="Set embeddings: null."
                )
            readers += tied_readers(model, path).values()  # refuses ties that could not be kept
        if isinstance(table, QuantizedEmbedding):
            continue
        width = table.embedding_dim
        size = group_size or (width if bits == 8 or width % 32 else 32)
        if width % size or (bits == 4 and width % 2):
            raise CompressionError(f"embedding_group_size must divide {width}, the width of {path}, not be {size}")
        tables[path] = (bits, size)
    return tables


def quantize_tables(model: PreTrainedModel, plan: dict[str, tuple[Bits, int]]) -> None:
    """Replaces tables as `plan_tables` says; the caller ends with `commit(model)`."""
    for path, (bits, size) in plan.items():
        table: Any = base_model(model).get_submodule(path)
        form: dict[str, Any] = {"bits": bits, "group_size": size, "scale": scale_of(table)}
        replace_table(model, path, QuantizedEmbedding.from_float(table, **form))
