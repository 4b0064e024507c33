"""Structured pruning of attention heads and FFN neurons: at once, or gradually while training.

While training, masks stand for what is going to be removed; the model shrinks once, at the end. So shapes never
change in flight, and data-parallel training, resuming and best-model selection work as in any Trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.configuration import Config
from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import run_batches
from hfcompress.methods.registry import Context, Method, register
from hfcompress.methods.training import Part
from hfcompress.modeling.anatomy import (
    AttentionBlock,
    FeedForwardBlock,
    attention_blocks,
    feed_forward_blocks,
)
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.layers.bitsandbytes import kind_of
from hfcompress.modeling.layers.low_rank import LowRankLinear
from hfcompress.modeling.surgery import shrink_attention, shrink_feed_forward


class StructuredPruningConfig(Config):
    """What to remove, and when.

    Attributes:
        heads: Share of all attention heads to remove (under grouped-query attention: of key-value heads with
            the queries that read them). At least one stays in every layer.
        neurons: Share of all FFN neurons to remove.
        importance: How units are ranked when pruning at once: `taylor` by the loss (needs labels), `activation`
            by what they pass on (needs calibration data), `magnitude` by their weights; `auto` is the first that
            the calibration data allows. In training it is always `taylor`.
        multiple_of: Each layer keeps a multiple of this many neurons: kernels are slower at odd widths.
        begin: Share of the training after which the first units are masked.
        end: Share of the training after which the masks are final; the rest is fine-tuning.
        interval: Steps between two looks at the masks.
    """

    heads: float = Field(0.0, ge=0, lt=1)
    neurons: float = Field(0.0, ge=0, lt=1)
    importance: Literal["auto", "taylor", "activation", "magnitude"] = "auto"
    multiple_of: int = Field(8, ge=1, le=1024)
    begin: float = Field(0.1, ge=0, lt=1)
    end: float = Field(0.6, gt=0, le=1)
    interval: int = Field(10, ge=1)

    @model_validator(mode="after")
    def _something_to_remove(self) -> Self:
        if self.heads == 0 and self.neurons == 0:
            raise ValueError("heads and neurons are both 0: there is nothing to remove")
        if self.begin >= self.end:
            raise ValueError(f"begin ({self.begin}) must be before end ({self.end})")
        return self


# Pure functions over scores


def cubic_share(target: float, step: int, begin: int, end: int) -> float:
    """Share removed at a step: rises from 0 to `target`, fast first (Zhu and Gupta 2017)."""
    if step < begin:
        return 0.0
    if step >= end:
        return target
    return target * (1 - (1 - (step - begin) / (end - begin)) ** 3)


def select(scores: Sequence[torch.Tensor], removed: float, multiple_of: int = 1) -> list[torch.Tensor]:
    """Chooses the most important units over all layers together.

    Units of a layer are taken from the most important down, in blocks of `multiple_of`; blocks of all layers
    compete by their mean score. Every layer keeps at least one block.

    Args:
        scores: For each layer float `(units,)`, comparable between layers.
        removed: Share of all units to remove; the number kept is the nearest that whole blocks allow.
        multiple_of: Size of a block; the last block of a layer may be smaller.

    Returns:
        For each layer the kept units, int64, ascending.
    """
    total = sum(len(layer) for layer in scores)
    wanted = round(total * (1 - removed))
    ranked = [torch.argsort(layer, descending=True, stable=True) for layer in scores]
    blocks: list[tuple[float, int, int]] = []
    kept_blocks = [1] * len(scores)
    for index, (layer, order) in enumerate(zip(scores, ranked, strict=True)):
        for place, block in enumerate(order.split(multiple_of)):
            if place:
                blocks.append((-layer[block].double().mean().item(), index, place))
    kept = sum(min(multiple_of, len(layer)) for layer in scores)
    for _, index, _place in sorted(blocks):
        size = min(multiple_of, len(scores[index]) - kept_blocks[index] * multiple_of)
        if kept + size / 2 > wanted:
            break
        kept_blocks[index] += 1
        kept += size
    return [order[: count * multiple_of].sort().values for order, count in zip(ranked, kept_blocks, strict=True)]


# Units of a live model


class _Units:
    """What can be removed from one block, seen at the inputs of the block's output projection.

    A unit (head or neuron) is a run of `width` neighbouring inputs; multiplying them by 0 is removing it.
    """

    def __init__(self, block: AttentionBlock | FeedForwardBlock) -> None:
        self.block = block
        output = block.at(block.spec.output)
        self.entry = output.down if isinstance(output, LowRankLinear) else output
        if kind_of(self.entry):
            raise CompressionError(f"{block.name}: the model is quantized", hint="Prune before quantizing.")
        if isinstance(block, AttentionBlock):
            self.count, self.width = block.heads, block.head_dim * block.queries_per_head
        else:
            self.count, self.width = block.neurons, 1

    def shrink(self, kept: torch.Tensor) -> None:
        if isinstance(self.block, AttentionBlock):
            shrink_attention(self.block, kept.tolist())
        else:
            shrink_feed_forward(self.block, kept.tolist())

    def fold(self, per_input: torch.Tensor) -> torch.Tensor:
        """Sums over the inputs of each unit."""
        return per_input.view(self.count, self.width).sum(1)

    def weight_and_gradient(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight = self.entry.weight
        gradient = weight.grad
        if isinstance(self.entry, Conv1D):  # keeps its weight as (in, out)
            return weight.detach().T, None if gradient is None else gradient.T
        return weight.detach(), gradient

    def squared_effect(self) -> torch.Tensor:
        """Squared derivative of the loss by a factor on each unit, `(count,)`.

        The derivative by a factor on input j of `y = W x` is `sum_i W_ij dL/dW_ij`: it is there after any
        backward pass, at no cost (Michel et al. 2019; its square is the empirical Fisher of Kwon et al. 2022).
        """
        weight, gradient = self.weight_and_gradient()
        if gradient is None:
            return torch.zeros(self.count)
        return self.fold((weight.float() * gradient.float()).sum(0)).square()


def _groups(model: PreTrainedModel, config: StructuredPruningConfig) -> dict[str, tuple[list[_Units], float, int]]:
    """Returns for each kind of unit its layers, the share to remove and the block size."""
    groups: dict[str, tuple[list[_Units], float, int]] = {}
    if config.heads:
        groups["heads"] = ([_Units(block) for block in attention_blocks(model)], config.heads, 1)
    if config.neurons:
        units = [_Units(block) for block in feed_forward_blocks(model)]
        groups["neurons"] = (units, config.neurons, config.multiple_of)
    return groups


def _shrink(model: PreTrainedModel, kept: Mapping[str, Sequence[torch.Tensor]], groups: Any) -> dict[str, Any]:
    findings: dict[str, Any] = {}
    for name, (units, _, _) in groups.items():
        findings[name] = {
            each.block.name: {"kept": len(index), "of": each.count}
            for each, index in zip(units, kept[name], strict=True)
        }
        for each, index in zip(units, kept[name], strict=True):
            if len(index) < each.count:
                each.shrink(index.cpu())
    commit(model)
    return findings


# At once


def _scores(model: PreTrainedModel, units: Sequence[_Units], importance: str, context: Context) -> list[torch.Tensor]:
    if importance == "magnitude":
        return [each.fold(each.weight_and_gradient()[0].float().square().sum(0)) for each in units]
    totals = [torch.zeros(each.count) for each in units]
    if importance == "taylor":
        for outputs in run_batches(model, context.calibration, description="scoring"):
            model.zero_grad(set_to_none=True)
            outputs.loss.backward()
            for total, each in zip(totals, units, strict=True):
                total += each.squared_effect().cpu()
        model.zero_grad(set_to_none=True)
        return totals

    def watch(total: torch.Tensor, each: _Units) -> Any:
        norms = each.weight_and_gradient()[0].float().square().sum(0)

        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            energy = arguments[0].detach().flatten(0, -2).float().square().mean(0)
            total.add_(each.fold(energy * norms).cpu())

        return hook

    handles = [
        each.entry.register_forward_pre_hook(watch(total, each)) for total, each in zip(totals, units, strict=True)
    ]
    try:
        with torch.no_grad():
            for _ in run_batches(model, context.calibration, description="scoring"):
                pass
    finally:
        for handle in handles:
            handle.remove()
    return totals


def structured_pruning(model: PreTrainedModel, config: StructuredPruningConfig, context: Context) -> dict[str, Any]:
    """Removes heads and neurons at once, in place.

    Args:
        model: A float model of a supported family.
        config: What to remove.
        context: Calibration data, with `labels` for `importance: taylor`.

    Returns:
        The importance used, and how many units each layer keeps.

    Raises:
        CompressionError: The model is quantized, calibration data or labels are missing, or scores are not finite.
    """
    labelled = bool(context.calibration) and "labels" in context.calibration[0]
    importance = config.importance
    if importance == "auto":
        importance = "taylor" if labelled else "activation" if context.calibration else "magnitude"
    if importance == "taylor" and not labelled:
        raise CompressionError(
            "importance 'taylor' needs calibration batches with labels",
            hint="Pass calibration=[batch, ...] with a 'labels' entry, or choose 'activation' or 'magnitude'.",
        )
    groups = _groups(model, config)
    every = [each for units, _, _ in groups.values() for each in units]
    scores = iter(_scores(model, every, importance, context))
    kept: dict[str, list[torch.Tensor]] = {}
    for name, (units, share, multiple) in groups.items():
        layers = [next(scores) for _ in units]
        if not all(torch.isfinite(layer).all() for layer in layers):
            raise CompressionError(f"the importance of {name} is not finite", hint="Check weights and data for NaN.")
        kept[name] = select(layers, share, multiple)
    return {"importance": importance, **_shrink(model, kept, groups)}


# In training


class PruningPart(Part):
    """Masks the least important units step by step, and removes them when training ends."""

    def __init__(self, config: StructuredPruningConfig) -> None:
        self.config = config
        self._handles: list[Any] = []

    def begin(self, model: PreTrainedModel, total_steps: int, device: torch.device) -> None:
        """Puts an open mask before every output projection."""
        self._groups = _groups(model, self.config)
        self._first, self._last = int(self.config.begin * total_steps), int(self.config.end * total_steps)
        self._scores = {
            name: [torch.zeros(each.count, device=device) for each in units]
            for name, (units, _, _) in self._groups.items()
        }
        self._masks = {
            name: [torch.ones(each.count, device=device) for each in units]
            for name, (units, _, _) in self._groups.items()
        }
        for name, (units, _, _) in self._groups.items():
            for mask, each in zip(self._masks[name], units, strict=True):
                self._handles.append(each.entry.register_forward_pre_hook(_masking(mask, each.width)))

    def before_optimizer_step(self, step: int) -> None:
        """Takes up what this step's gradients say about each unit."""
        if step >= self._last:
            return
        for name, (units, _, _) in self._groups.items():
            for score, each in zip(self._scores[name], units, strict=True):
                # A moving average over about twenty steps: old gradients are those of another model.
                score.mul_(0.95).add_(each.squared_effect().to(score.device))

    def after_step(self, step: int) -> None:
        """Masks more units where the schedule says so; masked ones get no gradient and stay masked."""
        due = self._first <= step <= self._last and (step % self.config.interval == 0 or step == self._last)
        if not due:
            return
        for name, (_, share, multiple) in self._groups.items():
            removed = cubic_share(share, step, self._first, self._last)
            open_only = [
                torch.where(mask > 0, score, -1.0)
                for score, mask in zip(self._scores[name], self._masks[name], strict=True)
            ]
            for mask, kept in zip(self._masks[name], select(open_only, removed, multiple), strict=True):
                chosen = torch.zeros_like(mask)
                chosen[kept] = 1.0
                mask.mul_(chosen)

    def settled(self, step: int) -> bool:
        """The masks are final."""
        return step >= self._last

    def end(self, model: PreTrainedModel) -> dict[str, Any]:
        """Takes the masks off and removes what they covered."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        kept = {name: [mask.nonzero().flatten() for mask in masks] for name, masks in self._masks.items()}
        return _shrink(model, kept, self._groups)

    def state(self) -> dict[str, torch.Tensor]:
        """Masks and scores."""
        return {
            f"{what}.{name}.{index}": tensor.cpu()
            for what, groups in (("masks", self._masks), ("scores", self._scores))
            for name, tensors in groups.items()
            for index, tensor in enumerate(tensors)
        }

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes masks and scores back, in place: the hooks hold the masks."""
        for key, value in state.items():
            what, name, index = key.split(".")
            groups = self._masks if what == "masks" else self._scores
            groups[name][int(index)].copy_(value)


def _masking(mask: torch.Tensor, width: int) -> Any:
    def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (arguments[0] * mask.repeat_interleave(width).to(arguments[0].dtype),)

    return hook


register(
    Method(
        name="structured_pruning",
        config=StructuredPruningConfig,
        summary="Removes attention heads and FFN neurons, at once or gradually in training.",
        apply=structured_pruning,
        part=lambda config, context: PruningPart(config),
    )
)
