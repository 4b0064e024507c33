"""Distilling trainers that are trained again, and what is refused or kept in them."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, TrainerCallback

from hfcompress import DistillationConfig, DistillationTrainer
from hfcompress.errors import CompressionError, ConfigError, TrainingError
from hfcompress.methods.distillation import DistillationPart
from hfcompress.methods.resuming import last_whole_checkpoint
from hfcompress.methods.teaching.filling import fill
from hfcompress.methods.teaching.signals import Asked, token_mask
from hfcompress.methods.training import EXAMPLE_ID
from tests.methods.teaching.test_cache import rows as cached_rows
from tests.methods.test_distillation import CPU, translator
from tests.methods.test_trainer import arguments, make, weights
from tests.tiny_models import make as make_model
from tests.workshop import batches, logits, tiny_classifier, tiny_tokenizer


def trained(folder: Path, config: DistillationConfig, **changes: Any) -> Any:
    teacher = tiny_classifier(9)
    return make(folder, DistillationTrainer, teacher=teacher, distillation=config, max_steps=2, **changes)


@pytest.mark.parametrize(
    "values",
    [
        {"cache": True, "hidden": 1.0},
        {"relations": 1.0, "relation_heads": 4},
        {"attention": 1.0},
        {"hidden": 1.0, "embeddings": 1.0},
    ],
)
def test_a_second_training_is_taught_as_the_first(values: dict[str, Any], tmp_path: Path) -> None:
    trainer = trained(tmp_path, DistillationConfig(**values), save_strategy="no")
    trainer.train()
    first = weights(trainer)
    trainer.train()
    terms = [{name for name in log if name.startswith("loss_")} for log in trainer.state.log_history if "loss" in log]
    assert len(terms) == 2 and terms[0] == terms[1] >= {"loss_soft", "loss_labels"}
    assert not torch.equal(weights(trainer)["classifier.weight"], first["classifier.weight"])


def test_weights_that_are_lost_are_not_saved_over_the_last_good_ones(tmp_path: Path) -> None:
    class Overflow(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step == 7:
                with torch.no_grad():
                    model.classifier.weight[0, 0] = float("nan")

    trainer = make(tmp_path, callbacks=[Overflow()], save_total_limit=1)
    with pytest.raises(TrainingError, match=r"step 8: classifier\.weight is no longer finite"):
        trainer.train()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert not (tmp_path / "checkpoint-8").exists()


def test_the_likeliest_labels_are_no_vocabulary() -> None:
    part = DistillationPart(DistillationConfig(cache=True, cache_top_k=2), tiny_classifier(1))
    with pytest.raises(CompressionError, match="cache_top_k keeps the likeliest of a vocabulary"):
        part.before_training(tiny_classifier(0), None)


def test_a_cache_of_hidden_states_alone_keeps_no_outputs(tmp_path: Path) -> None:
    data, hidden = cached_rows(tmp_path), (("", 2),)
    cache = fill(make_model("bert", "", vocab_size=64), Asked(logits=False, hidden=hidden), data, tmp_path)
    assert {name for shard in cache._maps() for name in shard} == {"hidden.2", "ends"}
    signals = cache.signals(data.batch([3, 1]), None, torch.tensor([3, 1]))
    assert signals.logits is None and set(signals.hidden) == set(hidden)


def test_a_teacher_without_a_head_teaches_what_lies_between(tmp_path: Path) -> None:
    config = DistillationConfig(soft=0, hard=1.0, hidden=1.0, cache=True)
    teacher = tiny_classifier(9).bert
    trainer = make(tmp_path, DistillationTrainer, teacher=teacher, distillation=config, max_steps=2)
    trainer.train()
    assert any("loss_hidden" in log for log in trainer.state.log_history)


def test_a_collator_need_not_know_the_rows_numbers(tmp_path: Path) -> None:
    trainer = trained(tmp_path, DistillationConfig(cache=True))
    collate = trainer.data_collator

    def forgetful(features: Any) -> Any:
        return {name: value for name, value in collate(features).items() if name in ("input_ids", "labels")}

    trainer.data_collator = forgetful
    trainer.train()
    assert any("loss_soft" in log for log in trainer.state.log_history)
    part, batch = trainer.parts[0], batches(1)[0]
    part.before_training(trainer.model, trainer._rows())
    part.begin(trainer.model, 1, CPU)
    with pytest.raises(CompressionError, match=f"lacks '{EXAMPLE_ID}'"):
        part.losses(batch, trainer.model(**batch))


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_several_numbers_are_compared_as_numbers(whose: str) -> None:
    student, teacher, batch = tiny_classifier(0), tiny_classifier(1), batches(1, labels=False)[0]
    (student if whose == "student" else teacher).config.problem_type = "regression"
    part = DistillationPart(DistillationConfig(soft=1.0, hard=0.0), teacher)
    part.begin(student, 1, CPU)
    with torch.no_grad():
        outputs = student(**batch)
        wanted = (outputs.logits - teacher(**batch).logits).square().mean()
    torch.testing.assert_close(part.losses(batch, outputs)["soft"], wanted)


def test_padding_does_not_count_in_a_decoder_that_judges_whole_texts() -> None:
    model = make_model("bart", "SequenceClassification")
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    inputs = {"input_ids": torch.ones_like(mask), "attention_mask": mask, "labels": torch.tensor([0, 1])}
    assert torch.equal(token_mask(model, inputs, mask.shape, "decoder_"), mask.bool())


def test_reentrant_checkpointing_is_refused(tmp_path: Path) -> None:
    changes = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(TrainingError, match="reentrant"):
        trained(tmp_path, DistillationConfig(), **changes).train()


def test_smoothed_labels_reach_a_decoder(tmp_path: Path) -> None:
    student, rows = translator(0), [{"input_ids": [5, 6, 7], "labels": [6, 7, 2]}] * 4
    trainer = make(
        tmp_path,
        DistillationTrainer,
        model=student,
        teacher=translator(1),
        distillation=DistillationConfig(),
        max_steps=1,
        label_smoothing_factor=0.1,
    )
    trainer.train_dataset, trainer.data_collator = rows, DataCollatorForSeq2Seq(tiny_tokenizer())
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.evaluate([{"input_ids": [5, 6, 7, 8], "labels": [6, 7]}] * 2)["eval_loss"] > 0


def test_answers_to_questions_accumulate_to_one_batch(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7, 8], "start_positions": n % 3, "end_positions": n % 4} for n in range(10)]
    losses = []
    for size, steps in ((16, 1), (4, 3)):
        trainer = make(
            tmp_path / str(size),
            DistillationTrainer,
            model=make_model("bert", "QuestionAnswering", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
            teacher=make_model("bert", "QuestionAnswering"),
            distillation=DistillationConfig(),
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
        )
        trainer.train_dataset = rows
        trainer.train()
        losses.append(next(log["loss"] for log in trainer.state.log_history if "loss" in log))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_weights_and_temperature_go_to_what_they_are_in_the_end(tmp_path: Path) -> None:
    final = {"soft": 0.0, "hard": 2.0, "temperature": 1.0, "hidden": 0.0}
    config = DistillationConfig(soft=1.0, hard=1.0, temperature=3.0, hidden=4.0, final=final)
    assert (config.at(0.5).soft, config.at(0.5).hard, config.at(0.5).temperature) == (0.5, 1.5, 2.0)
    student, teacher, batch = tiny_classifier(0), tiny_classifier(1), batches(1)[0]
    part = DistillationPart(config, teacher)
    part.begin(student, 4, CPU)
    plain = DistillationPart(DistillationConfig(soft=1.0, temperature=2.0, hidden=1.0), teacher)
    plain.begin(student, 4, CPU)
    with torch.no_grad():
        outputs = student(**batch, output_hidden_states=True)
        whole = plain.losses(batch, outputs)
        for step, (soft, hidden, hard) in {0: (None, 4.0, 1.0), 2: (0.5, 2.0, 1.5), 4: (0.0, 0.0, 2.0)}.items():
            part.after_step(step)
            terms = part.losses(batch, outputs)
            torch.testing.assert_close(terms["hidden"], hidden * whole["hidden"])
            assert part.label_weight == hard
            if soft is not None:
                torch.testing.assert_close(terms["soft"], soft * whole["soft"])
    resumed = DistillationPart(config, teacher)
    resumed.begin(student, 4, CPU)
    resumed.load_state({"step": torch.tensor(2)})
    assert resumed.label_weight == 1.5


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"final": {"relations": 1.0}}, "relations is 0"),
        ({"final": {"temperature": 0.0}}, "temperature should be over 0"),
        ({"final": {"temperature": 1.0}, "cache": True, "cache_top_k": 4}, "at one temperature"),
        ({"final": {"stage": 1.0}}, "stage"),
        ({"final": {"soft": -1.0}}, "soft"),
    ],
)
def test_an_end_that_cannot_be_reached_is_refused(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DistillationConfig(**values)


def called_with(model: nn.Module) -> list[set[str]]:
    """Returns a list to which each forward of a model adds the names of its inputs."""
    calls: list[set[str]] = []
    model.register_forward_pre_hook(lambda _model, _args, given: calls.append(set(given)), with_kwargs=True)
    return calls


@pytest.mark.parametrize("cache", [False, True])
def test_a_teacher_reads_columns_that_its_student_does_not_take(cache: bool, tmp_path: Path) -> None:
    teacher = tiny_classifier(1)
    labels = {"id2label": teacher.config.id2label, "label2id": teacher.config.label2id}
    student = make_model("distilbert", "SequenceClassification", vocab_size=teacher.config.vocab_size, **labels)
    of_student, of_teacher = called_with(student), called_with(teacher)
    pair = {"input_ids": [2, 5, 3, 6, 3], "token_type_ids": [0, 0, 0, 1, 1]}
    pairs = Dataset.from_list([pair | {"labels": number % 2} for number in range(8)])
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, max_steps=1, save_strategy="no"),
        teacher=teacher,
        distillation=DistillationConfig(cache=cache),
        train_dataset=pairs,
        eval_dataset=pairs,
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
    )
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0 and len(trainer.predict(pairs.remove_columns("labels")).predictions) == 8
    assert of_teacher and all("token_type_ids" in call for call in of_teacher)
    assert len(of_student) >= 3 and not any("token_type_ids" in call for call in of_student)


def test_a_cache_does_not_answer_for_another_training_set(tmp_path: Path) -> None:
    trainer = trained(tmp_path, DistillationConfig(cache=True), save_strategy="no")
    trainer.train()
    trainer.train()
    trainer.train_dataset = list(reversed(trainer.train_dataset.rows))
    gc.collect()
    with pytest.raises(CompressionError, match="cached for another student or training set, and the teachers are gone"):
        trainer.train()


def test_teachers_that_were_kept_answer_for_another_training_set(tmp_path: Path) -> None:
    teacher, student, data = tiny_classifier(9), tiny_classifier(0), cached_rows(tmp_path)
    part = DistillationPart(DistillationConfig(cache=True), teacher, tmp_path / "cache")
    part.before_training(student, data)
    part.before_training(student, replace(data, dataset=list(reversed(data.dataset))))
    assert not part.teachers and len(list((tmp_path / "cache").glob("*.lock"))) == 2
    batch, last = data.batch([0, 1]), len(data) - 1
    said = part._sources[0].signals(batch, None, torch.tensor([last, last - 1])).logits
    torch.testing.assert_close(said, logits(teacher, batch))


def test_every_student_of_a_search_learns_from_one_cache(tmp_path: Path) -> None:
    teacher, data = tiny_classifier(9), cached_rows(tmp_path)
    trainer = DistillationTrainer(
        None,
        arguments(tmp_path, save_strategy="no", max_steps=2),
        teacher=teacher,
        distillation=DistillationConfig(cache=True, hidden=1.0),
        model_init=lambda: tiny_classifier(3),
        train_dataset=data.dataset,
        data_collator=data.collate,
    )
    trainer.train()
    first = weights(trainer)
    trainer.train()
    assert all(torch.equal(value, weights(trainer)[name]) for name, value in first.items())
    assert len(list((tmp_path / "teacher_cache").glob("*.lock"))) == 1
