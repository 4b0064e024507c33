"""What a model weighs: parameters, and bytes as counted on disk."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from hfcompress.modeling.layers.bitsandbytes import kind_of
from hfcompress.modeling.layers.quantized_embedding import QuantizedEmbedding


def count_parameters(model: nn.Module) -> int:
    """Counts the numbers that a model holds, however few bits each takes; shared ones once."""
    total = 0
    for module in model.modules():
        # gptqmodel's layers have no kind of ours, and keep their weights in buffers.
        if kind_of(module) is not None or "qweight" in module._buffers:
            total += int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
        if isinstance(module, QuantizedEmbedding):
            total += module.num_embeddings * module.embedding_dim
    packed = {id(module.weight) for module in model.modules() if kind_of(module) is not None}
    return total + sum(p.numel() for p in model.parameters() if id(p) not in packed)


def weight_bytes(directory: Path) -> int:
    """Counts the bytes of a checkpoint's weight files on disk."""
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def tensor_bytes(model: nn.Module) -> int:
    """Counts the bytes of the tensors that a checkpoint of the model holds; shared ones once."""
    tensors = {id(each): each for each in model.state_dict(keep_vars=True).values()}
    return sum(each.numel() * each.element_size() for each in tensors.values())
