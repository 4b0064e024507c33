"""`report_to` works as in any Trainer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import TrainingArguments

from hfcompress.methods.distillation import DistillationConfig
from hfcompress.methods.trainer import CompressionTrainer
from hfcompress.methods.watching import MeasureWhileTraining
from tests.workshop import batches, tiny_classifier

ROWS = [{key: value[i] for key, value in batches(1, 16)[0].items()} for i in range(16)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of tensorboard's own imports
def test_tensorboard_gets_every_loss_and_every_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        report_to="tensorboard",
    )
    trainer = CompressionTrainer(
        tiny_classifier(), arguments, teacher=tiny_classifier(1), distillation=DistillationConfig(), train_dataset=ROWS
    )
    MeasureWhileTraining(trainer, lambda: {"eval_accuracy": 0.5}, 2)
    trainer.train()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (tmp_path / "logs").rglob("events.*")
    events = EventAccumulator(str(file)).Reload()
    assert {"train/loss", "train/loss_soft", "train/loss_labels", "eval/accuracy"} <= set(events.Tags()["scalars"])
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(logged)
    assert [event.step for event in events.Scalars("eval/accuracy")] == [2, 4]
