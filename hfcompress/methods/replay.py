"""Runs of a model from the middle, for methods that change it layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hfcompress.methods.calibration import evaluating
from hfcompress.methods.registry import Batch
from hfcompress.methods.statistics import InputStatistics, Sums, real_rows
from hfcompress.modeling.anatomy import architecture_of, base_model, layer_lists, module_at
from hfcompress.modeling.architectures import architectures


class _Reached(Exception):
    """All that was to be seen has been seen; the rest of the forward is not needed."""


class Replay:
    """Runs a model from the middle: layers that will not change any more give back what they gave before.

    It works on any family whose layers are known, for each layer is a module that is called once. Where a family
    is not known, or shares its layers, everything is run.

    Args:
        model: The model.
        batches: Model inputs, always the same.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        self.model, self.batches = model, batches
        self.base = base_model(model)
        self._outputs: dict[str, list[Any]] = {}  # by stack: those of its last finished layer
        self._finished: list[Any] = []
        self._current = 0

    def layer_of(self, path: str) -> str | None:
        """Returns the layer that holds a module, or None where there is none that is run once."""
        if self.model.config.model_type not in architectures():
            return None
        for stack in architecture_of(self.model).stacks:
            for layers in () if stack.shared else layer_lists(self.model, stack):
                if path.startswith(f"{layers}."):
                    return f"{layers}.{path.removeprefix(f'{layers}.').partition('.')[0]}"
        return None

    def inputs(self, path: str) -> Iterator[torch.Tensor]:
        """Yields what enters a module, real positions as rows, batch by batch."""
        caught: list[torch.Tensor] = []

        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            caught.append(arguments[0])
            raise _Reached

        with _hooked(module_at(self.model, path).register_forward_pre_hook(hook)):
            for batch in self._run():
                yield real_rows(self.model, caught.pop(), batch)

    def finish(self, layer: str) -> None:
        """Records what a layer gives; neither it nor any before it in its stack may change after this."""
        caught: list[Any] = []

        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            caught.append(output)
            raise _Reached

        module: Any = self.base.get_submodule(layer)
        with _hooked(module.register_forward_hook(hook)):
            for _ in self._run():
                pass
        stack = layer.rpartition(".")[0]
        self._outputs[stack] = caught
        # The layers before give the same: what they give is read by nothing but the next one, which does not look.
        module.forward = lambda *arguments, **named: self._outputs[stack][self._current]
        self._finished.append(module)

    def at(self, number: int) -> None:
        """Says which batch the model is run on next, by whoever runs it."""
        self._current = number

    def close(self) -> None:
        """Lets every layer run again."""
        for module in self._finished:
            vars(module).pop("forward", None)
        self._finished.clear()
        self._outputs.clear()

    def _run(self) -> Iterator[dict[str, torch.Tensor]]:
        for number, batch in enumerate(self.batches):
            self._current = number
            moved = {name: value.to(self.model.device) for name, value in batch.items()}
            # Not around the yield: two replays run by turns, and would leave each other's mode behind.
            with torch.no_grad(), evaluating(self.model), suppress(_Reached):
                self.model(**moved)
            yield moved


@contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def paired_statistics(changed: Replay, reference: Replay, path: str) -> InputStatistics:
    """Averages what enters a module of a model that is being changed, beside what enters it in the original.

    Raises:
        CompressionError: Activations that are not finite.
    """
    sums = Sums()
    for rows, other in zip(changed.inputs(path), reference.inputs(path), strict=True):
        sums.add(rows, other)
    return sums.statistics(path)
