"""Measures a model now and then while it trains, for the curves of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer, TrainerCallback


class MeasureWhileTraining(TrainerCallback):
    """Logs a measurement at evenly spaced steps, the last one among them.

    The log goes where any of a Trainer's goes: into its history, which training checkpoints keep, and to whatever
    `report_to` names. Nothing is chosen by it.

    Args:
        trainer: Whose training it is; the callback is added to it.
        measure: Returns values by name, of the model as it is; it must leave the model in training mode.
        points: How often in the whole training.
    """

    def __init__(self, trainer: Trainer, measure: Callable[[], Mapping[str, float]], points: int) -> None:
        self.trainer, self.measure, self.points = trainer, measure, points
        trainer.add_callback(self)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measures where a point lies between the step before and this one."""
        done, total = state.global_step, state.max_steps
        if done * self.points // total > (done - 1) * self.points // total and state.is_world_process_zero:
            loss_is_due = control.should_log
            self.trainer.log(dict(self.measure()))
            control.should_log = loss_is_due  # logging takes it for done
