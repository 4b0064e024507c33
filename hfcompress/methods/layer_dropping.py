"""Removes whole layers, or their attentions or feed-forward blocks: the first, the last, or those that matter least.

A model with fewer layers has the shape of its family's stock config, so it loads without this package; one whose
layers have lost blocks does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfcompress.configuration import Config
from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import are_labelled, evaluating, examples_in
from hfcompress.methods.registry import Batch, Context, Method, register
from hfcompress.methods.statistics import each_batch, real_rows
from hfcompress.modeling.anatomy import architecture_of, attention_blocks, base_model, feed_forward_blocks
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.depth import drop_layers, evenly, stack_depths
from hfcompress.modeling.surgery import remove_block, require_removable


class LayerDroppingConfig(Config):
    """Which layers to remove.

    Attributes:
        drop: How many.
        part: What goes: whole `layers`, or their `attention` or `ffn` alone, where the family runs without. What
            such a block gave on average over the calibration data stays, as a constant, in families with biases.
        which: The `first`, the `last`, `spread` evenly, or by `importance`: one after another that whose
            skipping raises the loss least, measured anew each time (without labels: that changes the outputs
            least). `auto` is `importance` where there is calibration data, else `last` (Sajjad et al. 2023).
        stack: Path of the stack in the base model, such as `encoder.block`; only where there are several.
    """

    drop: int = Field(1, ge=1, le=1000)
    part: Literal["layers", "attention", "ffn"] = "layers"
    which: Literal["auto", "importance", "first", "last", "spread"] = "auto"
    stack: str | None = None


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


def _divergence(model: PreTrainedModel, batch: Batch, outputs: Any, wanted: Any) -> torch.Tensor:
    """Says how far outputs are from those wanted, over all but padding: KL divergence of predictions, else relative
    squared error.
    """
    total = torch.zeros(())
    predictions = [name for name in outputs if name.endswith("logits") and isinstance(outputs[name], torch.Tensor)]
    for name in predictions or [next(name for name in outputs if isinstance(outputs[name], torch.Tensor))]:
        got, right = (real_rows(model, each[name], batch).float() for each in (outputs, wanted))
        if name in predictions and got.shape[-1] > 1:
            new, old = got.log_softmax(-1), right.log_softmax(-1)
            total = total + functional.kl_div(new, old, log_target=True, reduction="batchmean").cpu()
        else:
            total = total + ((got - right).square().mean() / right.square().mean().clamp_min(1e-12)).cpu()
    return total


class _Layers:
    """Runs a stack of layers without some of them.

    Layers before the one that is tried give back what they gave before, and those that are skipped are not run.

    Args:
        layers: The stack.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = layers
        self._given: list[Any] = []

    def see(self, model: PreTrainedModel, batch: Batch, gone: Sequence[int]) -> None:
        """Runs the model once without the layers that are gone, to see what each gives."""
        self._given = []

        def keep(module: nn.Module, arguments: Any, output: Any) -> None:
            self._given.append(output)

        with ExitStack() as stack:
            for number in gone:
                stack.callback(self.layers[number].register_forward_hook(_skip, with_kwargs=True).remove)
            for layer in self.layers:
                stack.callback(layer.register_forward_hook(keep).remove)
            model(**batch)

    @contextmanager
    def without(self, gone: Sequence[int], number: int) -> Iterator[None]:
        """The model is run on the batch that was seen without one more."""
        stand_ins = {
            each: partial(_given if each < number else _passed_on, self._given[each])
            for each in {*range(number + 1), *gone}
        }
        with ExitStack() as stack:
            for each, forward in stand_ins.items():
                stack.enter_context(_standing_in(self.layers[each], forward))
            yield


@contextmanager
def _standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        vars(module).pop("forward")
        if before is not None:
            module.forward = before


def _given(output: Any, *arguments: Any, **keywords: Any) -> Any:
    return output


def _passed_on(output: Any, *arguments: Any, **keywords: Any) -> Any:
    """Gives what enters a layer, in the form of what the layer gave."""
    hidden = arguments[0] if arguments else keywords["hidden_states"]
    return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])


def _skip(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> Any:
    return _passed_on(output, *arguments, **keywords)


class _Blocks:
    """Runs a model without some of its blocks, which give a constant instead.

    Args:
        outputs: Each block's last module.
        means: What enters it on average, or None.
    """

    def __init__(self, outputs: Sequence[nn.Module], means: Sequence[torch.Tensor | None]) -> None:
        self.outputs, self.means = outputs, means

    def see(self, model: PreTrainedModel, batch: Batch, gone: Sequence[int]) -> None:
        """Nothing has to be seen first."""

    @contextmanager
    def without(self, gone: Sequence[int], number: int) -> Iterator[None]:
        """The model is run without one more."""
        with ExitStack() as stack:
            for each in (*gone, number):
                hook = partial(_constant, self.means[each])
                stack.callback(self.outputs[each].register_forward_pre_hook(hook).remove)
            yield


def _constant(mean: torch.Tensor | None, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> Any:
    hidden = arguments[0]
    return (hidden * 0.0 if mean is None else mean.to(hidden).expand_as(hidden),)


class _Skipping:
    """Measures what it costs to skip layers or blocks, on calibration data.

    Args:
        model: The model.
        batches: Model inputs.
        candidates: The numbers of what may be skipped.
        parts: Makes the model do without some of them.
        tried: Is called after each that was skipped with a batch.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Batch],
        candidates: Sequence[int],
        parts: _Layers | _Blocks,
        tried: Callable[[], Any],
    ) -> None:
        self.model, self.batches, self.candidates, self.parts, self.tried = model, batches, candidates, parts, tried
        self.labelled = are_labelled(batches)
        self.found: list[dict[int, float]] = []

    def __call__(self, gone: tuple[int, ...]) -> dict[int, float]:
        totals = {number: torch.zeros(()) for number in self.candidates if number not in gone}
        with torch.no_grad(), evaluating(self.model):
            for each in self.batches:
                batch = {name: value.to(self.model.device) for name, value in each.items()}
                wanted = None if self.labelled else self.model(**batch)
                self.parts.see(self.model, batch, gone)
                for number, total in totals.items():
                    with self.parts.without(gone, number):
                        outputs = self.model(**batch)
                    cost = outputs["loss"] if self.labelled else _divergence(self.model, batch, outputs, wanted)
                    total += examples_in(batch) * cost.float().cpu()
                    self.tried()
        examples = sum(map(examples_in, self.batches))
        costs = {number: total.item() / examples for number, total in totals.items()}
        if not torch.tensor(list(costs.values())).isfinite().all():
            raise CompressionError("the cost of skipping layers is not finite", hint="Check weights and data for NaN.")
        self.found.append(costs)
        return costs


def layer_dropping(model: PreTrainedModel, config: LayerDroppingConfig, context: Context) -> dict[str, Any]:
    """Removes layers, or blocks of them, in place.

    Args:
        model: A model of a supported family; it may be compressed already, quantized too where layers go.
        config: Which layers.
        context: Calibration data for `which: importance`, and for what blocks gave on average.

    Returns:
        The stack, the layers kept (or the blocks removed), and what skipping cost where it was measured (the loss,
        or the divergence of the outputs), one mapping for each that was removed.

    Raises:
        CompressionError: As many cannot go, the stack is not clear, or there is no calibration data. Nothing was
            removed then.
    """
    depths = stack_depths(model)
    stack = config.stack or next(iter(depths))
    if stack not in depths or (config.stack is None and len(depths) > 1):
        problem = f"has no stack '{stack}'" if stack not in depths else "has several stacks of layers: name one"
        raise CompressionError(f"the model {problem}; allowed: {', '.join(depths)}")
    if config.part != "layers":
        return _drop_blocks(model, stack, config, context)
    depth = depths[stack]
    if config.drop >= depth:
        raise CompressionError(f"{config.drop} of {depth} layers cannot be dropped; reachable: up to {depth - 1}")
    spec = next(each for each in architecture_of(model).stacks if each.layers == stack)
    if config.which == "importance" and spec.shared:
        raise CompressionError(f"{stack}: its layers are one and the same: none is less important")
    parts = None
    if not spec.shared:  # else the path may stand for several lists
        layers: Any = base_model(model).get_submodule(stack)
        parts = _Layers(layers)
    candidates = range(1 if spec.first_stays else 0, depth)
    kept, findings = _choose(model, config, context, depth, candidates, parts)
    drop_layers(model, kept, stack=stack)
    commit(model)
    return {"stack": stack} | findings | {"kept": kept}


def _choose(
    model: PreTrainedModel,
    config: LayerDroppingConfig,
    context: Context,
    count: int,
    candidates: Sequence[int],
    parts: _Layers | _Blocks | None,
) -> tuple[list[int], dict[str, Any]]:
    """Returns which of `count` stay, ascending, and how that was found out."""
    which = config.which
    if which == "auto":
        which = "importance" if context.calibration and parts else "last"
    findings: dict[str, Any] = {"which": which, "of": count}
    if which != "importance" or parts is None:
        ranges = {"first": range(config.drop, count), "last": range(count - config.drop)}
        return evenly(count, count - config.drop) if which == "spread" else list(ranges[which]), findings
    if not context.calibration:
        raise CompressionError(
            "which: importance needs calibration data, and there is none",
            hint="Pass calibration=[batch, ...], or choose 'last', 'first' or 'spread'.",
        )
    if config.drop > len(candidates):
        raise CompressionError(
            f"{config.drop} layers cannot be dropped: the first must stay; reachable: up to {len(candidates)}"
        )
    trials = len(context.calibration) * sum(len(candidates) - gone for gone in range(config.drop))
    with tqdm(total=trials, desc="skipping", leave=False) as bar:
        cost = _Skipping(model, context.calibration, candidates, parts, bar.update)
        kept = least_important(count, config.drop, cost)
    return kept, findings | {"measure": "loss" if cost.labelled else "divergence", "costs": cost.found}


# Blocks of layers


def _drop_blocks(model: PreTrainedModel, stack: str, config: LayerDroppingConfig, context: Context) -> dict[str, Any]:
    every = attention_blocks(model) if config.part == "attention" else feed_forward_blocks(model)
    blocks = [block for block in every if block.stack.layers == stack]
    if config.drop >= len(blocks):
        raise CompressionError(
            f"{config.drop} of {len(blocks)} blocks ({config.part}) cannot be dropped; "
            f"reachable: up to {max(0, len(blocks) - 1)}"
        )
    for block in blocks:
        require_removable(block)
    outputs = [block.at(block.spec.output) for block in blocks]
    means: Sequence[torch.Tensor | None] = [None] * len(blocks)
    if context.calibration:
        found = _mean_inputs(model, outputs, [block.name for block in blocks], context.calibration)
        # Without a bias nothing can stay, and a block is to be judged by what removing it leaves.
        means = [mean if module.bias is not None else None for mean, module in zip(found, outputs, strict=True)]

    kept, findings = _choose(model, config, context, len(blocks), range(len(blocks)), _Blocks(outputs, means))
    gone = [number for number in range(len(blocks)) if number not in kept]
    for number in gone:
        remove_block(blocks[number], means[number])
    commit(model)
    return {"stack": stack} | findings | {"removed": [blocks[number].name for number in gone]}


def _mean_inputs(
    model: PreTrainedModel, modules: Sequence[nn.Module], names: Sequence[str], batches: Sequence[Batch]
) -> list[torch.Tensor]:
    """Averages what enters each module over all real positions: `(in,)`, float32."""
    totals: list[torch.Tensor | float] = [0.0] * len(modules)
    counts = [0] * len(modules)
    current: Batch = {}

    def watch(number: int) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            rows = real_rows(model, arguments[0], current)
            totals[number] = totals[number] + rows.double().sum(0)
            counts[number] += len(rows)

        return hook

    with ExitStack() as stack, torch.no_grad(), evaluating(model):
        for number, module in enumerate(modules):
            stack.callback(module.register_forward_pre_hook(watch(number)).remove)
        for current in each_batch(model, batches, "calibration"):
            model(**current)
    means = [torch.as_tensor(total) / max(1, count) for total, count in zip(totals, counts, strict=True)]
    for mean, name in zip(means, names, strict=True):
        if not torch.isfinite(mean).all():
            raise CompressionError(f"{name}: the calibration activations are not finite")
    return [mean.float() for mean in means]


register(
    Method(
        name="layer_dropping",
        config=LayerDroppingConfig,
        summary="Removes whole layers, which then need no plugin to load, or their attentions or FFNs.",
        apply=layer_dropping,
        needs_float=False,
    )
)
