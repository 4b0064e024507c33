"""Recipes in which several teach, and on rows that nobody labelled."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from hfcompress import pipeline
from hfcompress.errors import DataError, RecipeError
from hfcompress.recipe import load_recipe
from tests.workshop import save_data, save_model

RECIPE = """
name: taught
model: {place}/student
teacher: {place}/teacher
more_teachers: [{place}/other]
task: sst2
data: {place}/data
unlabelled: {place}/more
max_length: 32
evaluation: {{speed_batch_size: 2, speed_sequence_length: 8, speed_repeats: 3, grid_batch_sizes: [], curve_points: 0}}
steps:
  - name: learn
    distillation: {{soft: 1.0, hard: 0.5, teacher_weights: [1, 3], cache: true}}
    training: {{epochs: 1, learning_rate: 1e-3, batch_size: 16, precision: fp32}}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("several")
    for seed, name in enumerate(("student", "teacher", "other")):
        save_model(folder / name, seed=seed)
    save_data(folder / "data", train=32, validation=16)
    save_data(folder / "more", train=64, validation=16)
    for file in (folder / "more").rglob("*.parquet"):
        parquet.write_table(parquet.read_table(file).drop_columns(["label"]), file)
    (folder / "taught.yaml").write_text(RECIPE.format(place=folder))
    return folder


def test_several_teach_on_rows_without_labels(place: Path) -> None:
    report = pipeline.run(load_recipe(place / "taught.yaml"), place / "run", quiet=True)
    assert [row.name for row in report.rows] == ["teacher", "learn"]
    assert report.recipe["more_teachers"] == ["./other"] and report.recipe["unlabelled"] == "./more"
    said = report.rows[1].findings["distillation"]["distillation"]
    assert said["teacher"] == "BertForSequenceClassification + BertForSequenceClassification"
    training = report.rows[1].training
    assert training is not None and training.losses[0].steps[-1] == 6  # of 16 rows each: 32 with labels, 64 without


def test_what_teaches_changes_what_is_learnt(place: Path, tmp_path: Path) -> None:
    def learnt(name: str, *changes: str) -> list[float]:
        recipe = load_recipe(place / "taught.yaml", list(changes))
        training = pipeline.run(recipe, tmp_path / name, quiet=True).rows[1].training
        assert training is not None
        return list(training.losses[0].values)

    whole = learnt("whole")
    assert whole == learnt("again")
    assert whole != learnt("alone", "more_teachers=[]", "steps.learn.distillation.teacher_weights=[]")
    assert whole != learnt("labelled", "unlabelled=null")


def test_what_cannot_teach_is_refused_by_name(place: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="more_teachers: the folder /nowhere is not there"):
        load_recipe(place / "taught.yaml", ["more_teachers=[/nowhere]"])
    with pytest.raises(RecipeError, match="unlabelled: there is no folder /nowhere"):
        load_recipe(place / "taught.yaml", ["unlabelled=/nowhere"])
    text = RECIPE.format(place=place).replace("    distillation:", "    # distillation:")
    (place / "plain.yaml").write_text(text)
    with pytest.raises(RecipeError, match="no step learns from a teacher"):
        load_recipe(place / "plain.yaml")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="train"):
        pipeline.run(load_recipe(place / "taught.yaml", [f"unlabelled={tmp_path}/empty"]), tmp_path / "run", quiet=True)
