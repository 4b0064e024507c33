"""Attention whose position bias is computed elsewhere, for all heads, and added for those that are left."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import nn


class KeptHeads:
    """A mixin over a stock attention class: it picks its heads' rows out of the shared position bias.

    Attributes:
        kept_heads: Buffer, int64 `(heads,)`: which of the stock heads the module still has, in its order.
    """

    kept_heads: torch.Tensor

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the stock forward with `position_bias`, `(batch, stock heads, query, key)`, cut to its heads."""
        if position_bias is not None:
            position_bias = position_bias.index_select(1, self.kept_heads)
        return super().forward(hidden_states, attention_mask, position_bias, **kwargs)  # type: ignore[misc]


@cache
def _with_kept_heads(cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"{cls.__name__}WithKeptHeads", (KeptHeads, cls), {"__module__": __name__})


def keep_heads(attention: nn.Module, kept: torch.Tensor) -> None:
    """Records which heads of the shared bias an attention uses: `kept` indexes the heads it has now."""
    if isinstance(attention, KeptHeads):
        attention.register_buffer("kept_heads", attention.kept_heads[kept.to(attention.kept_heads.device)])
        return
    attention.__class__ = _with_kept_heads(type(attention))
    attention.register_buffer("kept_heads", kept.clone())
