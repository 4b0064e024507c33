"""Prunes the hidden width: whole dimensions of the residual stream, from every matrix that shares it.

The result is what its family's stock config of that width builds, so it loads without this package. A cut through
everything costs much at once: let training follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from hfcompress.configuration import Config
from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import are_labelled, run_batches
from hfcompress.methods.pruning import importance
from hfcompress.methods.pruning.search import keep_the_best
from hfcompress.methods.pruning.units import head_units
from hfcompress.methods.registry import Batch, Context, Method, register
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.width import cut_width, heads_are_shared, residual_tensors, width_step


class WidthPruningConfig(Config):
    """How narrow the model becomes.

    Attributes:
        remove: Share of the hidden width to remove, to the nearest width that the stock config can express.
        width: The hidden width itself, instead.
        importance: How dimensions, and the heads that go with them where a family's heads fill its width, are
            ranked: `taylor` by what the loss says of the weights that hold a dimension (Michel et al. 2019; needs
            labels), `magnitude` by the size of those weights; `auto` is `taylor` where there are labels. Where all
            layers share a position bias by head (MPNet), the same heads go everywhere.
    """

    remove: float = Field(0.25, gt=0, lt=1)
    width: int | None = Field(None, ge=1)
    importance: Literal["auto", "taylor", "magnitude"] = "auto"

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        if self.width is not None and "remove" in self.model_fields_set:
            raise ValueError("width says how much goes: leave remove out")
        return self


def _along(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Sums a tensor over all dimensions but one."""
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1).sum(1)


def magnitude(tensors: Sequence[tuple[torch.Tensor, Sequence[int]]]) -> torch.Tensor:
    """Adds up, over the tensors, the share of its squared size that lies in each dimension.

    Args:
        tensors: Each with the dimensions that are the residual stream's.

    Returns:
        `(width,)`.
    """
    scores = torch.zeros(())
    for tensor, dims in tensors:
        square = tensor.detach().float().square()
        for dim in dims:
            own = _along(square, dim)
            scores = scores + own / own.sum().clamp_min(torch.finfo(torch.float32).tiny)
    return scores


def taylor(model: PreTrainedModel, dimensions: dict[str, tuple[int, ...]], batches: Sequence[Batch]) -> torch.Tensor:
    """Averages, over batches, the size of the loss's derivative by a factor on each dimension's weights.

    Returns:
        `(width,)`.

    Raises:
        CompressionError: The model returns no loss, or derivatives are not finite.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    trained = {name: dims for name, dims in dimensions.items() if name in named and named[name].requires_grad}
    if not trained:
        raise CompressionError(
            "all weights are frozen, so that the loss says nothing about them",
            hint="Call model.requires_grad_(True), or choose importance 'magnitude'.",
        )
    weights = [named[name] for name in trained]
    scores = torch.zeros(())
    with torch.enable_grad():
        for outputs in run_batches(model, batches, description="scoring"):
            loss = outputs.get("loss")
            if loss is None:
                raise CompressionError("the model returns no loss for the calibration batches")
            effect = torch.zeros(())
            for weight, slope, dims in zip(
                weights, torch.autograd.grad(loss, weights, allow_unused=True), trained.values(), strict=True
            ):
                for dim in () if slope is None else dims:
                    effect = effect + _along((weight.detach() * slope).float(), dim)
            scores = scores + effect.abs().cpu()
    if not torch.isfinite(scores).all():
        raise CompressionError(
            "the importance of the hidden width is not finite", hint="Check weights and data for NaN."
        )
    return scores


def width_pruning(model: PreTrainedModel, config: WidthPruningConfig, context: Context) -> dict[str, Any]:
    """Makes a model narrower, in place.

    A decoder beside an encoder (`add_cross_attention`) reads states of the new width from then on.

    Args:
        model: A float model of stock shapes and a supported family.
        config: How narrow.
        context: Calibration data with `labels` for `importance: taylor`.

    Returns:
        The importance used, and the width before and after.

    Raises:
        CompressionError: The stock config cannot express such a width, the model was compressed otherwise before,
            labels are missing, or scores are not finite or all the same. Nothing was changed then.
    """
    step, before = width_step(model), int(model.config.hidden_size)
    wanted = config.width or max(step, round(before * (1 - config.remove) / step) * step)
    if wanted % step or wanted >= before:
        raise CompressionError(
            f"the hidden width cannot go from {before} to {wanted}; reachable: multiples of {step} below {before}"
        )
    labelled = are_labelled(context.calibration)
    ranking = config.importance
    if ranking == "auto":
        ranking = "taylor" if labelled else "magnitude"
    if ranking == "taylor" and not labelled:
        raise CompressionError(
            "importance 'taylor' needs calibration batches with labels",
            hint="Pass calibration=[batch, ...] with a 'labels' entry, or choose 'magnitude'.",
        )
    dimensions = residual_tensors(model, wanted)
    units = [each for each in head_units(model) if each.block.spec.head_dim_field is None]  # type: ignore[union-attr]
    if ranking == "taylor":
        scores = taylor(model, dimensions, context.calibration)
        slopes = importance.mask_gradients(model, units, context.calibration) if units else []
        of_heads = [importance.taylor(each) for each in slopes]
    else:
        tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
        scores = magnitude([(tensors[name], dims) for name, dims in dimensions.items()])
        of_heads = [importance.magnitude(each) for each in units]
    if not torch.isfinite(scores).all():
        raise CompressionError("the importance of the hidden width is not finite", hint="Check the weights for NaN.")
    if (scores == scores[0]).all():
        raise CompressionError("all dimensions are equally important: nothing says which to remove")
    if heads_are_shared(model):
        of_heads = [torch.stack(of_heads).sum(0)] * len(units)
    heads = {
        each.block.name: keep_the_best(score, wanted // each.block.head_dim).tolist()  # type: ignore[union-attr]
        for each, score in zip(units, of_heads, strict=True)
    }
    cut_width(model, keep_the_best(scores, wanted), heads)
    commit(model)
    return {"importance": ranking, "width": {"kept": wanted, "of": before}}


register(
    Method(
        name="width_pruning",
        config=WidthPruningConfig,
        summary="Removes dimensions of the hidden width everywhere; the result needs no plugin to load.",
        apply=width_pruning,
    )
)
