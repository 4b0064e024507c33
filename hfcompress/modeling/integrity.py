"""The seal of a checkpoint: digests of its tensors, and what its config must say, kept beside the weights.

Every save of ours writes the seal into the metadata of the safetensors files, where nothing but a new save changes
it. Loading compares all that costs no reading of weights: names, dtypes, shapes, the structure, the stock numbers.
`verify_files` reads everything and compares the digests as well.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from hfcompress.errors import CheckpointError
from hfcompress.modeling.headers import Header, read_header
from hfcompress.modeling.placement import inspect_index, inspect_texts, weight_files

KEY = "hfcompress"
DIGEST_KEY = f"{KEY}.sha256"  # of the seal itself
VERSION = 1

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# What a caller of from_pretrained may choose anew; all other numbers of a config belong to the weights.
_FREE = re.compile(
    r"drop|_token_id$|token_ids|label|initializer|^mask_|_loss|loss_|^output_|chunk_size|problem_type|version|"
    r"use_cache|gradient|num_beams|max_length|temperature|^top_|penalty|_coef$|begin_suppress|suppress|classifier_"
)
_NAMES_A_FUNCTION = re.compile(r"(^|_)(act|activation|activation_function)$|position_embedding|_proj$")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with a checkpoint's files.

    Attributes:
        file: The file's name in its folder.
        message: What is wrong with it.
        tensor: The damaged tensor, where one can be named.
    """

    file: str
    message: str
    tensor: str | None = None

    def __str__(self) -> str:
        where = f"{self.file}: {self.tensor}" if self.tensor else self.file
        return f"{where}: {self.message}"


def digest_tensor(tensor: torch.Tensor) -> str:
    """Returns the sha256 of a tensor's bytes as safetensors stores them, in hexadecimal."""
    if tensor.numel() == 0:
        return hashlib.sha256().hexdigest()
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def stock_numbers(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the values of a config that its weights depend on, by name (`part.name` in a nested config).

    Left out are those that may change from one use of the weights to the next: dropout, labels, special tokens.
    """
    found: dict[str, Any] = {}
    _collect(config.to_dict(), "", found)
    return found


def _collect(values: Mapping[str, Any], prefix: str, found: dict[str, Any]) -> None:
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name in ("quantization_config", "architectures") or _FREE.search(name):
            continue
        if isinstance(value, Mapping):
            _collect(value, f"{key}.", found)
        elif (isinstance(value, (int, float)) and not isinstance(value, bool)) or (
            isinstance(value, str) and (name == "model_type" or _NAMES_A_FUNCTION.search(name))
        ):
            found[key] = value
        elif isinstance(value, (list, tuple)) and all(isinstance(each, (int, float, str)) for each in value):
            found[key] = list(value)


def make_seal(
    tensors: Mapping[str, torch.Tensor], config: PreTrainedConfig, structure: Mapping[str, Any] | None
) -> dict[str, str]:
    """Makes the metadata that seals a checkpoint.

    Args:
        tensors: What will be written, by the names in the files.
        config: The model's config as it will be written.
        structure: What the config says about the compressed structure, or None for an ordinary checkpoint.
    """
    record = {
        "version": VERSION,
        "config": stock_numbers(config),
        "structure": _fingerprint(structure),
        "tensors": {
            name: [_DTYPES.get(tensor.dtype, str(tensor.dtype)), list(tensor.shape), digest_tensor(tensor)]
            for name, tensor in sorted(tensors.items())
        },
    }
    text = json.dumps(record, separators=(",", ":"))
    return {KEY: text, DIGEST_KEY: hashlib.sha256(text.encode()).hexdigest()}


def _fingerprint(structure: Mapping[str, Any] | None) -> str | None:
    if structure is None:
        return None
    return hashlib.sha256(json.dumps(structure, sort_keys=True).encode()).hexdigest()


def read_seal(headers: Iterable[Header]) -> dict[str, Any] | None:
    """Returns the seal that all files of a checkpoint carry, or None where none has one.

    Raises:
        CheckpointError: It is damaged, or differs from file to file.
    """
    found = {(header.metadata.get(KEY), header.metadata.get(DIGEST_KEY)) for header in headers}
    if found == {(None, None)}:
        return None
    if len(found) > 1:
        raise CheckpointError("the shards were not saved together: their seals differ")
    text, digest = found.pop()
    try:
        if text is None or hashlib.sha256(text.encode()).hexdigest() != digest:
            raise ValueError("not what was written")
        seal = json.loads(text)
        well_formed = isinstance(seal["config"], dict) and all(
            isinstance(name, str) and len(entry) == 3 and re.fullmatch(r"[0-9a-f]{64}", entry[2])
            for name, entry in seal["tensors"].items()
        )
        version = seal["version"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        well_formed, version = False, VERSION
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"the files carry a seal of version {version}, this hfcompress reads up to {VERSION}",
            hint="pip install --upgrade hfcompress",
        )
    if not well_formed or version != VERSION:
        raise CheckpointError("the seal in the safetensors metadata is damaged")
    return seal


def compare_layout(seal: Mapping[str, Any], headers: Iterable[Header]) -> list[Finding]:
    """Compares names, dtypes and shapes with the seal; reads no weights."""
    findings: list[Finding] = []
    missing = dict(seal["tensors"])
    for header in headers:
        for name, entry in header.tensors.items():
            sealed = missing.pop(name, None)
            if sealed is None:
                findings.append(Finding(header.file.name, "is not one of the tensors that were saved", name))
            elif [entry.dtype, list(entry.shape)] != sealed[:2]:
                findings.append(
                    Finding(
                        header.file.name,
                        f"is {entry.dtype} {list(entry.shape)}, was saved as {sealed[0]} {sealed[1]}",
                        name,
                    )
                )
    findings += [Finding("*.safetensors", "is missing", name) for name in missing]
    return findings


def compare_config(
    seal: Mapping[str, Any], config: PreTrainedConfig, structure: Mapping[str, Any] | None
) -> list[Finding]:
    """Compares a config's structure and stock numbers with the seal.

    The config may also be a part of the one that was saved: the text half of a larger model.
    """
    sealed, live = seal["config"], stock_numbers(config)
    prefixes = [key.removesuffix("model_type") for key in sealed if key.rpartition(".")[2] == "model_type"]
    fitting = [each for each in sorted(prefixes, key=len) if sealed[f"{each}model_type"] == live["model_type"]]
    prefix = next(iter(fitting), None)
    if prefix is None:
        return [Finding("config.json", f"model_type is '{live['model_type']}', was '{sealed.get('model_type')}'")]
    findings = [
        Finding("config.json", f"{name} is {live[name]!r}, the weights were saved with {sealed[prefix + name]!r}")
        for name in live
        if prefix + name in sealed and not _same(live[name], sealed[prefix + name])
    ]
    if not prefix and seal.get("structure") != _fingerprint(structure):
        findings.append(Finding("config.json", "the structure is not the one that the weights were saved with"))
    return findings


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def verify_files(directory: Path | str) -> list[Finding]:
    """Reads a checkpoint's files through and compares them with what was saved.

    Weights are streamed, not loaded: memory stays flat whatever their size. Any checkpoint can be checked for links
    and indexes that leave its folder; tensors and config only where hfcompress saved it.

    Args:
        directory: A checkpoint folder.

    Returns:
        What is wrong, empty where everything is as it was saved. A checkpoint without a seal is one finding.

    Raises:
        CheckpointError: The folder holds no checkpoint.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is no folder", hint="Give the folder that holds config.json.")
    try:
        inspect_texts(directory)
        files = weight_files(directory)
        headers = [read_header(file) for file in files]
        inspect_index(directory, headers)
        seal = read_seal(headers)
    except CheckpointError as error:
        return [Finding(directory.name, error.message)]
    if seal is None:
        return [Finding(files[0].name, "carries no digests, so that nothing can be compared")]
    findings = compare_layout(seal, headers)
    comparable = set(seal["tensors"]) - {finding.tensor for finding in findings}
    for header in headers:
        findings += _compare_digests(seal, header, comparable)
    return findings + _compare_written_config(seal, directory)


def require_undamaged(directory: Path | str) -> None:
    """Holds a checkpoint that was fetched to its digests; one that hfcompress did not write has none to be held to.

    Raises:
        CheckpointError: A file is not what was saved.
    """
    directory = Path(directory)
    if read_seal([read_header(file) for file in weight_files(directory)]) is None:
        return
    findings = verify_files(directory)
    if findings:
        raise CheckpointError(
            f"the checkpoint is not what was saved: {findings[0]}",
            hint=f"Remove {directory} and fetch it again; if it stays so, what was published is damaged.",
        )


def _compare_digests(seal: Mapping[str, Any], header: Header, comparable: set[str]) -> list[Finding]:
    findings: list[Finding] = []
    chunk = memoryview(bytearray(1 << 20))  # reading is faster here than mapping: no page faults
    with header.file.open("rb", buffering=0) as stream:
        for name, entry in sorted(header.tensors.items(), key=lambda item: item[1].start):
            if name not in comparable:
                continue
            stream.seek(entry.start)
            digest, left = hashlib.sha256(), entry.end - entry.start
            while left and (count := stream.readinto(chunk[: min(left, len(chunk))])):
                digest.update(chunk[:count])
                left -= count
            if digest.hexdigest() != seal["tensors"][name][2]:
                findings.append(Finding(header.file.name, "is not what was saved", name))
    return findings


def _compare_written_config(seal: Mapping[str, Any], directory: Path) -> list[Finding]:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        said = getattr(config, "quantization_config", None)
        structure = said.get("structure") if isinstance(said, Mapping) and said.get("quant_method") == KEY else None
        return compare_config(seal, config, structure)
    except Exception as error:  # a damaged config can fail anywhere in transformers' config classes
        return [Finding("config.json", f"cannot be read: {error}")]
