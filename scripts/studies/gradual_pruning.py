"""Gradual pruning with distillation at 60% and 95% of the encoder's FLOPs: quality against measured speed-up.

    python -m scripts.studies.gradual_pruning run [--tasks mrpc] [--seeds 0 1 2] [--max-steps 2]
    python -m scripts.studies.gradual_pruning summary

Runs `recipes/prune-60.yaml` and `recipes/prune-95.yaml` from the teachers of `scripts.studies.material` in place of
their first step, so that all seeds start from one model. Hours for each; runs that are there are not done again, and
one that was cut off goes on. Beside every run lies all that a run writes, its report with the paired intervals too.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from scripts.studies.material import ROOT, TASKS, glue_folder, results_file, study_root, teacher_folder

RECIPES = ("prune-60", "prune-95")
PICTURE = results_file("gradual_pruning.png")
ROWS = PICTURE.with_suffix(".jsonl")


def folder_of(recipe: str, task: str, seed: int, max_steps: int | None) -> Path:
    """Returns where a run's result lies; one that was stopped early lies elsewhere."""
    return study_root() / ("gradual-stopped" if max_steps else "gradual") / f"{recipe}-{task}-{seed}"


def from_teacher(recipe: str, task: str, seed: int, max_steps: int | None) -> Path:
    """Writes the recipe without its fine-tuning."""
    made = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())
    made |= {"model": str(teacher_folder("mpnet-base", task)), "task": task, "data": str(glue_folder()), "seed": seed}
    made["steps"] = [step for step in made["steps"] if step["name"] != "fine_tune"]
    for step in made["steps"] if max_steps else ():
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


def points() -> Iterator[dict[str, Any]]:
    """Yields what each run's report says of its last row."""
    for recipe in RECIPES:
        for file in sorted((study_root() / "gradual").glob(f"{recipe}-*/report.json")):
            report: Mapping[str, Any] = json.loads(file.read_text())
            last = report["rows"][-1]
            found = last["findings"].get("structured_pruning", {})
            yield {
                "recipe": recipe,
                "task": report["task"],
                "seed": report["seed"],
                "metrics": last["metrics"],
                "retention": last["retention"],
                "differences": (last["comparison"] or {}).get("differences"),
                "speed": last["speed"]["ratio"] if last["speed"] else None,
                "flops_removed": found.get("flops_removed"),
                "seconds": last["seconds"],
            }


def summary(asked: argparse.Namespace) -> None:
    """Prints the rows, keeps them, and draws quality against measured speed-up."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(points())
    ROWS.parent.mkdir(parents=True, exist_ok=True)
    ROWS.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = Figure(figsize=(7, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for task in dict.fromkeys(row["task"] for row in rows):
        curve = [(1.0, 1.0)]
        for recipe in RECIPES:
            mine = [row for row in rows if (row["task"], row["recipe"]) == (task, recipe) and row["speed"]]
            if not mine:
                continue
            speed, kept = (sum(row[key] for row in mine) / len(mine) for key in ("speed", "retention"))
            print(f"{task:6} {recipe:9} {len(mine)} seeds: {speed:5.2f}x faster, retention {kept:.3f}")
            axes.plot([row["speed"] for row in mine], [row["retention"] for row in mine], ".", color="#999999")
            curve.append((speed, kept))
        axes.plot(*zip(*curve, strict=True), marker="o", label=task)
    axes.set(xscale="log", xlabel="measured speed-up", ylabel="retention", title="MPNet-base, pruned and distilled")
    if rows:
        axes.legend()
    figure.savefig(PICTURE)


def main() -> None:
    """Does what was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    commands.add_parser("summary", help=summary.__doc__).set_defaults(work=summary)
    command = commands.add_parser("run", help=run.__doc__)
    command.set_defaults(work=run)
    command.add_argument("--tasks", nargs="+", choices=TASKS, default=["mrpc", "stsb", "sst2"])
    command.add_argument("--recipes", nargs="+", choices=RECIPES, default=RECIPES)
    command.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    command.add_argument("--max-steps", type=int, help="stop each training so early: only to see that all runs")
    asked = parser.parse_args()
    asked.work(asked)


if __name__ == "__main__":
    main()
