"""Structured pruning while training: masks, or gates, stand for what is going to be removed."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.pruning import importance
from hfcompress.methods.pruning.asked import StructuredPruningConfig, shrink, target_for, why_not
from hfcompress.methods.pruning.gates import Gates, open_probability, split, typical
from hfcompress.methods.pruning.search import cubic_share, window
from hfcompress.methods.pruning.units import masking
from hfcompress.methods.registry import Context
from hfcompress.methods.training import Part, Rows
from hfcompress.modeling.adapters import require_no_adapters

logger = logging.getLogger(__name__)

_LEAST_OPEN = 0.1  # of a gate that the target lets stay although it was closing
_CUT_SHORT = "training ended before pruning did, after step {last}: {units} more heads and neurons go without training"
_STILL_OPEN = (
    "the gates have learnt to close %.1f%% of the %.1f%% that is to go, and the rest of the choice is "
    "little better than chance: train longer, or choose importance 'taylor'"
)


class PruningPart(Part):
    """Masks the least important units step by step, and removes them when training ends.

    Raises:
        CompressionError: The config's importance cannot be had in training.
    """

    shrinks = True

    def __init__(self, config: StructuredPruningConfig, context: Context | None = None) -> None:
        if message := why_not(config, trains=True):
            raise CompressionError(message)
        self.config = config
        self._context = context or Context()
        self._handles: list[Any] = []

    def prepare(self, model: PreTrainedModel) -> None:
        """Refuses a model with adapters on it, of which nothing but they would be saved."""
        require_no_adapters(model)

    def before_training(self, model: PreTrainedModel, rows: Rows | None) -> None:
        """Takes a few rows to measure time with, where the model reads something else than text.

        Times are kept in the training's folder, if nowhere else: a resumed run must not measure others.
        """
        if self._context.cache_dir is None and rows is not None:
            self._context = replace(self._context, cache_dir=rows.folder)
        reads_text = model.main_input_name == "input_ids"
        if self.config.latency and not reads_text and not self._context.calibration and rows is not None and len(rows):
            count = min(self.config.latency_batch, len(rows))
            self._context = replace(self._context, calibration=[rows.batch(range(count))])

    def begin(self, model: PreTrainedModel, total_steps: int, device: torch.device) -> None:
        """Puts an open mask before every output projection."""
        self._start(model, total_steps)
        groups = self._target.groups
        frozen = [each.block.name for each in self._target.units if not each.entry.weight.requires_grad]
        if frozen and self.config.importance != "magnitude":
            raise CompressionError(
                f"{frozen[0]} is frozen, and has no gradients to tell by which of its units matter",
                hint="Train what is pruned, or choose importance 'magnitude' or 'l0'.",
            )
        self._scores = {
            name: [torch.zeros(each.count, device=device) for each in units] for name, units in groups.items()
        }
        self._masks = {
            name: [torch.ones(each.count, device=device) for each in units] for name, units in groups.items()
        }
        for name, units in groups.items():
            for mask, each in zip(self._masks[name], units, strict=True):
                self._handles.append(each.entry.register_forward_pre_hook(masking(each, mask)))

    def _start(self, model: PreTrainedModel, total_steps: int) -> None:
        self.release()
        self._target = target_for(model, self.config, self._context)
        self._first, self._last = window(self.config.begin, self.config.end, total_steps)
        self._is_settled = False

    def before_optimizer_step(self, step: int) -> None:
        """Takes up what this step's gradients say about each unit."""
        if step >= self._last or self.config.importance == "magnitude":
            return
        scores = [score for group in self._scores.values() for score in group]
        effects = [each.effect().to(score.device) for each, score in zip(self._target.units, scores, strict=True)]
        if not torch.isfinite(torch.cat(effects)).all():
            return  # a step in float16 that overflowed, which the optimizer leaves out too
        for score, effect in zip(scores, effects, strict=True):
            if self.config.importance == "movement":
                score.sub_(effect)  # over all of the training (Sanh et al. 2020)
            else:
                # A moving average over about twenty steps: old gradients are those of another model.
                score.mul_(0.95).add_(effect.square())

    def after_step(self, step: int) -> None:
        """Masks more units where the schedule says so; masked ones get no gradient and stay masked."""
        self._is_settled |= step >= self._last
        due = self._first <= step <= self._last and (step % self.config.interval == 0 or step == self._last)
        if not due:
            return
        if self.config.importance == "magnitude":
            for name, units in self._target.groups.items():
                self._scores[name] = [importance.magnitude(each) for each in units]
        progress = cubic_share(1.0, step, self._first, self._last)
        masks = [mask for group in self._masks.values() for mask in group]
        scores = [score for group in self._scores.values() for score in group]
        if progress:
            self._target.require_telling(scores)
        lowest = min(score.min() for score in scores)  # movement may be negative
        open_only = [
            torch.where(mask > 0, score - lowest.to(score), -1.0) for score, mask in zip(scores, masks, strict=True)
        ]
        for mask, kept in zip(masks, self._target.choose(open_only, progress), strict=True):
            chosen = torch.zeros_like(mask)
            chosen[kept] = 1.0
            mask.mul_(chosen)

    def settled(self, step: int) -> bool:
        """The masks are final."""
        return step >= self._last

    def release(self) -> None:
        """Takes the masks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def end(self, model: PreTrainedModel) -> dict[str, Any]:
        """Takes the masks off and removes what they covered; all of the target, where training ended before its time.

        Raises:
            CompressionError: Nothing tells units apart yet.
        """
        self.release()
        if not self._is_settled:
            before = self._left()
            self.after_step(self._last)
            if gone := before - self._left():
                warnings.warn(_CUT_SHORT.format(units=gone, last=self._last), stacklevel=2)
        kept = [mask.nonzero().flatten() for group in self._masks.values() for mask in group]
        return shrink(model, self._target, kept)

    def _left(self) -> int:
        return sum(int(mask.sum()) for group in self._masks.values() for mask in group)

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
        self._start(model, total_steps)
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
        self._warn_of_open_gates()
        values = typical(self._gates.log_odds.detach())
        for final, value, index in zip(
            split(self._final, self._counts), split(values, self._counts), kept, strict=True
        ):
            final[index] = value[index].clamp_min(_LEAST_OPEN)

    def _warn_of_open_gates(self) -> None:
        for (_, wanted), closed in zip(self._target.constraints(), self._gates.removed().tolist(), strict=True):
            if closed < wanted / 2:
                logger.warning(_STILL_OPEN, 100 * closed, 100 * wanted)

    def end(self, model: PreTrainedModel) -> dict[str, Any]:
        """Takes the gates off, multiplies what they let through into the weights, and removes what they closed."""
        self.release()
        if not self._final.any():
            self.after_step(self._last)
            warnings.warn(_CUT_SHORT.format(units=int((self._final == 0).sum()), last=self._last), stacklevel=2)
        finals = split(self._final, self._counts)
        for each, final in zip(self._target.units, finals, strict=True):
            weight, _ = each.weight_and_gradient()
            each.assign(weight * each.spread(final).to(weight), None)
        findings = {"expected_removed": [round(share, 4) for share in self._gates.removed().tolist()]}
        return findings | shrink(model, self._target, [final.nonzero().flatten() for final in finals])

    def state(self) -> dict[str, torch.Tensor]:
        """Gates, multipliers and what was settled."""
        return {"final": self._final.cpu(), "step": torch.tensor(self._step)} | self._gates.state()

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes them back."""
        self._final.copy_(state["final"])
        self._step = int(state["step"])
        self._gates.load_state(state)
