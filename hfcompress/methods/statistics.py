"""What the inputs of linear layers are like: means, second moments, and what the loss says about them.

Padding is left out wherever a batch says by its `attention_mask` where it is: nothing is read off it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import evaluating
from hfcompress.methods.registry import Batch
from hfcompress.modeling.anatomy import architecture_of, base_model, layer_lists
from hfcompress.modeling.architectures import architectures

# So many show which layers read one tensor.
_FEW_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class InputStatistics:
    """What enters a layer.

    Attributes:
        mean: `E x'`, `(in,)`.
        second_moment: `E x' x'ᵀ`, `(in, in)`.
        reference_mean: `E x` of the same positions in the model that is imitated, or None where it is the same.
        cross_moment: `E x x'ᵀ`, `(in, in)`, or None where x is x'.
    """

    mean: torch.Tensor
    second_moment: torch.Tensor
    reference_mean: torch.Tensor | None = None
    cross_moment: torch.Tensor | None = None

    def centred(self) -> InputStatistics:
        """Returns the same with covariances in place of second moments, for a layer whose bias can take the means."""
        mean = self.mean.double()
        moment = self.second_moment.double() - torch.outer(mean, mean)
        if self.cross_moment is None or self.reference_mean is None:
            return replace(self, second_moment=moment)
        cross = self.cross_moment.double() - torch.outer(self.reference_mean.double(), mean)
        return replace(self, second_moment=moment, cross_moment=cross)


def each_batch(model: PreTrainedModel, batches: Sequence[Batch], description: str) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the batches on the model's device, with a progress bar.

    Raises:
        CompressionError: There are no batches.
    """
    if not batches:
        raise CompressionError(
            "this needs calibration data, and there is none",
            hint="Pass calibration=[batch, ...]: mappings of model inputs such as a tokenizer returns.",
        )
    for batch in tqdm(batches, desc=description, leave=False):
        yield {name: value.to(model.device) for name, value in batch.items()}


def real_rows(inputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Returns inputs `(..., in)` as rows `(positions, in)` without those of padding."""
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2 and inputs.dim() == 3 and mask.shape == inputs.shape[:2] and mask.any():
        return inputs.detach()[mask.bool()]
    return inputs.detach().flatten(0, -2)


def shared_inputs(model: PreTrainedModel, paths: Sequence[str], batch: Batch) -> list[list[str]]:
    """Finds which layers read one and the same tensor, by running a few rows of one batch.

    Returns:
        The groups in the order in which they first run.

    Raises:
        CompressionError: A layer was not run.
    """
    base = base_model(model)
    groups: list[tuple[torch.Tensor, list[str]]] = []
    seen: set[str] = set()

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            if path in seen:
                return
            seen.add(path)
            for tensor, group in groups:
                if tensor is arguments[0]:
                    group.append(path)
                    return
            groups.append((arguments[0], [path]))

        return hook

    with ExitStack() as stack, torch.no_grad(), evaluating(model):
        for path in paths:
            stack.callback(base.get_submodule(path).register_forward_pre_hook(watch(path)).remove)
        model(**{name: value.to(model.device) for name, value in _few_rows(batch).items()})
    for path in paths:
        if path not in seen:
            raise CompressionError(f"{path} was never run on the calibration batches")
    return [group for _, group in groups]


def _few_rows(batch: Batch) -> Batch:
    """Returns the first rows of a batch, or all of it where its tensors do not have one number of rows."""
    if any(value.dim() == 0 for value in batch.values()) or len({len(value) for value in batch.values()}) != 1:
        return batch
    return {name: value[:_FEW_ROWS] for name, value in batch.items()}


class _Sums:
    """Sums of one input, and of a reference's beside it."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, rows: torch.Tensor, reference: torch.Tensor | None = None) -> None:
        rows = rows.float()
        self.count += len(rows)
        self._add("mean", rows.sum(0))
        self._add("second_moment", rows.T @ rows)
        if reference is not None:
            reference = reference.float()
            self._add("reference_mean", reference.sum(0))
            self._add("cross_moment", reference.T @ rows)

    def _add(self, name: str, value: torch.Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value
        else:
            self.sums[name] = value

    def statistics(self, path: str) -> InputStatistics:
        if not all(torch.isfinite(each).all() for each in self.sums.values()):
            raise CompressionError(f"{path}: the calibration activations are not finite")
        return InputStatistics(**{name: value / self.count for name, value in self.sums.items()})


def input_statistics(
    model: PreTrainedModel, paths: Sequence[str], batches: Sequence[Batch]
) -> Mapping[str, InputStatistics]:
    """Averages over every real position that enters a linear layer.

    Args:
        model: The model.
        paths: The layers, relative to the base model.
        batches: Model inputs.

    Returns:
        For each path its statistics; layers with one input (query, key and value) share one object.

    Raises:
        CompressionError: No batches, a layer that is never run, or activations that are not finite (it is named).
    """
    return layer_statistics(model, paths, batches)[0]


def layer_statistics(
    model: PreTrainedModel, paths: Sequence[str], batches: Sequence[Batch], *, by_outputs: Sequence[str] = ()
) -> tuple[dict[str, InputStatistics], dict[str, torch.Tensor]]:
    """Averages over every real position, as `input_statistics`, or of some layers over what they give.

    Args:
        model: The model.
        paths: The layers, relative to the base model.
        batches: Model inputs.
        by_outputs: Those of them of which second moments of the outputs are enough; where another layer reads the same
            input, inputs are read all the same.

    Returns:
        By path the statistics of inputs; and of the other layers, float32 `(out, out)`, the second moments of what they
        give without their bias.

    Raises:
        CompressionError: As `input_statistics`.
    """
    base = base_model(model)
    pending = each_batch(model, batches, "calibration")
    groups = shared_inputs(model, paths, batches[0]) if batches else []
    leaders = [group[0] for group in groups]
    narrow = {group[0] for group in groups if len(group) == 1 and group[0] in by_outputs}
    sums = {path: _Sums() for path in leaders}
    current: dict[str, torch.Tensor] = {}

    def watch(path: str) -> Callable[..., None]:
        return lambda module, arguments: sums[path].add(real_rows(arguments[0], current))

    def watch_outputs(path: str) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: torch.Tensor) -> None:
            sums[path].add(real_rows(output if module.bias is None else output - module.bias, current))

        return hook

    with ExitStack() as stack, torch.no_grad(), evaluating(model):
        for path in leaders:
            module = base.get_submodule(path)
            if path in narrow:
                stack.callback(module.register_forward_hook(watch_outputs(path)).remove)
            else:
                stack.callback(module.register_forward_pre_hook(watch(path)).remove)
        for current in pending:
            model(**current)
    made = {leader: each.statistics(leader) for leader, each in sums.items()}
    inputs = {path: made[group[0]] for group in groups for path in group if group[0] not in narrow}
    return inputs, {path: made[path].second_moment for path in leaders if path in narrow}


def input_fisher(model: PreTrainedModel, paths: Sequence[str], batches: Sequence[Batch]) -> Mapping[str, torch.Tensor]:
    """Sums the empirical Fisher information of a layer's weights over each of its inputs.

    That is, for every column of the weight, the squared gradients of the loss, example by example, averaged over
    the examples (Hsu et al. 2022, FWSVD).

    Returns:
        For each path float32 `(in,)`.

    Raises:
        CompressionError: No batches, no labels, or gradients that are not finite (the layer is named).
    """
    base = base_model(model)
    fisher: dict[str, torch.Tensor] = {}
    calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            calls.append((path, arguments[0].detach(), output if output.requires_grad else output.requires_grad_()))

        return hook

    examples = 0
    with ExitStack() as stack, torch.enable_grad(), evaluating(model):
        for path in paths:
            stack.callback(base.get_submodule(path).register_forward_hook(watch(path)).remove)
        for batch in each_batch(model, batches, "gradients"):
            calls.clear()
            loss = model(**batch).loss if "labels" in batch else None
            if loss is None:
                raise CompressionError(
                    "Fisher information needs calibration batches with labels",
                    hint="Pass calibration=[batch, ...] with a 'labels' entry, or choose another method.",
                )
            size = len(batch["labels"])
            examples += size
            gradients = torch.autograd.grad(loss, [output for _, _, output in calls])
            for (path, inputs, _), gradient in zip(calls, gradients, strict=True):
                # The loss is a mean over the batch: an example's own gradient is `size` times its part of it.
                found = _column_squares(inputs, gradient, size) * size**2
                fisher[path] = fisher[path] + found if path in fisher else found
    for path in paths:
        if path not in fisher:
            raise CompressionError(f"{path} was never run on the calibration batches")
        if not torch.isfinite(fisher[path]).all():
            raise CompressionError(f"{path}: the gradients on the calibration batches are not finite")
    return {path: fisher[path] / examples for path in paths}


def _column_squares(inputs: torch.Tensor, gradient: torch.Tensor, size: int) -> torch.Tensor:
    """Sums the squared gradients of a weight over its outputs and over the examples."""
    if inputs.dim() < 3 or len(inputs) != size:
        inputs, gradient = inputs.unsqueeze(0), gradient.unsqueeze(0)
    pairs = zip(inputs.flatten(1, -2).float(), gradient.flatten(1, -2).float(), strict=True)
    return torch.stack([(slope.T @ rows).square().sum(0) for rows, slope in pairs]).sum(0)


# Layer by layer


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

        with _hooked(self.base.get_submodule(path).register_forward_pre_hook(hook)):
            for batch in self._run():
                yield real_rows(caught.pop(), batch)

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
    sums = _Sums()
    for rows, other in zip(changed.inputs(path), reference.inputs(path), strict=True):
        sums.add(rows, other)
    return sums.statistics(path)
