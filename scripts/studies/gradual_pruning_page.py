"""The page of `scripts.studies.gradual_pruning`: tables and a picture, from what is kept of its runs.

    python -m scripts.studies.gradual_pruning_page

Needs the right answers of `scripts.studies.material`. Of the first machine's runs only the figures of
`results/gradual_earlier.jsonl` are left, their answers are not: those figures stand as they were.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import numpy as np
from pyarrow import parquet

from hfcompress.evaluation.metrics import score
from hfcompress.evaluation.resampling import drawn_changes, drawn_means, interval
from scripts.studies.gradual_pruning import CHOICES, CHOICES_TASK, ENDINGS, KEPT, RECIPES, for_task
from scripts.studies.gradual_pruning_picture import Point, draw
from scripts.studies.material import ROOT, TASKS, glue_folder, read_rows, table

PAGE = ROOT / "docs" / "gradual_pruning.md"
PICTURE = PAGE.with_suffix(".png")
EARLIER = KEPT.with_name("gradual_earlier.jsonl")
# What is drawn of a run's rows; the one after 80% has not been trained on.
STEPS = {"prune-60": (1, 2), "prune-95": (2, 4)}

_INTRODUCTION = """# 60% and 95% of the encoder's FLOPs, with training

Made by `scripts/studies/gradual_pruning.py`: fine-tuned MPNet-base (109.5M parameters) is pruned by
`recipes/prune-60.yaml` and `recipes/prune-95.yaml`. Half of the multiply-adds of its layers go at once, the rest
gradually, while the fine-tuned model teaches what is left, on the training texts and as many made out of them (of
SST-2, 20,000 texts and half as many). Nothing was chosen by these figures: validation was read once with every seed.
Metrics are accuracy, of STS-B Pearson's correlation, in points. Speed-ups are those of the whole model, measured on the
saved result in turn with the original: PyTorch, float32, 8 examples of 128 tokens, one thread.

The seeds were run on two machines, each with a fine-tuned model of its own for a task, from which its seeds begin.
Changes are against that model, and weigh every seed alike. Speed-ups stand apart: the same layers are faster by
different factors on the two. A gain says that a model could have been trained longer before: that of STS-B on the
second machine is nearly two points behind the first's.

"""
_APART = """
Intervals are 95%, by a paired bootstrap over seeds and examples at once. The answers behind the first machine's are not
kept any more, so where both have seeds, the ends of the two intervals are averaged, as if both always erred together,
which is wider than it need be. The tasks of a mean erred each for itself. What another fine-tuned model would change is
not in an interval: the two of STS-B gain differently.

## Each machine for itself

"""
_MINUTES = """
Minutes are those of the slowest seed's steps on one thread beside other work, measuring too (of a run that was cut off
they may count the last part alone).

"""
_DRAWN = """
A dot is a seed, a filled point the mean of one machine's, a hollow one the mean of the machine of which no more than
that is kept. The point at 80% is a step on the way to 95% and had a fifth of a pass to recover in, that at 60% nearly
two and that at 95% more than six.
"""
_CHOSEN = """
## How prune-95 ends

A step without pruning may follow the last one with it. Which one was chosen on a tenth of STS-B's train, which the
teacher of these runs has not seen either ({teacher:.2f} there); one seed. The recipe has {own}.

"""


@dataclass(frozen=True)
class Change:
    """A change in points, with the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True)
class Part:
    """What one machine measured of a recipe on a task.

    Args:
        recipe: Its name.
        task: Its name.
        cpu: The machine.
        seeds: How many.
        before: The metric of the model they begin from, in points.
        after: The mean metric, in points.
        change: The mean change.
        left: The mean share of the encoder's multiply-adds that is left.
        parameters: Mean, in millions.
        faster: The median speed-up.
        minutes: Of the slowest seed.
    """

    recipe: str
    task: str
    cpu: str
    seeds: int
    before: float
    after: float
    change: Change
    left: float
    parameters: float
    faster: float
    minutes: float


def earlier(row: dict[str, Any]) -> Part:
    """Returns a part of which only its figures are kept."""
    change = Change(row["change"], row.pop("low"), row.pop("high"))
    return Part(**row | {"change": change})


def measured(recipe: str, task: str, runs: Sequence[dict[str, Any]]) -> Part:
    """Returns what the runs of a machine come to.

    Raises:
        ValueError: The right answers are not those by which the runs' metrics were measured.
    """
    rows = [run["rows"] for run in runs]
    befores, afters = ([100 * each[place]["metric"] for each in rows] for place in (0, -1))
    return Part(
        recipe,
        task,
        named(runs[0]["cpu"]),
        len(runs),
        befores[0],
        mean(afters),
        gained(task, runs),
        mean(left(each) for each in rows),
        mean(each[-1]["parameters"] for each in rows) / 1e6,
        median(each[-1]["faster"] for each in rows),
        max(sum(row["seconds"] for row in each) for each in rows) / 60,
    )


def named(cpu: str) -> str:
    """Returns a processor's name without what every name has."""
    return cpu.replace("(R)", "").removesuffix(" Processor")


def left(rows: Sequence[dict[str, Any]]) -> float:
    """Returns the share of the encoder's multiply-adds that is left after steps."""
    return math.prod(1 - row["flops_removed"] for row in rows)


def gained(task: str, runs: Sequence[dict[str, Any]]) -> Change:
    """Returns the mean change of the runs, whose metrics must be those of their kept answers."""
    metric = runs[0]["metric"]
    references = parquet.read_table(glue_folder() / task / "validation.parquet")["label"].to_pylist()
    changes = []
    for run in runs:
        before, after = (run["rows"][place]["metric"] for place in (0, -1))
        for said, answers in ((before, run["first"]), (after, run["last"])):
            found = score([metric], answers, references)[metric]
            if abs(found - said) > 1e-4:
                raise ValueError(
                    f"{task}: {metric} of a run's kept answers is {found:.4f} by {glue_folder() / task}, and was"
                    f" {said:.4f}; make the folder from GLUE anew with `python -m scripts.studies.material`"
                )
        changes.append(100 * (after - before))
    drawn = drawn_changes(metric, references, [(run["first"], run["last"]) for run in runs], seed=TASKS.index(task))
    value = mean(changes)
    return Change(value, *interval(100 * drawn_means(drawn, seed=10 + TASKS.index(task)), value))


def pooled(parts: Sequence[Part]) -> Change:
    """Returns the mean change over all seeds, with an interval as if the parts always erred together."""
    weights = [part.seeds for part in parts]
    ends = [(part.change.value, part.change.low, part.change.high) for part in parts]
    return Change(*(float(each) for each in np.average(ends, axis=0, weights=weights)))


def over_tasks(changes: Sequence[Change]) -> Change:
    """Returns the mean of changes that erred each for itself."""
    value = mean(change.value for change in changes)
    below, above = (
        math.hypot(*(end(change) - change.value for change in changes)) / len(changes)
        for end in (lambda change: change.low, lambda change: change.high)
    )
    return Change(value, value - below, value + above)


def results(parts: Sequence[Part]) -> str:
    """Returns the table of all seeds."""
    cpus = list(dict.fromkeys(part.cpu for part in parts))
    lines = []
    for recipe in RECIPES:
        changes = []
        for task in TASKS:
            mine = [part for part in parts if (part.recipe, part.task) == (recipe, task)]
            if not mine:
                continue
            weights = [part.seeds for part in mine]
            figures = [(part.before, part.after, part.left, part.parameters) for part in mine]
            before, after, share, parameters = np.average(figures, axis=0, weights=weights)
            changes.append(pooled(mine))
            faster = {part.cpu: f"{part.faster:.2f}x" for part in mine}
            cells = [recipe, task, f"{sum(weights)}", f"{before:.1f}", f"{after:.2f}", str(changes[-1])]
            lines.append([*cells, f"{share:.1%}", f"{parameters:.1f}M", *(faster.get(cpu, "") for cpu in cpus)])
        lines.append([recipe, f"mean of {len(changes)}", *[""] * 3, str(over_tasks(changes)), *[""] * (2 + len(cpus))])
    head = ["recipe", "task", "seeds", "before", "after", "change", "multiply-adds left", "parameters"]
    return table([*head, *(f"faster, {cpu}" for cpu in cpus)], lines, texts=2)


def apart(parts: Sequence[Part]) -> str:
    """Returns the table of each machine's own figures."""
    lines = []
    for part in sorted(parts, key=lambda part: (RECIPES.index(part.recipe), TASKS.index(part.task))):
        cells = [part.recipe, part.task, part.cpu, f"{part.seeds}", f"{part.before:.1f}", f"{part.after:.2f}"]
        lines.append([*cells, str(part.change), f"{part.faster:.2f}x", f"{part.minutes:.0f}"])
    head = ["recipe", "task", "machine", "seeds", "before", "after", "change", "faster", "minutes"]
    return table(head, lines, texts=3)


def kept() -> dict[tuple[str, str, str], list[dict[str, Any]]]:
    """Returns what is kept of runs, by recipe, task and machine."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for recipe in RECIPES:
        for task in TASKS:
            for file in sorted(KEPT.glob(f"{recipe}-{task}-*.json")):
                run = json.loads(file.read_text())
                found.setdefault((recipe, task, run["cpu"]), []).append(run)
    return found


def points(runs: Mapping[tuple[str, str, str], Sequence[dict[str, Any]]], old: Sequence[Part]) -> list[Point]:
    """Returns what is drawn: the model halved at once, and those of the recipes."""
    found = []
    for (recipe, task, cpu), several in runs.items():
        for step in STEPS[recipe]:
            rows = [run["rows"][: step + 1] for run in several]
            seeds = [(each[-1]["faster"], 100 * each[-1]["metric"] / each[0]["metric"]) for each in rows]
            gone = 1 - mean(left(each) for each in rows)
            found.append(Point(f"{task}: {several[0]['metric']}", named(cpu), f"{gone:.0%} gone", seeds))
    labels = {point.task.split(":")[0]: point.task for point in found}
    for part in old:
        seeds = [(part.faster, 100 * part.after / (part.after - part.change.value))]
        found.append(Point(labels.get(part.task, part.task), part.cpu, f"{1 - part.left:.0%} gone", seeds, hollow=True))
    return found


def choices() -> str:
    """Returns what was found where the last step of prune-95 was chosen."""
    rows = {row["ending"]: row for row in read_rows(CHOICES)}
    lines = [["none", f"{100 * rows['none']['pearson']:.2f}", ""]]
    lines += [[name, f"{100 * rows[name]['pearson']:.2f}", f"{rows[name]['minutes']:.0f}"] for name in ENDINGS]
    training = for_task("prune-95", CHOICES_TASK)["steps"][-1]["training"]
    own = f"{training['epochs']} passes, {training['learning_rate']}"
    said = _CHOSEN.format(teacher=100 * rows["teacher"]["pearson"], own=own)
    return said + table(["last step", "pearson", "minutes"], lines)


def main() -> None:
    """Writes page and picture."""
    runs = kept()
    old = [earlier(row) for row in read_rows(EARLIER)]
    parts = old + [measured(recipe, task, several) for (recipe, task, _), several in runs.items()]
    draw(points(runs, old), PICTURE)
    text = f"{_INTRODUCTION}{results(parts)}{_APART}{apart(parts)}{_MINUTES}"
    text += f"![Kept against faster]({PICTURE.name})\n{_DRAWN}{choices()}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
