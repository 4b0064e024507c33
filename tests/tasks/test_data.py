"""Loading local data, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hfcompress.errors import DataError
from hfcompress.tasks import get_task, load_data

GLUE = Path(os.environ.get("HFCOMPRESS_GLUE", Path(__file__).parents[2] / ".." / "shared" / "data" / "glue"))
TEXTS = ["good", "bad", "fine", "dull"]
WHOLE: dict[str, list[Any]] = {"sentence": TEXTS, "label": [1, 0, 1, 0]}

Write = Callable[..., Path]


def refusal(data: Path, name: str = "sst2") -> str:
    with pytest.raises(DataError) as caught:
        load_data(get_task(name), str(data))
    return str(caught.value)


def test_a_folder_becomes_named_splits(write_split: Write) -> None:
    write_split("sst2", "train", WHOLE)
    data = write_split("sst2", "validation-00000-of-00001", {"sentence": ["so so"], "label": [1]})
    splits = load_data(get_task("sst2"), str(data))
    assert {name: len(split) for name, split in splits.items()} == {"train": 4, "validation": 1}
    assert splits["train"].features["label"].names == ["negative", "positive"]
    assert list(splits["train"]["sentence"]) == TEXTS
    assert list(splits["train"]["label"]) == [1, 0, 1, 0]


def test_shards_are_joined_in_order(write_split: Write) -> None:
    write_split("sst2", "validation", WHOLE)
    write_split("sst2", "train-00001-of-00002", {"sentence": ["second"], "label": [0]})
    data = write_split("sst2", "train-00000-of-00002", {"sentence": ["first"], "label": [1]})
    assert list(load_data(get_task("sst2"), str(data))["train"]["sentence"]) == ["first", "second"]


def test_a_changed_file_is_read_again(write_split: Write) -> None:
    write_split("sst2", "train", WHOLE)
    data = write_split("sst2", "validation", WHOLE)
    load_data(get_task("sst2"), str(data))
    write_split("sst2", "validation", {"sentence": ["new", "newer"], "label": [0, 1]})
    assert list(load_data(get_task("sst2"), str(data))["validation"]["sentence"]) == ["new", "newer"]


def test_unlabelled_rows_may_be_in_a_split_that_is_not_measured(write_split: Write) -> None:
    write_split("sst2", "train", WHOLE)
    write_split("sst2", "validation", WHOLE)
    data = write_split("sst2", "test", {"sentence": ["who knows"], "label": [-1]})
    assert list(load_data(get_task("sst2"), str(data))["test"]["label"]) == [-1]


def test_the_diagnostic_set_needs_no_train_split(write_split: Write) -> None:
    data = write_split("ax", "test", {"premise": ["a"], "hypothesis": ["b"], "label": [2]})
    assert list(load_data(get_task("ax"), str(data))) == ["test"]


@pytest.mark.parametrize(
    ("split", "rows", "said"),
    [
        ("train", {"text": TEXTS, "label": [1, 0, 1, 0]}, "column 'sentence' is missing; found: text, label"),
        ("train", {"sentence": TEXTS}, "column 'label' is missing"),
        ("train", {"sentence": TEXTS, "label": [1, 1, 1, 1]}, "every row is 'positive'"),
        ("train", {"sentence": TEXTS, "label": [1, 0, 2, 0]}, "holds 2 in 1 rows; allowed: 0 to 1"),
        ("train", {"sentence": TEXTS, "label": [1, 0, None, 0]}, "holds None in 1 rows"),
        ("train", {"sentence": TEXTS, "label": ["a", "b", "a", "b"]}, "holds 'a' in 2 rows"),
        ("train", {"sentence": TEXTS, "label": [1.0, 0.0, 1.0, 0.0]}, "holds 1.0 in 2 rows"),
        ("train", {"sentence": ["a", None, None, "d"], "label": [1, 0, 1, 0]}, "no text in 2 rows"),
        ("train", {"sentence": [1, 2, 3, 4], "label": [1, 0, 1, 0]}, "must hold text"),
        ("validation", {"sentence": TEXTS, "label": [-1, -1, -1, -1]}, "4 of 4 rows have label -1"),
        ("validation", {"sentence": TEXTS, "label": [-1, 1, 0, 0]}, "1 of 4 rows have label -1"),
    ],
)
def test_rows_that_cannot_be_used_are_named(write_split: Write, split: str, rows: dict, said: str) -> None:
    write_split("sst2", "train", WHOLE)
    write_split("sst2", "validation", WHOLE)
    message = refusal(write_split("sst2", split, rows))
    assert said in message
    assert f"task 'sst2', split '{split}'" in message


def test_an_empty_split_is_refused(write_split: Write) -> None:
    import pyarrow

    write_split("sst2", "train", WHOLE)
    empty = {"sentence": pyarrow.array([], pyarrow.string()), "label": pyarrow.array([], pyarrow.int64())}
    assert "split 'validation' is empty" in refusal(write_split("sst2", "validation", empty))


def test_one_class_in_the_measured_split_is_allowed(write_split: Write) -> None:
    write_split("sst2", "train", WHOLE)
    data = write_split("sst2", "validation", {"sentence": ["a"], "label": [1]})
    assert len(load_data(get_task("sst2"), str(data))["validation"]) == 1


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_regression_labels_must_be_finite(write_split: Write, bad: float | None) -> None:
    pairs = {"sentence1": ["a", "b"], "sentence2": ["c", "d"]}
    write_split("stsb", "validation", {**pairs, "label": [1.0, 2.0]})
    data = write_split("stsb", "train", {**pairs, "label": [1.0, bad]})
    assert "must hold finite numbers; row 1 holds" in refusal(data, "stsb")


def test_regression_without_labels_is_refused(write_split: Write) -> None:
    pairs = {"sentence1": ["a", "b"], "sentence2": ["c", "d"]}
    write_split("stsb", "train", {**pairs, "label": [1.0, 2.0]})
    data = write_split("stsb", "validation", {**pairs, "label": [-1.0, -1.0]})
    assert "every label is -1" in refusal(data, "stsb")


def test_class_names_in_another_order_are_refused(tmp_path: Path, write_split: Write) -> None:
    import datasets

    data = write_split("rte", "validation", {"sentence1": ["a"], "sentence2": ["b"], "label": [0]})
    features = datasets.Features(
        {
            "sentence1": datasets.Value("string"),
            "sentence2": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["not_entailment", "entailment"]),
        }
    )
    rows = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1]}
    for split in ("train", "validation"):
        datasets.Dataset.from_dict(rows, features=features).to_parquet(data / "rte" / f"{split}.parquet")
    assert "names its classes not_entailment, entailment" in refusal(data, "rte")


def test_a_missing_split_is_named(write_split: Write) -> None:
    message = refusal(write_split("sst2", "train", WHOLE))
    assert "split 'validation' is not in the data; found: train" in message


def test_an_unknown_split_is_answered_with_the_known_ones(write_split: Write) -> None:
    message = refusal(write_split("sst2", "trian", WHOLE))
    assert "split 'trian' is not known; did you mean 'train'?" in message


@pytest.mark.parametrize(
    "files", [("train", "train-00000-of-00001"), ("train-00000-of-00002",), ("train", "train-00000-of-00002")]
)
def test_a_split_that_is_there_twice_or_in_part_is_refused(write_split: Write, files: tuple[str, ...]) -> None:
    for file in files:
        data = write_split("sst2", file, WHOLE)
    message = refusal(data)
    assert "split 'train'" in message
    assert all(f"{file}.parquet" in message for file in files)


def test_a_folder_that_is_not_there_says_what_it_should_hold(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert "nowhere/sst2 does not exist" in message
    assert "sst2/train.parquet and sst2/validation.parquet" in message
    assert "--data on the command line" in message and ".jsonl" in message


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    assert "holds no file of rows" in refusal(tmp_path)


def test_a_damaged_file_is_refused(write_split: Write) -> None:
    data = write_split("sst2", "train", WHOLE)
    (data / "sst2" / "train.parquet").write_bytes(b"PAR1 and then nothing")
    assert "could not be read" in refusal(data)


def test_the_demo_task_takes_no_folder(tmp_path: Path) -> None:
    assert "brings its own data" in refusal(tmp_path, "demo/movie-reviews")


def test_without_the_hub_a_local_folder_is_asked_for() -> None:
    code = (
        "from hfcompress.errors import DataError\n"
        "from hfcompress.tasks import get_task, load_data\n"
        "try:\n    load_data(get_task('rte'))\n"
        "except DataError as error:\n    print(error)\n"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    result = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True, check=True)
    assert "nyu-mll/glue (rte) could not be loaded from the Hub" in result.stdout
    assert "Give a local folder" in result.stdout


@pytest.mark.skipif(not GLUE.is_dir(), reason="no GLUE folder: set HFCOMPRESS_GLUE to one")
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("mrpc", (3668, 408)), ("rte", (2490, 277)), ("sst2", (67349, 872)), ("stsb", (5749, 1500))],
)
def test_real_glue_loads_whole(name: str, sizes: tuple[int, int]) -> None:
    splits = load_data(get_task(name), str(GLUE))
    assert (len(splits["train"]), len(splits["validation"])) == sizes


@pytest.mark.skipif(not GLUE.is_dir(), reason="no GLUE folder: set HFCOMPRESS_GLUE to one")
def test_a_real_row_means_what_its_label_says() -> None:
    row = load_data(get_task("sst2"), str(GLUE))["validation"][0]
    assert row["sentence"].startswith("it 's a charming and often affecting journey")
    assert get_task("sst2").labels[row["label"]] == "positive"
