"""The page of `scripts.studies.distillation`: tables and a picture, from its results alone.

python -m scripts.studies.distillation_page
"""

from __future__ import annotations

import math
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
    HALF,
    RATE,
    RATES,
    RESULTS,
    SEEDS,
    SHARE,
    TAUGHT,
    TEACHER,
    point_for_validation,
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
MPNet-base (109.5M), which has another tokenizer and speaks once about each row. The arm *made texts* also learns texts
that are made out of the training texts (`augmentation` in a recipe), of which nobody but the teacher says anything.
Both have the same learning rate, which was chosen on a tenth of train, and the same time, that of the teacher counted:
minutes are those of one thread's processor for a seed, loading and measuring too. More passes are not always better:
the student alone has also made half of them, and what is gained is more than the better of the two (where they share
one seed, which says nothing, than the one with more seeds). SST-2 is a fixed 20,000 rows of its train. RTE is told of
beside the others: it is not in their mean, and no rate was chosen on it. Validation is read with every seed, which
changes the head, the order and dropout. Metrics are accuracy, of STS-B Pearson's correlation, in points. Intervals are
95%, by a paired bootstrap over seeds and examples at once. A figure of fewer seeds than its row has their number in
brackets.

"""


class Study:
    """What is measured so far.

    Args:
        rows: Of the study.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)

    def runs(self, task: str, arm: str) -> dict[int, Row]:
        """Returns the runs of an arm on a task, by their seed."""
        points = (point_for_validation(task, arm, seed) for seed in range(1, 100))
        return {row["seed"]: row for point in points for row in self.rows if row | point == row}

    def alone(self, task: str) -> str:
        """Returns the arm of the student alone that is better on average over the seeds that both have.

        One seed says nothing of two arms: of such, the one with more seeds stands for both.
        """
        whole, half = (self.runs(task, arm) for arm in (ALONE, HALF))
        seeds, metric = whole.keys() & half.keys(), get_task(task).metrics[0]
        if len(seeds) < 2:
            return HALF if len(half) > len(whole) else ALONE
        more = mean(half[seed]["metrics"][metric] - whole[seed]["metrics"][metric] for seed in seeds)
        return HALF if more > 0 else ALONE

    def pairs(self, task: str, arm: str) -> list[tuple[Row, Row]]:
        """Returns the runs of the student alone with those of the same seed, in the order of the seeds."""
        alone, taught = self.runs(task, self.alone(task)), self.runs(task, arm)
        return [(alone[seed], taught[seed]) for seed in sorted(alone.keys() & taught.keys())]

    def tasks(self, arm: str) -> list[str]:
        """Returns the tasks in which an arm has been measured beside the student alone."""
        return [task for task in TASKS if self.pairs(task, arm)]

    def minutes(self, task: str, arm: str) -> tuple[float, float]:
        """Returns what a seed's run takes of a processor, and what a teacher takes to speak before it."""
        runs = self.runs(task, arm).values()
        found = {state: [row["seconds"] for row in runs if row["filled"] is state] for state in (True, False)}
        if not found[True]:
            return mean(found[False]) / 60, 0.0
        if not found[False]:
            return math.nan, math.nan  # nothing tells the two apart yet
        own = mean(found[False])
        return own / 60, (mean(found[True]) - own) / 60

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
    lines = []
    for arm in (each for each in EPOCHS if ARMS[each] and study.tasks(each)):
        gains = {}
        for task in study.tasks(arm):
            metric, gains[task] = get_task(task).metrics[0], study.gained(task, arm)
            seeds = [row["seed"] for row, _ in study.pairs(task, arm)]
            cells = [arm, task, f"{len(seeds)}", f"{teacher(task):.1f}"]
            for each in (ALONE, HALF, arm):
                runs = study.runs(task, each)
                values = [runs[seed]["metrics"][metric] for seed in seeds if seed in runs]
                fewer = f" ({len(values)})" if len(values) < len(seeds) else ""
                cells.append(f"{100 * mean(values):.2f}{fewer}" if values else "")
            (own, _), (learning, speaking) = study.minutes(task, ALONE), study.minutes(task, arm)
            lines.append([*cells, said(gains[task]), f"{own:.1f}", f"{learning:.1f} + {speaking:.1f}"])
        counted = [gains[task] for task in DECISIVE if task in gains]
        lines.append([arm, f"mean of {len(counted)}", *[""] * 5, said(np.mean(counted, axis=0)), "", ""])
    head = ["arm", "task", "seeds", "teacher", "alone", "half", "taught", "gained", "minutes alone", "and taught"]
    return table(head, lines, texts=2)


def passes(tasks: Sequence[str]) -> str:
    """Returns how long each arm was trained, and how many seeds the study is for."""
    lines = [
        f"- {task}: alone {EPOCHS[ALONE][task]} passes, or {EPOCHS[HALF][task]}; with made texts, {SHARE[task]:.0%} "
        f"as many as train has, {EPOCHS[TAUGHT][task]} over all; {SEEDS[task]} seeds"
        for task in tasks
    ]
    return f"\nThe study is for, at a learning rate of {RATE:g}:\n\n" + "\n".join(lines) + "\n"


def choices(study: Study) -> str:
    """Returns the table of what was tried on a part of train."""
    found: dict[tuple[str, str, float], dict[float, str]] = {}
    for row in (row for row in study.rows if row["part"] == "choices"):
        figure = f"{100 * row['metrics'][get_task(row['task']).metrics[0]]:.1f}"
        found.setdefault((row["task"], row["arm"], row["epochs"]), {})[row["rate"]] = figure
    order = sorted(found, key=lambda key: (TASKS.index(key[0]), list(ARMS).index(key[1]), key[2]))
    lines = [
        [task, arm, f"{passes:g}", *(found[task, arm, passes].get(rate, "") for rate in RATES)]
        for task, arm, passes in order
    ]
    return table(["task", "arm", "passes", *(f"at {rate:g}" for rate in RATES)], lines, texts=2)


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
        metric, axes = get_task(task).metrics[0], figure.add_subplot(1, len(tasks), number)
        for place, arm in enumerate((ALONE, HALF, TAUGHT)):
            values = [100 * row["metrics"][metric] for row in study.runs(task, arm).values()]
            axes.plot([place] * len(values), values, "o", color=("#8c8c8c", "#c2c2c2", "#4c72b0")[place], alpha=0.7)
            if values:
                axes.hlines(mean(values), place - 0.3, place + 0.3, color="#222222")
        axes.axhline(teacher(task), color="#c44e52", linewidth=1, linestyle="--")
        axes.set(xlim=(-0.6, 2.6), title=f"{task}: {metric}")
        axes.set_xticks([0, 1, 2], ["alone", "alone,\nhalf", "taught"])
    figure.suptitle("MiniLM-L6, each dot a seed, the lines their means; dashed: MPNet-base, the teacher", fontsize=9)
    FigureCanvasAgg(figure).print_figure(file, dpi=120, metadata={"Software": None})


def main() -> None:
    """Writes page and picture, of what is measured."""
    study = Study(read_rows(RESULTS))
    parts = [_TITLE]
    if tasks := study.tasks(TAUGHT):
        draw(study, PICTURE)
        parts += [_STUDENTS, results(study), passes(tasks)]
        parts += [f"\n![Alone and taught, seed by seed]({PICTURE.name})\n"]
        parts += [_LOSSES, choices(study)]
    if rows := read_rows(half_depth.RESULTS):
        parts += [_HALF_DEPTH, language_model(rows)]
    PAGE.write_text("".join(parts), encoding="utf-8")


_LOSSES = """
### What was tried on a part of train

On the tenth of train that is for choices, one seed. All arms but *alone* are taught; *outputs* is by the teacher's
outputs on train and by labels, and the others add to it, or leave out, what they are called by. A point is 3.7 rows of
MRPC: differences of a point are chance there. Hidden states, by mean square or by cosine, and embeddings never gained
anything over outputs alone. Relations did on STS-B; the teacher speaks at every step then, which takes as long as twice
the passes, and by those outputs alone gain no less. Attention maps cannot be compared here: the two cut texts into
other tokens.

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
