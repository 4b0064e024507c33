"""Tokenizing and translating labels by name."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset
from transformers import BertTokenizer, PreTrainedTokenizerBase

from hfcompress.errors import DataError
from hfcompress.tasks import align_labels, get_task, preprocess

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film", "very")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}, model_max_length=16)


def run(rows: dict[str, list[Any]], name: str, tokenizer: Any, **options: Any) -> Dataset:
    return preprocess(
        Dataset.from_dict(rows), get_task(name), tokenizer, **{"max_length": 8, "label2id": None, **options}
    )


def test_one_text_is_tokenized_and_labelled(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = {"sentence": ["good film", "very bad film"], "label": [1, 0], "idx": [7, 8]}
    done = run(rows, "sst2", tokenizer)
    assert set(done.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert list(done["input_ids"]) == [[2, 5, 7, 3], [2, 8, 6, 7, 3]]
    assert list(done["labels"]) == [1, 0]


def test_a_pair_is_read_in_the_tasks_order(tokenizer: PreTrainedTokenizerBase) -> None:
    done = run({"sentence2": ["bad"], "sentence1": ["good"], "label": [0]}, "mrpc", tokenizer)
    assert done[0]["input_ids"] == [2, 5, 3, 6, 3]
    assert done[0]["token_type_ids"] == [0, 0, 0, 1, 1]


def test_long_texts_are_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    done = run({"sentence": ["very " * 30], "label": [0]}, "sst2", tokenizer, max_length=5)
    assert done[0]["input_ids"] == [2, 8, 8, 8, 3]


def test_regression_keeps_numbers(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = {"sentence1": ["good", "bad"], "sentence2": ["film", "film"], "label": [3.5, 0.0]}
    assert list(run(rows, "stsb", tokenizer, label2id={"LABEL_0": 0})["labels"]) == [3.5, 0.0]


def test_labels_are_translated_by_name(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = {"premise": ["good"] * 3, "hypothesis": ["bad"] * 3, "label": [0, 1, 2]}
    other_order = {"CONTRADICTION": 0, "Neutral": 1, "entailment": 2}
    assert list(run(rows, "mnli", tokenizer, label2id=other_order)["labels"]) == [2, 1, 0]


def test_generic_names_mean_the_tasks_order() -> None:
    assert align_labels(get_task("mnli"), {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}) == (0, 1, 2)


@pytest.mark.parametrize(
    "label2id",
    [
        {"negative": 0, "neutral": 1},
        {"negative": 0},
        {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
        {"negative": 0, "positive": 0},
        {"negative": 1, "positive": 2},
        {"positive": 0, "POSITIVE": 1},
        {},
    ],
)
def test_labels_of_another_task_are_refused(label2id: dict[str, int]) -> None:
    with pytest.raises(DataError, match=r"are not those of task 'sst2' \(negative, positive\)"):
        align_labels(get_task("sst2"), label2id)


def test_a_missing_column_is_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match="needs column 'sentence'; the data has 'text', 'label'"):
        run({"text": ["good"], "label": [0]}, "sst2", tokenizer)


@pytest.mark.parametrize("label", [-1, 2])
def test_a_label_outside_the_task_never_becomes_another_class(tokenizer: Any, label: int) -> None:
    with pytest.raises(DataError, match=f"column 'label' holds {label}; the labels of task 'sst2' are 0 to 1"):
        run({"sentence": ["good"], "label": [label]}, "sst2", tokenizer)


@pytest.mark.parametrize("length", [0, -1, 17])
def test_a_length_the_tokenizer_does_not_allow_is_refused(tokenizer: Any, length: int) -> None:
    with pytest.raises(DataError, match=f"max_length {length} must be from 1 to 16"):
        run({"sentence": ["good"], "label": [0]}, "sst2", tokenizer, max_length=length)
