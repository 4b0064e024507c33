"""Removes whole layers: the first, the last, some in between, or those that matter least when skipped.

The result has the shape of its family's stock config with fewer layers, so it loads without this package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from hfcompress.configuration import Config
from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import evaluating, run_batches
from hfcompress.methods.registry import Batch, Context, Method, register
from hfcompress.modeling.anatomy import architecture_of, base_model
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.surgery import drop_layers, stack_depths


class LayerDroppingConfig(Config):
    """Which layers to remove.

    Attributes:
        drop: How many.
        which: The `first`, the `last`, `spread` evenly, or by `importance`: one after another that whose
            skipping raises the loss least, measured anew each time (without labels: that changes the outputs
            least). `auto` is `importance` where there is calibration data, else `last` (Sajjad et al. 2023).
        stack: Path of the stack in the base model, such as `encoder.block`; only where there are several.
    """

    drop: int = Field(1, ge=1, le=1000)
    which: Literal["auto", "importance", "first", "last", "spread"] = "auto"
    stack: str | None = None


def spread(depth: int, drop: int) -> list[int]:
    """Returns the layers that stay when `drop` of `depth` go evenly: ascending, the first always among them."""
    kept = depth - drop
    return [number * depth // kept for number in range(kept)]


def least_important(depth: int, drop: int, cost: Callable[[tuple[int, ...]], dict[int, float]]) -> list[int]:
    """Removes one layer after another, each time that which costs least beside those already gone.

    Args:
        depth: Number of layers.
        drop: How many to remove.
        cost: Tells, given the layers already gone, what removing each further one costs.

    Returns:
        The layers that stay, ascending.
    """
    gone: tuple[int, ...] = ()
    for _ in range(drop):
        costs = cost(gone)
        gone = (*gone, min(costs, key=lambda number: (costs[number], -number)))
    return [number for number in range(depth) if number not in gone]


def _divergence(outputs: Any, wanted: Any) -> torch.Tensor:
    """Says how far outputs are from those wanted: KL divergence of predictions, else relative squared error."""
    total = torch.zeros(())
    predictions = [name for name in outputs if name.endswith("logits") and isinstance(outputs[name], torch.Tensor)]
    for name in predictions or [next(name for name in outputs if isinstance(outputs[name], torch.Tensor))]:
        got, right = outputs[name].float(), wanted[name].float()
        if name in predictions and got.shape[-1] > 1:
            logs = [each.log_softmax(-1).flatten(0, -2) for each in (got, right)]
            total = total + functional.kl_div(*logs, log_target=True, reduction="batchmean").cpu()
        else:
            total = total + ((got - right).square().mean() / right.square().mean().clamp_min(1e-12)).cpu()
    return total


def _skip(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
    hidden = arguments[0] if arguments else keywords["hidden_states"]
    return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])


class _Skipping:
    """Measures what it costs to skip layers, on calibration data."""

    def __init__(self, model: PreTrainedModel, stack: str, batches: Sequence[Batch], candidates: Sequence[int]) -> None:
        self.model, self.batches, self.candidates = model, batches, candidates
        self.layers: Any = base_model(model).get_submodule(stack)
        self.labelled = bool(batches) and all("labels" in batch for batch in batches)
        self.found: list[dict[int, float]] = []

    def __call__(self, gone: tuple[int, ...]) -> dict[int, float]:
        totals = {number: torch.zeros(()) for number in self.candidates if number not in gone}
        with torch.no_grad(), evaluating(self.model):
            for batch in self.batches:
                wanted = None if self.labelled else self._run(batch, ())
                for number, total in totals.items():
                    outputs = self._run(batch, (*gone, number))
                    total += outputs["loss"].float().cpu() if self.labelled else _divergence(outputs, wanted)
        costs = {number: total.item() / len(self.batches) for number, total in totals.items()}
        if not torch.tensor(list(costs.values())).isfinite().all():
            raise CompressionError("the cost of skipping layers is not finite", hint="Check weights and data for NaN.")
        self.found.append(costs)
        return costs

    def _run(self, batch: Batch, skipped: Sequence[int]) -> Any:
        with ExitStack() as stack:
            for number in skipped:
                handle = self.layers[number].register_forward_hook(_skip, with_kwargs=True)
                stack.callback(handle.remove)
            (outputs,) = run_batches(self.model, [batch], description="skipping")
            return outputs


def layer_dropping(model: PreTrainedModel, config: LayerDroppingConfig, context: Context) -> dict[str, Any]:
    """Removes layers in place.

    Args:
        model: A model of a supported family; it may be compressed already, quantized too.
        config: Which layers.
        context: Calibration data for `which: importance`.

    Returns:
        The stack, the layers kept, and what skipping cost where it was measured (the loss, or the divergence of
        the outputs), one mapping for each layer removed.

    Raises:
        CompressionError: As many layers cannot go, the stack is not clear, or there is no calibration data.
    """
    depths = stack_depths(model)
    stack = config.stack or next(iter(depths))
    if stack not in depths or (config.stack is None and len(depths) > 1):
        problem = f"has no stack '{stack}'" if stack not in depths else "has several stacks of layers: name one"
        raise CompressionError(f"the model {problem}; allowed: {', '.join(depths)}")
    depth = depths[stack]
    if config.drop >= depth:
        raise CompressionError(f"{config.drop} of {depth} layers cannot be dropped; reachable: up to {depth - 1}")
    spec = next(each for each in architecture_of(model).stacks if each.layers == stack)
    which = config.which
    if which == "auto":
        which = "importance" if context.calibration and not spec.shared else "last"
    findings: dict[str, Any] = {"stack": stack, "which": which, "of": depth}
    if which == "importance":
        if spec.shared:
            raise CompressionError(f"{stack}: its layers are one and the same: none is less important")
        if not context.calibration:
            raise CompressionError(
                "which: importance needs calibration data, and there is none",
                hint="Pass calibration=[batch, ...], or choose 'last', 'first' or 'spread'.",
            )
        candidates = range(1 if spec.first_stays else 0, depth)
        if config.drop > len(candidates):
            raise CompressionError(
                f"{config.drop} layers cannot be dropped: the first must stay; reachable: up to {len(candidates)}"
            )
        cost = _Skipping(model, stack, context.calibration, candidates)
        kept = least_important(depth, config.drop, cost)
        findings |= {"measure": "loss" if cost.labelled else "divergence", "costs": cost.found}
    else:
        ranges = {"first": range(config.drop, depth), "last": range(depth - config.drop)}
        kept = spread(depth, config.drop) if which == "spread" else list(ranges[which])
    drop_layers(model, kept, stack=stack)
    commit(model)
    return findings | {"kept": kept}


register(
    Method(
        name="layer_dropping",
        config=LayerDroppingConfig,
        summary="Removes whole layers; the result needs no plugin to load.",
        apply=layer_dropping,
        needs_float=False,
    )
)
