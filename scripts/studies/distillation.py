"""MiniLM-L6 fine-tuned alone beside MiniLM-L6 taught by a fine-tuned MPNet-base, for the same time.

    python -m scripts.studies.distillation run [--tasks mrpc stsb ...] [--seeds 1 2 3 ...]   # goes on where cut off
    python -m scripts.studies.distillation choose [--tasks ...] [--arms ...]  # rates alone, and what each loss is worth
    python -m scripts.studies.distillation_page                               # docs/distillation.md and its picture

Teachers and data are those of `scripts.studies.material`. Every arm has the same learning rates, of which one is
chosen on a tenth of train with one seed. What the teacher takes to speak counts: by the processor's time of the runs
that are for choices, a student alone trains so many more epochs as that is worth. Validation is read once
with every seed, which changes the head, the order and dropout. Runs that are there are not done again, and seeds go
round by round, so that a cut leaves the arms and tasks in balance. One epoch of MiniLM takes one thread one to three
minutes.
"""

from __future__ import annotations

import argparse
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict
from statistics import mean
from typing import Any

import torch
import yaml

from hfcompress.bench import Bench
from hfcompress.material import Material
from hfcompress.recipe import Recipe, parse_recipe
from hfcompress.run_folder import Done
from hfcompress.tasks import get_task
from scripts.studies.language_model import pending
from scripts.studies.material import TASKS, add_row, glue_folder, read_rows, results_file, study_root, teacher_folder

RESULTS = results_file("distillation.jsonl")
STUDENT, TEACHER = "minilm-l6", "mpnet-base"
RATES = (3e-5, 5e-5, 1e-4)
EPOCHS = {"mrpc": 8, "stsb": 6, "sst2": 3, "rte": 8}
SEEDS = {"mrpc": 10, "stsb": 10, "sst2": 5, "rte": 10}

_OUTPUTS: dict[str, Any] = {"soft": 1.0, "hard": 0.5, "temperature": 2.0, "cache": True}
ALONE, TAUGHT = "alone", "outputs"
ARMS: dict[str, dict[str, Any] | None] = {
    ALONE: None,
    TAUGHT: _OUTPUTS,
    "outputs, no labels": _OUTPUTS | {"hard": 0.0},
    "outputs, temperature 5": _OUTPUTS | {"temperature": 5.0},
    "outputs, last hidden states": _OUTPUTS | {"hidden": 20.0, "layers": [[6, 12]]},
    "outputs, hidden states": _OUTPUTS | {"hidden": 20.0},
    "outputs, hidden states first": _OUTPUTS | {"hidden": 20.0, "stage": 0.3},
    "outputs, relations": _OUTPUTS | {"cache": False, "relations": 0.1, "relation_heads": 12},
}
MAIN = (ALONE, TAUGHT)


# Runs


def recipe_of(point: dict[str, Any]) -> Recipe:
    """Returns what a run does."""
    training = {"epochs": point["epochs"], "learning_rate": point["rate"], "batch_size": 32}
    step: dict[str, Any] = {"name": "learn", "training": training}
    if taught := ARMS[point["arm"]]:
        step["distillation"] = taught
    recipe = {
        "name": "study",
        "model": f"demo/{STUDENT}",
        "teacher": str(teacher_folder(TEACHER, point["task"])),
        "task": point["task"],
        "data": str(glue_folder(point["part"])),
        "max_length": 128,
        "evaluation": {"curve_points": 0},
        "steps": [step],
    }
    return parse_recipe(yaml.safe_dump(recipe), "study")


def run(point: dict[str, Any]) -> None:
    """Trains and measures a student, unless that is done; keeps its answers and the processor's time."""
    if not pending(read_rows(RESULTS), point):
        return
    root = study_root() / "distillation"
    work = root / "-".join(f"{each}" for each in point.values()).replace(" ", "_")
    cache = root / f"cache-{point['task']}-{point['part']}"
    known = set(cache.glob("*")) if cache.exists() else set()
    started = time.process_time()
    material = Material(recipe_of(point), progress=False)
    assert material.teacher is not None
    # Its own report says how good the teacher is.
    teacher = Done("teacher", (), material.teacher, work, "", {})
    bench = Bench(material, point["seed"], work, cache, quiet=True)
    done = bench.run_steps(teacher)[-1]
    said = {"seconds": time.process_time() - started, "filled": bool(set(cache.glob("*")) - known)}
    answers = {name: each for name, each in asdict(bench.answers(done)).items() if name != "groups"}
    add_row(RESULTS, point | said | {"metrics": done.record["metrics"], "answers": answers})
    shutil.rmtree(work)


# Choices


def points_for_choices(task: str, arm: str, rates: Sequence[float] = RATES) -> list[dict[str, Any]]:
    """Returns the runs by which a learning rate is chosen."""
    point = {"task": task, "arm": arm, "part": "choices", "epochs": EPOCHS[task], "seed": 0}
    return [point | {"rate": rate} for rate in rates]


def chosen_rate(rows: list[dict[str, Any]], task: str, arm: str) -> float:
    """Returns the rate that is best on the tenth of train that is for choices."""
    tried = [row for point in points_for_choices(task, arm) for row in rows if row | point == row]
    return max(tried, key=lambda row: row["metrics"][get_task(task).metrics[0]])["rate"]


def epochs_of_teacher(rows: list[dict[str, Any]], task: str) -> float:
    """Returns for how many epochs a student could have trained while the teacher spoke once about each row.

    That is by how much a run that filled the cache took longer than one that did not.
    """
    runs = [row for point in points_for_choices(task, TAUGHT) for row in rows if row | point == row]
    filling, other = (mean(row["seconds"] for row in runs if row["filled"] is state) for state in (True, False))
    return EPOCHS[task] * (filling - other) / other


def points_for_validation(rows: list[dict[str, Any]], task: str, arm: str, seed: int) -> dict[str, Any]:
    """Returns the run that is measured on validation."""
    more = math.ceil(10 * epochs_of_teacher(rows, task)) / 10 if arm == ALONE else 0
    point = {"task": task, "arm": arm, "part": "whole", "epochs": EPOCHS[task] + more, "seed": seed}
    return point | {"rate": chosen_rate(rows, task, arm)}


def choose(asked: argparse.Namespace) -> None:
    """Does the runs by which rates are chosen, and prints what they came to."""
    for task in asked.tasks:
        for point in (each for arm in asked.arms for each in points_for_choices(task, arm, asked.rates)):
            run(point)
    for row in read_rows(RESULTS):
        if row["part"] == "choices" and row["task"] in asked.tasks:
            figures = " ".join(f"{name} {value:.4f}" for name, value in row["metrics"].items())
            print(f"{row['task']:5} {row['arm']:30} {row['rate']:.0e} {row['seconds']:5.0f} s  {figures}")


def run_all(asked: argparse.Namespace) -> None:
    """Chooses, and runs every arm with every seed."""
    for task in asked.tasks:
        for arm in asked.arms if TAUGHT in asked.arms else (TAUGHT, *asked.arms):
            for point in points_for_choices(task, arm):
                run(point)
    for seed in asked.seeds or range(1, max(SEEDS[task] for task in asked.tasks) + 1):
        for task in asked.tasks:
            for arm in asked.arms if seed <= SEEDS[task] else ():
                run(points_for_validation(read_rows(RESULTS), task, arm, seed))


def main() -> None:
    """Does what was asked."""
    torch.set_num_threads(1)  # a run's processor time is its time
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, work in (("run", run_all), ("choose", choose)):
        command = commands.add_parser(name, help=work.__doc__)
        command.set_defaults(work=work)
        command.add_argument("--tasks", nargs="+", choices=TASKS, default=("mrpc", "stsb", "sst2"))
        command.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=MAIN)
    commands.choices["run"].add_argument("--seeds", nargs="+", type=int)
    commands.choices["choose"].add_argument("--rates", nargs="+", type=float, default=RATES)
    asked = parser.parse_args()
    asked.work(asked)


if __name__ == "__main__":
    main()
