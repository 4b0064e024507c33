"""Attention whose position bias is shared between layers, cut to the heads that each layer still has.

The bias is made and handed on for all stock heads, whatever the layers between keep.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import torch
from torch import nn

SharedBias = Literal["given", "passed_on"]


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


class KeptHeadsPassingOn:
    """The same over a class (T5's) that makes the bias where none is given, and hands it to the next layer.

    Attributes:
        kept_heads: As in `KeptHeads`.
    """

    kept_heads: torch.Tensor
    config: Any
    layer_idx: int
    has_relative_attention_bias: bool

    def forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor | None = None,
        key_value_states: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the stock forward with the rows of its heads, and returns the bias of all stock heads."""
        seen: Any = 0
        if past_key_values is not None and position_bias is None:
            seen = past_key_values.get_seq_length(self.layer_idx)  # before this call adds to it
            seen = seen.clone() if isinstance(seen, torch.Tensor) else seen
        own = None if position_bias is None else position_bias.index_select(1, self.kept_heads)
        output, used, weights = super().forward(  # type: ignore[misc]
            hidden_states,
            mask=mask,
            key_value_states=key_value_states,
            position_bias=own,
            past_key_values=past_key_values,
            **kwargs,
        )
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = self._stock_bias(*used.shape[-2:], device=used.device, past_seen_tokens=seen)
        elif position_bias is None:  # all zeros: no layer's heads tell it from another's
            position_bias = used[:, :1].expand(-1, self.config.num_heads, -1, -1)
        return output, position_bias, weights

    def compute_bias(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Makes the bias of the heads that are left, `(1, heads, query, key)`."""
        return self._stock_bias(*args, **kwargs).index_select(1, self.kept_heads)

    def _stock_bias(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return super().compute_bias(*args, **kwargs)  # type: ignore[misc]


_MIXINS: dict[SharedBias, type] = {"given": KeptHeads, "passed_on": KeptHeadsPassingOn}


@cache
def _with_kept_heads(cls: type[nn.Module], mixin: type) -> type[nn.Module]:
    def reduce(self: nn.Module) -> Any:  # pickle, and deepcopy too, look for classes by their names in modules
        return _empty, (cls, mixin), vars(self)

    return type(f"{cls.__name__}WithKeptHeads", (mixin, cls), {"__module__": __name__, "__reduce__": reduce})


def _empty(cls: type[nn.Module], mixin: type) -> nn.Module:
    made = _with_kept_heads(cls, mixin)
    return made.__new__(made)


def keep_heads(attention: Any, kept: torch.Tensor, bias: SharedBias) -> None:
    """Records which heads of the shared bias an attention uses.

    Args:
        attention: The `nn.Module` whose forward takes the bias.
        kept: Indexes, int64, of heads that it has now.
        bias: What becomes of the bias there.
    """
    mixin = _MIXINS[bias]
    if isinstance(attention, mixin):
        attention.register_buffer("kept_heads", attention.kept_heads[kept.to(attention.kept_heads.device)])
        return
    attention.__class__ = _with_kept_heads(type(attention), mixin)
    attention.register_buffer("kept_heads", kept.clone())
