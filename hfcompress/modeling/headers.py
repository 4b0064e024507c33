"""The headers of safetensors files, read without reading a weight."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfcompress.errors import CheckpointError

# The format's own limit.
_MOST_HEADER_BYTES = 100_000_000
_ENTRY = {"dtype", "shape", "data_offsets"}
_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True)
class Entry:
    """Where and what a tensor is.

    Attributes:
        dtype: As the format spells it (`F32`).
        shape: The tensor's shape.
        start: First byte in the file.
        end: One after the last byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says about itself.

    Attributes:
        file: The file.
        tensors: Its tensors by name.
        metadata: Its texts by name.
    """

    file: Path
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]


def read_header(file: Path) -> Header:
    """Reads and checks the header of a safetensors file.

    Raises:
        CheckpointError: The file is not whole: its header is damaged, or does not account for every byte.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8).ljust(8, b"\xff"))
            if size < 8 or length > min(_MOST_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{file.name}: the file is cut short, or no safetensors file")
            raw = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"{file.name} cannot be read: {error.strerror}") from error
    try:
        # The format pads with spaces and has each name once.
        if raw[:1] != b"{" or raw.rstrip(b" ")[-1:] != b"}":
            raise ValueError("no JSON object")
        values: dict[str, Any] = json.loads(raw.decode("utf-8"), object_pairs_hook=_without_duplicates)
        metadata = values.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(each, str) for each in metadata.values()):
            raise ValueError("__metadata__ must hold texts")
        begin = 8 + length
        tensors = {name: _entry(name, value, begin) for name, value in values.items()}
        _require_gapless(tensors, begin, size)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file.name}: the header is damaged: {error}") from None
    return Header(file, tensors, metadata)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a name occurs twice")
    return values


def _entry(name: str, value: Any, begin: int) -> Entry:
    if not isinstance(value, dict) or value.keys() != _ENTRY:
        raise ValueError(f"{name} must hold dtype, shape and data_offsets")
    shape, offsets = value["shape"], value["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [-1]
    if len(numbers) != len(shape) + 2 or any(type(each) is not int or not 0 <= each < 2**63 for each in numbers):
        raise ValueError(f"{name} has a shape or offsets that are no sizes")
    if value["dtype"] not in _BITS:
        raise ValueError(f"{name} has the unknown dtype {value['dtype']!r}")
    count = 1
    for each in shape:
        count *= each
    start, end = offsets
    if (end - start) * 8 != count * _BITS[value["dtype"]]:
        raise ValueError(f"{name} says {value['dtype']} {shape} but has {end - start} bytes")
    return Entry(value["dtype"], tuple(shape), begin + start, begin + end)


def _require_gapless(tensors: Mapping[str, Entry], begin: int, size: int) -> None:
    at = begin
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != at:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        at = entry.end
    if at != size:
        raise ValueError(f"it accounts for {at} bytes of {size}")
