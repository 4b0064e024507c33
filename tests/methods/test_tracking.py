"""`report_to` works as in any Trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import TrainingArguments

from hfcompress.methods.distillation import DistillationConfig
from hfcompress.methods.trainer import CompressionTrainer
from hfcompress.methods.watching import MeasureWhileTraining
from tests.workshop import batches, tiny_classifier

HERE = "`bash scripts/beside.sh trackers -m pytest tests/methods/test_tracking.py` runs this"
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


@pytest.mark.skipif(find_spec("trackio") is None, reason=f"trackio is not here; {HERE}")
@pytest.mark.filterwarnings("ignore")  # of trackio's own imports
def test_trackio_gets_every_loss_and_every_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Where trackio keeps what it is told is settled when it is imported, so that is done in a process of its own.
    script = """
        import json, sys
        from transformers import TrainingArguments
        from hfcompress.methods.distillation import DistillationConfig
        from hfcompress.methods.trainer import CompressionTrainer
        from hfcompress.methods.watching import MeasureWhileTraining
        from tests.methods.test_tracking import ROWS
        from tests.workshop import tiny_classifier

        arguments = TrainingArguments(
            output_dir=sys.argv[1], max_steps=4, logging_steps=1, save_strategy="no", disable_tqdm=True, use_cpu=True,
            report_to="trackio", project="tiny", run_name="first",
        )
        trainer = CompressionTrainer(
            tiny_classifier(), arguments, teacher=tiny_classifier(1), distillation=DistillationConfig(),
            train_dataset=ROWS,
        )
        MeasureWhileTraining(trainer, lambda: {"eval_accuracy": 0.5}, 2)
        trainer.train()
        from trackio.sqlite_storage import SQLiteStorage
        print(json.dumps({"kept": SQLiteStorage.get_logs("tiny", "first"), "logged": trainer.state.log_history}))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "out")],
        env=os.environ | {"TRACKIO_DIR": str(tmp_path / "kept"), "HF_HUB_OFFLINE": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    logged = [entry["loss"] for entry in said["logged"] if "loss" in entry]
    assert [each["train/loss"] for each in said["kept"] if "train/loss" in each] == pytest.approx(logged)
    assert [each["eval/accuracy"] for each in said["kept"] if "eval/accuracy" in each] == [0.5, 0.5]
    assert any("train/loss_soft" in each for each in said["kept"])
