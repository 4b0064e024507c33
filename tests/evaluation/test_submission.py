from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset

from hfcompress.errors import ConfigError, DataError
from hfcompress.evaluation.quality import evaluate_quality
from hfcompress.evaluation.submission import write_submission
from hfcompress.tasks import get_task, preprocess
from tests.test_commands import invoke
from tests.workshop import save_data, save_model, sentences, tiny_classifier, tiny_tokenizer

PAIRS = [{"a": row["sentence"], "b": row["sentence"]} for row in sentences(10)]


def lines(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()]


def test_the_command_answers_a_test_set_without_labels(tmp_path: Path) -> None:
    model, data = save_model(tmp_path / "model", initializer_range=0.3), save_data(tmp_path / "data")
    rows = sentences(20, seed=5)
    columns = {"sentence": [row["sentence"] for row in rows], "label": [-1] * 20, "idx": list(range(100, 120))}
    pyarrow.parquet.write_table(pyarrow.table(columns), data / "sst2" / "test.parquet")
    how = ("--task", "sst2", "--data", data, "--max-length", "32", "--quiet")
    done = invoke("evaluate", model, *how, "--submission", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(tmp_path / "out" / "SST-2.tsv")
    head, *answers = lines(tmp_path / "out" / "SST-2.tsv")
    assert head == ["index", "prediction"] and [number for number, _ in answers] == [str(i) for i in range(100, 120)]
    task, tokenizer = get_task("sst2"), tiny_tokenizer()
    labelled = Dataset.from_list([{"sentence": row["sentence"], "label": row["label"]} for row in rows])
    encoded = preprocess(labelled, task, tokenizer, max_length=32, label2id=None)
    loaded = tiny_classifier(initializer_range=0.3)
    found = evaluate_quality(loaded, encoded, task, tokenizer, progress=False).predictions
    assert [answer for _, answer in answers] == [str(label) for label in found] and len(set(found)) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["SST-2.tsv"]


def test_mnli_has_two_files_and_answers_by_name_in_whatever_order_the_model_has_them(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"premise": row["a"], "hypothesis": row["b"], "label": -1} for row in PAIRS])
    names = ("contradiction", "entailment", "neutral")
    model = tiny_classifier(
        initializer_range=0.3,
        num_labels=3,
        id2label=dict(enumerate(names)),
        label2id={n: i for i, n in enumerate(names)},
    )
    splits = {"test_matched": rows, "test_mismatched": rows.select(range(4))}
    written = write_submission(
        tmp_path, model, tiny_tokenizer(), get_task("mnli"), splits, max_length=32, progress=False
    )
    assert [path.name for path in written] == ["MNLI-m.tsv", "MNLI-mm.tsv"]
    import torch

    with torch.no_grad():
        texts = [[row[side] for row in PAIRS] for side in ("a", "b")]
        batch = tiny_tokenizer()(*texts, padding=True, truncation=True, max_length=32, return_tensors="pt")
        expected = [names[i] for i in model(**batch).logits.argmax(-1).tolist()]
    assert [answer for _, answer in lines(written[0])[1:]] == expected
    assert len(lines(written[1])) == 5


def test_scores_are_held_to_their_scale(tmp_path: Path) -> None:
    rows = Dataset.from_list([{"sentence1": row["a"], "sentence2": row["b"], "idx": i} for i, row in enumerate(PAIRS)])
    model = tiny_classifier(initializer_range=5.0, num_labels=1, id2label={0: "score"}, label2id={"score": 0})
    model.config.problem_type = "regression"
    (file,) = write_submission(
        tmp_path, model, tiny_tokenizer(), get_task("stsb"), {"test": rows}, max_length=32, progress=False
    )
    scores = [float(answer) for _, answer in lines(file)[1:]]
    assert len(scores) == 10 and all(0 <= score <= 5 for score in scores)


def test_what_has_no_submission(tmp_path: Path) -> None:
    model, tokenizer = tiny_classifier(), tiny_tokenizer()
    with pytest.raises(ConfigError, match="'demo/movie-reviews' is no GLUE task"):
        write_submission(tmp_path, model, tokenizer, get_task("demo/movie-reviews"), {})
    with pytest.raises(DataError, match="no split test in the data; found: train"):
        write_submission(tmp_path, model, tokenizer, get_task("rte"), {"train": Dataset.from_list([])})
    assert list(tmp_path.iterdir()) == []
