"""Gradual pruning with distillation at 60% and 95% of the encoder's FLOPs: quality against measured speed-up.

    python -m scripts.studies.gradual_pruning run [--tasks mrpc] [--seeds 0 1 2] [--max-steps 2]
    python -m scripts.studies.gradual_pruning choose                          # how prune-95 ends, on a part of train
    python -m scripts.studies.gradual_pruning_page                            # docs/gradual_pruning.md and its picture

What a run measured, and what it answered, is kept in `scripts/studies/results/gradual`, without the right answers: a
study of 17 hours of a thread is gathered on more than one machine, and what one has done is not done again on the next.

Runs `recipes/prune-60.yaml` and `recipes/prune-95.yaml` from the teachers of `scripts.studies.material` in place of
their first step, so that all seeds of a machine start from one model. Half an hour of a thread for each on MRPC; runs
that are there are not done again, and one that was cut off goes on.

`choose` fine-tunes a teacher that has not seen the tenth of STS-B's train which is for choices, removes 95% as the
recipe says, and compares there what a last step without pruning gains. An hour of a thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from hfcompress.evaluation.report import Report
from hfcompress.tasks import get_task
from scripts.studies.distillation import SHARE
from scripts.studies.material import (
    EPOCHS,
    ROOT,
    TASKS,
    add_row,
    glue_folder,
    read_rows,
    share_step,
    study_root,
    teacher_folder,
)

RECIPES = ("prune-60", "prune-95")
KEPT = ROOT / "scripts" / "studies" / "results" / "gradual"
# Last steps that are compared, by their name: passes and learning rate, falling to nothing.
CHOICES = KEPT.with_name("gradual_choices.jsonl")
CHOICES_TASK = "stsb"
ENDINGS = {"2 passes, 5e-5": (2, "5e-5"), "2 passes, 1e-4": (2, "1e-4"), "6 passes, 1e-4": (6, "1e-4")}


def folder_of(recipe: str, task: str, seed: int, max_steps: int | None) -> Path:
    """Returns where a run's result lies; one that was stopped early lies elsewhere."""
    return study_root() / ("gradual-stopped" if max_steps else "gradual") / f"{recipe}-{task}-{seed}"


def kept_file(recipe: str, task: str, seed: int) -> Path:
    """Returns where what a run measured is kept in the project."""
    return KEPT / f"{recipe}-{task}-{seed}.json"


def keep(recipe: str, task: str, seed: int) -> None:
    """Keeps a run's figures and the answers of its first and last model."""
    out = folder_of(recipe, task, seed, None)
    report = Report.from_json((out / "report.json").read_text())
    answers = json.loads((out / "predictions.json").read_text())["rows"]
    rows = [
        {
            "metric": row.metrics[report.metric],
            "parameters": row.parameters,
            "seconds": round(row.seconds, 1),
            "faster": row.speed.ratio if row.speed else None,
            "flops_removed": row.findings.get("structured_pruning", {}).get("flops_removed", 0.0),
        }
        for row in report.rows
    ]
    first, last = ([round(answer, 4) for answer in answers[place]["predictions"]] for place in (0, -1))
    kept = {"cpu": report.environment["cpu"], "metric": report.metric, "rows": rows, "first": first, "last": last}
    KEPT.mkdir(parents=True, exist_ok=True)
    kept_file(recipe, task, seed).write_text(json.dumps(kept) + "\n")


def for_task(recipe: str, task: str) -> dict[str, Any]:
    """Returns a recipe of the project for a task of the studies."""
    made = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())
    made |= {"task": task, "augmentation": {"share": SHARE[task]}}
    for step in made["steps"]:
        if "distillation" in step and get_task(task).kind == "regression":
            step["distillation"]["hard"] = 0.0  # a number that nobody gave cannot stand beside numbers
    return made


def from_teacher(recipe: str, task: str, seed: int, max_steps: int | None) -> dict[str, Any]:
    """Returns the recipe without its fine-tuning."""
    made = for_task(recipe, task)
    made |= {"model": str(teacher_folder("mpnet-base", task)), "data": str(glue_folder()), "seed": seed}
    made["evaluation"] = {"grid_batch_sizes": []}
    made["steps"] = [step for step in made["steps"] if step["name"] != "fine_tune"]
    for step in made["steps"]:
        if "training" in step and max_steps:
            step["training"]["max_steps"] = max_steps
    return made


def run_recipe(recipe: dict[str, Any], out: Path) -> None:
    """Runs a recipe that is written beside its result, or goes on where that was cut off."""
    file = out.with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "hfcompress_cli", "run", str(file), "--quiet", "--output", str(out)]
    subprocess.run(command, check=True, cwd=ROOT)
    print(out, flush=True)


def run(asked: argparse.Namespace) -> None:
    """Does every run that is not there yet, seed by seed, so that a cut leaves the tasks in balance."""
    for seed in asked.seeds:
        for task in asked.tasks:
            for recipe in asked.recipes:
                out = folder_of(recipe, task, seed, asked.max_steps)
                if not asked.max_steps and kept_file(recipe, task, seed).exists():
                    continue
                if not (out / "report.json").exists():
                    for other in RECIPES:
                        for step in ("0-original", "1-halve"):
                            share_step(step, folder_of(other, task, seed, asked.max_steps), out)
                    run_recipe(from_teacher(recipe, task, seed, asked.max_steps), out)
                if not asked.max_steps:
                    keep(recipe, task, seed)


def choose(asked: argparse.Namespace) -> None:
    """Compares last steps for prune-95 on a part of train."""
    folder = study_root() / "gradual-choices"
    done = {row["ending"] for row in read_rows(CHOICES)}
    pruned: dict[str, Any] = for_task("prune-95", CHOICES_TASK) | {"data": str(glue_folder("choices"))}
    pruned["steps"] = [step for step in pruned["steps"] if step["name"] != "recover"]
    pruned["steps"][0]["training"]["epochs"] = EPOCHS[CHOICES_TASK]
    # The teacher is a run of its own, whose folder the last steps learn from.
    teacher = pruned | {"name": "teacher", "model": "demo/mpnet-base", "steps": pruned["steps"][:1]}
    teacher.pop("augmentation")
    pruned |= {"model": str(folder / "teacher"), "steps": pruned["steps"][1:]}
    taught = pruned["steps"][-1]["distillation"]
    recipes = {"teacher": teacher, "none": pruned}
    for ending, (epochs, rate) in ENDINGS.items():
        training = {"epochs": epochs, "learning_rate": rate, "batch_size": 32}
        step = {"name": "recover", "distillation": taught, "training": training}
        lasts = {"model": str(folder / "none"), "teacher": str(folder / "teacher"), "steps": [step]}
        recipes[ending] = pruned | lasts
    for ending, recipe in recipes.items():
        out = folder / ending.replace(", ", "-").replace(" ", "-")
        if ending in done:
            continue
        if not (out / "report.json").exists():
            run_recipe(recipe | {"evaluation": {"grid_batch_sizes": []}}, out)
        report = Report.from_json((out / "report.json").read_text())
        metric = report.rows[-1].metrics[report.metric]
        add_row(CHOICES, {"ending": ending, report.metric: metric, "minutes": report.rows[-1].seconds / 60})


def main() -> None:
    """Does what was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("choose", help=choose.__doc__).set_defaults(do=choose)
    command = commands.add_parser("run", help=run.__doc__)
    command.set_defaults(do=run)
    command.add_argument("--tasks", nargs="+", choices=TASKS, default=["mrpc", "stsb", "sst2"])
    command.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    command.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    command.add_argument("--max-steps", type=int, help="stop each training so early: only to see that all runs")
    asked = parser.parse_args()
    asked.do(asked)


if __name__ == "__main__":
    main()
