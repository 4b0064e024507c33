"""Which files a checkpoint folder may be loaded from: its own, and nothing that a text in it points elsewhere."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfcompress.errors import CheckpointError
from hfcompress.modeling.headers import Header

_HINT = "Copy the files that belong to the checkpoint into its folder."

# transformers lets these texts choose code, or files and repositories to take weights or kernels from.
# A compressed checkpoint never needs one.
REFUSED_KEYS = frozenset(
    {
        "auto_map",
        "custom_pipelines",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "experts_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "kernel_config",
        "use_kernels",
        "fusion_config",
        "distributed_config",
        "transformers_weights",
        "configuration_files",
        "per_layer_config",
    }
)


def require_inside(file: Path, folder: Path) -> None:
    """Refuses a file that is not a regular file of the folder.

    The links of a Hub snapshot into its own repository's `blobs` are fine.

    Args:
        file: The file; it is not opened.
        folder: The folder that it must be in.

    Raises:
        CheckpointError: The file is missing, leaves the folder, or is no regular file.
    """
    home = Path(os.path.realpath(folder))
    real = Path(os.path.realpath(file))
    if not real.is_relative_to(home) and not (file.is_symlink() and real.parent == _blobs(folder)):
        raise CheckpointError(f"{file.name} leads out of the checkpoint's folder, to {real}", hint=_HINT)
    try:
        mode = real.stat().st_mode
    except OSError as error:
        raise CheckpointError(f"{file.name} is missing from the checkpoint") from error
    if not stat.S_ISREG(mode):
        raise CheckpointError(f"{file.name} is no regular file", hint=_HINT)


def _blobs(folder: Path) -> Path | None:
    """Returns where the links of a Hub snapshot lead, or None for a folder that is none."""
    absolute = Path(os.path.abspath(folder))
    for parent in (absolute, *absolute.parents):
        if parent.parent.name == "snapshots":
            return Path(os.path.realpath(parent.parent.parent / "blobs"))
    return None


def inspect_weight_paths(files: Sequence[str], name_or_path: str) -> Path:
    """Refuses weight files that a checkpoint's index led elsewhere; opens none of them.

    Args:
        files: The files that transformers is about to read.
        name_or_path: What `from_pretrained` was given.

    Returns:
        The folder that all of them are in.

    Raises:
        CheckpointError: A file is no safetensors file, is outside of the folder, or is shared with another place.
    """
    paths = [Path(file) for file in files]
    for file, path in zip(files, paths, strict=True):
        if path.suffix != ".safetensors":
            raise CheckpointError(
                f"{path.name} is no safetensors file; hfcompress loads nothing else", hint="Save the model again."
            )
        if ".." in Path(file.removeprefix(name_or_path)).parts:
            raise CheckpointError(f"the checkpoint's index leads out of its folder: {path}", hint=_HINT)
    folder = paths[0].parent
    local = os.path.isdir(name_or_path)
    for path in paths:
        if path.parent != folder or (local and not path.is_relative_to(name_or_path)):
            raise CheckpointError(f"the checkpoint's index leads out of its folder: {path}", hint=_HINT)
        require_inside(path, folder)
        if len(paths) > 1 and not path.is_symlink() and path.stat().st_nlink > 1:
            raise CheckpointError(f"{path.name} is a hard link to a file of another place", hint=_HINT)
    return folder


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: The file holds none.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file.name} must hold an object, not a {type(value).__name__}")
    return value


def inspect_texts(folder: Path) -> None:
    """Refuses config files that are links out of the folder, or choose code, files or repositories.

    Raises:
        CheckpointError: Names the file and the key.
    """
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        file = folder / name
        if not os.path.lexists(file):
            continue
        require_inside(file, folder)
        _refuse_keys(read_json(file), name)


def _refuse_keys(values: Any, where: str) -> None:
    if isinstance(values, Mapping):
        for key, value in values.items():
            if key in REFUSED_KEYS and value is not None:
                raise CheckpointError(
                    f"{where}: '{key}' is not allowed in a compressed checkpoint: it could choose what is run",
                    hint="Remove it; choose attention and kernels after loading: model.set_attn_implementation(...).",
                )
            _refuse_keys(value, where)
    elif isinstance(values, list):
        for value in values:
            _refuse_keys(value, where)


def weight_files(folder: Path) -> list[Path]:
    """Returns the weight files of a checkpoint folder, each of them inside it.

    Raises:
        CheckpointError: There is none, or the index names one that is missing or elsewhere.
    """
    single = folder / "model.safetensors"
    if os.path.lexists(single):
        require_inside(single, folder)
        return [single]
    index = folder / "model.safetensors.index.json"
    if not os.path.lexists(index):
        raise CheckpointError(
            f"{folder} holds neither {single.name} nor {index.name}",
            hint="hfcompress reads nothing but safetensors files.",
        )
    require_inside(index, folder)
    names = sorted(set(_weight_map(index).values()))
    inspect_weight_paths([f"{folder}/{name}" for name in names], str(folder))
    return [folder / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) and name for name in weight_map.values())
    ):
        raise CheckpointError(f"{index.name}: weight_map must say for each tensor which file holds it")
    return weight_map


def inspect_index(folder: Path, headers: Sequence[Header]) -> None:
    """Refuses shards that do not hold what the index says, swapped ones for example.

    Raises:
        CheckpointError: Names a tensor and the shard.
    """
    names = {header.file.name for header in headers}
    for index in sorted(folder.glob("*.safetensors.index*.json")):
        require_inside(index, folder)
        weight_map = _weight_map(index)
        if set(weight_map.values()) != names:
            continue  # of another variant
        for header in headers:
            said = {name for name, file in weight_map.items() if file == header.file.name}
            for name in sorted(said ^ set(header.tensors)):
                raise CheckpointError(f"{header.file.name} and {index.name} disagree about '{name}'")
