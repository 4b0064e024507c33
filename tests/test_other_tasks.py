"""From a recipe to a verified result, for every kind of task that is not sentence classification."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from hfcompress import pipeline
from hfcompress.evaluation.answer_book import AnswerBook
from hfcompress.evaluation.report import Report
from hfcompress.recipe import load_recipe
from hfcompress.tasks import KINDS as KNOWN
from hfcompress.verification import holds, verify
from tests.other_tasks import KINDS, recipe_text, save_task
from tests.test_commands import invoke

CLASSES = {
    "causal_lm": "CausalLM",
    "masked_lm": "MaskedLM",
    "summarization": "ForConditionalGeneration",
    "speech_recognition": "ForCTC",
    "speech_to_text": "ForConditionalGeneration",
}
TRAINING = {"epochs": 2, "learning_rate": 3e-3, "batch_size": 16, "precision": "fp32"}
# The others are as quick a run each, and too much for every day.
EVERY_DAY = {"causal_lm", "token_classification"}
PARAMETERS = [kind if kind in EVERY_DAY else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
STEPS: list[dict[str, Any]] = [
    {"training": TRAINING},
    {
        "name": "prune",
        "structured_pruning": {"heads": 0.4, "neurons": 0.4, "interval": 1},
        "distillation": {},
        "training": TRAINING,
    },
    {"low_rank": {"targets": ["ffn"], "keep": 0.7}, "calibration": 32},
    {"quantization": {"weights": "int8"}},
]
UNTAUGHT = {"speech_recognition", "speech_to_text"}


def steps_of(kind: str) -> list[dict[str, Any]]:
    if kind not in UNTAUGHT:
        return STEPS
    return [{key: value for key, value in step.items() if key != "distillation"} for step in STEPS]


@pytest.fixture(scope="module", params=PARAMETERS)
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Report]:
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    # Few tokens of a block are masked, so that there is less to learn from.
    said = save_task(folder, kind, train=600 if kind == "masked_lm" else 96)
    (folder / "tiny.yaml").write_text(recipe_text(said, steps_of(kind)))
    report = pipeline.run(load_recipe(folder / "tiny.yaml", ()), folder / "result", quiet=True)
    return kind, folder, report


def test_a_run_learns_compresses_and_reports(finished: tuple[str, Path, Report]) -> None:
    kind, folder, report = finished
    assert [row.name for row in report.rows] == ["fine_tune", "prune", "low_rank", "quantization"]
    assert report.task == "data" and report.metric == KNOWN[kind].defaults[0]
    assert report.rows[-1].bytes < report.rows[0].bytes and report.rows[-1].parameters < report.rows[0].parameters
    assert all(row.retention > 0 for row in report.rows)
    learnt = report.rows[0].metrics
    assert report.rows[0].training is not None
    losses = report.rows[0].training.losses[0]
    better_than_chance = {
        "causal_lm": learnt.get("perplexity", 99) < 11,
        "masked_lm": learnt.get("masked_perplexity", 99) < 14,
        "token_classification": learnt.get("overall_f1", 0) > 0.5,
        "question_answering": learnt.get("token_f1", 0) > 0.1,
        "image_classification": learnt.get("accuracy", 0) > 0.9,
        "summarization": learnt.get("rougeL", 0) > 0.6,
        # A few steps are not enough to hear letters; that it learns is seen in its loss.
        "speech_recognition": losses.values[-1] < 0.7 * losses.values[0],
        "speech_to_text": losses.values[-1] < 0.7 * losses.values[0],
    }
    assert better_than_chance[kind]
    known = report.rows[-1].comparison
    assert known is not None and set(known.differences) == set(report.rows[0].metrics)
    assert (known.flips is not None) == KNOWN[kind].flips
    if kind == "token_classification":
        assert [each.label for each in known.classes] == ["thing", "verdict"]
    book = AnswerBook.from_json((folder / "result" / "predictions.json").read_text())
    assert len(book.references) == report.examples
    text = (folder / "result" / "report.json").read_text()
    assert str(folder) not in text and json.loads(text)["recipe"]["task"]["data"] == "./data"


def test_its_card_says_how_it_loads_and_it_does(finished: tuple[str, Path, Report]) -> None:
    kind, folder, _ = finished
    card = (folder / "result" / "README.md").read_text()
    auto = KNOWN[kind].auto_class
    assert f"from transformers import {auto}" in card and f"pipeline_tag: {KNOWN[kind].pipeline_tag}" in card
    assert f" {KNOWN[kind].unit} of the validation split" in card
    assert "hfcompress verify path/to/this/folder --data path/to/the/data" in card
    assert type(getattr(transformers, auto).from_pretrained(folder / "result")).__name__.endswith(
        CLASSES.get(kind, "".join(map(str.title, kind.split("_"))))
    )


def test_what_it_wrote_holds(finished: tuple[str, Path, Report]) -> None:
    _, folder, _ = finished
    checks = verify(folder / "result", data=str(folder / "data"), progress=False)
    # Tiny models take microseconds: their speed is no figure that could hold on a busy machine.
    assert [each for each in checks if each.state != "holds" and "speed-up" not in each.figure] == []
    assert {"README.md", "report.html", "quantization: answers"} <= {each.figure for each in checks}


@pytest.mark.parametrize("field", ["predictions", "references"])
def test_altered_answers_fail(finished: tuple[str, Path, Report], field: str) -> None:
    _, folder, _ = finished
    file = folder / "result" / "predictions.json"
    before = file.read_text()
    book = json.loads(before)
    holder = book if field == "references" else book["rows"][-1]
    holder[field] = [_other(holder[field][0]), *holder[field][1:]]
    try:
        file.write_text(json.dumps(book))
        assert not holds(verify(folder / "result", data=str(folder / "data"), progress=False))
    finally:
        file.write_text(before)


def _other(value: Any) -> Any:
    if isinstance(value, list):
        return [_other(value[0]), *value[1:]]
    return f"{value} not" if isinstance(value, str) else 1 - value if value in (0, 1) else value * 1.5


def test_evaluate_measures_the_same(finished: tuple[str, Path, Report]) -> None:
    _, folder, report = finished
    asked = ("--data", folder / "data", "--batch-size", "16", "--json", "--quiet")
    measured = json.loads(invoke("evaluate", folder / "result", *asked).stdout)
    assert measured["metrics"] == pytest.approx(report.rows[-1].metrics)
    assert measured["examples"] == report.examples
