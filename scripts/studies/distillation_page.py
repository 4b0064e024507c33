"""The page of `scripts.studies.distillation`: tables and a picture, from its results alone.

python -m scripts.studies.distillation_page
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from hfcompress.evaluation.comparison import Answers
from hfcompress.evaluation.metrics import answered
from hfcompress.evaluation.report import Report
from hfcompress.evaluation.resampling import drawn_changes, drawn_means, interval
from hfcompress.tasks import get_task
from scripts.studies import distillation_smollm2 as half_depth
from scripts.studies.distillation import (
    ALONE,
    ARMS,
    EPOCHS,
    RATES,
    RESULTS,
    TAUGHT,
    TEACHER,
    epochs_of_teacher,
    points_for_choices,
    points_for_validation,
)
from scripts.studies.language_model import chosen_rate
from scripts.studies.material import ROOT, TASKS, read_rows, table, teacher_folder

PAGE = ROOT / "docs" / "distillation.md"
PICTURE = PAGE.with_suffix(".png")
DECISIVE = ("mrpc", "stsb", "sst2")

Row = dict[str, Any]

_TITLE = "# A student alone, and taught\n"

_STUDENTS = """
## Encoders

Made by `scripts/studies/distillation.py`. MiniLM-L6 (22.7M parameters) is fine-tuned alone, and taught by a fine-tuned
MPNet-base (109.5M), which has another tokenizer and speaks once about each row. Both have the same learning rates to
choose from, on a tenth of train with one seed, and the same time: the student alone trains so many more epochs as the
teacher takes to speak. SST-2 is a fixed 20,000 rows of its train. Validation is read once with every seed; a seed
changes the head, the order and dropout. Metrics are accuracy, of STS-B Pearson's correlation, in points. Intervals are
95%, by a paired bootstrap over seeds and examples at once.

"""


class Study:
    """What is measured so far.

    Args:
        rows: Of the study.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def pairs(self, task: str, arm: str) -> list[tuple[Row, Row]]:
        """Returns the runs of a task with those of the student alone of the same seed, in the order of the seeds."""
        found: dict[str, dict[int, Row]] = {}
        for each in (ALONE, arm):
            points = (points_for_validation(self.rows, task, each, seed) for seed in range(1, 100))
            found[each] = {row["seed"]: row for point in points for row in self.rows if row | point == row}
        seeds = sorted(found[ALONE].keys() & found[arm].keys())
        return [(found[ALONE][seed], found[arm][seed]) for seed in seeds]

    def tasks(self, arm: str) -> list[str]:
        """Returns the tasks in which an arm has been measured."""
        known = {row["task"] for row in self.rows if row["part"] == "whole" and row["arm"] == arm}
        return [task for task in TASKS if task in known]

    def gained(self, task: str, arm: str) -> np.ndarray:
        """Returns the mean change against the student alone in points: as measured, then of each draw."""
        metric, pairs = get_task(task).metrics[0], self.pairs(task, arm)
        answers = [(answers_of(metric, before), answers_of(metric, after)) for before, after in pairs]
        changes = drawn_changes(metric, pairs[0][0]["answers"]["references"], answers, seed=TASKS.index(task))
        measured = mean(after["metrics"][metric] - before["metrics"][metric] for before, after in pairs)
        return 100 * np.concatenate([[measured], drawn_means(changes, seed=10 + TASKS.index(task))])


def answers_of(metric: str, row: Row) -> Sequence[Any]:
    """Returns what a metric is of, as a run answered it."""
    return answered(metric, Answers(**row["answers"]))


def said(values: np.ndarray) -> str:
    """Returns a measured value with the interval of its draws."""
    low, high = interval(values[1:], float(values[0]))
    return f"{values[0]:+.2f} [{low:+.2f}, {high:+.2f}]"


def teacher(task: str) -> float:
    """Returns what a teacher's own report says of it, in points."""
    report = Report.from_json((teacher_folder(TEACHER, task) / "report.json").read_text())
    return 100 * report.rows[-1].metrics[report.metric]


def results(study: Study) -> str:
    """Returns the table of what was read on validation."""
    lines, gains = [], {}
    for task in study.tasks(TAUGHT):
        metric, pairs = get_task(task).metrics[0], study.pairs(task, TAUGHT)
        alone, taught = ([row["metrics"][metric] for row in side] for side in zip(*pairs, strict=True))
        gains[task] = study.gained(task, TAUGHT)
        first = pairs[0]
        lines.append(
            [task, metric, f"{len(pairs)}", f"{teacher(task):.1f}"]
            + [f"{100 * mean(each):.2f}" for each in (alone, taught)]
            + [said(gains[task]), *(f"{row['epochs']} at {row['rate']:g}" for row in first)]
        )
    counted = [gains[task] for task in DECISIVE if task in gains]
    lines.append([f"mean of {len(counted)}", *[""] * 5, said(np.mean(counted, axis=0)), "", ""])
    head = ["task", "metric", "seeds", "teacher", "alone", "taught", "gained", "epochs alone", "epochs taught"]
    return table(head, lines, texts=2)


def choices(study: Study) -> str:
    """Returns the table of what was tried on a part of train."""
    lines = []
    for arm in ARMS:
        cells = []
        for task in DECISIVE:
            metric, cell = get_task(task).metrics[0], []
            for point in points_for_choices(task, arm):
                found = [row["metrics"][metric] for row in study.rows if row | point == row]
                cell.append(f"{100 * found[0]:.1f}" if found else "-")
            cells.append(" / ".join(cell))
        if any(set(cell) - set("- /") for cell in cells):
            lines.append([arm, *cells])
    return table(["arm", *DECISIVE], lines)


def language_model(rows: Sequence[Row]) -> str:
    """Returns the table of the language model's students, each at the rate that was chosen for it."""
    lines = []
    for arm in half_depth.ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        found = [row for row in mine if row["rate"] == chosen_rate(mine)] if mine else []
        for row in found[:1]:
            figures = [each["perplexity"] for each in found]
            cells = [f"{row['seconds'] / 60:.0f}", f"{row['steps']}", f"{row['rate']:g}", f"{len(found)}"]
            lines.append([arm, *cells, " ".join(f"{figure:.2f}" for figure in figures)])
    return table(["arm", "minutes", "steps", "learning rate", "seeds", "perplexity"], lines)


def draw(study: Study, file: Path) -> None:
    """Draws every seed's figure of both arms, and the teacher's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = study.tasks(TAUGHT)
    figure = Figure(figsize=(2.6 * len(tasks) + 0.6, 3.4), layout="constrained")
    for number, task in enumerate(tasks, start=1):
        metric, pairs = get_task(task).metrics[0], study.pairs(task, TAUGHT)
        axes = figure.add_subplot(1, len(tasks), number)
        for place, side in enumerate(zip(*pairs, strict=True)):
            values = [100 * row["metrics"][metric] for row in side]
            axes.plot([place] * len(values), values, "o", color=("#8c8c8c", "#4c72b0")[place], alpha=0.6)
            axes.hlines(mean(values), place - 0.25, place + 0.25, color="#222222")
        axes.axhline(teacher(task), color="#c44e52", linewidth=1, linestyle="--")
        axes.set(xlim=(-0.6, 1.6), title=f"{task}: {metric}")
        axes.set_xticks([0, 1], ["alone", "taught"])
    figure.suptitle("MiniLM-L6, each dot a seed, the lines their means; dashed: MPNet-base, the teacher", fontsize=9)
    FigureCanvasAgg(figure).print_figure(file, dpi=120, metadata={"Software": None})


def main() -> None:
    """Writes page and picture, of what is measured."""
    study = Study(read_rows(RESULTS))
    parts = [_TITLE]
    if tasks := study.tasks(TAUGHT):
        draw(study, PICTURE)
        speaks = ", ".join(f"{task} {epochs_of_teacher(study.rows, task):.1f}" for task in tasks)
        parts += [_STUDENTS, results(study)]
        parts += [f"\nEpochs of the student that the teacher's speaking is worth: {speaks}.\n"]
        parts += [f"\n![Alone and taught, seed by seed]({PICTURE.name})\n"]
        epochs = ", ".join(f"{task} {EPOCHS[task]}" for task in tasks)
        rates = " / ".join(f"{rate:g}" for rate in RATES)
        parts += [_LOSSES.format(epochs=epochs, rates=rates), choices(study)]
    if rows := read_rows(half_depth.RESULTS):
        parts += [_HALF_DEPTH, language_model(rows)]
    PAGE.write_text("".join(parts), encoding="utf-8")


_LOSSES = """
### What each loss is worth

On the tenth of train that is for choices, one seed, all for the same number of epochs ({epochs}); figures
at the learning rates {rates}. A point is 3.7 rows of MRPC: differences of a point are chance there.

"""

_HALF_DEPTH = """
## A language model with half its layers

Made by `scripts/studies/distillation_smollm2.py`: SmolLM2 (134.5M parameters, unpacked from 4 bits) without the 15
of its 30 layers whose skipping raises the loss least, trained on three quarters of wikitext-2's `wiki.valid.tokens`, in
which nothing reads or predicts an `<unk>`. One thread has the same time for each arm, and the whole model's speaking is
part of it. Of several learning rates, the one that is best on the last quarter is shown. Perplexity is that of the
first 24 blocks of 512 tokens of `wiki.test.raw`.

"""


if __name__ == "__main__":
    main()
