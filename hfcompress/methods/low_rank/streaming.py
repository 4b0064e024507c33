"""Factorises a checkpoint that is larger than memory, one matrix at a time.

The weights are mapped from their files and the factors are put into files of their own and mapped as well, so that
only the matrix at hand is in memory.
"""

from __future__ import annotations

import ctypes
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from hfcompress.errors import CheckpointError, CompressionError, RunFolderError
from hfcompress.methods.low_rank.config import LowRankConfig
from hfcompress.methods.low_rank.embeddings import factorize_table, token_table
from hfcompress.methods.low_rank.fitting import Knowledge
from hfcompress.methods.low_rank.method import by_layer, choose_ranks, factorize_group, float_layers, groups_of
from hfcompress.modeling.anatomy import module_at
from hfcompress.modeling.checkpoint import commit, save
from hfcompress.modeling.densify import Companions
from hfcompress.modeling.headers import read_header
from hfcompress.modeling.layers.low_rank import LowRankLinear
from hfcompress.modeling.placement import inspect_texts, weight_files

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_STOCK = "Load it with from_pretrained and save it again, or compress it in memory."


def stream_factorize(
    source: Path | str, out: Path | str, config: LowRankConfig, *, max_shard_size: str = "2GB", progress: bool = True
) -> dict[str, Any]:
    """Factorises a checkpoint on disk; the result is the one that doing it in memory would save.

    Args:
        source: A checkpoint of a stock model in safetensors files, one or many. It is only read.
        out: Where the result goes; must not exist, or be empty. The files of the tokenizer are copied.
        config: With method `svd` (which `auto` is here) or `nmf`, and `keep`, `rank` or `energy`.
        max_shard_size: As `save_pretrained` takes it.
        progress: Whether to show a bar.

    Returns:
        What `low_rank` returns.

    Raises:
        CheckpointError: The source is not whole, is compressed already, or has other tensors than its class.
        CompressionError: The config needs calibration data, or a matrix is not finite (it is named).
        RunFolderError: `out` holds something.
    """
    source, out = Path(source), Path(out)
    if needed := _needs_data(config):
        raise CompressionError(
            f"{needed} needs calibration data, which a checkpoint on disk is not run on",
            hint="Use method svd or nmf with keep, rank or energy.",
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} is not empty", hint="Choose a new folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    return _factorize(mapped_model(source), source, out, config, max_shard_size, progress)


def stream_step(source: Path, out: Path, config: LowRankConfig, progress: bool) -> dict[str, Any] | None:
    """Does a recipe's step on disk; returns None where the config needs data, or the source is not a stock checkpoint.

    Raises:
        CompressionError: A matrix is not finite (it is named).
    """
    if config.method == "auto" or _needs_data(config):
        return None
    try:
        model = mapped_model(source)
    except CheckpointError:  # compressed already, or its tensors have other names than the class: it is loaded whole
        return None
    return _factorize(model, source, out, config, "2GB", progress)


def _factorize(
    model: PreTrainedModel, source: Path, out: Path, config: LowRankConfig, max_shard_size: str, progress: bool
) -> dict[str, Any]:
    if config.embeddings is not None:
        token_table(model)
    knowledge = Knowledge(method="nmf" if config.method == "nmf" else "svd")
    layers, _ = float_layers(model, config)
    groups = groups_of(model, layers, config)
    ranks, _ = choose_ranks(model, groups, config, knowledge, ())
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.factors-", dir=out.parent))
    try:
        plan = {group: rank for group in groups if (rank := ranks[group.name]) is not None}
        for number, (group, rank) in enumerate(tqdm(plan.items(), desc="factorizing", disable=not progress)):
            factorize_group(model, group, rank, config, knowledge)
            for member, path in enumerate(group.paths):
                _spill(module_at(model, path), scratch / f"{number}-{member}.safetensors")
            _give_back_memory()
        table = {} if config.embeddings is None else factorize_table(model, config.embeddings, config.multiple_of)
        commit(model)
        save(model, out, tokenizer=Companions(source), max_shard_size=max_shard_size)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    whole = [path for group in groups if group not in plan for path in group.paths]
    findings = {"method": knowledge.method, "ranks": by_layer(plan), "left_whole": whole}
    return findings | ({"embeddings": table} if table else {})


def _needs_data(config: LowRankConfig) -> str:
    """Returns what in a config needs calibration data; empty where nothing does."""
    fitted = [name for name in ("sequential", "refit", "correct_bias") if getattr(config, name)]
    if config.method in ("whitened", "fisher"):
        fitted.append(f"method {config.method}")
    if config.budget is not None:
        fitted.append("budget")
    return next(iter(fitted), "")


def mapped_model(folder: Path) -> PreTrainedModel:
    """Makes the stock model of a checkpoint, with parameters that lie in its files.

    Raises:
        CheckpointError: The checkpoint is compressed, or its tensors are not those of its class.
    """
    inspect_texts(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointError(f"{folder} is compressed already", hint="Start from the stock checkpoint.")
    model = _empty(config)
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        tensors |= _mapped(file)
    found = model.load_state_dict(tensors, strict=False, assign=True)
    if found.unexpected_keys:
        raise CheckpointError(f"{type(model).__name__} has no tensor '{found.unexpected_keys[0]}'", hint=_STOCK)
    model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.device.type == "meta"]
    if missing:
        raise CheckpointError(f"the checkpoint has no tensor '{missing[0]}'", hint=_STOCK)
    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _empty(config: Any) -> PreTrainedModel:
    import transformers

    name = str((config.architectures or [None])[0])
    made = getattr(transformers, name, None)
    if not (isinstance(made, type) and issubclass(made, PreTrainedModel)):
        raise CheckpointError(f"config.json: architectures names no model class of transformers: '{name}'")
    with torch.device("meta"):
        return made(config)


def _give_back_memory() -> None:
    """Returns freed memory to the system: glibc keeps it, and a few small blocks pin all that lies below them."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _mapped(file: Path) -> dict[str, torch.Tensor]:
    """Maps each tensor of a file by itself: what shares one mapping would be saved into one shard."""
    tensors: dict[str, torch.Tensor] = {}
    for name, entry in read_header(file).tensors.items():
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise CheckpointError(f"{file.name}: '{name}' is of type {entry.dtype}, which is not supported")
        if entry.end == entry.start:
            tensors[name] = torch.empty(entry.shape, dtype=dtype)
            continue
        raw = np.memmap(file, np.uint8, mode="c", offset=entry.start, shape=(entry.end - entry.start,))
        if entry.start % dtype.itemsize:  # no tensor may begin in the middle of a number
            raw = raw.copy()
        tensors[name] = torch.from_numpy(raw).view(dtype).view(entry.shape)
    return tensors


def _spill(module: nn.Module, file: Path) -> None:
    """Puts factors into a file and maps them from there."""
    assert isinstance(module, LowRankLinear)
    factors: dict[str, nn.Linear] = {name: getattr(module, name) for name in module.own_factors}
    save_file({name: factor.weight.detach() for name, factor in factors.items()}, file)
    mapped = _mapped(file)
    for name, factor in factors.items():
        factor.weight = nn.Parameter(mapped[name], requires_grad=factor.weight.requires_grad)
