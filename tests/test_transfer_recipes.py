"""Recipes in which several teach, and on rows that nobody labelled."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest

from hfcompress import bench, pipeline
from hfcompress.errors import DataError, RecipeError
from hfcompress.recipe import load_recipe
from tests.workshop import save_data, save_model, sentences

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


def test_texts_are_made_for_the_teacher_to_answer(place: Path, tmp_path: Path) -> None:
    changes = ["unlabelled=null", "augmentation={share: 0.5}"]
    report = pipeline.run(load_recipe(place / "taught.yaml", changes), tmp_path / "made", quiet=True)
    training = report.rows[1].training
    assert training is not None and training.losses[0].steps[-1] == 3  # of 16 rows each: 32, and 16 made of them
    assert report.recipe["augmentation"] == {"share": 0.5, "words": 0.3, "combined": 0.5}
    with pytest.raises(RecipeError, match=r"augmentation\.share.*greater than 0"):
        load_recipe(place / "taught.yaml", ["augmentation={share: 0}"])
    with pytest.raises(RecipeError, match="augmentation: no step learns from a teacher"):
        (tmp_path / "plain.yaml").write_text(
            RECIPE.format(place=place)
            .replace("    distillation:", "    # ")
            .replace("unlabelled:", "augmentation: {} #")
            .replace("more_teachers:", "# ")
        )
        load_recipe(tmp_path / "plain.yaml")


def test_numbers_are_learnt_from_the_teacher_alone(tmp_path: Path) -> None:
    for name, seed in (("student", 0), ("teacher", 1)):
        save_model(tmp_path / name, seed=seed, num_labels=1)
    folder = tmp_path / "data" / "stsb"
    folder.mkdir(parents=True)
    for split, count, seed in (("train", 32, 1), ("validation", 16, 2)):
        one, other = ([row["sentence"] for row in sentences(count, seed + further)] for further in (0, 10))
        columns = {"sentence1": one, "sentence2": other, "label": [0.5 * (row % 10) for row in range(count)]}
        parquet.write_table(pyarrow.table(columns), folder / f"{split}.parquet")
    text = RECIPE.format(place=tmp_path).replace("more_teachers:", "# ").replace("unlabelled:", "augmentation: {} #")
    text = text.replace("task: sst2", "task: stsb").replace(", teacher_weights: [1, 3]", "")
    (tmp_path / "numbers.yaml").write_text(text)
    with pytest.raises(DataError, match=r"augmentation: rows without a number.*(?s:.*)hard: 0"):
        pipeline.run(load_recipe(tmp_path / "numbers.yaml"), tmp_path / "run", quiet=True)
    smoothed = load_recipe(tmp_path / "numbers.yaml", ["steps.learn.training.label_smoothing=0.1"])
    with pytest.raises(DataError, match=r"learn\.training\.label_smoothing: answers .* regression are no classes"):
        pipeline.run(smoothed, tmp_path / "run", quiet=True)
    recipe = load_recipe(tmp_path / "numbers.yaml", ["steps.learn.distillation.hard=0.0"])
    training = pipeline.run(recipe, tmp_path / "run", quiet=True).rows[1].training
    assert training is not None and training.losses[0].steps[-1] == 4


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


def test_each_teacher_has_a_weight(place: Path) -> None:
    with pytest.raises(RecipeError, match=r"teacher_weights.*has 2 entries for 1 teacher"):
        load_recipe(place / "taught.yaml", ["more_teachers=[]"])


def test_other_made_texts_leave_what_came_before_them(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    stock = bench.Bench._do

    def spy(self, step, *args, **kwargs):
        done.append(step.name)
        return stock(self, step, *args, **kwargs)

    training = "training: {epochs: 1, learning_rate: 1e-3, batch_size: 16, precision: fp32}"
    (tmp_path / "own.yaml").write_text(
        f"name: own\nmodel: {place}/student\ntask: sst2\ndata: {place}/data\nmax_length: 32\n"
        "augmentation: {share: 0.5}\nevaluation: {speed_batch_size: 2, speed_sequence_length: 8, speed_repeats: 3, "
        "grid_batch_sizes: [], curve_points: 0}\nsteps:\n"
        f"  - {{name: fine_tune, {training}}}\n"
        f"  - {{name: learn, distillation: {{cache: true}}, {training}}}\n"
    )
    monkeypatch.setattr(bench.Bench, "_do", spy)
    pipeline.run(load_recipe(tmp_path / "own.yaml"), tmp_path / "run", quiet=True)
    assert done == ["fine_tune", "learn"]
    pipeline.run(load_recipe(tmp_path / "own.yaml", ["augmentation={share: 1.0}"]), tmp_path / "run", quiet=True)
    assert done == ["fine_tune", "learn", "learn"]
