"""What the studies share: data split once, and fine-tuned teachers made once.

    python -m scripts.studies.material GLUE [--tasks mrpc sst2 stsb rte] [--models mpnet-base minilm-l6]

GLUE is a local folder laid out like `nyu-mll/glue`. Data, teachers and the studies' results are kept in
`~/.cache/hfcompress` (or in `HFCOMPRESS_CACHE`), so that a second call does nothing. MPNet-base takes some 20 minutes
a task on two cores.

A teacher has seen all of train, the tenth that is for choices too: how well it and what is made of it do there says
little. Choose by how far a result is from its teacher there, or by a student that has seen the rest alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as parquet
from datasets import Dataset

from hfcompress.tasks.fetching import cache_folder

TASKS = ("mrpc", "sst2", "stsb", "rte")
SST2_ROWS = 20_000
CHOICE_SHARE = 0.1  # of train: on these rows choices are made
ROOT = Path(__file__).resolve().parents[2]

# Chosen once, by what is usual for models of this size; the same for every task but for the number of passes.
EPOCHS = {"mrpc": 4, "sst2": 2, "stsb": 3, "rte": 5}
LEARNING_RATE = {"mpnet-base": "3e-5", "minilm-l6": "1e-4"}


def study_root() -> Path:
    """Returns the folder of the studies' data and teachers."""
    return cache_folder() / "studies"


def results_file(name: str) -> Path:
    """Returns where a study keeps its rows: beside the data, whose right answers some hold, not in the project."""
    return study_root() / "results" / name


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Returns a study's rows that are there."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def add_row(file: Path, row: dict[str, Any]) -> None:
    """Keeps a row of a study, and prints it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as rows:
        rows.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


def table(head: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Returns a Markdown table whose first columns are text and the rest numbers."""
    lines = [head, [*["---"] * texts, *["--:"] * (len(head) - texts)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def glue_folder(part: str = "whole") -> Path:
    """Returns the folder for a recipe's `data`.

    Args:
        part: `whole` has GLUE's train (20,000 fixed rows of SST-2's) and validation; `choices` has a fixed tenth of
            train as its validation and the rest as its train.
    """
    return study_root() / "glue" / part


def teacher_folder(model: str, task: str) -> Path:
    """Returns where a fine-tuned model lies."""
    return study_root() / "teachers" / f"{model}-{task}"


def share_step(step: str, done: Path, out: Path) -> None:
    """Copies a step of a run that began in the same way into another's; that run checks that it is what it needs."""
    theirs, place = (run.with_name(f"{run.name}.work") / step for run in (done, out))
    if not place.exists() and (theirs / "step.json").is_file():
        shutil.copytree(theirs, place)


def make_data(glue: Path, task: str) -> None:
    """Splits a task's rows, the same at every call."""
    if (glue_folder("choices") / task / "train.parquet").exists():
        return
    train = Dataset(parquet.read_table(glue / task / "train.parquet")).shuffle(seed=0)
    train = train.select(range(min(SST2_ROWS, len(train)))) if task == "sst2" else train
    held_out = int(CHOICE_SHARE * len(train))
    validation = Dataset(parquet.read_table(glue / task / "validation.parquet"))
    _write("whole", task, train, validation)
    _write("choices", task, train.select(range(held_out, len(train))), train.select(range(held_out)))


def _write(part: str, task: str, train: Dataset, validation: Dataset) -> None:
    folder = glue_folder(part) / task
    folder.mkdir(parents=True, exist_ok=True)
    validation.to_parquet(folder / "validation.parquet")
    train.to_parquet(folder / "train.parquet")  # last: it says that the part is there


def make_teacher(model: str, task: str) -> Path:
    """Fine-tunes a model as `recipes/fine-tune.yaml` says, or goes on where that was cut off."""
    folder = teacher_folder(model, task)
    if not (folder / "report.json").exists():
        settings = {
            "model": f"demo/{model}",
            "task": task,
            "data": str(glue_folder()),
            "steps.fine_tune.training.epochs": str(EPOCHS[task]),
            "steps.fine_tune.training.learning_rate": LEARNING_RATE[model],
        }
        command = [sys.executable, "-m", "hfcompress_cli", "run", str(ROOT / "recipes/fine-tune.yaml")]
        command += [f"--set={key}={value}" for key, value in settings.items()]
        subprocess.run([*command, "--quiet", "--output", str(folder)], check=True)
    return folder


def main() -> None:
    """Makes what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("glue", type=Path)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--models", nargs="+", choices=tuple(LEARNING_RATE), default=tuple(LEARNING_RATE))
    options = parser.parse_args()
    for task in options.tasks:
        make_data(options.glue, task)
        for model in options.models:
            print(make_teacher(model, task), flush=True)


if __name__ == "__main__":
    main()
