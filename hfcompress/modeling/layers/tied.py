"""Compressed embedding tables that other modules read too: the output layer, a second stack's lookup.

A stock model ties such modules by one parameter. A compressed table is several tensors, so here the others hold the
module itself. It is a plain attribute of theirs, not a submodule: the table's tensors have one name and are stored
once, nothing can untie them, and copies and pickles of a model take the reference along.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import nn


class Table(Protocol):
    """What a compressed embedding table can do for the modules that read it."""

    num_embeddings: int
    embedding_dim: int
    weight: torch.Tensor

    def lookup(self, indices: torch.Tensor) -> torch.Tensor:
        """Returns the rows at integer `indices` of any shape, `(*indices.shape, embedding_dim)`."""
        ...

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the products of `(..., embedding_dim)` with every row, `(..., num_embeddings)`."""
        ...

    def dense(self) -> torch.Tensor:
        """Returns the float table, `(num_embeddings, embedding_dim)`."""
        ...


class _Reader(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        vars(self)["_table"] = table  # not a submodule: its tensors are stored where they belong

    @property
    def table(self) -> Table:
        """The table that is read."""
        return cast(Table, vars(self)["_table"])

    def extra_repr(self) -> str:
        """Shows the shape of the table."""
        return f"{self.table.num_embeddings}, {self.table.embedding_dim}, tied"


class TiedOutput(_Reader):
    """An output layer whose weight is an embedding table.

    Args:
        table: The table.
        bias: Of shape `(num_embeddings,)`, or None.
    """

    def __init__(self, table: nn.Module, bias: nn.Parameter | None) -> None:
        super().__init__(table)
        self.bias = bias

    @property
    def weight(self) -> torch.Tensor:
        """Shape and dtype of the stock layer's weight, for those who ask; on `meta`, without numbers."""
        return torch.empty(self.out_features, self.in_features, device="meta", dtype=self.table.weight.dtype)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.table.embedding_dim

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.table.num_embeddings

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Maps `(..., in_features)` to `(..., out_features)`."""
        scores = self.table.project(hidden)
        return scores if self.bias is None else scores + self.bias


class TiedLookup(_Reader):
    """An embedding that looks up rows of another's table.

    Args:
        table: The table.
        scale: What its rows are multiplied by.
    """

    def __init__(self, table: nn.Module, scale: float = 1.0) -> None:
        super().__init__(table)
        self.scale = scale

    @property
    def weight(self) -> torch.Tensor:
        """The table's sentinel: families read device and dtype off it."""
        return self.table.weight

    @property
    def num_embeddings(self) -> int:
        """Rows."""
        return self.table.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """Columns."""
        return self.table.embedding_dim

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Looks up integer `indices` of any shape; returns `(*indices.shape, embedding_dim)`."""
        rows = self.table.lookup(indices)
        return rows if self.scale == 1.0 else rows * self.scale


class LowRankEmbedding(nn.Module):
    """An embedding table as the product of two thin ones: rows of `rank` numbers, widened by `up`.

    Args:
        num_embeddings: Rows.
        embedding_dim: Columns.
        rank: Width of the stored rows.
        scale: What looked up rows are multiplied by, as some families do.
        device: Where the parameters are made.
        dtype: The parameters' dtype.
    """

    weight: torch.Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        *,
        scale: float = 1.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.rank = rank
        self.scale = scale
        rows = torch.empty(num_embeddings, rank, device=device, dtype=dtype)
        self.table: nn.Module = nn.Embedding(num_embeddings, rank, _weight=rows)
        self.up = nn.Parameter(torch.empty(embedding_dim, rank, device=device, dtype=dtype))
        self.register_buffer("weight", torch.zeros(1, device=device, dtype=dtype))

    @classmethod
    def from_factors(cls, table: torch.Tensor, up: torch.Tensor, *, scale: float = 1.0) -> LowRankEmbedding:
        """Makes one of `table`, `(rows, rank)`, and `up`, `(columns, rank)`, whose product is `table @ up.T`."""
        with torch.device("meta"):
            made = cls(len(table), len(up), table.shape[1], scale=scale, dtype=table.dtype)
        made.table = nn.Embedding(len(table), made.rank, _weight=table.contiguous())
        made.up = nn.Parameter(up.contiguous())
        made.register_buffer("weight", table.new_zeros(1))
        return made

    def lookup(self, indices: torch.Tensor) -> torch.Tensor:
        """Returns the rows at integer `indices` of any shape, unscaled."""
        return nn.functional.linear(self.table(indices), self.up)

    def project(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns the products of `(..., embedding_dim)` with every row, `(..., num_embeddings)`."""
        narrow = hidden @ self.up
        table = self.table
        if isinstance(table, nn.Embedding):
            return nn.functional.linear(narrow, table.weight)
        return cast(Table, table).project(narrow)

    def dense(self) -> torch.Tensor:
        """Returns the float table, `(num_embeddings, embedding_dim)`."""
        table = self.table
        rows = table.weight if isinstance(table, nn.Embedding) else cast(Table, table).dense()
        return (rows.detach().double() @ self.up.detach().double().T).to(self.weight.dtype)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Looks up integer `indices` of any shape; returns `(*indices.shape, embedding_dim)`."""
        rows = self.lookup(indices)
        return rows if self.scale == 1.0 else rows * self.scale

    def extra_repr(self) -> str:
        """Shows the shape that the two factors stand for."""
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
