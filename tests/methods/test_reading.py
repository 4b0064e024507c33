"""What trainers read and count: labels, columns, row numbers, optimizers that are given, models made anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils.data import IterableDataset
from transformers import (
    CLIPVisionConfig,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    FlaubertConfig,
    FlaubertWithLMHeadModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from hfcompress import (
    DistillationConfig,
    DistillationTrainer,
    LayerDroppingConfig,
    PruningTrainer,
    StructuredPruningConfig,
    StudentConfig,
    compress,
)
from hfcompress.errors import CompressionError, ConfigError, TrainingError
from hfcompress.methods.digests import _plain
from hfcompress.methods.teaching.signals import positions
from hfcompress.methods.training import shifts_labels
from hfcompress.modeling.anatomy import attention_blocks
from tests.methods.test_trainer import arguments, make, rows
from tests.tiny_models import make as make_model
from tests.workshop import tiny_classifier, tiny_tokenizer

WIDER = {"hidden_size": 32}


class Stream(IterableDataset[Any]):
    """Rows one after the other, which know how many they are."""

    def __init__(self, given: list[dict[str, Any]]) -> None:
        self.given = given

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


def distilling(folder: Path, data: Any, config: DistillationConfig, student: Any = None, **changes: Any) -> Any:
    own = {
        name: changes.pop(name) for name in ("optimizers", "model_init", "teacher", "eval_dataset") if name in changes
    }
    if student is None and "model_init" not in own:
        student = tiny_classifier(0)
    return DistillationTrainer(
        student,
        arguments(folder, **({"max_steps": 2, "save_strategy": "no"} | changes)),
        teacher=own.pop("teacher", None) or tiny_classifier(9),
        distillation=config,
        train_dataset=data,
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
        **own,
    )


def without_labels(given: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "labels"} for row in given]


def test_labels_that_are_learnt_and_not_there_are_missed(tmp_path: Path) -> None:
    stream = Stream(without_labels(rows()))
    with pytest.raises(ValueError, match="did not return a loss"):
        distilling(tmp_path, stream, DistillationConfig(hard=0.5)).train()
    trainer = distilling(tmp_path, stream, DistillationConfig(hard=0.0))
    trainer.train()
    assert trainer.state.log_history[0]["loss_soft"] > 0


def test_labels_that_do_not_count_cannot_spoil_the_loss(tmp_path: Path) -> None:
    one = {"num_labels": 1, "id2label": {0: "how much"}, "label2id": {"how much": 0}}
    data = [row | {"labels": float("nan")} for row in rows()]
    config, models = DistillationConfig(hard=0.0), (tiny_classifier(0, **one), tiny_classifier(9, **one))
    trainer = distilling(tmp_path, data, config, student=models[0], teacher=models[1])
    trainer.train()
    assert trainer.state.log_history[0]["loss_soft"] > 0


def test_logits_that_are_masked_by_infinity_do_not_spoil_it_either(tmp_path: Path) -> None:
    student = tiny_classifier(0)
    with torch.no_grad():
        student.classifier.bias[0] = -torch.inf
    trainer = distilling(tmp_path, without_labels(rows()), DistillationConfig(hard=0.0, soft=0.0, hidden=1.0), student)
    trainer._prepare_parts(student)
    trainer.create_optimizer_and_scheduler(2)
    trainer._begin_parts(2)
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    trainer.current_gradient_accumulation_steps = 1
    assert torch.isfinite(trainer.compute_loss(student.train(), dict(batches[0]), num_items_in_batch=items))


def test_what_is_logged_of_each_term_is_its_part_of_the_loss(tmp_path: Path) -> None:
    data = rows(16)
    for row in data[4:]:
        row["labels"] = -100
    logs = []
    for size, windows in ((16, 1), (4, 4)):
        changes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": windows, "max_steps": 1}
        trainer = distilling(tmp_path, data, DistillationConfig(), logging_steps=1, **changes)
        trainer.train()
        logs.append(trainer.state.log_history[0])
        assert logs[-1]["loss"] == pytest.approx(logs[-1]["loss_labels"] + logs[-1]["loss_soft"], rel=1e-4)
    for name in ("loss", "loss_labels", "loss_soft"):
        assert logs[0][name] == pytest.approx(logs[1][name], rel=1e-2)  # float32


def projections(trainer: Any) -> torch.Tensor:
    return torch.cat([value.flatten() for value in trainer.parts[0]._between.state().values()])


def test_projections_are_trained_by_an_optimizer_that_is_given(tmp_path: Path) -> None:
    config, student = DistillationConfig(hidden=1.0), tiny_classifier(0, **WIDER)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    trainer = distilling(tmp_path, rows(), config, student=student, optimizers=(optimizer, None))
    trainer._prepare_parts(student)
    before = projections(trainer)
    trainer.train()
    assert not torch.equal(projections(trainer), before)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    trainer = distilling(tmp_path, rows(), config, student=student, optimizers=(optimizer, scheduler))
    with pytest.raises(TrainingError, match=r"optimizers=\(optimizer, None\)"):
        trainer.train()


def test_a_model_made_anew_for_each_training_is_taught_and_pruned(tmp_path: Path) -> None:
    made: list[Any] = []

    def student() -> Any:
        made.append(tiny_classifier(len(made), **WIDER))
        return made[-1]

    trainer = distilling(tmp_path, rows(), DistillationConfig(hidden=1.0), model_init=student)
    for number in (2, 3):
        trainer.train()
        assert len(made) == number and trainer.model is made[-1]
        trained = {id(each) for group in trainer.optimizer.param_groups for each in group["params"]}
        assert {id(each) for each in trainer.parts[0].parameters()} <= trained
    pruning = StructuredPruningConfig(heads=0.5, interval=1)
    settings = arguments(tmp_path, max_steps=4, save_strategy="no")
    collate = DataCollatorWithPadding(tiny_tokenizer())
    pruner = PruningTrainer(
        None, settings, pruning=pruning, model_init=student, train_dataset=rows(), data_collator=collate
    )
    pruner.train()
    assert sum(block.heads for block in attention_blocks(pruner.model)) == 4


def test_a_teacher_that_teaches_nothing_and_methods_that_do_not_train_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing says what it teaches"):
        PruningTrainer(tiny_classifier(), pruning=StructuredPruningConfig(heads=0.5), teacher=tiny_classifier(9))
    with pytest.raises(ConfigError, match="layer_dropping works only at once"):
        make(tmp_path, PruningTrainer, pruning=LayerDroppingConfig(drop=1))


@pytest.mark.parametrize("cache", [False, True])
def test_a_column_of_the_users_may_be_called_anything(cache: bool, tmp_path: Path) -> None:
    data = Dataset.from_list([row | {"example_id": f"row {number}"} for number, row in enumerate(rows(16))])
    trainer = distilling(tmp_path, data, DistillationConfig(cache=cache), eval_dataset=data)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_cache_reads_what_a_data_set_gives(tmp_path: Path) -> None:
    plain = Dataset.from_list([row | {"text": "some"} for row in rows(16)])
    chosen = plain.with_format(None, columns=["input_ids", "labels"])
    changed = plain.with_transform(
        lambda batch: {"input_ids": [ids[:3] for ids in batch["input_ids"]], "labels": batch["labels"]}
    )
    for number, data in enumerate((chosen, changed)):
        config, folder = DistillationConfig(cache=True), tmp_path / f"{number}"
        trainer = distilling(folder, data, config, remove_unused_columns=False)
        trainer.train()
        assert trainer.state.log_history[0]["loss_soft"] > 0


def test_images_are_told_apart_by_their_pixels() -> None:
    from PIL import Image

    black, other = Image.new("L", (2, 2)), Image.new("L", (2, 2), 255)
    assert _plain(black) == _plain(Image.new("L", (2, 2))) != _plain(other)
    assert _plain(black) != _plain(Image.new("L", (4, 1)))
    assert _plain(b"one") != _plain(b"other")
    with pytest.raises(CompressionError, match="cannot be told from others"):
        _plain(object())


class Wrapped(nn.Module):
    """A model around another, that hands everything on."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


def test_a_model_that_hands_everything_on_gets_everything(tmp_path: Path) -> None:
    from hfcompress.methods.trainer import CompressionTrainer

    settings = arguments(tmp_path, max_steps=1, save_strategy="no", remove_unused_columns=False)
    collate = DataCollatorWithPadding(tiny_tokenizer())
    model: Any = Wrapped(tiny_classifier())
    model.loss_type, model.config = "ForSequenceClassification", model.inner.config
    trainer = CompressionTrainer(model, settings, train_dataset=rows(), data_collator=collate)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_a_causal_model_with_adapters_still_predicts_the_next_token() -> None:
    peft = pytest.importorskip("peft", reason="PEFT is an extra")
    adapters = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(make_model("gpt2", "LMHeadModel"), adapters)
    assert type(model).__name__ == "PeftModelForCausalLM" and shifts_labels(model)


def test_fewer_heads_of_the_same_width_share_all_of_it() -> None:
    model = tiny_classifier(0)
    before = model.bert.encoder.layer[0].attention.self.query.weight.clone()
    compress(model, [StudentConfig(sizes={"num_attention_heads": 2})])
    query = model.bert.encoder.layer[0].attention.self.query.weight
    assert attention_blocks(model)[0].heads == 2 and torch.equal(query, before)


def test_a_model_that_reads_images_and_writes_predicts_the_next_token() -> None:
    text = LlamaConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=61)
    eye = CLIPVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=eye, image_token_id=60))
    labels = torch.tensor([[-100, -100, 7, 8]])
    counted = positions(model, {"input_ids": torch.tensor([[5, 6, 7, 8]]), "labels": labels})
    assert counted is not None and counted.tolist() == [[False, True, True, False]]
    assert shifts_labels(model) and not shifts_labels(make_model("bart", "ConditionalGeneration"))


@pytest.mark.parametrize(
    ("config", "cls"), [(FlaubertConfig, FlaubertWithLMHeadModel), (XLNetConfig, XLNetLMHeadModel)]
)
def test_a_head_of_a_causal_name_may_say_what_a_token_is(config: type, cls: type) -> None:
    sizes = {"vocab_size": 61, "n_words": 61, "emb_dim": 16, "d_model": 16, "d_inner": 24}
    sizes |= {name: 2 for name in ("n_layers", "n_layer", "n_heads", "n_head")}
    torch.manual_seed(0)
    model: Any = cls(config(**{name: size for name, size in sizes.items() if hasattr(config(), name)})).eval()
    ids, labels = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[-100, 9, -100, 10]])
    with torch.no_grad():
        outputs = model(input_ids=ids, labels=labels)
    by_token = nn.functional.cross_entropy(outputs.logits[0], labels[0])
    torch.testing.assert_close(outputs.loss, by_token)
    counted = positions(model, {"input_ids": ids, "labels": labels})
    assert counted is not None and torch.equal(counted, labels.ne(-100))


def test_a_student_without_a_head_learns_what_lies_between(tmp_path: Path) -> None:
    student, teacher = tiny_classifier(0).bert, tiny_classifier(9).bert
    data, config = without_labels(rows()), {"hard": 0, "hidden": 1.0, "relations": 1.0, "relation_heads": 4}
    before = student.encoder.layer[0].output.dense.weight.clone()
    distilling(tmp_path, data, DistillationConfig(soft=0, **config), student=student, teacher=teacher).train()
    assert not torch.equal(student.encoder.layer[0].output.dense.weight, before)
    with pytest.raises(CompressionError, match="no logits to compare, but last_hidden_state"):
        distilling(tmp_path, data, DistillationConfig(**config), student=student, teacher=teacher).train()


def test_a_loss_of_the_users_gets_what_a_decoder_makes_of_the_labels(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())

    data = [{"input_ids": [5, 6, 7], "labels": [8, 9, 10]}] * 4  # as many of both: nothing fails where it is left out
    losses = []
    for function in (None, loss):
        trainer = DistillationTrainer(
            make_model("bart", "ConditionalGeneration", dropout=0.0),
            arguments(tmp_path, max_steps=1, save_strategy="no"),
            teacher=make_model("bart", "ConditionalGeneration", seed=1),
            train_dataset=data,
            eval_dataset=data,
            data_collator=DataCollatorForSeq2Seq(tiny_tokenizer()),
            compute_loss_func=function,
        )
        losses.append(trainer.evaluate()["eval_loss"])
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss_labels"])
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)
