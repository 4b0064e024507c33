"""An embedding table stored as 8 or 4 bit integers with one scale for every row or group of a row."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

Bits = Literal[4, 8]
_ROWS_AT_ONCE = 8192  # bounds the floats that an output layer needs at a time


def quantize_rows(table: torch.Tensor, bits: Bits, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds each group of each row to signed integers with one scale a group.

    The scale of a group is the one of 16 candidates (the largest value, down to two thirds of it) with the
    smallest squared error: clipping an outlier is worth it where the other values gain more.

    Args:
        table: Float values, `(rows, columns)`; `group_size` divides `columns`.
        bits: 8 or 4.
        group_size: How many neighbours in a row share a scale.

    Returns:
        Codes, int8 of shape `(rows, columns)`, in [-127, 127] or [-7, 7], and scales, float32 of shape
        `(rows, columns / group_size)`, so that `codes * scale` is near the table. A group of zeros has scale 0.
    """
    limit = 127 if bits == 8 else 7
    rows, columns = table.shape
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scales = torch.empty(rows, columns // group_size, dtype=torch.float32)
    for start in range(0, rows, 4096):  # blocks of rows bound the memory of the search
        groups = table[start : start + 4096].float().reshape(-1, columns // group_size, group_size)
        largest = groups.abs().amax(-1, keepdim=True)
        best_error = torch.full_like(largest, torch.inf)
        best_scale = torch.zeros_like(largest)
        # With 8 bits the rounding error is so small that clipping never pays.
        for share in torch.linspace(1.0, 2 / 3, 16 if bits == 4 else 1).tolist():
            scale = largest * (share / limit)
            rounded = _round(groups, scale, limit)
            error = (groups - rounded * scale).square().sum(-1, keepdim=True)
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
        block = _round(groups, best_scale, limit)
        codes[start : start + 4096] = block.to(torch.int8).reshape(-1, columns)
        scales[start : start + 4096] = best_scale.squeeze(-1)
    return codes, scales


def _round(groups: torch.Tensor, scale: torch.Tensor, limit: int) -> torch.Tensor:
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (groups / safe).round().clamp(-limit, limit)


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Packs pairs of neighbours in [-8, 7] into bytes: int8 `(rows, columns)` to uint8 `(rows, columns / 2)`."""
    shifted = (codes + 8).to(torch.uint8)
    return shifted[:, ::2] << 4 | shifted[:, 1::2]


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """Undoes `pack_nibbles` on the last dimension."""
    pairs = torch.stack((packed >> 4, packed & 15), dim=-1)
    return pairs.flatten(-2).to(torch.int8) - 8


class QuantizedEmbedding(nn.Module):
    """An embedding table of integers, looked up and scaled row by row.

    bitsandbytes' own embedding layers cannot be saved; this one is plain buffers.

    Args:
        num_embeddings: Rows.
        embedding_dim: Columns.
        bits: 8 or 4.
        group_size: How many neighbours in a row share a scale; divides `embedding_dim`.
        scale: What looked up rows are multiplied by, as some families do.
        device: Where the buffers are made.
        dtype: The dtype of what is looked up.
    """

    weight: torch.Tensor
    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        bits: Bits,
        group_size: int,
        scale: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.bits: Bits = bits
        self.group_size = group_size
        self.scale = scale
        shape, stored = (
            ((num_embeddings, embedding_dim), torch.int8)
            if bits == 8
            else ((num_embeddings, embedding_dim // 2), torch.uint8)
        )
        self.register_buffer("codes", torch.zeros(shape, dtype=stored, device=device))
        groups = embedding_dim // group_size
        self.register_buffer("scales", torch.zeros(num_embeddings, groups, dtype=torch.float32, device=device))
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))

    @classmethod
    def from_float(
        cls, embedding: nn.Embedding, *, bits: Bits, group_size: int, scale: float = 1.0
    ) -> QuantizedEmbedding:
        """Quantizes an embedding's table; the embedding itself is left as it was."""
        table = embedding.weight.detach()
        form = {"bits": bits, "group_size": group_size, "scale": scale}
        made = cls(*table.shape, **form, device=table.device, dtype=table.dtype)
        codes, scales = quantize_rows(table, bits, group_size)
        made.codes.copy_(codes if bits == 8 else pack_nibbles(codes))
        made.scales.copy_(scales)
        return made

    def lookup(self, indices: torch.Tensor) -> torch.Tensor:
        """Returns the rows at integer `indices` of any shape, unscaled."""
        return self._floats(self.codes[indices], self.scales[indices])

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the products of `(..., embedding_dim)` with every row, `(..., num_embeddings)`."""
        scores = []
        for codes, scales in zip(self.codes.split(_ROWS_AT_ONCE), self.scales.split(_ROWS_AT_ONCE), strict=True):
            if scales.shape[-1] == 1:  # one for a row: it scales the score, which is less work than the row
                whole = nn.functional.linear(hidden, self._integers(codes).to(hidden.dtype))
                scores.append(whole * scales.T.to(hidden.dtype))
            else:
                scores.append(nn.functional.linear(hidden, self._floats(codes, scales)))
        return torch.cat(scores, dim=-1)

    def dense(self) -> torch.Tensor:
        """Returns the float table, `(num_embeddings, embedding_dim)`."""
        return self._floats(self.codes, self.scales)

    def _integers(self, codes: torch.Tensor) -> torch.Tensor:
        return unpack_nibbles(codes) if self.bits == 4 else codes

    def _floats(self, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        grouped = self._integers(codes).unflatten(-1, (scales.shape[-1], -1)).to(scales.dtype)
        # The sentinel carries the dtype that the model computes in.
        return (grouped * scales.unsqueeze(-1)).flatten(-2).to(self.weight.dtype)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Looks up integer `indices` of any shape; returns `(*indices.shape, embedding_dim)`."""
        rows = self.lookup(indices)
        return rows if self.scale == 1.0 else rows * self.scale

    def extra_repr(self) -> str:
        """Shows shape and precision."""
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}, group_size={self.group_size}"
