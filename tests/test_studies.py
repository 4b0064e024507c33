"""What the studies decide by: which points are still to be measured, and which of them count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from scripts.studies import distillation, material
from scripts.studies.distillation_page import Study
from scripts.studies.gradual_pruning_page import Change, Part, gained, over_tasks, pooled
from scripts.studies.language_model import blocks_of, pending, recovered
from scripts.studies.low_rank import ARMS, config_of


def row(arm: str, seed: int, rate: float, perplexity: float, choices: float | None = None) -> dict[str, Any]:
    made = {"study": "recovered", "arm": arm, "seed": seed, "rate": rate, "perplexity": perplexity}
    return made if choices is None else made | {"choices": choices}


def test_a_point_is_pending_until_a_row_has_all_of_it() -> None:
    rows = [row("original", 0, 0.0, 20.0)]
    assert not pending(rows, {"arm": "original", "seed": 0})
    assert pending(rows, {"arm": "original", "seed": 1})
    assert pending(rows, {"arm": "original", "removed": 0.1})
    assert pending([], {"arm": "original"})


def test_the_first_seed_chooses_and_ratios_are_those_of_the_same_seed() -> None:
    rows = [
        row("original", 0, 0.0, 10.0, choices=5.0),
        row("original", 0, 1e-4, 8.0, choices=6.0),  # better on the test file, which chooses nothing
        row("original", 1, 0.0, 20.0),
        row("smaller", 0, 0.0, 15.0, choices=9.0),
        row("smaller", 0, 1e-4, 12.0, choices=7.0),
        row("smaller", 1, 0.0, 50.0),
        row("smaller", 1, 1e-4, 30.0),
        row("smaller", 2, 1e-4, 30.0),  # there is no original of this seed yet
        row("smallest", 1, 1e-4, 30.0),  # nothing is chosen for it yet
        row("new", 0, 0.0, 30.0, choices=9.0),  # not trained yet
    ]
    found = [(each["arm"], each["seed"], each["ratio"]) for each in recovered(rows, "arm")]
    assert found == [("original", 0, 1.0), ("original", 1, 1.0), ("smaller", 0, 1.2), ("smaller", 1, 1.5)]


class Letters:
    """A tokenizer whose tokens are letters."""

    unk_token_id = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


@pytest.mark.parametrize("known", [True, False])
def test_nothing_reads_or_predicts_what_is_not_known(known: bool) -> None:
    text = "a" * 600 + ("b" if known else "<unk>") + "c" * 500
    made = blocks_of(text, Letters())
    assert made["input_ids"].shape == (2, 512)
    gap = torch.zeros(2, 512, dtype=torch.bool)
    gap[1, 600 - 512] = not known
    assert torch.equal(made["labels"] == -100, gap)
    assert torch.equal(made["input_ids"] == 0, gap)
    assert known or torch.equal(made["attention_mask"] == 0, gap)
    assert ("attention_mask" in made) != known


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_removes_the_share_that_it_is_asked_for(arm: str) -> None:
    config = config_of(arm, 0.3)
    assert (config.keep or config.budget) == 0.7
    assert config.weighs_outputs_with(config.method_with(True)) == arm.startswith("curvature")


def test_made_texts_are_learnt_from_the_teacher_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HFCOMPRESS_CACHE", str(tmp_path))
    material.glue_folder().mkdir(parents=True)
    for task in ("mrpc", "stsb"):
        teacher = material.teacher_folder("mpnet-base", task)
        teacher.mkdir(parents=True)
        (teacher / "config.json").write_text("{}")
    for task, hard in (("mrpc", 0.5), ("stsb", 0.0)):
        point = {"task": task, "part": "whole", "epochs": 3, "seed": 1, "rate": 1e-4}
        made, plain = (distillation.recipe_of(point | {"arm": arm}) for arm in (distillation.TAUGHT, "outputs"))
        assert made.augmentation is not None and plain.augmentation is None
        assert [step.methods[0].model_dump()["hard"] for step in (*made.steps, *plain.steps)] == [hard, 0.5]


def test_gains_are_those_of_the_same_seed_in_points() -> None:
    def row(arm: str, seed: int, predictions: list[int]) -> dict[str, Any]:
        point = distillation.point_for_validation("mrpc", arm, seed)
        right = sum(prediction == 1 for prediction in predictions) / len(predictions)
        answers = {"predictions": predictions, "references": [1] * 4, "confidences": [1.0] * 4}
        said = {"seconds": 100.0 if seed == 1 else 80.0, "filled": seed == 1 and arm != "alone"}
        return point | said | {"metrics": {"accuracy": right, "f1": 0.0}, "answers": answers}

    rows = [row("outputs", 2, [1, 1, 1, 1]), row("alone", 2, [1, 1, 0, 0]), row("outputs", 1, [1, 1, 1, 1])]
    rows += [row("alone", 1, [1, 1, 1, 0]), row("alone", 3, [0, 0, 0, 0])]
    half = [row(distillation.HALF, seed, [1, 1, 1, right]) for seed, right in ((1, 0), (2, 0))]
    assert Study(rows).alone("mrpc") == "alone" and Study([*rows, *half]).alone("mrpc") == distillation.HALF
    study = Study(rows)
    assert [before["seed"] for before, _ in study.pairs("mrpc", "outputs")] == [1, 2]
    gained = study.gained("mrpc", "outputs")
    assert gained[0] == pytest.approx(37.5)
    assert 0 <= gained[1:].min() < gained[1:].max() <= 100
    assert study.minutes("mrpc", "outputs") == pytest.approx((80 / 60, 20 / 60))
    assert study.minutes("mrpc", "alone") == pytest.approx((260 / 180, 0))


def test_seeds_of_two_machines_weigh_alike_and_their_intervals_do_not_shrink() -> None:
    def part(seeds: int, change: Change) -> Part:
        return Part("prune-60", "mrpc", "one", seeds, 90.0, 90.0 + change.value, change, 0.4, 58.0, 2.0, 1.0)

    both = pooled([part(3, Change(1.0, 0.0, 3.0)), part(1, Change(-3.0, -8.0, -1.0))])
    assert both == Change(0.0, -2.0, 2.0)
    mean = over_tasks([Change(1.0, -2.0, 5.0), Change(3.0, -1.0, 6.0)])
    assert (mean.value, mean.low, mean.high) == pytest.approx((2.0, 2.0 - 5.0 / 2, 2.0 + 5.0 / 2))


def test_kept_answers_count_only_with_the_right_answers_they_were_measured_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HFCOMPRESS_CACHE", str(tmp_path))
    folder = material.glue_folder() / "mrpc"
    folder.mkdir(parents=True)
    right = [1, 0, 1, 1, 0, 1, 0, 1] * 10
    runs = [
        {"metric": "accuracy", "rows": [{"metric": 1.0}, {"metric": 70 / 80}], "first": right, "last": last}
        for last in ([0] * 6 + right[6:14] + [0] * 10 + right[24:], [1 - each for each in right[:10]] + right[10:])
    ]
    runs[0]["rows"][1]["metric"] = sum(map(int.__eq__, runs[0]["last"], right)) / 80
    parquet.write_table(pa.table({"label": right}), folder / "validation.parquet")
    change = gained("mrpc", runs)
    measured = [100 * (run["rows"][1]["metric"] - 1.0) for run in runs]
    assert change.value == pytest.approx(sum(measured) / 2)
    assert change.low < change.value < change.high <= 0
    parquet.write_table(pa.table({"label": right[::-1]}), folder / "validation.parquet")
    with pytest.raises(ValueError, match=r"mrpc: accuracy of a run's kept answers is 0\.\d+ by .*, and was 1\.0000"):
        gained("mrpc", runs)
