"""Fills a teacher's cache: its key, its shards, and the room they take."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.digests import feed, model_digest
from hfcompress.methods.resuming import digest
from hfcompress.methods.teaching.cache import META, Layout, TeacherCache, ends_name, is_read, shard_file, state_name
from hfcompress.methods.teaching.signals import Asked, at_place, is_token_level, output_logits, run_teacher, token_mask
from hfcompress.methods.training import EXAMPLE_ID, Rows

logger = logging.getLogger(__name__)

FORMAT = 1
_OF_DECODERS = ("decodes", "read")  # not in the keys of others, which so stay what they were
_NOT_INPUTS = {"labels", "label", "label_ids", EXAMPLE_ID}


# Keys


def scan(rows: Rows, *, with_labels: bool) -> tuple[str, list[int], list[int]]:
    """Looks through the rows.

    Args:
        rows: The training set.
        with_labels: Whether a decoder makes the tokens that have labels.

    Returns:
        A digest of their inputs (and of the first ones as they are collated); how many tokens each row has that are
        said something about; and how many it has that are read.

    Raises:
        CompressionError: The same rows are another batch each time.
    """
    left_out = _NOT_INPUTS - ({"labels"} if with_labels else set())
    hasher, lengths, read = hashlib.sha256(), [], []
    for row in rows:
        for name in sorted(set(row) - left_out):
            hasher.update(name.encode())
            feed(hasher, row[name])
        if with_labels and "labels" not in row:
            raise CompressionError(
                "a row has no 'labels', which say how many tokens the teacher's decoder makes",
                hint="Add labels, or set cache: false.",
            )
        read.append(_tokens(row.get("input_ids", ())))
        lengths.append(sum(label != -100 for label in row["labels"]) if with_labels else read[-1])
    for name, value in sorted(_repeatable(rows).items()):
        if name not in left_out:
            hasher.update(name.encode())
            feed(hasher, value)
    return hasher.hexdigest(), lengths, read


def _tokens(ids: Any) -> int:
    """Returns how many tokens a row has, those of all its choices where it has several."""
    return sum(map(len, ids)) if len(ids) and isinstance(ids[0], list | tuple) else len(ids)


def _repeatable(rows: Rows) -> dict[str, Any]:
    """Collates the first rows twice.

    Raises:
        CompressionError: The batches differ, so that no answer to them can be kept.
    """
    few = range(min(8, len(rows)))
    with torch.random.fork_rng(devices=[]):
        first, second = rows.batch(few), rows.batch(few)
    for name, value in first.items():
        if isinstance(value, torch.Tensor) and not torch.equal(value, second[name]):
            raise CompressionError(
                f"the teacher's outputs cannot be cached: '{name}' of the same rows is another each time",
                hint="Set cache: false where the collator or the data set masks, crops or augments at random.",
            )
    return first


def _look(
    teacher: PreTrainedModel,
    asked: Asked,
    rows: Rows,
    lengths: Sequence[int],
    read: Sequence[int],
    top_k: int | None,
) -> Layout:
    """Runs the teacher on the first row to see what its outputs are like."""
    batch = rows.batch(range(1))
    with rows.autocast():
        outputs = run_teacher(teacher, batch, asked)
    states = {state_name(place): at_place(outputs, "hidden_states", place) for place in asked.hidden}
    width, per_token = 0, is_token_level(teacher)
    sized = {name: state.shape[1] for name, state in states.items()}
    if asked.logits:
        logits = output_logits(outputs, batch)
        if logits.dim() == 4:
            raise CompressionError("what is said about each pixel is not cached", hint="Set cache: false.")
        width = logits.shape[-1] if logits.dim() > 1 else 1
        if per_token:
            sized.setdefault("logits", logits.shape[1])

    def alike(encoder: bool) -> int:  # images and sound: all rows have as many, or nearly so
        return len(rows) * next((tokens for name, tokens in sized.items() if is_read(name) is encoder), 1)

    return Layout(
        rows=len(rows),
        per_token=per_token,
        width=min(top_k, width) if top_k else width,
        top_k=bool(top_k),
        hidden={name: (state.shape[-1], str(state.dtype).removeprefix("torch.")) for name, state in states.items()},
        tokens=(sum(lengths) or alike(False)) if per_token or states else 0,
        decodes=_decodes(teacher),
        read=(sum(read) or alike(True)) if any(map(is_read, states)) else 0,
    )


def _decodes(teacher: PreTrainedModel) -> bool:
    return teacher.config.is_encoder_decoder and is_token_level(teacher)


# Filling


def fill(
    teacher: PreTrainedModel,
    asked: Asked,
    rows: Rows,
    root: Path,
    *,
    top_k: int | None = None,
    temperature: float = 1.0,
) -> TeacherCache:
    """Finds a teacher's cache for these rows, or makes it; goes on with one that was cut off.

    Args:
        teacher: The teacher, in evaluation mode.
        asked: Logits and hidden states that are to be kept.
        rows: The training set.
        root: The folder that holds caches; runs may share it.
        top_k: Keeps only so many of the largest probabilities of a position, and their log-probabilities at
            `temperature`.
        temperature: See `top_k`.

    Raises:
        CompressionError: It does not fit on the disk, or the same rows are another batch each time.
    """
    from filelock import FileLock

    rows_key, lengths, read = scan(rows, with_labels=_decodes(teacher))
    layout = _look(teacher, asked, rows, lengths, read, top_k)
    key = {
        "format": FORMAT,
        "teacher": model_digest(teacher),
        "rows": rows_key,
        "temperature": temperature if top_k else None,
        "autocast": _autocast_dtype(rows),
        "layout": {name: value for name, value in asdict(layout).items() if value or name not in _OF_DECODERS},
    }
    folder = root / _key_name(key)
    if (folder / META).exists() and not _missing(folder, layout):
        return TeacherCache(folder, key)  # there may be no right to write there
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{folder.name}.lock"):
        _begin(folder, key, layout)
        if missing := _missing(folder, layout):
            _require_room(folder, layout, share=len(missing) / layout.shards)
            started = time.monotonic()
            order = [own + other for own, other in zip(lengths, read, strict=True)]
            for index in missing:
                _write_shard(folder, index, _make_shard(teacher, asked, rows, layout, index, temperature, order))
            logger.info("cached the teacher's outputs in %.0f s", time.monotonic() - started)
    return TeacherCache(folder, key)


def _autocast_dtype(rows: Rows) -> str:
    with rows.autocast():
        kind = rows.device.type
        return str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "none"


def _key_name(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _begin(folder: Path, key: Mapping[str, Any], layout: Layout) -> None:
    folder.mkdir(exist_ok=True)
    for litter in folder.glob(".*.partial"):
        litter.unlink()
    if not (folder / META).exists():
        _write_text(folder / META, json.dumps(key, indent=2))
        logger.info(
            "the teacher's outputs on %d rows take %s in %s", layout.rows, _megabytes(layout.bytes), folder.parent
        )


def _require_room(folder: Path, layout: Layout, *, share: float) -> None:
    needed, free = int(layout.bytes * share * 1.05), shutil.disk_usage(folder).free
    if needed > free:
        raise CompressionError(
            f"the teacher's outputs on {layout.rows} rows would take {_megabytes(needed)}, and {folder.parent} has "
            f"{_megabytes(free)} free",
            hint="Name fewer layers, keep only the largest probabilities (cache_top_k), or set cache: false.",
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _missing(folder: Path, layout: Layout) -> list[int]:
    return [index for index in range(layout.shards) if not _is_whole(shard_file(folder, index))]


def _is_whole(shard: Path) -> bool:
    try:
        return digest(shard) == shard.with_suffix(".sha256").read_text()
    except OSError:
        return False


def _write_text(file: Path, text: str) -> None:
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text)
    os.replace(partial, file)


def _write_shard(folder: Path, index: int, tensors: dict[str, torch.Tensor]) -> None:
    shard = shard_file(folder, index)
    partial = shard.with_name(f".{shard.name}.partial")
    save_file(tensors, partial)
    os.replace(partial, shard)
    _write_text(shard.with_suffix(".sha256"), digest(shard))


def _make_shard(
    teacher: PreTrainedModel,
    asked: Asked,
    rows: Rows,
    layout: Layout,
    index: int,
    temperature: float,
    lengths: Sequence[int],
) -> dict[str, torch.Tensor]:
    """Runs the teacher on a shard's rows, rows of like length together, and puts them in order."""
    first = index * layout.shard_rows
    numbers = range(first, min(first + layout.shard_rows, layout.rows))
    kept: dict[int, dict[str, torch.Tensor]] = {}
    ordered = sorted(numbers, key=lambda number: lengths[number])
    for start in range(0, len(ordered), rows.batch_size):
        few = ordered[start : start + rows.batch_size]
        batch = rows.batch(few)
        with rows.autocast():
            outputs = run_teacher(teacher, batch, asked)
        for name, pieces in _pieces(teacher, asked, layout, batch, outputs, temperature):
            if len(pieces) != len(few):
                raise CompressionError(
                    f"the teacher's outputs cannot be cached: the collator makes {len(pieces)} of {len(few)} rows",
                    hint="Set cache: false where the collator lays rows end to end.",
                )
            for number, piece in zip(few, pieces, strict=True):
                kept.setdefault(number, {})[name] = piece
    tensors = {name: torch.cat([kept[number][name] for number in numbers]) for name in kept[first]}
    per_token = {ends_name(name): name for name in tensors if layout.per_token or "hidden" in name}
    for ends, name in per_token.items():
        tensors[ends] = torch.tensor([len(kept[number][name]) for number in numbers]).cumsum(0)
    return tensors


def _logit_pieces(
    teacher: PreTrainedModel,
    layout: Layout,
    batch: Mapping[str, torch.Tensor],
    logits: torch.Tensor,
    temperature: float,
) -> Iterator[tuple[str, Sequence[torch.Tensor]]]:
    logits = logits.unsqueeze(-1) if logits.dim() == 1 else logits
    if layout.per_token:
        mask = token_mask(teacher, batch, logits.shape[:2])
        lengths, logits = mask.sum(1).tolist(), logits[mask]
    else:
        lengths = [1] * len(logits)
    if layout.top_k:
        values, indices = (logits / temperature).log_softmax(-1).topk(layout.width)
        yield "logits", values.half().cpu().split(lengths)
        yield "indices", indices.int().cpu().split(lengths)
    else:
        yield "logits", logits.cpu().split(lengths)


def _pieces(
    teacher: PreTrainedModel,
    asked: Asked,
    layout: Layout,
    batch: Mapping[str, torch.Tensor],
    outputs: Any,
    temperature: float,
) -> Iterator[tuple[str, Sequence[torch.Tensor]]]:
    """Yields what is kept of a batch: by name, one tensor for each row, whose first axis is the row's positions."""
    if asked.logits:
        yield from _logit_pieces(teacher, layout, batch, outputs["logits"].float(), temperature)
    for place in asked.hidden:
        states = at_place(outputs, "hidden_states", place)
        mask = token_mask(teacher, batch, states.shape[:2], place[0])
        examples = len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))
        lengths = mask.reshape(examples, -1).sum(1).tolist()  # an example's choices are kept together
        yield state_name(place), states[mask].cpu().split(lengths)
