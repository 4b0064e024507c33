"""What a teacher says about every row of a training set, kept on disk and read in its place.

A cache is a folder named by a digest of the teacher's weights, the rows' inputs and what is asked: another teacher,
other rows or another preprocessing is another cache. It is filled shard by shard (one safetensors file and its digest
each), goes on where it was cut off, and is read through memory maps, so that neither the teacher nor its outputs need
memory while the student trains. Runs may share a folder; one of them fills it while the others wait.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.nn.utils.rnn import pad_sequence

from hfcompress.errors import CheckpointError
from hfcompress.methods.teaching.signals import Place, Signals

META = "teacher_cache.json"
_SHARD_BYTES = 64 * 1024**2


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a cache holds for one row, or for one token.

    Attributes:
        rows: Number of rows.
        per_token: Whether logits are kept for every token.
        width: Outputs kept at a position; 0 where none are.
        top_k: Whether those are the largest only.
        hidden: By place, as JSON: width and dtype.
        tokens: Number of real tokens in all rows, as far as it is known before.
        decodes: Whether a decoder makes these tokens: a row has as many as it has labels.
        read: Number of real tokens that an encoder reads beside them, where its hidden states are kept.
    """

    rows: int
    per_token: bool
    width: int
    top_k: bool
    hidden: dict[str, tuple[int, str]]
    tokens: int
    decodes: bool = False
    read: int = 0

    @property
    def bytes(self) -> int:
        """Size on disk of all shards, nearly."""
        each = self.width * (6 if self.top_k else 4)
        logits = each * (self.tokens if self.per_token else self.rows)
        return logits + sum(
            width * getattr(torch, kind).itemsize * (self.read if is_read(name) else self.tokens)
            for name, (width, kind) in self.hidden.items()
        )

    @property
    def shard_rows(self) -> int:
        """Rows in a shard."""
        return max(1, min(8192, _SHARD_BYTES * self.rows // max(1, self.bytes)))

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)


def state_name(place: Place) -> str:
    """Returns what the hidden states of a place are called in a shard."""
    return f"{place[0]}hidden.{place[1]}"


def is_read(name: str) -> bool:
    """Tells whether a tensor of a shard has a row for each token that an encoder-decoder's encoder reads."""
    return name.startswith("encoder_")


def ends_name(name: str) -> str:
    """Returns what a shard calls the places where each row's part of a tensor ends."""
    return "encoder_ends" if is_read(name) else "ends"


def shard_file(folder: Path, index: int) -> Path:
    """Returns the file of a shard."""
    return folder / f"shard-{index:05d}.safetensors"


class TeacherCache:
    """A filled cache, which answers in the teacher's place.

    Args:
        folder: The cache's folder.
        key: What it must have been made for.

    Raises:
        CheckpointError: It was made for something else, or is damaged.
    """

    def __init__(self, folder: Path, key: Mapping[str, Any]) -> None:
        self.folder = folder
        try:
            stored = json.loads((folder / META).read_text())
        except (OSError, ValueError):
            stored = None
        if stored != json.loads(json.dumps(key)):
            differs = [name for name in key if not stored or json.loads(json.dumps(key[name])) != stored.get(name)]
            raise CheckpointError(
                f"the teacher cache {folder} is stale: it was made for another {' and '.join(differs)}",
                hint="Remove it, and it is made anew.",
            )
        assert stored is not None
        self.layout = Layout(**{**stored["layout"], "hidden": dict(stored["layout"]["hidden"])})
        self._open: list[dict[str, torch.Tensor]] = []
        self._maps()

    def _maps(self) -> list[dict[str, torch.Tensor]]:
        if not self._open:  # at first, and in a training after the one that closed it
            self._open = [self._map(shard_file(self.folder, index)) for index in range(self.layout.shards)]
        return self._open

    def _map(self, shard: Path) -> dict[str, torch.Tensor]:
        try:
            with safe_open(shard, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{shard} cannot be read: {error}", hint="Remove it, and it is made anew.") from None
        return tensors

    def _row(self, number: int, name: str, *, per_token: bool) -> torch.Tensor:
        shard, row = self._maps()[number // self.layout.shard_rows], number % self.layout.shard_rows
        if not per_token:
            return shard[name][row : row + 1]
        ends = shard[ends_name(name)]
        return shard[name][int(ends[row - 1]) if row else 0 : int(ends[row])]

    def _rows(self, numbers: Sequence[int], name: str, *, per_token: bool) -> torch.Tensor:
        rows = [self._row(number, name, per_token=per_token) for number in numbers]
        # Under autocast the CPU cannot join float16.
        return torch.cat([row.float() if row.dtype == torch.float16 else row for row in rows])

    def signals(self, inputs: Mapping[str, torch.Tensor], counted: torch.Tensor | None, ids: torch.Tensor) -> Signals:
        """Looks up what the teacher said about a batch; as `LiveTeacher.signals`.

        Args:
            inputs: The batch.
            counted: As `positions` returns it.
            ids: The rows' numbers, `(batch,)`.

        Raises:
            CheckpointError: A row has another length now than when the cache was made.
        """
        numbers, device = ids.tolist(), ids.device
        names = () if not self.layout.width else ("logits", "indices") if self.layout.top_k else ("logits",)
        read = {name: self._rows(numbers, name, per_token=self.layout.per_token) for name in names}
        if counted is not None and read:
            mask = self._mask(inputs, counted)
            self._require(len(read["logits"]), mask)
            chosen = counted[mask].cpu()
            read = {name: tensor[chosen] for name, tensor in read.items()}
        return Signals(
            logits=read["logits"].to(device) if read else None,
            indices=read["indices"].long().to(device) if "indices" in read else None,
            hidden={place: self._hidden(inputs, numbers, place) for place in self._places()},
        )

    def _places(self) -> list[Place]:
        split = [name.rpartition("hidden.") for name in self.layout.hidden]
        return [(prefix, int(layer)) for prefix, _, layer in split]

    def _mask(self, inputs: Mapping[str, torch.Tensor], counted: torch.Tensor) -> torch.Tensor:
        if self.layout.decodes or "input_ids" not in inputs:  # of sound, all real frames count
            return counted
        mask = inputs.get("attention_mask")
        return mask.bool() if mask is not None and mask.shape == counted.shape else torch.ones_like(counted)

    def _hidden(self, inputs: Mapping[str, torch.Tensor], numbers: Sequence[int], place: Place) -> torch.Tensor:
        if place[0] == "decoder_":
            mask = inputs["labels"].ne(-100)
        elif "input_ids" in inputs:
            mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
        else:
            # Images and sound: a mask is one of samples, and the frames that were kept are padded as the student's.
            rows = [self._rows([number], state_name(place), per_token=True) for number in numbers]
            return pad_sequence(rows, batch_first=True).to(next(iter(inputs.values())).device)
        flat = self._rows(numbers, state_name(place), per_token=True)
        mask = mask.bool().flatten(0, -2)  # choices are so many examples
        self._require(len(flat), mask)
        padded = torch.zeros(*mask.shape, flat.shape[-1], dtype=flat.dtype, device=mask.device)
        padded[mask] = flat.to(mask.device)
        return padded

    def _require(self, found: int, mask: torch.Tensor) -> None:
        if found != int(mask.sum()):
            raise CheckpointError(
                f"the teacher cache {self.folder} holds {found} tokens for rows that have {int(mask.sum())} now",
                hint="The collator changed the rows; set cache: false.",
            )

    def close(self) -> None:
        """Lets the files go."""
        self._open = []
