"""The mutations: each damages a folder in one way and says how."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from hfcompress.modeling.headers import read_header
from tests.corruption.originals import Original

Mutation = Callable[[Path, Original, random.Random], str]
CLASSES: dict[str, tuple[Mutation, str]] = {}  # with the checkpoints it is for: any, sharded


def mutation(name: str, of: str = "any") -> Callable[[Mutation], Mutation]:
    """Registers a class of mutations."""

    def register(function: Mutation) -> Mutation:
        CLASSES[name] = (function, of)
        return function

    return register


def _weights(folder: Path, rng: random.Random) -> Path:
    return rng.choice(sorted(folder.glob("*.safetensors")))


def _header_length(raw: bytes | bytearray) -> int:
    return struct.unpack("<Q", raw[:8])[0]


@mutation("file cut short")
def _cut(folder: Path, original: Original, rng: random.Random) -> str:
    file = _weights(folder, rng)
    size = file.stat().st_size
    length = rng.choice([rng.randrange(size), rng.randrange(min(size, 40_000)), size - 1 - rng.randrange(64)])
    os.truncate(file, length)
    return f"{file.name} cut to {length} of {size}"


@mutation("bytes appended or inserted")
def _longer(folder: Path, original: Original, rng: random.Random) -> str:
    file = _weights(folder, rng)
    raw = file.read_bytes()
    at = rng.choice([len(raw), rng.randrange(len(raw)), rng.randrange(8 + _header_length(raw))])
    file.write_bytes(raw[:at] + rng.randbytes(rng.randint(1, 64)) + raw[at:])
    return f"{file.name} longer at {at}"


@mutation("bit flipped in the header")
def _header_bit(folder: Path, original: Original, rng: random.Random) -> str:
    return _change_byte(_weights(folder, rng), rng, lambda length: rng.randrange(8 + length), bit=True)


@mutation("byte changed in the header")
def _header_byte(folder: Path, original: Original, rng: random.Random) -> str:
    # The part after the seal: names, dtypes, shapes, offsets.
    return _change_byte(_weights(folder, rng), rng, lambda length: 7 + length - rng.randrange(length // 3), bit=False)


@mutation("byte flipped in the data")
def _data_bit(folder: Path, original: Original, rng: random.Random) -> str:
    file = _weights(folder, rng)
    size = file.stat().st_size
    return _change_byte(file, rng, lambda length: rng.randrange(8 + length, size), bit=True)


def _change_byte(file: Path, rng: random.Random, place: Callable[[int], int], *, bit: bool) -> str:
    raw = bytearray(file.read_bytes())
    at = place(_header_length(raw))
    before = raw[at]
    raw[at] ^= 1 << rng.randrange(8) if bit else rng.randint(1, 255)
    file.write_bytes(raw)
    return f"{file.name} byte {at}: {before:#x} -> {raw[at]:#x}"


@mutation("data overwritten")
def _data_block(folder: Path, original: Original, rng: random.Random) -> str:
    file = _weights(folder, rng)
    raw = bytearray(file.read_bytes())
    begin = 8 + _header_length(raw)
    length = rng.randint(16, 4096)
    at = rng.randrange(begin, len(raw))
    block = raw[at : at + length]
    raw[at : at + length] = bytes(each ^ 0xFF for each in block)
    file.write_bytes(raw)
    return f"{file.name} {len(block)} bytes at {at}"


@mutation("tensors of one header exchanged")
def _exchange(folder: Path, original: Original, rng: random.Random) -> str:
    file = max(folder.glob("*.safetensors"), key=lambda each: len(read_header(each).tensors))
    raw = file.read_bytes()
    length = _header_length(raw)
    header = json.loads(raw[8 : 8 + length])
    names = sorted(name for name in header if name != "__metadata__")
    begin = 8 + length

    def stored(name: str) -> bytes:
        start, end = header[name]["data_offsets"]
        return raw[begin + start : begin + end]

    pairs = [(a, b) for a in names for b in names if a < b and stored(a) != stored(b)]
    alike = [(a, b) for a, b in pairs if header[a]["shape"] == header[b]["shape"]]
    one, other = rng.choice(alike or pairs)
    header[one], header[other] = header[other], header[one]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    file.write_bytes(raw[:8] + text + raw[begin:])
    return f"{one} <-> {other}"


@mutation("shards swapped", "sharded")
def _swap(folder: Path, original: Original, rng: random.Random) -> str:
    one, other = rng.sample(sorted(folder.glob("*.safetensors")), 2)
    one.rename(folder / "x")
    other.rename(one)
    (folder / "x").rename(other)
    return f"{one.name} <-> {other.name}"


@mutation("shard of another checkpoint, or gone", "sharded")
def _foreign(folder: Path, original: Original, rng: random.Random) -> str:
    files = sorted(folder.glob("*.safetensors"))
    file = rng.choice(files)
    way = rng.choice(["foreign", "foreign", "gone", "empty", "copy"])
    if way == "foreign":
        for each in rng.sample(files, rng.randint(1, len(files) - 1)):
            shutil.copy(original.other / each.name, each)
    elif way == "gone":
        file.unlink()
    elif way == "empty":
        file.write_bytes(b"" if rng.random() < 0.5 else struct.pack("<Q", 2) + b"{}")
    else:
        shutil.copy(rng.choice([each for each in files if each != file]), file)
    return f"{way} {file.name}"


@mutation("index edited", "sharded")
def _index(folder: Path, original: Original, rng: random.Random) -> str:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    weight_map = index["weight_map"]
    name = rng.choice(sorted(weight_map))
    way = rng.choice(["other", "drop", "rename", "up", "absolute", "missing", "type", "empty", "cut"])
    shards = sorted(set(weight_map.values()))
    shard = weight_map[name]
    changed: dict[str, Any] = {
        "other": rng.choice([each for each in shards if each != shard]),
        "up": f"../{shard}",
        "absolute": f"/{shard}",
        "missing": f"x{shard}",
        "type": rng.choice([None, 3, [shard], {"a": 1}]),
    }
    if way in changed:
        weight_map[name] = changed[way]
    elif way == "drop":
        del weight_map[name]
    elif way == "rename":
        weight_map[f"{name}x"] = weight_map.pop(name)
    elif way == "empty":
        weight_map.clear()
    text = json.dumps(index)
    file.write_text(text[: rng.randrange(len(text) - 1)] if way == "cut" else text)
    return f"{way} {name}"


@mutation("config.json cut short")
def _config_cut(folder: Path, original: Original, rng: random.Random) -> str:
    file = folder / "config.json"
    text = file.read_text().rstrip()
    length = rng.randrange(len(text))
    file.write_text(text[:length])
    return f"to {length} of {len(text)}"


def _numbers(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _numbers(each, (*path, key))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path


def _set(config: Any, path: tuple[Any, ...], value: Any) -> str:
    for key in path[:-1]:
        config = config[key]
    before = config[path[-1]]
    config[path[-1]] = value
    return f"{'.'.join(map(str, path))}: {before} -> {str(value)[:40]}"


_STRUCTURE = ("quantization_config", "structure")
_STOCK = (
    "hidden_size",
    "num_attention_heads",
    "num_hidden_layers",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "relative_attention_num_buckets",
    "dim",
    "n_heads",
    "n_layers",
    "hidden_dim",
)
_WRONG: dict[str, Callable[[int, random.Random], Any]] = {
    "negative": lambda number, rng: -rng.choice([1, 2, number, 10**6, 2**40]),
    "zero": lambda number, rng: rng.choice([0, -0.0, 0.0, False]),
    "huge": lambda number, rng: rng.choice([10**6, 10**7, 2**31, 2**40, 2**63, 10**30]) + rng.randrange(1000),
    "another": lambda number, rng: (
        number + rng.choice([each for each in (-3, -2, -1, 1, 2, 3, 5, 7, number, 3 * number) if number + each > 0])
    ),
    "of wrong type": lambda number, rng: rng.choice(
        [str(number), number + 0.5, float(number), None, True, [number], [number] * 3, {"a": number}, "x", [], {}]
    ),
}


def _register_numbers(where: str, kind: str) -> None:
    def mutate(folder: Path, original: Original, rng: random.Random) -> str:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        if where == "structure":
            begin = config["quantization_config"]["structure"]
            paths = [(*_STRUCTURE, *path) for path in _numbers(begin)]
            paths.append(("quantization_config", "format_version"))
        else:
            paths = [(name,) for name in _STOCK if name in config]
        path = rng.choice(paths)
        number = config
        for key in path:
            number = number[key]
        wrong = _WRONG[kind](number, rng)
        while wrong == number and type(wrong) is type(number):
            wrong = _WRONG[kind](number, rng)
        said = _set(config, path, wrong)
        file.write_text(json.dumps(config))
        return said

    mutation(f"{where} number {kind}")(mutate)


def _register_missing(where: str) -> None:
    def mutate(folder: Path, original: Original, rng: random.Random) -> str:
        file = folder / "config.json"
        config = json.loads(file.read_text())
        structure = config["quantization_config"]["structure"]
        places: list[tuple[dict[str, Any], str]] = []
        if where == "structure":
            places = [(config, "quantization_config"), (config["quantization_config"], "structure")]
            places += [(config["quantization_config"], "quant_method")]
            for section, entries in structure.items():
                places += [(structure, section), *((entries, name) for name in entries)]
        else:
            defaults = AutoConfig.for_model(config["model_type"]).to_dict()
            places = [
                (config, name) for name in (*_STOCK, "dtype") if name in config and config[name] != defaults.get(name)
            ]
        owner, name = rng.choice(places)
        if where == "structure" and rng.random() < 0.4 and owner is not config:
            owner[f"{name}x"] = owner.pop(name)
            said = f"{name} renamed"
        else:
            del owner[name]
            said = f"{name} removed"
        file.write_text(json.dumps(config))
        return said

    mutation(f"{where} entry missing")(mutate)


for _where in ("structure", "stock"):
    for _kind in _WRONG:
        _register_numbers(_where, _kind)
    _register_missing(_where)
