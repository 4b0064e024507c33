"""Writing checkpoints: sealed by every save of a compressed model, and there whole or not at all."""

from __future__ import annotations

import ctypes
import functools
import inspect
import json
import os
import shutil
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers.base import HfQuantizer

from hfcompress.errors import CheckpointError
from hfcompress.modeling.adapters import adapted_layers, without_adapters
from hfcompress.modeling.integrity import make_seal
from hfcompress.modeling.layers.bitsandbytes import settle_all

_METHOD = "save_pretrained"


class _Sealer(HfQuantizer):
    """Stands in as the model's quantizer for one save: transformers asks it for the files' metadata."""

    def __init__(self, state_dict: Mapping[str, Any] | None, original_format: bool) -> None:
        self.state_dict = state_dict
        self.original_format = original_format

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[Any, dict[str, str]]:
        state_dict = model.state_dict() if self.state_dict is None else self.state_dict
        plain = all(
            isinstance(each, torch.Tensor) and not isinstance(each, DTensor) and each.device.type != "meta"
            for each in state_dict.values()
        )
        if not plain:  # offloaded or spread over processes: nobody here holds the values
            return state_dict, {}
        ignored = set(model._keys_to_ignore_on_save or ())
        written = {name: tensor for name, tensor in state_dict.items() if name not in ignored}
        written = remove_tied_weights_from_state_dict(written, model)
        if self.original_format:
            written = revert_weight_conversion(model, written)
        said = getattr(model.config, "quantization_config", None)
        structure = getattr(said, "structure", None)
        return state_dict, make_seal(written, model.config, structure)


def save_sealed(model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
    """Does what the model's stock `save_pretrained` does, and seals the weight files.

    Raises:
        CompressionError: A forward has changed 4-bit weights in a way that cannot be undone.
    """
    stock = getattr(type(model), _METHOD)
    asked = inspect.signature(stock).bind(model, *args, **kwargs)
    asked.apply_defaults()
    wanted = asked.arguments
    settle_all(model)
    forget_reading(model)
    adapters_only = getattr(model, "_hf_peft_config_loaded", False)
    if adapters_only or wanted["distributed_checkpoint"] or not wanted["is_main_process"]:
        stock(model, *args, **kwargs)
        return
    before = vars(model).get("hf_quantizer")
    vars(model)["hf_quantizer"] = _Sealer(wanted["state_dict"], wanted["save_original_format"])
    try:
        stock(model, *args, **kwargs)
    finally:
        del vars(model)["hf_quantizer"]
        if before is not None:
            vars(model)["hf_quantizer"] = before
    for file in Path(wanted["save_directory"]).glob("model*.safetensors"):
        _sort_metadata(file)


def _sort_metadata(file: Path) -> None:
    """Gives a file the same bytes whenever it holds the same: safetensors writes its metadata in any order."""
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        metadata = header.get("__metadata__", {})
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(metadata) > 1 and len(text) <= length:
            stream.seek(8)
            stream.write(text.ljust(length))


def forget_reading(model: PreTrainedModel) -> None:
    """Drops what only reading needed: the stored parts of a quantized weight are written as they are.

    transformers keeps these conversions and cannot undo them, so that even bitsandbytes models that it loaded
    itself could not be saved again.
    """
    conversions = vars(model).get("_weight_conversions")
    if conversions:
        vars(model)["_weight_conversions"] = [
            each
            for each in conversions
            if not any(getattr(operation, "hf_quantizer", None) for operation in getattr(each, "operations", ()))
        ]


def seal_when_saved(model: PreTrainedModel) -> None:
    """Makes plain `model.save_pretrained(...)` seal what it writes.

    It is set on the one model, not on its class. Copies and pickles of the model get a method of their own, for
    `partial` takes the model along.
    """
    vars(model)[_METHOD] = functools.partial(save_sealed, model)


def save_as_stock(model: PreTrainedModel) -> None:
    """Gives a model its stock `save_pretrained` back."""
    vars(model).pop(_METHOD, None)


def save(model: PreTrainedModel, directory: Path, *, tokenizer: Any = None, **options: Any) -> None:
    """Saves a checkpoint as a whole or not at all, sealed.

    It is written beside its place and moved there; what was at that place before is replaced only by a whole
    successor. File modes follow the umask.

    Args:
        model: A committed model.
        directory: Where the checkpoint goes.
        tokenizer: Saved along when given.
        options: Handed to `save_pretrained` (`max_shard_size`).

    Raises:
        CheckpointError: The disk is full, or the place cannot be written; what was there before is untouched.
    """
    directory = Path(directory)
    partial = _partial(directory)
    with _cleanly(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        _recover(directory)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with without_adapters(model):
                save_sealed(model, partial, **options)
            if adapted_layers(model):  # in files of their own; transformers puts them on what lies beside them
                save_sealed(model, partial)
            if tokenizer is not None:
                tokenizer.save_pretrained(partial)
            _open_modes(partial)
            replace_directory(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _partial(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.partial")


@contextmanager
def _cleanly(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{directory} could not be written: {error}",
            hint="What was there before is untouched. Free some space or choose another place.",
        ) from error


def replace_directory(new: Path, place: Path) -> None:
    """Moves a finished folder to its place, over what is there.

    Where the system can exchange two folders in one step there is a whole one at the place at every moment;
    elsewhere the next save brings the old one back if this one is killed between its two steps.
    """
    old = _old(place)
    _recover(place)
    shutil.rmtree(old, ignore_errors=True)
    if not place.exists():
        os.rename(new, place)
    elif _exchange(new, place):
        os.rename(new, old)
    else:
        os.rename(place, old)
        os.rename(new, place)
    shutil.rmtree(old, ignore_errors=True)


def _old(place: Path) -> Path:
    return place.with_name(f".{place.name}.old")


def _recover(place: Path) -> None:
    """Ends what a killed replacement began."""
    if not os.path.lexists(place) and _old(place).is_dir():
        os.rename(_old(place), place)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(one), here, os.fsencode(other), swap) == 0


def _open_modes(directory: Path) -> None:
    """Makes files that safetensors made private follow the user's umask."""
    umask = os.umask(0)
    os.umask(umask)
    for file in directory.iterdir():
        file.chmod(0o666 & ~umask)
