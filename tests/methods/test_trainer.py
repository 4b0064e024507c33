from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DataCollatorWithPadding, TrainerCallback, TrainingArguments

from hfcompress import (
    DistillationConfig,
    DistillationTrainer,
    LowRankConfig,
    PruningTrainer,
    StructuredPruningConfig,
    compress,
)
from hfcompress.errors import CheckpointError, TrainingError
from hfcompress.methods.resuming import damage, last_whole_checkpoint
from hfcompress.methods.trainer import CompressionTrainer
from hfcompress.methods.watching import Stopwatch
from hfcompress.modeling.anatomy import attention_blocks
from tests.workshop import sentences, tiny_classifier, tiny_tokenizer

PRUNING = StructuredPruningConfig(heads=0.4, neurons=0.4, begin=0.1, end=0.6, interval=2)


def rows(count: int = 64) -> list[dict[str, Any]]:
    tokenizer = tiny_tokenizer()
    return [{**tokenizer(row["sentence"]), "labels": row["label"]} for row in sentences(count)]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values: dict[str, Any] = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 4,
        "save_total_limit": 2,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "report_to": "none",
    }
    return TrainingArguments(str(folder), **(values | changes))


def make(folder: Path, cls: type = PruningTrainer, *, dropout: float = 0.1, **changes: Any) -> CompressionTrainer:
    own = {
        key: changes.pop(key)
        for key in ("pruning", "teacher", "distillation", "callbacks", "optimizers", "parts")
        if key in changes
    }
    if cls is PruningTrainer:
        own.setdefault("pruning", PRUNING)
        own.setdefault("teacher", tiny_classifier(9))
        own.setdefault("distillation", DistillationConfig())
    model = changes.pop("model", None) or tiny_classifier(0, hidden_dropout_prob=dropout)
    return cls(
        model,
        arguments(folder, **changes),
        train_dataset=rows(),
        eval_dataset=rows(16),
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
        **own,
    )


def weights(trainer: CompressionTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_one_run_prunes_and_distils_and_reloads(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    trainer = make(tmp_path / "run")
    trainer.train()
    assert sum(block.heads for block in attention_blocks(trainer.model)) == 5
    assert {"loss_labels", "loss_soft"} <= trainer.state.log_history[0].keys()
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert same(weights(trainer), again.state_dict())
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("cut_after", [1, 5, 9, 11])
def test_cut_off_and_resumed_is_uninterrupted(tmp_path: Path, cut_after: int) -> None:
    class Cut(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == cut_after:
                raise KeyboardInterrupt

    whole, clocks = make(tmp_path / "whole"), [Stopwatch() for _ in range(3)]
    whole.train()
    for clock in clocks[:2]:
        clock._started -= 1000.0  # as if the work before its training had taken long
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "cut", callbacks=[clocks[0], Cut()]).train()
    assert 1000 < clocks[0].seconds < 1900, "what was not resumed goes on from nothing"
    resumed = make(tmp_path / "cut", callbacks=[clocks[1]])
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(resumed))
    saved = 1000 if cut_after > 4 else 0
    assert 1000 + saved < clocks[1].seconds < 1900 + saved
    again = make(tmp_path / "cut", callbacks=[clocks[2]])
    again.train(resume_from_checkpoint=True)
    assert 1000 + saved < clocks[2].seconds < 1900 + saved, "the checkpoint holds the sum"


@pytest.mark.parametrize("file", ["optimizer.pt", "rng_state.pth", "model.safetensors", "hfcompress_parts.safetensors"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, file: str) -> None:
    whole = make(tmp_path / "run")
    whole.train()
    newest, folder = tmp_path / "run" / "checkpoint-12", tmp_path / "run"
    assert last_whole_checkpoint(folder) == newest
    (newest / file).write_bytes((newest / file).read_bytes()[:-7])
    assert file in str(damage(newest))
    assert last_whole_checkpoint(folder) == folder / "checkpoint-8"
    with pytest.raises(CheckpointError, match=file):
        make(tmp_path / "run").train(resume_from_checkpoint=str(newest))
    resumed = make(tmp_path / "run")
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(resumed))


@pytest.mark.parametrize("limit", [60_000, 400_000])
def test_a_checkpoint_that_finds_no_room_leaves_those_before_it(tmp_path: Path, limit: int) -> None:
    whole = make(tmp_path / "whole")
    whole.train()

    class Fill(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:  # after the first checkpoint
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError, match="checkpoint-8 could not be written"):
            make(tmp_path / "cut", callbacks=[Fill()]).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(path.name for path in (tmp_path / "cut").glob("checkpoint-*")) == ["checkpoint-4"]
    resumed = make(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(resumed))


def test_another_structure_is_not_resumed(tmp_path: Path) -> None:
    make(tmp_path / "run", CompressionTrainer).train()
    model = compress(tiny_classifier(), [LowRankConfig(method="svd")])
    trainer = make(tmp_path / "run", CompressionTrainer, model=model)
    with pytest.raises(CheckpointError, match="another structure"):
        trainer.train(resume_from_checkpoint=True)


def test_checkpoints_of_another_kind_of_training_are_not_resumed(tmp_path: Path) -> None:
    make(tmp_path / "run", CompressionTrainer).train()
    with pytest.raises(CheckpointError, match="another kind of training"):
        make(tmp_path / "run").train(resume_from_checkpoint=True)


def test_a_training_goes_on_with_the_settings_that_it_began_with(tmp_path: Path) -> None:
    make(tmp_path / "run").train()
    other = make(tmp_path / "run", distillation=DistillationConfig(hidden=1.0, temperature=3.0))
    with pytest.raises(CheckpointError, match=r"hidden was 0\.0 and is 1\.0; temperature was 2\.0 and is 3\.0"):
        other.train(resume_from_checkpoint=True)
    fewer = make(tmp_path / "run", CompressionTrainer, pruning=PRUNING)
    with pytest.raises(CheckpointError, match="of a training with other settings"):
        fewer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("cls", [CompressionTrainer, DistillationTrainer])
def test_accumulating_four_times_four_is_one_batch_of_sixteen(tmp_path: Path, cls: type) -> None:
    results = []
    for size, steps in ((16, 1), (4, 4)):
        own = {"teacher": tiny_classifier(9)} if cls is DistillationTrainer else {}
        trainer = make(
            tmp_path / str(size),
            cls,
            dropout=0.0,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=3,
            save_strategy="no",
            train_sampling_strategy="sequential",
            optim="sgd",
            **own,
        )
        trainer.train()
        results.append((trainer.state.log_history, weights(trainer)))
    (one_log, one), (four_log, four) = results
    assert [entry["loss"] for entry in one_log[:3]] == pytest.approx([e["loss"] for e in four_log[:3]], rel=1e-4)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, four[name], rtol=1e-4, atol=1e-6)


def test_the_best_checkpoint_counts_only_at_the_final_sparsity(tmp_path: Path) -> None:
    trainer = make(
        tmp_path / "run",
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        save_total_limit=1,
    )
    trainer.train()
    assert trainer.state.best_global_step >= 7  # 60% of 12 steps
    assert sum(block.heads for block in attention_blocks(trainer.model)) == 5
    assert Path(str(trainer.state.best_model_checkpoint)).is_dir()


def test_a_loss_that_is_not_finite_stops_and_names_the_term(tmp_path: Path) -> None:
    teacher = tiny_classifier(9)
    trainer = make(tmp_path / "run", DistillationTrainer, teacher=teacher)

    class Spoil(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                teacher.classifier.weight.data.fill_(float("nan"))

    trainer.add_callback(Spoil())
    with pytest.raises(TrainingError, match=r"step 6.*\(soft\)"):
        trainer.train()
    assert last_whole_checkpoint(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"


def test_checkpoints_leave_no_litter(tmp_path: Path) -> None:
    (tmp_path / "run" / ".partial" / "checkpoint-4").mkdir(parents=True)  # of a run that was cut off there
    make(tmp_path / "run").train()
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-12", "checkpoint-8"]


def test_without_parts_it_trains_like_any_trainer(tmp_path: Path) -> None:
    from transformers import Trainer

    def train(cls: type) -> dict[str, torch.Tensor]:
        trainer = (
            make(tmp_path / cls.__name__, CompressionTrainer, save_strategy="no")
            if cls is CompressionTrainer
            else Trainer(
                tiny_classifier(0, hidden_dropout_prob=0.1),
                arguments(tmp_path / "plain", save_strategy="no"),
                train_dataset=rows(),
                data_collator=DataCollatorWithPadding(tiny_tokenizer()),
            )
        )
        trainer.train()
        return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}

    plain, ours = train(Trainer), train(CompressionTrainer)
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, ours[name], rtol=1e-4, atol=1e-5)


def test_a_best_step_that_was_not_saved_is_not_loaded(tmp_path: Path) -> None:
    trainer = make(
        tmp_path / "run",
        DistillationTrainer,
        teacher=tiny_classifier(9),
        max_steps=4,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=2,
        load_best_model_at_end=True,
        learning_rate=1.0,  # the first step is the best, and lies between two checkpoints
    )
    trainer.train()
    assert trainer.state.best_global_step == 1 and trainer.state.best_model_checkpoint is None
