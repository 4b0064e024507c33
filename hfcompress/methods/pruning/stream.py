"""What the blocks of a layer read from its residual stream and add to it, seen while the layer runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import nn

from hfcompress.modeling.anatomy import AttentionBlock, FeedForwardBlock

Norm = Literal["before", "after"]


class StreamWatch:
    """Watches one layer.

    Where the norm comes after a block (BERT), the stream is what the block reads; where it comes before (GPT-2), it
    is the layer's input with all that the blocks before have added. Which of the two it is, the numbers of a run say.

    Args:
        layer: The layer, or a copy of it.
        blocks: Its blocks, in the original or in the copy.

    Attributes:
        reads: What each block read in the last run, by its output projection's path in the layer, in order.
        gives: What each block gave.
    """

    def __init__(self, layer: nn.Module, blocks: Sequence[AttentionBlock | FeedForwardBlock]) -> None:
        self.reads: dict[str, torch.Tensor] = {}
        self.gives: dict[str, torch.Tensor] = {}
        self._hooked: list[tuple[str, nn.Module, nn.Module]] = []
        for block in blocks:
            first = block.projections[0][1] if isinstance(block, AttentionBlock) else block.inputs[0]
            ends = layer.get_submodule(first.path), layer.get_submodule(block.spec.output)
            self._hooked.append((block.spec.output, *ends))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sees one run of the layer, or of its first part."""
        self.reads.clear()
        self.gives.clear()

        def read(name: str) -> Any:  # once: DeBERTa's projections read positions after that
            return lambda module, arguments: None if name in self.reads else self.reads.update({name: arguments[0]})

        def given(name: str) -> Any:
            return lambda module, arguments, output: self.gives.update({name: output})

        with ExitStack() as stack:
            for name, first, last in self._hooked:
                stack.callback(first.register_forward_pre_hook(read(name)).remove)
                stack.callback(last.register_forward_hook(given(name)).remove)
            yield

    def norm(self, hidden: torch.Tensor, output: torch.Tensor) -> Norm | None:
        """Tells from a whole run of the layer on `hidden` where its norms are; None where it is built otherwise."""
        added = list(self.gives.values())
        if not added or any(each.shape != hidden.shape for each in added):
            return None
        whole = hidden
        for each in added:  # as the layer does: in bfloat16 another order gives other numbers
            whole = whole + each
        if torch.allclose(whole.float(), output.float(), rtol=1e-3, atol=1e-3 * float(output.abs().max())):
            return "before"  # the first block may read the stream itself all the same, where its norm is left out
        return "after" if torch.equal(next(iter(self.reads.values())), hidden) else None

    def before(self, name: str, norm: Norm | None, hidden: torch.Tensor) -> torch.Tensor | float:
        """Returns the stream that a block adds to in the last run; 0 where that is not known.

        Args:
            name: The path of the block's output projection in the layer.
            norm: Where the layer has its norms.
            hidden: The layer's input.
        """
        if norm is None:
            return 0.0
        if norm == "after":
            return self.reads[name]
        for other, given in self.gives.items():
            if other == name:
                break
            hidden = hidden + given
        return hidden
