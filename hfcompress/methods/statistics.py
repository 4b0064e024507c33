"""What the inputs of linear layers are like: means, second moments, and what the loss says about them.

Padding is left out wherever a batch says by its `attention_mask` where it is: nothing is read off it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import evaluating, examples_in, labels_of
from hfcompress.methods.registry import Batch
from hfcompress.methods.sound import mask_of_frames
from hfcompress.methods.training import sums_over_rows
from hfcompress.modeling.anatomy import module_at

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


def real_positions(model: PreTrainedModel, inputs: torch.Tensor, batch: Batch) -> torch.Tensor | None:
    """Returns which positions of what enters a layer of a model, `(..., in)`, are not padding; None: nothing tells.

    Where an encoder-decoder reads and writes as many tokens, nothing tells which of the two the inputs are, and the
    mask, which is about what it reads, leaves none out.
    """
    mask = batch.get("attention_mask")
    written = batch.get("decoder_input_ids", batch.get("labels")) if model.config.is_encoder_decoder else None
    if mask is None or mask.dim() not in (2, 3) or (written is not None and written.shape == mask.shape):
        return None
    mask = mask.flatten(0, -2)  # each of an example's choices is a row of its own
    if mask.shape != inputs.shape[:-1]:
        mask = mask_of_frames(model, mask, inputs.shape[:-1])
    return mask.bool().to(inputs.device) if mask.shape == inputs.shape[:-1] else None


def real_rows(model: PreTrainedModel, inputs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Returns what enters a layer of a model, `(..., in)`, as rows `(positions, in)` without those of padding."""
    real = real_positions(model, inputs, batch)
    return inputs.detach().flatten(0, -2) if real is None or not real.any() else inputs.detach()[real]


def remembering(batch: dict[str, torch.Tensor]) -> Callable[..., None]:
    """Returns a pre-hook, with keywords, for a model, that puts what the model is called with into `batch`."""

    def hook(module: nn.Module, arguments: Any, inputs: Batch) -> None:
        batch.clear()
        batch.update(inputs)

    return hook


def shared_inputs(model: PreTrainedModel, paths: Sequence[str], batch: Batch) -> list[list[str]]:
    """Finds which layers read one and the same tensor, by running a few rows of one batch.

    Returns:
        The groups in the order in which they first run.

    Raises:
        CompressionError: A layer was not run.
    """
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
            stack.callback(module_at(model, path).register_forward_pre_hook(watch(path)).remove)
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


class Sums:
    """Sums of one input, and of a reference's beside it.

    Attributes:
        count: Rows so far.
        sums: By name of what `InputStatistics` says of them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, rows: torch.Tensor, reference: torch.Tensor | None = None) -> None:
        """Adds rows `(positions, in)`, and what stands at the same positions in the reference."""
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
        """Returns the averages.

        Raises:
            CompressionError: They are not finite (the layer is named).
        """
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
    pending = each_batch(model, batches, "calibration")
    with LayerReader(model, paths, batches, by_outputs=by_outputs) as reader, torch.no_grad(), evaluating(model):
        for reader.batch in pending:
            model(**reader.batch)
    return reader.statistics()


class LayerReader:
    """Reads, while it is entered, what `layer_statistics` gives off the forward passes of whoever runs the model.

    Args:
        model: The model.
        paths: The layers, relative to the base model.
        batches: Model inputs; a few rows of the first are run to see which layers read the same.
        by_outputs: As for `layer_statistics`.

    Attributes:
        batch: What the model runs on, to be set before it does: it says what is padding.

    Raises:
        CompressionError: A layer is never run.
    """

    def __init__(
        self, model: PreTrainedModel, paths: Sequence[str], batches: Sequence[Batch], *, by_outputs: Sequence[str] = ()
    ) -> None:
        self.batch: Batch = {}
        self._model = model
        self._groups = shared_inputs(model, paths, batches[0]) if batches else []
        self._narrow = {group[0] for group in self._groups if len(group) == 1 and group[0] in by_outputs}
        self._sums = {group[0]: Sums() for group in self._groups}
        self._hooks = ExitStack()

    def __enter__(self) -> LayerReader:
        for path, sums in self._sums.items():
            module = module_at(self._model, path)
            if path in self._narrow:
                self._hooks.callback(module.register_forward_hook(self._outputs_into(sums)).remove)
            else:
                self._hooks.callback(module.register_forward_pre_hook(self._inputs_into(sums)).remove)
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def statistics(self) -> tuple[dict[str, InputStatistics], dict[str, torch.Tensor]]:
        """Returns what `layer_statistics` does.

        Raises:
            CompressionError: Activations that are not finite (the layer is named).
        """
        made = {leader: sums.statistics(leader) for leader, sums in self._sums.items()}
        inputs = {path: made[group[0]] for group in self._groups for path in group if group[0] not in self._narrow}
        return inputs, {path: made[path].second_moment for path in made if path in self._narrow}

    def _inputs_into(self, sums: Sums) -> Callable[..., None]:
        return lambda module, arguments: sums.add(real_rows(self._model, arguments[0], self.batch))

    def _outputs_into(self, sums: Sums) -> Callable[..., None]:
        def hook(module: Any, arguments: Any, output: torch.Tensor) -> None:
            own = output if module.bias is None else output - module.bias
            sums.add(real_rows(self._model, own, self.batch))

        return hook


def input_fisher(model: PreTrainedModel, paths: Sequence[str], batches: Sequence[Batch]) -> Mapping[str, torch.Tensor]:
    """Sums the empirical Fisher information of a layer's weights over each of its inputs.

    That is, for every column of the weight, the squared gradients of the loss, example by example, averaged over
    the examples (Hsu et al. 2022, FWSVD). Of a loss that is a mean over tokens an example has the share that its
    tokens have in the batch.

    Returns:
        For each path float32 `(in,)`.

    Raises:
        CompressionError: No batches, no labels, or gradients that are not finite (the layer is named).
    """
    fisher: dict[str, torch.Tensor] = {}
    calls: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def watch(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            calls.append((path, arguments[0].detach(), output if output.requires_grad else output.requires_grad_()))

        return hook

    examples = 0
    with ExitStack() as stack, torch.enable_grad(), evaluating(model):
        for path in paths:
            stack.callback(module_at(model, path).register_forward_hook(watch(path)).remove)
        for batch in each_batch(model, batches, "gradients"):
            calls.clear()
            loss = model(**batch).loss if labels_of(batch) is not None else None
            if loss is None:
                raise CompressionError(
                    "Fisher information needs calibration batches with labels",
                    hint="Pass calibration=[batch, ...] with a 'labels' entry, or choose another method.",
                )
            size = examples_in(batch)
            examples += size
            gradients = torch.autograd.grad(loss, [output for _, _, output in calls])
            for (path, inputs, _), gradient in zip(calls, gradients, strict=True):
                # Of a mean over the batch an example's own gradient is `size` times its part.
                found = _column_squares(inputs, gradient, size) * (1 if sums_over_rows(model) else size**2)
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
