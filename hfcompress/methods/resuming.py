"""Training checkpoints that are whole or not there: staged, listed with digests, and checked before use."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel

from hfcompress.errors import CheckpointError

MANIFEST = "hfcompress_manifest.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def digest(file: Path) -> str:
    """Returns a file's sha256 in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(checkpoint: Path) -> None:
    """Lists every file of a checkpoint with its digest; written last, it marks the checkpoint whole."""
    files = sorted(file for file in checkpoint.iterdir() if file.is_file() and file.name != MANIFEST)
    text = json.dumps({file.name: digest(file) for file in files}, indent=2)
    partial = checkpoint / f".{MANIFEST}"
    partial.write_text(text)
    os.replace(partial, checkpoint / MANIFEST)


def damage(checkpoint: Path) -> str | None:
    """Says what is wrong with a training checkpoint, or None where it is whole."""
    try:
        listed = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"it has no readable {MANIFEST}, which is written last"
    for name, expected in listed.items():
        file = checkpoint / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            return f"{name} is missing"
        if digest(file) != expected:
            return f"{name} is not what was written"
    return None


def last_whole_checkpoint(folder: Path) -> Path | None:
    """Returns the newest whole training checkpoint of a run, or None; damaged ones are passed over."""
    if not folder.is_dir():
        return None
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := _CHECKPOINT.fullmatch(path.name))]
    return next((path for _, path in sorted(found, reverse=True) if damage(path) is None), None)


def require_whole(checkpoint: Path) -> None:
    """Refuses a training checkpoint that is not whole, or not ours.

    Raises:
        CheckpointError: Says which file is wrong.
    """
    wrong = damage(checkpoint)
    if wrong is not None:
        raise CheckpointError(
            f"{checkpoint} cannot be resumed from: {wrong}",
            hint="Resume from an earlier checkpoint of the run, or start it again in an empty folder.",
        )


def require_same_shape(checkpoint: Path, model: PreTrainedModel) -> None:
    """Refuses weights whose names or shapes are not the model's.

    Trainer loads with `strict=False`: a dense model resumed from a factorised checkpoint, or the other way
    round, would keep the weights it happens to have, without a word.

    Raises:
        CheckpointError: Names the first tensor that differs.
    """
    stored: dict[str, tuple[int, ...]] = {}
    for file in checkpoint.glob("model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    if not stored:
        return  # adapters and sharded states have loaders of their own, which are strict
    live = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name in sorted((set(live) | set(stored)) - tied):
        if live.get(name) != stored.get(name):
            raise CheckpointError(
                f"{checkpoint} holds another structure than the model: {name} is {stored.get(name, 'absent')} in the "
                f"file and {live.get(name, 'absent')} in the model",
                hint="Load the model with from_pretrained from that checkpoint before training goes on.",
            )
