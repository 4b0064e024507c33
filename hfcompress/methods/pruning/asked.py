"""What is asked of structured pruning: its config, the target it stands for, and the removal itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from hfcompress.configuration import Config
from hfcompress.methods.pruning.latency import latency_target, workload
from hfcompress.methods.pruning.reconstruction import Reconstruction
from hfcompress.methods.pruning.targets import Target, target_of
from hfcompress.methods.pruning.units import Units, require_untied, total_cost
from hfcompress.methods.registry import Context
from hfcompress.modeling.checkpoint import commit


class StructuredPruningConfig(Config):
    """What to remove, and when.

    Attributes:
        heads: Share of all attention heads to remove (under grouped-query attention: of key-value heads with
            the queries that read them). At least one stays in every layer.
        neurons: Share of all FFN neurons to remove.
        flops: Share of the layers' multiply-adds to remove, counted at 128 tokens, instead of `heads` and
            `neurons`: these then compete by importance per multiply-add.
        parameters: The same for the layers' parameters.
        bytes: The same for bytes, as a share of those of all the model's weights: embeddings count, and stay.
        latency: Share of the time of a forward pass on this machine to remove, instead: what each block takes at
            each size is measured first (once; the table is kept beside the run), and what is kept is the most
            important that fits into the time. Other than every other target it depends on the machine.
        latency_batch: Examples of the batch that time is measured with.
        latency_tokens: Their length, where the model reads text.
        importance: How units are ranked. At once: `fisher` and `taylor` by the loss (they need labels),
            `activation` by what they pass on (needs calibration data), `magnitude` by their weights; `auto` is
            `fisher`, `activation` or `magnitude`, the first that the calibration data allows. `fisher` also
            exchanges units within a layer so that those removed matter least together. In training: `taylor`
            (which is `auto`), `movement` by how far weights move away from 0, `magnitude`, or `l0`: a gate for each
            unit that is learnt with the weights, under a Lagrangian towards the target (CoFi, Xia et al. 2022).
        reconstruct: Whether, at once, the weights that read what is left are fitted to give what they gave before
            (least squares on the calibration data); `auto` does so where there is calibration data.
        precision: At once, `bf16` runs the model over calibration data in bfloat16 under autocast; `auto` does so
            where the hardware is fast at it. Weights and least squares stay as they are.
        multiple_of: Each layer keeps a multiple of this many neurons: kernels are slower at odd widths.
        begin: Share of the training after which the first units are masked.
        end: Share of the training after which the masks are final; the rest is fine-tuning. Gates are asked for
            the whole target from half-way between the two.
        interval: Steps between two looks at the masks.
    """

    heads: float = Field(0.0, ge=0, lt=1)
    neurons: float = Field(0.0, ge=0, lt=1)
    flops: float = Field(0.0, ge=0, lt=1)
    parameters: float = Field(0.0, ge=0, lt=1)
    bytes: float = Field(0.0, ge=0, lt=1)
    latency: float = Field(0.0, ge=0, lt=1)
    latency_batch: int = Field(8, ge=1, le=4096)
    latency_tokens: int = Field(128, ge=1, le=1 << 20)
    importance: Literal["auto", "fisher", "taylor", "activation", "magnitude", "movement", "l0"] = "auto"
    reconstruct: bool | Literal["auto"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    multiple_of: int = Field(8, ge=1, le=1024)
    begin: float = Field(0.1, ge=0, lt=1)
    end: float = Field(0.6, gt=0, le=1)
    interval: int = Field(10, ge=1)

    @model_validator(mode="after")
    def _something_to_remove(self) -> Self:
        named = [name for name in ("flops", "parameters", "bytes", "latency") if getattr(self, name)]
        if not (self.heads or self.neurons or named):
            raise ValueError(
                "heads, neurons, flops, parameters, bytes and latency are all 0: there is nothing to remove"
            )
        if len(named) > 1 or (named and (self.heads or self.neurons)):
            raise ValueError(f"{named[0]} is a target of its own: set it alone, or heads and neurons without it")
        if self.begin >= self.end:
            raise ValueError(f"begin ({self.begin}) must be before end ({self.end})")
        return self


def why_not(config: StructuredPruningConfig, trains: bool) -> str | None:
    """Says why a config cannot work in training, or at once, and what would; None where it can."""
    if not trains and config.importance in ("movement", "l0"):
        return f"importance '{config.importance}' exists only in training: add `training`, or choose 'fisher'"
    if trains and config.importance in ("activation", "fisher"):
        return (
            f"importance '{config.importance}' exists only without training; in training choose 'taylor', 'movement', "
            "'magnitude' or 'l0'; 'auto' is 'taylor'"
        )
    if config.importance == "l0" and config.latency:
        return (
            "importance 'l0' cannot work towards a latency target; set heads, neurons, flops, parameters or bytes, or "
            "choose 'taylor'"
        )
    return None


def target_for(model: PreTrainedModel, config: StructuredPruningConfig, context: Context) -> Target:
    """Returns what is to go.

    Args:
        model: The model.
        config: What was asked.
        context: Calibration data, and where tables of what took long may be kept.

    Raises:
        CompressionError: The model is quantized or its layers share weights, or less would be left than must be.
    """
    if config.latency:
        inputs = workload(model, config.latency_batch, config.latency_tokens, context.calibration)
        tables = context.cache_dir / "pruning" if context.cache_dir else None
        target: Target = latency_target(model, config.latency, config.multiple_of, inputs, tables)
    else:
        target = target_of(
            model,
            heads=config.heads,
            neurons=config.neurons,
            flops=config.flops,
            parameters=config.parameters,
            bytes=config.bytes,
            multiple_of=config.multiple_of,
        )
    require_untied(model, target.units)
    target.require_reachable()
    return target


def shrink(
    model: PreTrainedModel, target: Target, kept: Sequence[torch.Tensor], made: Reconstruction | None = None
) -> dict[str, Any]:
    """Removes all units but those in `kept`, for each of the target's units, and returns what there is to say of it."""
    units = target.units
    before = total_cost(units, "flops")
    findings: dict[str, Any] = {name: {} for name in target.groups}
    for position, (each, index) in enumerate(zip(units, kept, strict=True)):
        findings["heads" if each.are_heads else "neurons"][each.block.name] = {"kept": len(index), "of": each.count}
        if len(index) == each.count:
            continue
        each.shrink(index.cpu())
        if made is not None and position in made.fits:
            each.assign(made.fits[position].weight, made.fits[position].bias)
    commit(model)
    after = total_cost([Units(each.block) for each in units], "flops")
    return findings | target.findings(kept) | {"flops_removed": round(1 - after / before, 4)}
