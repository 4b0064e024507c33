"""What a stored intermediate result was made from, in one number: it is used again for the very same only."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError

# Where it comes from, who wrote it, and what a first forward pass with labels sets.
_NOT_THE_MODEL = ("_name_or_path", "transformers_version", "problem_type")


def model_digest(model: PreTrainedModel) -> str:
    """Returns a digest of a live model's class, config and weights, whatever their precision."""
    hasher = hashlib.sha256()
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_THE_MODEL}
    hasher.update(json.dumps([type(model).__name__, config], sort_keys=True, default=str).encode())
    for name, value in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        feed(hasher, value)
    for name, module in model.named_modules():
        chosen: Any = getattr(module, "active_adapters", None)
        if isinstance(chosen, list | tuple):  # PEFT's layers hold several adapters, and use some, by a factor
            layer: Any = module
            feed(hasher, [name, list(chosen), bool(layer.disable_adapters), getattr(layer, "scaling", None)])
    return hasher.hexdigest()


def feed(hasher: Any, value: Any) -> None:
    """Takes a tensor with its type and shape, or any JSON-like value, into a `hashlib` hasher."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        hasher.update(f"{value.dtype}{tuple(value.shape)}".encode())
        hasher.update(flat.view(torch.uint8).numpy().data)
    else:
        hasher.update(json.dumps(value, default=_plain).encode())


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if hasattr(value, "tobytes"):  # an image
        return [type(value).__name__, getattr(value, "mode", None), getattr(value, "size", None), _of(value.tobytes())]
    if isinstance(value, bytes):
        return _of(value)
    text = repr(value)
    if " at 0x" in text:  # where it lies in memory, which is elsewhere the next time
        raise CompressionError(
            f"{text} cannot be told from others of its kind, so that what is computed from it cannot be kept",
            hint="Set cache: false, or turn it into numbers before.",
        )
    return text


def _of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
