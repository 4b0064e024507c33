"""Gradual pruning with distillation at 60% and 95% of the encoder's FLOPs: quality against measured speed-up.

    python -m scripts.studies.gradual_pruning run [--tasks mrpc] [--seeds 0 1 2] [--max-steps 2]
    python -m scripts.studies.gradual_pruning_page                            # docs/gradual_pruning.md and its picture

Runs `recipes/prune-60.yaml` and `recipes/prune-95.yaml` from the teachers of `scripts.studies.material` in place of
their first step, so that all seeds start from one model. Half an hour of a thread for each on MRPC; runs that are there
are not done again, and one that was cut off goes on.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import yaml

from hfcompress.tasks import get_task
from scripts.studies.distillation import SHARE
from scripts.studies.material import ROOT, TASKS, glue_folder, study_root, teacher_folder

RECIPES = ("prune-60", "prune-95")


def folder_of(recipe: str, task: str, seed: int, max_steps: int | None) -> Path:
    """Returns where a run's result lies; one that was stopped early lies elsewhere."""
    return study_root() / ("gradual-stopped" if max_steps else "gradual") / f"{recipe}-{task}-{seed}"


def from_teacher(recipe: str, task: str, seed: int, max_steps: int | None) -> Path:
    """Writes the recipe without its fine-tuning."""
    made = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())
    made |= {"model": str(teacher_folder("mpnet-base", task)), "task": task, "data": str(glue_folder()), "seed": seed}
    made["steps"] = [step for step in made["steps"] if step["name"] != "fine_tune"]
    made["augmentation"] = {"share": SHARE[task]}
    for step in made["steps"]:
        if "distillation" in step and get_task(task).kind == "regression":
            step["distillation"]["hard"] = 0.0  # a number that nobody gave cannot stand beside numbers
        if "training" in step and max_steps:
            step["training"]["max_steps"] = max_steps
    file = folder_of(recipe, task, seed, max_steps).with_suffix(".yaml")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(made))
    return file


def run(asked: argparse.Namespace) -> None:
    """Does every run that is not there yet, seed by seed, so that a cut leaves the tasks in balance."""
    for seed in asked.seeds:
        for task in asked.tasks:
            for recipe in asked.recipes:
                out = folder_of(recipe, task, seed, asked.max_steps)
                if (out / "report.json").exists():
                    continue
                file = from_teacher(recipe, task, seed, asked.max_steps)
                command = [sys.executable, "-m", "hfcompress_cli", "run", str(file), "--quiet", "--output", str(out)]
                subprocess.run(command, check=True, cwd=ROOT)
                print(out, flush=True)


def main() -> None:
    """Does what was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command = parser.add_subparsers(required=True).add_parser("run", help=run.__doc__)
    command.add_argument("--tasks", nargs="+", choices=TASKS, default=["mrpc", "stsb", "sst2"])
    command.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    command.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    command.add_argument("--max-steps", type=int, help="stop each training so early: only to see that all runs")
    run(parser.parse_args())


if __name__ == "__main__":
    main()
