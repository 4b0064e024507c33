"""Structured pruning of attention heads and FFN neurons: at once, or gradually while training.

While training, masks stand for what is going to be removed; the model shrinks once, at the end. So shapes never
change in flight, and data-parallel training, resuming and best-model selection work as in any Trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from hfcompress.configuration import Config
from hfcompress.errors import CompressionError
from hfcompress.methods.pruning import importance
from hfcompress.methods.pruning.gates import Gates, open_probability, split, typical
from hfcompress.methods.pruning.latency import latency_target, workload
from hfcompress.methods.pruning.reconstruction import Reconstruction, reconstruct
from hfcompress.methods.pruning.search import cubic_share, rearrange
from hfcompress.methods.pruning.search import select as select
from hfcompress.methods.pruning.targets import Target, target_of
from hfcompress.methods.pruning.units import Units, masking, total_cost
from hfcompress.methods.registry import Context, Method, register
from hfcompress.methods.training import Part, bf16_is_fast
from hfcompress.modeling.checkpoint import commit

_LEAST_OPEN = 0.1  # of a gate that the target lets stay although it was closing


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


def _target(model: PreTrainedModel, config: StructuredPruningConfig, context: Context) -> Target:
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
    target.require_reachable()
    return target


def _shrink(
    model: PreTrainedModel, target: Target, kept: Sequence[torch.Tensor], made: Reconstruction | None = None
) -> dict[str, Any]:
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


# At once


def structured_pruning(model: PreTrainedModel, config: StructuredPruningConfig, context: Context) -> dict[str, Any]:
    """Removes heads and neurons at once, in place.

    Args:
        model: A float model of a supported family.
        config: What to remove.
        context: Calibration data, with `labels` for `importance: fisher` and `taylor`.

    Returns:
        The importance used, how projections were mended, how many units each layer keeps, and the share of the
        FLOPs of the blocks that could lose some which was removed.

    Raises:
        CompressionError: The model is quantized, the target cannot be reached, calibration data or labels are
            missing, or scores are not finite or all the same. Nothing was removed then.
    """
    labelled = bool(context.calibration) and all("labels" in batch for batch in context.calibration)
    ranking = config.importance
    if ranking == "auto":
        ranking = "fisher" if labelled else "activation" if context.calibration else "magnitude"
    _require_data(ranking, config, context, labelled)
    target = _target(model, config, context)
    gradients: list[torch.Tensor] = []
    if ranking == "magnitude":
        scores = [importance.magnitude(each) for each in target.units]
    elif ranking == "activation":
        with _computing(model, config):
            scores = importance.output_energies(model, target.units, context.calibration)
    else:
        folder = context.cache_dir / "pruning" if context.cache_dir else None
        with _computing(model, config):
            gradients = importance.kept_gradients(model, target.units, context.calibration, folder)
        scores = [getattr(importance, ranking)(each) for each in gradients]
    target.require_telling(scores)
    kept = target.choose(scores)
    if ranking == "fisher":
        kept = [rearrange(each, index) for each, index in zip(gradients, kept, strict=True)]
    mend = bool(context.calibration) if config.reconstruct == "auto" else config.reconstruct
    made = None
    if mend:
        with _computing(model, config):
            made = reconstruct(model, target.units, kept, context.calibration)
    findings = {"importance": ranking, "reconstructed": made.mode if made else False}
    return findings | _shrink(model, target, kept, made)


def _computing(model: PreTrainedModel, config: StructuredPruningConfig) -> Any:
    bf16 = config.precision == "bf16" or (config.precision == "auto" and bf16_is_fast())
    return torch.autocast(model.device.type, torch.bfloat16, enabled=bf16 and model.dtype == torch.float32)


def _require_data(ranking: str, config: StructuredPruningConfig, context: Context, labelled: bool) -> None:
    if ranking in ("movement", "l0"):
        raise CompressionError(
            f"importance '{ranking}' exists only in training", hint="Add `training` to the step, or choose 'fisher'."
        )
    if ranking in ("fisher", "taylor") and not labelled:
        raise CompressionError(
            f"importance '{ranking}' needs calibration batches with labels",
            hint="Pass calibration=[batch, ...] with a 'labels' entry, or choose 'activation' or 'magnitude'.",
        )
    if config.reconstruct is True and not context.calibration:
        raise CompressionError(
            "reconstruct needs calibration data, and there is none",
            hint="Pass calibration=[batch, ...], or leave reconstruct at 'auto'.",
        )


# In training


class PruningPart(Part):
    """Masks the least important units step by step, and removes them when training ends.

    Raises:
        CompressionError: The config's importance cannot be had in training.
    """

    def __init__(self, config: StructuredPruningConfig, context: Context | None = None) -> None:
        if config.importance in ("activation", "fisher"):
            raise CompressionError(
                f"importance '{config.importance}' exists only without training",
                hint="In training choose 'taylor', 'movement', 'magnitude' or 'l0'; 'auto' is 'taylor'.",
            )
        self.config = config
        self._context = context or Context()
        self._handles: list[Any] = []

    def begin(self, model: PreTrainedModel, total_steps: int, device: torch.device) -> None:
        """Puts an open mask before every output projection."""
        self._target = _target(model, self.config, self._context)
        self._first, self._last = int(self.config.begin * total_steps), int(self.config.end * total_steps)
        groups = self._target.groups
        self._scores = {
            name: [torch.zeros(each.count, device=device) for each in units] for name, units in groups.items()
        }
        self._masks = {
            name: [torch.ones(each.count, device=device) for each in units] for name, units in groups.items()
        }
        for name, units in groups.items():
            for mask, each in zip(self._masks[name], units, strict=True):
                self._handles.append(each.entry.register_forward_pre_hook(masking(each, mask)))

    def before_optimizer_step(self, step: int) -> None:
        """Takes up what this step's gradients say about each unit."""
        if step >= self._last or self.config.importance == "magnitude":
            return
        for name, units in self._target.groups.items():
            for score, each in zip(self._scores[name], units, strict=True):
                effect = each.effect().to(score.device)
                if self.config.importance == "movement":
                    score.sub_(effect)  # over all of the training (Sanh et al. 2020)
                else:
                    # A moving average over about twenty steps: old gradients are those of another model.
                    score.mul_(0.95).add_(effect.square())

    def after_step(self, step: int) -> None:
        """Masks more units where the schedule says so; masked ones get no gradient and stay masked."""
        due = self._first <= step <= self._last and (step % self.config.interval == 0 or step == self._last)
        if not due:
            return
        if self.config.importance == "magnitude":
            for name, units in self._target.groups.items():
                self._scores[name] = [importance.magnitude(each) for each in units]
        masks = [mask for group in self._masks.values() for mask in group]
        scores = [score for group in self._scores.values() for score in group]
        lowest = min(score.min() for score in scores)  # movement may be negative
        open_only = [
            torch.where(mask > 0, score - lowest.to(score), -1.0) for score, mask in zip(scores, masks, strict=True)
        ]
        progress = cubic_share(1.0, step, self._first, self._last)
        for mask, kept in zip(masks, self._target.choose(open_only, progress), strict=True):
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
        kept = [mask.nonzero().flatten() for group in self._masks.values() for mask in group]
        return _shrink(model, self._target, kept)

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


class GatedPruningPart(PruningPart):
    """Learns which units to close (`importance: l0`), closes them for good, and removes them when training ends."""

    def begin(self, model: PreTrainedModel, total_steps: int, device: torch.device) -> None:
        """Puts a gate before every output projection."""
        self._target = _target(model, self.config, self._context)
        self._first, self._last = int(self.config.begin * total_steps), int(self.config.end * total_steps)
        self._step, units = 0, self._target.units
        self._counts = [each.count for each in units]
        constraints = self._target.constraints()
        each_unit = torch.tensor(self._counts)
        self._shares = torch.stack([torch.tensor(costs).repeat_interleave(each_unit) for costs, _ in constraints])
        self._gates = Gates(self._shares, torch.tensor([share for _, share in constraints]), device)
        self._final = torch.zeros(sum(self._counts), device=device)  # what the gates are once they are settled
        self._open = split(torch.ones_like(self._final), self._counts)
        self._handles.append(model.register_forward_pre_hook(self._set))
        for position, each in enumerate(units):
            self._handles.append(each.entry.register_forward_pre_hook(self._gate(position)))

    def _set(self, module: Any, *_: Any) -> None:
        if self._step >= self._last:
            gates = self._final
        elif self._step < self._first:
            gates = torch.ones_like(self._final)
        else:
            gates = self._gates.draw() if module.training else typical(self._gates.log_odds.detach())
        self._open = split(gates, self._counts)

    def _gate(self, position: int) -> Any:
        units = self._target.units[position]
        return lambda module, arguments: masking(units, self._open[position])(module, arguments)

    def losses(self, inputs: Mapping[str, Any], outputs: Any) -> Mapping[str, torch.Tensor]:
        """Adds the Lagrangian's term; the target rises over the first half of the time there is."""
        if not self._first <= self._step < self._last:
            return {}
        progress = min(1.0, 2 * (self._step - self._first + 1) / (self._last - self._first))
        return {"gates": self._gates.penalty(progress)}

    def before_optimizer_step(self, step: int) -> None:
        """Moves the gates and the multipliers."""
        if self._first <= step < self._last:
            self._gates.update()

    def after_step(self, step: int) -> None:
        """Settles, when the time has come, which units stay: those most likely open, as many as the target allows."""
        self._step = step
        if step < self._last or self._final.any():
            return
        # A unit's cost is in the score, since the Lagrangian has weighed it already and the target would once more.
        scores = open_probability(self._gates.log_odds.detach()) * self._shares.sum(0).to(self._final.device)
        kept = self._target.choose(split(scores, self._counts))
        values = typical(self._gates.log_odds.detach())
        for final, value, index in zip(
            split(self._final, self._counts), split(values, self._counts), kept, strict=True
        ):
            final[index] = value[index].clamp_min(_LEAST_OPEN)

    def end(self, model: PreTrainedModel) -> dict[str, Any]:
        """Takes the gates off, multiplies what they let through into the weights, and removes what they closed."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        finals = split(self._final, self._counts)
        for each, final in zip(self._target.units, finals, strict=True):
            weight, _ = each.weight_and_gradient()
            each.assign(weight * each.spread(final).to(weight), None)
        findings = {"expected_removed": [round(share, 4) for share in self._gates.removed().tolist()]}
        return findings | _shrink(model, self._target, [final.nonzero().flatten() for final in finals])

    def state(self) -> dict[str, torch.Tensor]:
        """Gates, multipliers and what was settled."""
        return {"final": self._final.cpu(), "step": torch.tensor(self._step)} | self._gates.state()

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes them back."""
        self._final.copy_(state["final"])
        self._step = int(state["step"])
        self._gates.load_state(state)


def _part(config: StructuredPruningConfig, context: Context) -> PruningPart:
    return (GatedPruningPart if config.importance == "l0" else PruningPart)(config, context)


register(
    Method(
        name="structured_pruning",
        config=StructuredPruningConfig,
        summary="Removes attention heads and FFN neurons, at once or gradually in training.",
        apply=structured_pruning,
        part=_part,
    )
)
