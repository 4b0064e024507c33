"""Recipes that ask for explanations and attacks, from the run to `verify`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from hfcompress import pipeline, verification
from hfcompress.errors import DataError, MissingBackendError, RecipeError
from hfcompress.evaluation.answer_book import AnswerBook
from hfcompress.evaluation.attacks import Attempt, Attempts, Withstood, withstood
from hfcompress.recipe import Recipe, parse_recipe
from tests.workshop import save_data, save_model

pytestmark = pytest.mark.filterwarnings("ignore")

RECIPE = """
name: tried
model: {folder}/model
task: sst2
data: {folder}/data
max_length: 16
evaluation: {{speed_batch_size: 2, speed_sequence_length: 8, speed_repeats: 3, grid_batch_sizes: [], {asked}}}
steps:
  - quantization: {{weights: int8}}
"""
TRIALS = {
    "explain": "explanations: shap, explanation_examples: 5",
    "attack": "attack: deepwordbug, attack_examples: 24",
}
NEEDED = {"explain": "shap", "attack": "textattack"}


def trial(name: str) -> Any:
    why = f"{NEEDED[name]} is not here; `bash scripts/beside.sh {name} -m pytest tests/evaluation/test_trials.py`"
    return pytest.param(name, marks=pytest.mark.skipif(find_spec(NEEDED[name]) is None, reason=why))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("trials")
    save_model(place / "model", initializer_range=0.3)
    save_data(place / "data", train=16, validation=24)
    return place


def recipe(folder: Path, asked: str) -> Recipe:
    return parse_recipe(RECIPE.format(folder=folder, asked=asked), "tried")


@pytest.mark.slow
@pytest.mark.parametrize("name", [trial("explain"), trial("attack")])
def test_a_run_tries_and_verify_tries_again(folder: Path, tmp_path: Path, name: str) -> None:
    asked = recipe(folder, TRIALS[name])
    report = pipeline.run(asked, tmp_path / "result", quiet=True)
    again = pipeline.run(asked, tmp_path / "result", quiet=True)
    assert (again.explanations, again.attack) == (report.explanations, report.attack)
    book = AnswerBook.from_json((tmp_path / "result" / "predictions.json").read_text())
    if name == "explain":
        assert report.explanations is not None and book.explanations is not None
        # 8 bits move a tiny model's reasons by little.
        assert report.explanations.library == "shap" and report.explanations.rank_correlation > 0.8
        assert len(book.explanations.original) == len(book.explanations.compressed) == 5
    else:
        assert report.attack is not None and book.attack is not None
        for model in (report.attack.original, report.attack.compressed):
            # Its words have one spelling: a slip makes another word of any, so what is right can be fooled.
            assert 0 <= model.under_attack < model.accuracy and 0 < model.changed <= 1 and model.queries > 1
    said = (tmp_path / "result" / "README.md").read_text()
    assert {"explain": "The same reasons?", "attack": "Under attack"}[name] in said
    checks = verification.verify(
        tmp_path / "result", original=str(folder / "model"), data=str(folder / "data"), progress=False
    )
    tried = [check for check in checks if "words count" in check.figure or "withstood" in check.figure]
    assert [check.state for check in tried] == ["holds"], tried
    kept = json.loads((tmp_path / "result" / "predictions.json").read_text())
    if name == "explain":
        kept["explanations"]["compressed"][0][0] += 0.1
    else:
        kept["attack"]["compressed"][0]["queries"] += 1
    (tmp_path / "result" / "predictions.json").write_text(json.dumps(kept))
    assert not verification.holds(verification.verify(tmp_path / "result", data=str(folder / "data"), progress=False))


@pytest.mark.parametrize("name", ["explain", "attack"])
def test_what_is_missing_is_said_before_anything_is_done(folder: Path, tmp_path: Path, name: str) -> None:
    if find_spec(NEEDED[name]) is not None:
        pytest.skip(f"{NEEDED[name]} is here")
    with pytest.raises(MissingBackendError, match=rf"{NEEDED[name]} is not installed\n.*hfcompress\[{name}\]"):
        pipeline.run(recipe(folder, TRIALS[name]), tmp_path / "result", quiet=True)
    assert not list(tmp_path.iterdir())


def test_other_names_and_other_kinds_are_refused(folder: Path) -> None:
    for asked in ("explanations: lime", "attack: textfooler", "attack: deepwordbug, attack_examples: 0"):
        with pytest.raises(RecipeError):
            recipe(folder, asked)
    from hfcompress.material import Material

    asked = recipe(folder, TRIALS["attack"])
    with pytest.raises(DataError, match=r"evaluation\.attack: is for tasks of kind classification, not regression"):
        Material(asked.model_copy(update={"task": "stsb"}), progress=False)


def test_an_attack_is_summed_up_by_model() -> None:
    def attempt(outcome: str, queries: int, changed: float) -> Attempt:
        return Attempt(outcome=outcome, queries=queries, changed=changed)  # pyright: ignore[reportArgumentType]

    before = [attempt("wrong", 0, 0.0), attempt("withstood", 30, 0.0), attempt("fooled", 10, 0.5)]
    after = [attempt("fooled", 4, 0.25), attempt("wrong", 0, 0.0), attempt("fooled", 8, 0.75)]
    told = withstood("pruthi", Attempts(original=before, compressed=after))
    assert told.original == Withstood(accuracy=2 / 3, under_attack=1 / 3, queries=20, changed=0.5)
    assert told.compressed == Withstood(accuracy=2 / 3, under_attack=0, queries=6, changed=0.5)
    assert withstood("pruthi", Attempts(original=[], compressed=[])).examples == 0
