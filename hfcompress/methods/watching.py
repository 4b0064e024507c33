"""Watches a training for its report: measures the model now and then, and how long it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState


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


class Stopwatch(TrainerCallback, ExportableState):
    """Counts the seconds since it was made, and those that a training before it had taken when it was cut off.

    Training checkpoints keep what it shows; what was done after the last of them is done again and counts once.
    """

    def __init__(self) -> None:
        self._started, self._before = time.monotonic(), 0.0

    @property
    def seconds(self) -> float:
        """What it shows."""
        return self._before + time.monotonic() - self._started

    def state(self) -> dict[str, Any]:
        """Returns what a training checkpoint keeps."""
        return {"args": {}, "attributes": {"seconds": self.seconds}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Goes on from what the checkpoint shows that a training is resumed from."""
        kept = state.stateful_callbacks.get(type(self).__name__)
        if state.global_step and kept is not None:
            self._before = float(kept["attributes"]["seconds"])
