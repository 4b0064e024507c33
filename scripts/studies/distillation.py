"""MiniLM-L6 fine-tuned alone beside MiniLM-L6 taught by a fine-tuned MPNet-base, for the same time.

    python -m scripts.studies.distillation run [--tasks mrpc stsb ...] [--arms ...] [--seeds 1 2 3 ...]
    python -m scripts.studies.distillation choose [--tasks ...] [--arms ...] [--rates ...] [--passes ...]
    python -m scripts.studies.distillation_page                               # docs/distillation.md and its picture

Teachers and data are those of `scripts.studies.material`. What `choose` runs is judged on a tenth of train with one
seed; of it came the learning rate, which is the same for all. Then validation is read once with every seed, which
changes the head, the order and dropout. The taught student also learns texts that are made out of its training texts,
of which nobody but the teacher says anything. What the teacher takes to speak counts: the student alone makes so many
more passes, and every row keeps the processor's time, so that the page can say whether they were enough. More passes
are not always better: the student alone also makes half of them, and the taught one is compared with the better of the
two. Runs that are there are not done again, and seeds go round by round, so that a cut leaves arms and tasks in
balance. One pass over a task takes one thread one to two and a half minutes.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import asdict
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
# Of RATES the best in short runs for both arms, but for STS-B alone, which is better at 5e-5 in short runs and at this
# one in long ones, and for SST-2 taught, which comes half a point further at 2e-4: too much for MRPC and STS-B.
RATE = 1e-4
RATES = (5e-5, RATE, 2e-4)
CHOICE_EPOCHS = {"mrpc": 3, "stsb": 3, "sst2": 2, "rte": 3}
SEEDS = {"mrpc": 10, "stsb": 10, "sst2": 5, "rte": 10}

ALONE, HALF, TAUGHT, OUTPUTS = "alone", "alone, half the passes", "made texts", "outputs"
# Passes over all the rows there are, of which a student that learns made texts has more; one whose teacher speaks about
# train alone makes as many steps as that one.
EPOCHS = {
    ALONE: {"mrpc": 10, "stsb": 9, "sst2": 6, "rte": 10},
    HALF: {"mrpc": 5, "stsb": 4.5, "sst2": 3, "rte": 5},
    TAUGHT: {"mrpc": 3, "stsb": 3, "sst2": 2, "rte": 3},
    OUTPUTS: {"mrpc": 6, "stsb": 6, "sst2": 3, "rte": 6},
}
SHARE = {"mrpc": 1.0, "stsb": 1.0, "sst2": 0.5, "rte": 1.0}

_OUTPUTS: dict[str, Any] = {"soft": 1.0, "hard": 0.5, "temperature": 2.0, "cache": True}
ARMS: dict[str, dict[str, Any] | None] = {
    ALONE: None,
    HALF: None,
    OUTPUTS: _OUTPUTS,
    TAUGHT: _OUTPUTS,
    "outputs, no labels": _OUTPUTS | {"hard": 0.0},
    "outputs, temperature 5": _OUTPUTS | {"temperature": 5.0},
    "outputs, last hidden states": _OUTPUTS | {"hidden": 20.0, "layers": [[6, 12]]},
    "outputs, hidden states": _OUTPUTS | {"hidden": 20.0},
    "outputs, hidden states first": _OUTPUTS | {"hidden": 20.0, "stage": 0.3},
    "outputs, hidden states, cosine": _OUTPUTS | {"hidden": 1.0, "hidden_loss": "cosine"},
    "outputs, embeddings": _OUTPUTS | {"embeddings": 1.0},
    "outputs, relations": _OUTPUTS | {"cache": False, "relations": 0.1, "relation_heads": 12},
}
MAIN = (ALONE, HALF, TAUGHT)


# Runs


def recipe_of(point: dict[str, Any]) -> Recipe:
    """Returns what a run does."""
    task, taught = point["task"], ARMS[point["arm"]]
    training = {"epochs": point["epochs"], "learning_rate": point["rate"], "batch_size": 32}
    step: dict[str, Any] = {"name": "learn", "training": training}
    recipe: dict[str, Any] = {
        "name": "study",
        "model": f"demo/{STUDENT}",
        "teacher": str(teacher_folder(TEACHER, task)),
        "task": task,
        "data": str(glue_folder(point["part"])),
        "max_length": 128,
        "evaluation": {"curve_points": 0},
        "steps": [step],
    }
    if taught and point["arm"] == TAUGHT:
        recipe["augmentation"] = {"share": SHARE[task]}
        # A number that nobody gave cannot stand beside numbers.
        taught = taught | {"hard": 0.0} if get_task(task).kind == "regression" else taught
    if taught:
        step["distillation"] = taught
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


def point_for_choices(task: str, arm: str, rate: float = RATE, epochs: float | None = None) -> dict[str, Any]:
    """Returns a run that is measured on the tenth of train that is for choices."""
    return {
        "task": task,
        "arm": arm,
        "part": "choices",
        "epochs": epochs or CHOICE_EPOCHS[task],
        "seed": 0,
        "rate": rate,
    }


def point_for_validation(task: str, arm: str, seed: int) -> dict[str, Any]:
    """Returns a run that is measured on validation."""
    return {"task": task, "arm": arm, "part": "whole", "epochs": EPOCHS[arm][task], "seed": seed, "rate": RATE}


def choose(asked: argparse.Namespace) -> None:
    """Does the runs by which rates are chosen, and prints what they came to."""
    for task in asked.tasks:
        for arm in asked.arms:
            for rate in asked.rates:
                run(point_for_choices(task, arm, rate, asked.passes))
    for row in read_rows(RESULTS):
        if row["part"] == "choices" and row["task"] in asked.tasks:
            figures = " ".join(f"{name} {value:.4f}" for name, value in row["metrics"].items())
            passes = f"{row['epochs']} passes at {row['rate']:.0e}"
            print(f"{row['task']:5} {row['arm']:30} {passes} {row['seconds']:5.0f} s  {figures}")


def run_all(asked: argparse.Namespace) -> None:
    """Runs every arm with every seed."""
    for seed in asked.seeds or range(1, max(SEEDS[task] for task in asked.tasks) + 1):
        for task in asked.tasks:
            for arm in asked.arms if seed <= SEEDS[task] else ():
                run(point_for_validation(task, arm, seed))


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
    commands.choices["choose"].add_argument("--rates", nargs="+", type=float, default=(RATE,))
    commands.choices["choose"].add_argument("--passes", type=float, help="over train")
    asked = parser.parse_args()
    asked.work(asked)


if __name__ == "__main__":
    main()
