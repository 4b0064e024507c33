"""Pruning without training, at 2.0x fewer encoder FLOPs, on fine-tuned MPNet-base.

    python -m scripts.studies.pruning                 # hours; goes on where it was cut off, waits for teachers
    python -m scripts.studies.pruning --part choices  # on a part of train, where choices are made
    python -m scripts.studies.pruning_page            # tables of what is there, docs/pruning.md and pruning_rte.md

Teachers and data are those of `scripts.studies.material`. Every arm removes the same share of the layers' multiply-adds
with the same draw of 512 calibration sentences of train; each is measured on validation once. A row of the results
holds every answer, so that the page's intervals are paired: over examples, and over draws. The time of an arm is
that of everything it does, on one thread beside whatever else runs. One forward and backward pass of a draw gives the
derivatives by weights that `torch-pruning` ranks by and those by units that `ours` does: both are charged for all of
it, though `ours` alone would need no derivatives by weights. `taylor` takes those of `ours`, and is not charged.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hfcompress import StructuredPruningConfig
from hfcompress.evaluation.quality import Quality, evaluate_quality
from hfcompress.methods.pruning.importance import statistics_file, store_statistics
from hfcompress.methods.pruning.targets import target_of
from hfcompress.methods.pruning.units import head_units, neuron_units, total_cost
from hfcompress.methods.registry import Context
from hfcompress.methods.structured_pruning import structured_pruning
from hfcompress.modeling.checkpoint import commit
from hfcompress.tasks import get_task, load_data, preprocess
from scripts.studies import torch_pruning_arm
from scripts.studies.material import TASKS, glue_folder, results_file, study_root, teacher_folder

# Pages and the tasks on them. RTE is not pooled with the others: one of its 277 examples is a third of a point.
PAGES = {"pruning": ("mrpc", "sst2", "stsb"), "pruning_rte": ("rte",)}
SHARE = 0.5
DRAWS = 5
EXAMPLES = 512
MAX_LENGTH = 128
BATCH = 32
CALIBRATION_BATCH = 16  # what a backward pass holds is most of the memory that is needed

Batches = list[dict[str, torch.Tensor]]


class Draw(NamedTuple):
    """What the arms of one draw share.

    Attributes:
        number: Of the draw.
        batches: Of calibration examples.
        folder: Where derivatives by units are kept for the draw.
    """

    number: int
    batches: Batches
    folder: Path


Arm = Callable[[Any, Draw], None]


def at_random(model: Any, draw: Draw) -> None:
    """Removes units that chance chooses."""
    target = target_of(model, flops=SHARE, multiple_of=8)
    generator = torch.Generator().manual_seed(draw.number)
    kept = target.choose([torch.rand(each.count, generator=generator) for each in target.units])
    for each, index in zip(target.units, kept, strict=True):
        each.shrink(index)
    commit(model)


def by(**settings: Any) -> Arm:
    """Returns the arm that prunes as a config says, keeping what it found out about the data for the others."""

    def arm(model: Any, draw: Draw) -> None:
        context = Context(calibration=draw.batches, cache_dir=draw.folder)
        structured_pruning(model, StructuredPruningConfig(flops=SHARE, **settings), context)

    return arm


def differentiate(model: Any, draw: Draw) -> None:
    """Leaves derivatives by weights in the model, and those by units where `structured_pruning` looks for them."""
    units = target_of(model, flops=SHARE, multiple_of=8).units
    gradients = torch_pruning_arm.accumulate(model, units, draw.batches)
    store_statistics(statistics_file("gradients", model, draw.batches, draw.folder / "pruning"), units, gradients)


def by_torch_pruning(model: Any, draw: Draw) -> None:
    """Removes what Torch-Pruning chooses."""
    torch_pruning_arm.prune(model, draw.batches, SHARE)


ARMS: dict[str, Arm] = {
    "ours": by(),
    "torch-pruning": by_torch_pruning,
    "taylor": by(importance="taylor", reconstruct=False),
    "random": at_random,
    "magnitude": by(importance="magnitude", reconstruct=False),
}
SAME_IN_EVERY_DRAW = ("magnitude",)


# Runs


class Study:
    """The rows that are there, and what is needed to make more."""

    def __init__(self, files: Mapping[str, Path], part: str) -> None:
        self.files, self.part = files, part
        self.done = {(row["task"], row["draw"], row["arm"]) for file in set(files.values()) for row in read(file)}

    def measure(self, name: str, number: int, arms: Mapping[str, Arm], teacher: Path) -> None:
        """Prunes and measures with each arm that is not there yet for this task and draw."""
        first = {"original": None} | dict(arms) if number == 0 else arms
        wanted = [arm for arm in first if (name, number, arm) not in self.done]
        wanted = [arm for arm in wanted if number == 0 or arm not in SAME_IN_EVERY_DRAW]
        if not wanted:
            return
        wanted.sort(key=lambda arm: arm != "torch-pruning")  # its pass serves the others
        data = material(name, self.part, teacher)
        with empty_folder(study_root() / "pruning" / f"{self.part}-{name}-{number}") as folder:
            draw = Draw(number, data.calibration(number), folder)
            shared = 0.0
            for arm in wanted:
                model = fresh(teacher)
                whole, started = layer_flops(model), time.perf_counter()
                if arm == "torch-pruning":
                    differentiate(model, draw)
                    shared = time.perf_counter() - started
                if arm != "original":
                    arms[arm](model, draw)
                seconds = time.perf_counter() - started + (shared if arm == "ours" else 0.0)
                self._write(name, number, arm, data.quality(model), 1 - layer_flops(model) / whole, seconds)
                del model
                gc.collect()  # a graph of dependencies holds its model by cycles

    def _write(self, name: str, number: int, arm: str, quality: Quality, removed: float, seconds: float) -> None:
        row = {"task": name, "draw": number, "arm": arm, "metric": quality.primary, "metrics": quality.metrics}
        row |= {"flops_removed": round(removed, 4), "seconds": round(seconds, 1)}
        row |= {"predictions": short(quality.predictions), "references": short(quality.references)}
        self.files[name].parent.mkdir(parents=True, exist_ok=True)
        with self.files[name].open("a") as lines:
            lines.write(json.dumps(row) + "\n")
        print(f"{time.strftime('%H:%M:%S')} {name} {number} {arm} {quality.metrics} {seconds:.0f} s", flush=True)


class Material:
    """A task's data as its teacher reads them."""

    def __init__(self, name: str, part: str, teacher: Path) -> None:
        self.task, self.tokenizer = get_task(name), AutoTokenizer.from_pretrained(teacher)
        self.splits = load_data(self.task, str(glue_folder(part)), progress=False)
        self.options = {"max_length": MAX_LENGTH, "label2id": AutoConfig.from_pretrained(teacher).label2id}
        self.validation = preprocess(self.splits["validation"], self.task, self.tokenizer, **self.options)

    def calibration(self, draw: int) -> Batches:
        """Returns a draw's batches."""
        drawn = self.splits["train"].shuffle(seed=draw).select(range(EXAMPLES))
        return calibration_batches(list(preprocess(drawn, self.task, self.tokenizer, **self.options)), self.tokenizer)

    def quality(self, model: Any) -> Quality:
        """Measures a model on validation."""
        return evaluate_quality(model, self.validation, self.task, self.tokenizer, batch_size=BATCH, progress=False)


@lru_cache
def material(name: str, part: str, teacher: Path) -> Material:
    """Returns a task's data, the same for all draws."""
    return Material(name, part, teacher)


@contextmanager
def empty_folder(folder: Path) -> Iterator[Path]:
    """Makes a folder for the body: what a run that was cut off left there would not be charged to any arm."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def fresh(teacher: Path) -> Any:
    """Returns the model to prune."""
    return AutoModelForSequenceClassification.from_pretrained(teacher).eval()


def calibration_batches(rows: list[Any], tokenizer: Any) -> Batches:
    """Returns batches of examples of similar length."""
    collate, rows = DataCollatorWithPadding(tokenizer), sorted(rows, key=lambda row: len(row["input_ids"]))
    starts = range(0, len(rows), CALIBRATION_BATCH)
    return [dict(collate(rows[start : start + CALIBRATION_BATCH])) for start in starts]


def layer_flops(model: Any) -> float:
    """Returns the multiply-adds of all layers for a token of 128."""
    return total_cost([*head_units(model), *neuron_units(model)], "flops")


def short(values: Sequence[Any]) -> list[Any]:
    """Returns numbers as they are written down."""
    return [round(value, 4) if isinstance(value, float) else value for value in values]


def read(file: Path) -> list[dict[str, Any]]:
    """Returns the rows of a file; a line that was cut off is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def run(options: argparse.Namespace) -> None:
    """Goes through all tasks draw by draw, so that wherever it is cut off the tasks are in balance."""
    files = {task: options.results or rows_of(page, options.part) for page, tasks in PAGES.items() for task in tasks}
    study = Study(files, options.part)
    arms = {name: ARMS[name] for name in options.arms}
    pending = [(name, draw) for draw in range(options.draws) for name in options.tasks]
    while pending:
        ready = [each for each in pending if (teacher_of(options, each[0]) / "report.json").exists()]
        if not ready:
            time.sleep(60)
            continue
        pending.remove(ready[0])
        study.measure(*ready[0], arms, teacher_of(options, ready[0][0]))


def rows_of(page: str, part: str = "whole") -> Path:
    """Returns the file of a page's rows."""
    return results_file(f"{page}.jsonl" if part == "whole" else f"{page}-{part}.jsonl")


def teacher_of(options: argparse.Namespace, task: str) -> Path:
    """Returns the folder of the model to prune."""
    return options.teacher or teacher_folder("mpnet-base", task)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--part", choices=("whole", "choices"), default="whole")
    parser.add_argument("--results", type=Path, help="another file of rows")
    parser.add_argument("--teacher", type=Path, help="another fine-tuned model, for a single task")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    run(options)


if __name__ == "__main__":
    main()
