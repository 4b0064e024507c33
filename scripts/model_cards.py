"""Runs the published recipes that need nothing from the Hub, and keeps their cards in model_cards/.

    python -m scripts.model_cards [NAME ...] [--glue FOLDER] [--wnut17 FOLDER]

GLUE is laid out like `nyu-mll/glue`, wnut17 like `wnut_17`; recipes whose data is not given are left out. The runs are
kept in `~/.cache/hfcompress` (or in `HFCOMPRESS_CACHE`) and go on where they were cut off. Recipes that begin with the
same fine-tuning share it, and one whose teacher is another recipe's run lets that be made first. A card that is there
is made again only where its recipe is named.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from scripts.studies.material import ROOT, share_step, study_root

CARDS = ROOT / "model_cards"
KEPT = ("README.md", "report.json", "pictures")
# Which data a task is read from; a demo brings its own.
DATA = {"mrpc": "glue", "sst2": "glue", "wnut17": "wnut17"}


def recipes() -> dict[str, dict[str, Any]]:
    """Returns the recipes that start from a demo model, the quickest first."""
    found = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in (ROOT / "recipes").glob("*.yaml")}
    own = {
        name: values
        for name, values in found.items()
        if values["model"].startswith("demo/") and isinstance(values["task"], str)
    }
    own = {name: values for name, values in own.items() if "teacher" not in values or teacher_of(values) in own}
    return dict(sorted(own.items(), key=lambda each: (each[1]["model"], each[1]["task"] in DATA, each[0])))


def teacher_of(values: dict[str, Any]) -> str:
    """Returns the recipe whose run teaches."""
    return values["teacher"].removeprefix("./runs/")


def beginning(values: dict[str, Any]) -> Any:
    """Returns what the result of a recipe's first step depends on."""
    return [values.get(field) for field in ("model", "task", "seed", "max_length")] + [values["steps"][0]]


def share_first_step(name: str, every: dict[str, dict[str, Any]], runs: Path) -> None:
    """Copies the first step of a run that began in the same way."""
    first = f"1-{every[name]['steps'][0].get('name')}"
    for other, values in every.items():
        if beginning(values) == beginning(every[name]):
            share_step(first, runs / other, runs / name)


def run(name: str, every: dict[str, dict[str, Any]], runs: Path, data: Path | None) -> None:
    """Runs a recipe, and before it the one that makes its teacher."""
    settings = {"data": data} if data else {}
    if "teacher" in every[name]:
        teacher = teacher_of(every[name])
        run(teacher, every, runs, data)
        settings["teacher"] = runs / teacher
    share_first_step(name, every, runs)
    recipe = ROOT / "recipes" / f"{name}.yaml"
    command = [sys.executable, "-m", "hfcompress_cli", "run", str(recipe), "--quiet", "--output", str(runs / name)]
    subprocess.run([*command, *(f"--set={field}={value}" for field, value in settings.items())], check=True)


def make(name: str, every: dict[str, dict[str, Any]], data: Path | None) -> None:
    """Runs a recipe and keeps its card."""
    runs = study_root() / "cards"
    runs.mkdir(parents=True, exist_ok=True)
    run(name, every, runs, data)
    (CARDS / name).mkdir(parents=True, exist_ok=True)
    for each in KEPT:
        source, target = runs / name / each, CARDS / name / each
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, target)
        elif source.is_file():
            shutil.copyfile(source, target)
    print(f"{name}: {(CARDS / name).relative_to(ROOT)}", flush=True)


def main() -> None:
    """Makes the cards that are not there or older than their recipe."""
    every = recipes()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(every)}; all where none is given")
    parser.add_argument("--glue", type=Path)
    parser.add_argument("--wnut17", type=Path)
    options = parser.parse_args()
    if unknown := set(options.names) - set(every):
        parser.error(f"{', '.join(sorted(unknown))}: no recipe that runs without the Hub; there are {', '.join(every)}")
    for name in options.names or [each for each in every if not (CARDS / each / "README.md").is_file()]:
        source = DATA.get(every[name]["task"])
        data = getattr(options, source) if source else None
        if source and data is None:
            print(f"{name}: left out, --{source} is not given", flush=True)
            continue
        make(name, every, data.resolve() if data else None)


if __name__ == "__main__":
    main()
