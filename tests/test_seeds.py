"""A recipe with several seeds: every step with each of them, resumably, and the first one's result published."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hfcompress import bench, pipeline
from hfcompress.errors import RecipeError
from hfcompress.evaluation.answer_book import AnswerBook
from hfcompress.evaluation.report import Report
from hfcompress.recipe import Recipe, load_recipe
from hfcompress.recipe.loading import parse_recipe
from hfcompress.verification import holds, verify
from tests.workshop import save_data, save_model

pytestmark = pytest.mark.filterwarnings("ignore")

RECIPE = """
name: tiny
model: {model}
task: sst2
data: {data}
max_length: 16
seeds: [3, 4]
evaluation:
  batch_size: 16
  speed_batch_size: 2
  speed_sequence_length: 8
  speed_repeats: 3
  grid_batch_sizes: []
  metrics: [f1_macro, roc_auc]
steps:
  - name: fine_tune
    training: {{epochs: 1, learning_rate: 1e-3, batch_size: 16, precision: fp32, report_to: [tensorboard]}}
  - low_rank: {{keep: 0.6}}
    calibration: 16
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    save_model(folder / "model", hidden_dropout_prob=0.1)
    save_data(folder / "data")
    (folder / "tiny.yaml").write_text(RECIPE.format(model=folder / "model", data=folder / "data"))
    return folder


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Path, Report]:
    return place / "out", pipeline.run(recipe(place), place / "out", quiet=True)


def recipe(place: Path, *overrides: str) -> Recipe:
    return load_recipe(place / "tiny.yaml", overrides)


def test_every_step_is_done_with_every_seed_and_the_first_is_published(finished: tuple[Path, Report]) -> None:
    output, report = finished
    assert report.seed == 3 and report.seeds is not None and report.seeds.seeds == (3, 4)
    first = output.parent / "out.work" / "2-low_rank" / "checkpoint" / "model.safetensors"
    other = output.parent / "out.work" / "seed-4" / "2-low_rank" / "checkpoint" / "model.safetensors"
    assert (output / "model.safetensors").read_bytes() == first.read_bytes() != other.read_bytes()
    for row, seeded in zip(report.rows, report.seeds.rows, strict=True):
        assert row.name == seeded.name
        assert {name: each.values[0] for name, each in seeded.metrics.items()} == row.metrics
        assert set(row.metrics) == {"accuracy", "f1_macro", "roc_auc"}
    change = report.seeds.rows[1].differences["accuracy"]
    assert math.isfinite(change.value) and change.low <= change.value <= change.high
    book = AnswerBook.from_json((output / "predictions.json").read_text())
    assert [each.seed for each in book.seeds] == [4] and len(book.seeds[0].rows) == 2
    card = (output / "README.md").read_text()
    assert "result of seed 3: the first that the recipe names, and not the best" in card
    assert "## Over several seeds" in card and "Training was done with 2 seeds" in card
    assert "Over several seeds" in (output / "report.html").read_text()
    assert report == Report.from_json((output / "report.json").read_text())
    assert "by seed: 3: " in str(report.table().caption)


def test_its_trackers_logs_are_kept(finished: tuple[Path, Report]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output, _ = finished
    for folder in ("out.work/1-fine_tune", "out.work/seed-4/1-fine_tune"):
        (events,) = (output.parent / folder / "logs").rglob("events.out.*")
        read = EventAccumulator(str(events)).Reload()
        assert {"train/loss", "eval/accuracy"} <= set(read.Tags()["scalars"])


def test_a_second_run_does_no_step_again_and_one_seed_alone_finds_its_steps(
    place: Path, finished: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, report = finished
    monkeypatch.setattr(bench.Bench, "_do", lambda *a, **k: pytest.fail("a finished step was done again"))
    assert pipeline.run(recipe(place), output, quiet=True).seeds == report.seeds
    alone = (place / "tiny.yaml").read_text().replace("seeds: [3, 4]", "seed: 3")
    single = pipeline.run(parse_recipe(alone, "alone"), output, quiet=True)
    assert single.seeds is None and single.rows[-1].metrics == report.rows[-1].metrics
    # A tracker is no part of what a step's result depends on.
    untracked = parse_recipe(alone.replace(", report_to: [tensorboard]", ""), "untracked")
    assert pipeline.run(untracked, output, quiet=True).rows[-1].metrics == report.rows[-1].metrics
    pipeline.run(recipe(place), output, quiet=True)


def test_a_lost_step_of_a_later_seed_is_done_again_alone(
    place: Path, finished: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    output, report = finished
    done: list[tuple[int, str]] = []
    stock = bench.Bench._do

    def spy(self, step, *args, **kwargs):
        done.append((self.seed, step.name))
        return stock(self, step, *args, **kwargs)

    monkeypatch.setattr(bench.Bench, "_do", spy)
    (place / "out.work" / "seed-4" / "2-low_rank" / "step.json").unlink()
    assert pipeline.run(recipe(place), output, quiet=True).seeds == report.seeds
    assert done == [(4, "low_rank")]


def test_what_it_wrote_holds_and_an_altered_seed_fails(place: Path, finished: tuple[Path, Report]) -> None:
    output, _ = finished
    checks = verify(output, data=str(place / "data"), progress=False)
    assert [each for each in checks if each.state != "holds" and "speed-up" not in each.figure] == []
    assert "seeds: metrics, means, deviations, changes and intervals" in {each.figure for each in checks}
    file = output / "predictions.json"
    text = file.read_text()
    book = AnswerBook.from_json(text)
    book.seeds[0].rows[1].predictions[0] = 1 - book.seeds[0].rows[1].predictions[0]  # type: ignore[operator]
    file.write_text(book.to_json())
    try:
        assert not holds(verify(output, data=str(place / "data"), progress=False))
    finally:
        file.write_text(text)


HEAD = "name: a\nmodel: demo/minilm-l6\ntask: sst2\nsteps: [{low_rank: {}}]\n"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("seeds: [1, 2]\nseed: 2\n", "is the first of `seeds`"),
        ("seeds: [1, 1]\n", "each may be named once"),
        ("seeds: [-1]\n", "seeds"),
        ("seeds: 3\n", "seeds"),
        ("evaluation: {metrics: [rouge]}\n", "'rouge' is none that answers of classification are judged by"),
        ("evaluation: {metrics: [presicion]}\n", "did you mean 'precision'"),
    ],
)
def test_what_a_recipe_may_not_say(lines: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(HEAD + lines, "x.yaml")
    assert said in str(caught.value)
    if "metrics" in lines:
        assert "extra_metrics" in str(caught.value)


def test_a_recipe_with_seeds_is_read_as_it_was_written() -> None:
    read = parse_recipe(HEAD + "seeds: [5, 6]\nevaluation: {metrics: [f1]}\n", "x.yaml")
    assert (read.seed, read.all_seeds) == (5, (5, 6))
    assert read.to_dict()["seeds"] == [5, 6]
    single = parse_recipe(HEAD + "seed: 5\n", "x.yaml")
    assert single.all_seeds == (5,) and "seeds" not in single.to_dict()
