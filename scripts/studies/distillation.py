"""MiniLM-L6 fine-tuned alone beside MiniLM-L6 taught by a fine-tuned MPNet-base, for the same time.

    python -m scripts.studies.distillation run [--tasks mrpc stsb ...] [--seeds 10]   # hours; goes on where cut off
    python -m scripts.studies.distillation summary

Teachers and data are those of `scripts.studies.material`. Every arm has the same grid of learning rates, from which
one is chosen on a tenth of train with one seed; the student alone then trains so many more epochs as take the time
that the teacher took. Validation is read once, with every seed: a seed changes the head, the order and dropout. The
summary's intervals are paired, over seeds and examples (`hfcompress.evaluation.seeds`).
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import yaml

from hfcompress import pipeline
from hfcompress.evaluation.answer_book import AnswerBook
from hfcompress.evaluation.comparison import Answers
from hfcompress.evaluation.report import Report
from hfcompress.evaluation.seeds import over_seeds
from hfcompress.recipe import parse_recipe
from hfcompress.tasks import get_task
from scripts.studies.material import TASKS, glue_folder, results_file, study_root, teacher_folder

RESULTS = results_file("distillation.json")
STUDENT, TEACHER = "minilm-l6", "mpnet-base"
RATES = (5e-5, 1e-4, 2e-4)
EPOCHS = {"mrpc": 4, "stsb": 4, "sst2": 2, "rte": 5}
MOST_SEEDS = {"sst2": 5}

ARMS: dict[str, dict[str, Any] | None] = {
    "alone": None,
    "outputs": {"soft": 1.0, "hard": 0.5, "temperature": 2.0, "cache": True},
    "outputs alone": {"soft": 1.0, "hard": 0.0, "temperature": 2.0, "cache": True},
    "outputs and hidden states": {"soft": 1.0, "hard": 0.5, "temperature": 2.0, "hidden": 0.1, "layers": "last"},
    "outputs and relations": {"soft": 1.0, "hard": 0.5, "temperature": 2.0, "relations": 0.1},
}


def result(task: str, arm: str, rate: float, epochs: float, seeds: list[int], part: str) -> tuple[Path, Report]:
    """Runs one arm, or finds what it has done."""
    training = {"epochs": epochs, "learning_rate": rate, "batch_size": 32}
    step: dict[str, Any] = {"name": "learn", "training": training}
    if taught := ARMS[arm]:
        step["distillation"] = taught
    name = f"{task}-{arm}-{rate:g}-{epochs:g}-{part}".replace(" ", "-")
    recipe = {
        "name": name,
        "model": f"demo/{STUDENT}",
        "teacher": str(teacher_folder(TEACHER, task)),
        "task": task,
        "data": str(glue_folder(part)),
        "seeds": seeds,
        "max_length": 128,
        "evaluation": {"curve_points": 0, "grid_batch_sizes": [], "speed_repeats": 3},
        "steps": [step],
    }
    folder = study_root() / "distillation" / name
    report = pipeline.run(parse_recipe(yaml.safe_dump(recipe), "study"), folder, quiet=True)
    return folder, report


def choose(task: str, arm: str) -> tuple[float, float]:
    """Returns the learning rate that is best on the tenth of train that is for choices, and the seconds it took."""
    metric = get_task(task).metrics[0]
    tried = []
    for rate in RATES:
        _, report = result(task, arm, rate, EPOCHS[task], [0], "choices")
        tried.append((report.rows[-1].metrics[metric], rate, report.rows[-1].seconds))
    _, rate, seconds = max(tried)
    return rate, min(seconds, *(each[2] for each in tried))


def measure(task: str, seeds: int) -> None:
    """Chooses, runs every arm with every seed, and writes what came out."""
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    chosen = {arm: choose(task, arm) for arm in ARMS}
    longest = chosen["outputs"][1]
    books = {}
    for arm, (rate, seconds) in chosen.items():
        more = math.ceil(EPOCHS[task] * longest / seconds) if arm == "alone" else EPOCHS[task]
        folder, report = result(task, arm, rate, max(more, EPOCHS[task]), list(range(1, seeds + 1)), "whole")
        book = AnswerBook.from_json((folder / "predictions.json").read_text())
        books[arm] = answers_of(book)
        spread = report.seeds.rows[-1] if report.seeds else None
        found[f"{task}|{arm}"] = {
            "learning_rate": rate,
            "epochs": max(more, EPOCHS[task]),
            "seeds": seeds,
            "values": {name: each.values for name, each in spread.metrics.items()} if spread else {},
            "teacher": dict(report.rows[0].metrics),
        }
    for arm in list(ARMS)[1:]:
        pairs = [list(each) for each in zip(books["alone"], books[arm], strict=True)]
        gained = over_seeds(range(seeds), ("alone", arm), pairs, get_task(task)).rows[1].differences
        found[f"{task}|{arm}"]["gained"] = {name: [each.value, each.low, each.high] for name, each in gained.items()}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1))


def answers_of(book: AnswerBook) -> list[Answers]:
    """Returns the student's answers, one entry a seed."""
    every = [book.rows, *(seed.rows for seed in book.seeds)]
    return [Answers(predictions=own[-1].predictions, references=book.references, confidences=own[-1].confidences)
            for own in every]  # fmt: skip


def summary() -> None:
    """Prints a table of what is there."""
    found = json.loads(RESULTS.read_text())
    for key, each in found.items():
        task, arm = key.split("|")
        metric = get_task(task).metrics[0]
        values = each["values"][metric]
        gained = each.get("gained", {}).get(metric)
        said = f"{gained[0]:+.4f} ({gained[1]:+.4f} to {gained[2]:+.4f})" if gained else ""
        print(f"{task:5} {arm:28} {metric:10} {sum(values) / len(values):.4f} over {len(values)} seeds  {said}")


def main() -> None:
    """Runs the study or shows it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "summary"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=("mrpc", "stsb", "sst2", "rte"))
    parser.add_argument("--seeds", type=int, default=10)
    options = parser.parse_args()
    if options.what == "run":
        for task in options.tasks:
            measure(task, min(options.seeds, MOST_SEEDS.get(task, options.seeds)))
    summary()


if __name__ == "__main__":
    main()
