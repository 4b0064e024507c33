"""Each kind's rows: what is read, what is asked, and what outputs answer."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertTokenizer, PreTrainedTokenizerFast

from hfcompress.errors import CheckpointError, DataError
from hfcompress.tasks import KINDS, Task, TaskConfig, get_task, kind_of, load_data, preprocess, task_of
from hfcompress.tasks.kinds.base import pad
from hfcompress.tasks.kinds.blocks import blocks
from tests.other_tasks import ENTITIES, plain_tokenizer, running_text, write_parquet
from tests.workshop import tiny_tokenizer


def described(kind: str, **more: Any) -> Task:
    return TaskConfig(kind=kind, data="./somewhere", **more).task()  # type: ignore[arg-type]


def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer as GPT-2's, whose tokens are bytes: one character may be several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["the cat"], trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="Ġ", eos_token="Ġ")


# Blocks of text


@pytest.mark.parametrize("text", ["the cat\n", "naïve café é 東京 🙂 e\u0301", "  a  \n\n", "x"])
def test_the_bytes_of_tokens_add_up_to_the_text(text: str) -> None:
    for tokenizer in (byte_level(), plain_tokenizer()):
        for size in (1, 3, 1000):
            cut = list(blocks([text, "the cat "], tokenizer, size))
            counted = sum(count for block in cut for _, count in block)
            left = len((text + "the cat ").encode()) - counted
            assert left == 0 or (left <= 8 and size > 1), "only a last token that is alone may be left out"
    assert list(blocks([], byte_level(), 4)) == []


def test_blocks_go_on_over_the_ends_of_texts() -> None:
    data = Dataset.from_dict({"text": ["good bad fine dull film", "plot very not", "a the was and"]})
    rows = preprocess(data, described("causal_lm"), plain_tokenizer(), max_length=5, label2id=None)
    words = [" ".join(plain_tokenizer().convert_ids_to_tokens(row)) for row in rows["input_ids"]]
    assert words == ["good bad fine dull film", "plot very not a the", "was and"]
    assert rows["labels"] == rows["input_ids"]
    # Without a first token of its own a block's first word is read and not predicted.
    assert rows["bytes"] == [len(" bad fine dull film"), len(" very not" + "a the"), len(" and")]


def test_a_first_token_of_the_tokenizers_own_begins_every_block() -> None:
    data = Dataset.from_dict({"text": ["good bad fine dull film plot"]})
    rows = preprocess(data, described("causal_lm"), tiny_tokenizer(), max_length=4, label2id=None)
    first = tiny_tokenizer().cls_token_id
    assert [row[0] for row in rows["input_ids"]] == [first, first]
    assert sum(rows["bytes"]) == len("good bad fine dull film plot")


def test_a_language_models_answer_is_the_loss_of_its_block() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 9, generator=generator)
    labels = torch.tensor([[1, 2, 3, 4], [5, 6, -100, -100]])
    kind = KINDS["causal_lm"]
    kept = kind.read(SimpleNamespace(logits=logits), {"labels": labels})
    wanted = [
        -sum(float(logits[row, at].log_softmax(-1)[labels[row, at + 1]]) for at in range(count))
        for row, count in ((0, 3), (1, 1))
    ]
    assert [loss for loss, _ in kept] == pytest.approx(wanted) and [count for _, count in kept] == [3, 1]


def test_masks_are_the_same_every_time_and_hide_their_tokens() -> None:
    data = Dataset.from_dict({"text": ["good bad fine dull film plot very not a the was and " * 4]})
    task, tokenizer = described("masked_lm"), tiny_tokenizer()
    rows = preprocess(data, task, tokenizer, max_length=22, label2id=None)
    again = preprocess(data, task, tokenizer, max_length=22, label2id=None)
    assert rows[:] == again[:]
    for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):
        asked = [place for place, label in enumerate(labels) if label != -100]
        assert len(asked) == round(0.15 * (len(ids) - 2)) and {0, len(ids) - 1}.isdisjoint(asked)
        assert all(
            (label == -100) != (token == tokenizer.mask_token_id) for token, label in zip(ids, labels, strict=True)
        )
    assert rows["labels"][0] != rows["labels"][1]
    with pytest.raises(DataError, match="mask token"):
        preprocess(data, task, plain_tokenizer(), max_length=22, label2id=None)


# Words with labels

PIECES = BertTokenizer(
    vocab={
        word: at
        for at, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "new", "york", "##ers", "eat"])
    }
)


def tagged(words: list[list[str]], tags: list[list[int]]) -> Dataset:
    return Dataset.from_dict({"tokens": words, "ner_tags": tags})


def test_the_first_piece_of_a_word_has_its_label() -> None:
    task = described("token_classification", labels=ENTITIES)
    rows = preprocess(tagged([["new", "yorkers", "eat"]], [[1, 2, 0]]), task, PIECES, max_length=16, label2id=None)
    assert PIECES.convert_ids_to_tokens(rows[0]["input_ids"]) == ["[CLS]", "new", "york", "##ers", "eat", "[SEP]"]
    assert rows[0]["labels"] == [-100, 1, 2, -100, 0, -100]
    other = {name: at for at, name in enumerate(reversed(ENTITIES))}
    rows = preprocess(tagged([["new", "yorkers"]], [[1, 2]]), task, PIECES, max_length=16, label2id=other)
    assert rows[0]["labels"] == [-100, other["B-thing"], other["I-thing"], -100, -100]
    assert rows[0]["tags"] == [1, 2]


def test_words_that_are_cut_off_count_as_not_found() -> None:
    task, kind = described("token_classification", labels=ENTITIES), KINDS["token_classification"]
    data = tagged([["new", "yorkers", "eat"], [], [" ", "eat"]], [[1, 2, 3], [], [1, 3]])
    rows = preprocess(data, task, PIECES, max_length=4, label2id=None)
    batch = kind.collator(PIECES)([rows[at] for at in range(3)])
    assert set(batch) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    logits = torch.nn.functional.one_hot(batch["labels"].clamp(min=0), len(ENTITIES)).float()
    given = kind.answers(task, range(len(ENTITIES)), rows, kind.read(SimpleNamespace(logits=logits), batch))
    assert given.predictions == [["B-thing", "I-thing", "O"], [], ["O", "B-verdict"]]
    assert given.references == [["B-thing", "I-thing", "B-verdict"], [], ["B-thing", "B-verdict"]]


def test_a_byte_level_tokenizer_is_told_that_words_are_apart(tmp_path: Path) -> None:
    tokenizer = byte_level()
    tokenizer.save_pretrained(tmp_path)
    assert KINDS["token_classification"].load_processor(tmp_path)(["a"], is_split_into_words=True)["input_ids"]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"tokens": ["good film"], "ner_tags": [[0, 0]]}, "must hold lists of words; row 0"),
        ({"tokens": [["good", "film"]], "ner_tags": [[0]]}, "must hold one label a word; row 0"),
        ({"tokens": [["good", "film"]], "ner_tags": [[0, 5]]}, r"holds 5 in row 0; allowed: 0 to 4 \(O, B-thing"),
    ],
)
def test_words_and_labels_that_do_not_fit_are_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    write_parquet(tmp_path / "validation.parquet", columns)
    task = described("token_classification", labels=ENTITIES, training_split=None)
    with pytest.raises(DataError, match=message):
        load_data(task, str(tmp_path))


# Questions


def asked(context: str, answer: str | None) -> Dataset:
    texts, starts = ([answer], [context.index(answer)]) if answer is not None else ([], [])
    answers = {"text": texts, "answer_start": starts}
    return Dataset.from_dict({"question": ["film"], "context": [context], "answers": [answers]})


def perfect(rows: Dataset) -> list[Any]:
    """The outputs of a model that marks what the rows say is right."""
    kept = []
    for row in rows:
        logits = torch.zeros(2, len(row["input_ids"]))
        logits[0, row["start_positions"]] = logits[1, row["end_positions"]] = 5.0 if row["start_positions"] else 1.0
        kept.append((logits[0], logits[1]))
    return kept


def test_answers_are_found_in_whichever_window_holds_them() -> None:
    context = "good bad fine dull film plot very not a the was and " * 3 + "zebra quark good"
    rows = preprocess(asked(context, "zebra quark"), get_task("squad"), tiny_tokenizer(), max_length=14, label2id=None)
    assert len(rows) > 4 and 0 < sum(start > 0 for start in rows["start_positions"]) < len(rows)
    given = kind_of(get_task("squad")).answers(get_task("squad"), (), rows, perfect(rows))
    assert given.predictions == ["zebra quark"] and given.references == [["zebra quark"]]


def test_a_window_holds_an_answer_whole_or_not_at_all() -> None:
    rows = preprocess(
        asked("good bad fine dull film plot very not", "dull film plot"),
        get_task("squad"), tiny_tokenizer(), max_length=9, label2id=None,
    )  # fmt: skip
    tokenizer = tiny_tokenizer()
    for row in rows:
        own = tokenizer.convert_ids_to_tokens(row["input_ids"][row["start_positions"] : row["end_positions"] + 1])
        assert own in (["dull", "film", "plot"], ["[CLS]"])
    assert sum(start > 0 for start in rows["start_positions"]) >= 1


def test_a_question_may_have_no_answer() -> None:
    rows = preprocess(asked("good bad fine", None), get_task("squad"), tiny_tokenizer(), max_length=16, label2id=None)
    given = kind_of(get_task("squad")).answers(get_task("squad"), (), rows, perfect(rows))
    assert given.predictions == [""] and given.references == [[""]]


def test_an_answer_that_is_not_in_its_context_is_refused(tmp_path: Path) -> None:
    answers = [{"text": ["dull"], "answer_start": [0]}]
    write_parquet(tmp_path / "validation.parquet", {"question": ["film"], "context": ["good dull"], "answers": answers})
    task = described("question_answering", training_split=None)
    with pytest.raises(DataError, match=r"the answer 'dull' is not at 0 of its context"):
        load_data(task, str(tmp_path))


# Images


def test_paths_in_the_data_are_not_opened(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"not for reading")
    images = [{"bytes": None, "path": str(secret)}]
    write_parquet(tmp_path / "data" / "validation.parquet", {"image": images, "label": [0]})
    task = described("image_classification", labels=("dark", "light"), training_split=None)
    with pytest.raises(DataError, match="must hold the bytes of images; row 0 does not"):
        load_data(task, str(tmp_path / "data"))


# All


def test_rows_are_padded_on_the_right() -> None:
    rows = [{"labels": [1, 2], "input_ids": [3, 4], "n": 7}, {"labels": [5], "input_ids": [6], "n": 8}]
    batch = pad(rows, {"labels": -100, "input_ids": 9})
    assert batch["labels"].tolist() == [[1, 2], [5, -100]] and batch["input_ids"].tolist() == [[3, 4], [6, 9]]
    assert batch["n"].tolist() == [7, 8]


def test_a_text_file_is_read_whole(tmp_path: Path) -> None:
    running_text(tmp_path / "train", 5, 0)
    (tmp_path / "validation.txt").write_bytes("one\r\n\n two é three\nno end".encode())
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    data = load_data(described("causal_lm"), str(tmp_path))
    assert "".join(data["validation"]["text"]) == "one\r\n\n two é three\nno end"
    assert list(data["test"]["text"]) == ["a", "b"] and len(data["train"]) == 5


def test_a_described_task_is_read_back_from_a_report() -> None:
    config = TaskConfig(kind="token_classification", data="org/data", labels=ENTITIES, metrics=("overall_recall",))
    recipe = {"task": config.model_dump(mode="json")}
    assert task_of("data", recipe) == config.task()
    assert config.task().name == "data" and config.task().label == "ner_tags"
    assert task_of("sst2", {"task": "sst2"}) == task_of("sst2", {}) == get_task("sst2")
    with pytest.raises(CheckpointError, match="task is not valid"):
        task_of("data", {"task": {"kind": "sorcery", "data": "org/data"}})
