from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from hfcompress.evaluation.curves import Curve, Training, training_of
from hfcompress.methods.trainer import CompressionTrainer
from hfcompress.methods.watching import MeasureWhileTraining
from tests.workshop import batches, tiny_classifier

ROWS = [{key: value[i] for key, value in batches(1, 16)[0].items()} for i in range(16)]


def train(folder: Path, points: int, steps: int = 6, **options: object) -> CompressionTrainer:
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=steps, logging_steps=1, save_steps=4, disable_tqdm=True, use_cpu=True
    )
    trainer = CompressionTrainer(tiny_classifier(hidden_dropout_prob=0.1), arguments, train_dataset=ROWS)
    assert trainer.model is not None
    modes: list[bool] = []

    def measure() -> dict[str, float]:
        modes.append(trainer.model.training)  # type: ignore[union-attr]
        return {"eval_accuracy": len(modes) / 10}

    MeasureWhileTraining(trainer, measure, points)
    trainer.train(**options)
    return trainer


def test_curves_hold_every_logged_loss_and_every_measurement(tmp_path: Path) -> None:
    found = training_of(train(tmp_path, 3).state.log_history, 16)
    (loss,) = found.losses
    assert loss.name == "loss" and loss.steps == (1, 2, 3, 4, 5, 6)
    assert all(math.isfinite(value) for value in loss.values)
    assert found.metrics == (Curve(name="accuracy", steps=(2, 4, 6), values=(0.1, 0.2, 0.3)),)
    assert found.examples == 16 and training_of([], 16).examples == 0


def test_measuring_changes_no_weight(tmp_path: Path) -> None:
    states = [train(tmp_path / str(points), points).model.state_dict() for points in (1, 6)]  # type: ignore[union-attr]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize(("steps", "points", "at"), [(6, 4, [2, 3, 5, 6]), (6, 100, [1, 2, 3, 4, 5, 6]), (5, 1, [5])])
def test_points_are_spread_over_the_training(tmp_path: Path, steps: int, points: int, at: list[int]) -> None:
    (metric,) = training_of(train(tmp_path, points, steps).state.log_history, 1).metrics
    assert list(metric.steps) == at


def test_a_resumed_training_has_the_curves_of_the_whole(tmp_path: Path) -> None:
    train(tmp_path, 2)
    again = train(tmp_path, 2, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    found = training_of(again.state.log_history, 1)
    assert found.losses[0].steps == (1, 2, 3, 4, 5, 6) and found.metrics[0].steps == (3, 6)


def test_a_record_comes_back_from_json_whole() -> None:
    log = [{"loss": 0.123456789, "loss_soft": math.nan, "step": 3}, {"eval_f1": 0.5, "step": 3}, {"train_loss": 1}]
    made = training_of(log, 9)
    record = asdict(made)
    record["losses"] = [{**each, "values": list(each["values"])} for each in record["losses"]]
    again = Training.of_record(record)
    assert again.losses[0] == Curve(name="loss", steps=(3,), values=(0.123457,))
    assert again.losses[1].name == "loss_soft" and math.isnan(again.losses[1].values[0])
    assert again.metrics == made.metrics
