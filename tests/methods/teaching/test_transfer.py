from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset
from transformers import DataCollatorWithPadding, TrainingArguments

from hfcompress import DistillationConfig, DistillationTrainer, transfer_set
from hfcompress.errors import DataError
from tests.workshop import sentences, tiny_classifier, tiny_tokenizer


def encoded(count: int, *, seed: int = 0, labels: bool = True) -> Dataset:
    tokenizer = tiny_tokenizer()
    rows = sentences(count, seed=seed)
    made = [{**tokenizer(row["sentence"])} | ({"labels": row["label"]} if labels else {}) for row in rows]
    return Dataset.from_list(made)


def backwards(row: dict[str, Any]) -> dict[str, Any]:
    assert "labels" not in row
    return row | {"input_ids": row["input_ids"][::-1]}


def test_rows_are_added_without_labels() -> None:
    train, more = encoded(6), encoded(4, seed=1).add_column("source", ["web"] * 4)
    train = train.cast_column("labels", ClassLabel(names=["negative", "positive"]))
    made = transfer_set(train, more, transform=backwards)
    assert made.column_names == train.column_names and len(made) == 20
    assert made["labels"][:6] == train["labels"][:] and set(made["labels"][6:]) == {-100}
    ids = made["input_ids"][:]
    assert ids[:10] == [*train["input_ids"], *more["input_ids"]]
    assert ids[10:] == [each[::-1] for each in ids[:10]]
    alone = transfer_set(train.remove_columns("labels"), more)
    assert "labels" not in alone.column_names and len(alone) == 10


def test_a_student_learns_from_them_through_the_cache(tmp_path: Path) -> None:
    rows = transfer_set(encoded(8), encoded(8, seed=1, labels=False), transform=backwards)
    values: dict[str, Any] = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    trainer = DistillationTrainer(
        tiny_classifier(0),
        TrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True, **values),
        teacher=tiny_classifier(1),
        distillation=DistillationConfig(cache=True),
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
    )
    trainer.train()
    assert all(entry["loss_soft"] > 0 for entry in trainer.state.log_history if "loss" in entry)


def test_what_cannot_stand_beside_the_rows_is_refused() -> None:
    with pytest.raises(DataError, match="lack attention_mask"):
        transfer_set(encoded(4), encoded(4).remove_columns("attention_mask"))
    for labels in ([0.5] * 4, [[0, 1]] * 4):
        with pytest.raises(DataError, match="hard: 0"):
            transfer_set(encoded(4, labels=False).add_column("labels", labels), encoded(4))
