"""The page of `scripts.studies.gradual_pruning`: a table and a picture, from the runs' own reports.

python -m scripts.studies.gradual_pruning_page
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

import numpy as np

from hfcompress.evaluation.report import Report, Row
from hfcompress.evaluation.resampling import drawn_changes, drawn_means, interval
from scripts.studies.gradual_pruning import CHOICES, CHOICES_TASK, ENDINGS, RECIPES, folder_of, for_task
from scripts.studies.material import ROOT, TASKS, read_rows, results_file, table

PAGE = ROOT / "docs" / "gradual_pruning.md"
PICTURE = PAGE.with_suffix(".png")
SEEDS = range(1, 100)
# What is drawn: the model halved at once, and those of the recipes; the one after 80% has not been trained on.
POINTS = (("prune-60", 1), ("prune-60", -1), ("prune-95", 2), ("prune-95", -1))

_INTRODUCTION = """# 60% and 95% of the encoder's FLOPs, with training

Made by `scripts/studies/gradual_pruning.py`: fine-tuned MPNet-base (109.5M parameters) is pruned by
`recipes/prune-60.yaml` and `recipes/prune-95.yaml`. Half of the multiply-adds of its layers go at once, the rest
gradually, while the fine-tuned model teaches what is left, on the training texts and as many made out of them (of
SST-2, 20,000 texts and half as many). Nothing was chosen by these figures: validation was read once with every seed.
Metrics are accuracy, of STS-B Pearson's correlation, in points. Intervals are 95%, by a paired bootstrap over seeds and
examples at once. Speed-ups are those of the whole model, measured on the saved result in turn with the original:
PyTorch, float32, 8 examples of 128 tokens, one thread. Minutes are those of the slowest seed's steps on one thread
beside other work, measuring too (of a run that was cut off they may count the last part alone). The study is for five
seeds on MRPC and STS-B and three on SST-2.

"""
_DRAWN = """
The point at 80% is a step on the way to 95% and had a fifth of a pass to recover in, that at 60% nearly two and that at
95% more than six.
"""
_CHOSEN = """
## How prune-95 ends

A step without pruning may follow the last one with it. Which one was chosen on a tenth of STS-B's train, which the
teacher of these runs has not seen either ({teacher:.2f} there); one seed. The recipe has {own}.

"""


class Runs:
    """The runs of a recipe on a task that have ended.

    Args:
        recipe: Its name.
        task: Its name.
    """

    def __init__(self, recipe: str, task: str) -> None:
        self.recipe, self.task = recipe, task
        self.folders = [
            out for seed in SEEDS if ((out := folder_of(recipe, task, seed, None)) / "report.json").exists()
        ]
        self.reports = [Report.from_json((folder / "report.json").read_text()) for folder in self.folders]

    def __len__(self) -> int:
        return len(self.reports)

    @property
    def metric(self) -> str:
        """The task's metric."""
        return self.reports[0].metric

    def figures(self, place: int) -> list[float]:
        """Returns the metric of a row of each report, in points."""
        return [100 * report.rows[place].metrics[report.metric] for report in self.reports]

    def speeds(self, place: int = -1) -> list[float]:
        """Returns how many times faster than the original a row of each report is."""
        return [speed.ratio for report in self.reports if (speed := report.rows[place].speed)]

    def left(self, place: int = -1) -> float:
        """Returns the share of the encoder's multiply-adds that is left in a row."""
        rows = [report.rows[: len(report.rows) + place + 1 if place < 0 else place + 1] for report in self.reports]
        return mean(math.prod(1 - removed(row) for row in each) for each in rows)

    def gained(self) -> np.ndarray:
        """Returns the mean change against the original in points: as measured, then of each draw."""
        pairs, references = [], []
        for folder in self.folders:
            kept = json.loads((folder / "predictions.json").read_text())
            references = kept["references"]
            pairs.append((kept["rows"][0]["predictions"], kept["rows"][-1]["predictions"]))
        changes = drawn_changes(self.metric, references, pairs, seed=TASKS.index(self.task))
        measured = mean(b - a for a, b in zip(self.figures(0), self.figures(-1), strict=True))
        return np.concatenate([[measured], 100 * drawn_means(changes, seed=10 + TASKS.index(self.task))])


def removed(row: Row) -> float:
    """Returns which share of the multiply-adds that were there a step removed."""
    return row.findings.get("structured_pruning", {}).get("flops_removed", 0.0)


def said(values: np.ndarray) -> str:
    """Returns a measured value with the interval of its draws."""
    low, high = interval(values[1:], float(values[0]))
    return f"{values[0]:+.2f} [{low:+.2f}, {high:+.2f}]"


def results(found: Sequence[Runs]) -> str:
    """Returns the table."""
    lines = []
    for recipe in RECIPES:
        gains = []
        for runs in (each for each in found if each.recipe == recipe):
            gains.append(runs.gained())
            parameters = mean(report.rows[-1].parameters for report in runs.reports) / 1e6
            minutes = max(sum(row.seconds for row in report.rows) for report in runs.reports) / 60
            cells = [recipe, runs.task, f"{len(runs)}", f"{runs.figures(0)[0]:.1f}", f"{mean(runs.figures(-1)):.2f}"]
            cells += [said(gains[-1]), f"{runs.left():.1%}", f"{parameters:.1f}M"]
            lines.append([*cells, f"{median(runs.speeds()):.2f}x", f"{minutes:.0f}"])
        if len(gains) > 1:
            pooled = said(np.mean(gains, axis=0))
            lines.append([recipe, f"mean of {len(gains)}", "", "", "", pooled, *[""] * 4])
    head = ["recipe", "task", "seeds", "before", "after", "change", "multiply-adds left", "parameters", "faster"]
    return table([*head, "minutes"], lines, texts=2)


def draw(found: Sequence[Runs], file: Path) -> None:
    """Draws what is kept of a metric against how much faster the model is, a line a task, a dot a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    speeds: dict[str, list[float]] = {}
    for number, task in enumerate(dict.fromkeys(each.task for each in found)):
        mine, color = {each.recipe: each for each in found if each.task == task}, f"C{number}"
        curve = [(1.0, 100.0)]
        for runs, place in [(mine[recipe], place) for recipe, place in POINTS if recipe in mine]:
            befores, afters = runs.figures(0), runs.figures(place)
            kept = [100 * after / before for before, after in zip(befores, afters, strict=True)]
            axes.plot(runs.speeds(place), kept, "o", color=color, alpha=0.4, markersize=4)
            curve.append((median(runs.speeds(place)), mean(kept)))
            speeds.setdefault(f"{1 - runs.left(place):.0%} gone", []).append(curve[-1][0])
        axes.plot(*zip(*curve, strict=True), "o-", color=color, label=f"{task}: {next(iter(mine.values())).metric}")
    for gone, several in speeds.items():  # those of 50% and 60% are close
        side = "right" if gone.startswith("5") else "left"
        axes.text(mean(several), 0.95, gone, transform=axes.get_xaxis_transform(), fontsize=8, ha=side)
    shown = (1, 2, 4, 8, 16)
    axes.set(xscale="log", xlabel="times faster, measured", ylabel="% kept of the original's metric", xlim=(0.93, 25))
    axes.margins(y=0.15)
    axes.set_xticks(shown, [f"{tick}x" for tick in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title("MPNet-base, as multiply-adds of its encoder go", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    FigureCanvasAgg(figure).print_figure(file, dpi=120, metadata={"Software": None})


def choices() -> str:
    """Returns what was found where the last step of prune-95 was chosen."""
    rows = {row["ending"]: row for row in read_rows(results_file(CHOICES))}
    if not {"none", *ENDINGS} <= set(rows):
        return ""
    lines = [["none", f"{100 * rows['none']['pearson']:.2f}", ""]]
    lines += [[name, f"{100 * rows[name]['pearson']:.2f}", f"{rows[name]['minutes']:.0f}"] for name in ENDINGS]
    training = for_task("prune-95", CHOICES_TASK)["steps"][-1]["training"]
    own = f"{training['epochs']} passes, {training['learning_rate']}"
    said = _CHOSEN.format(teacher=100 * rows["teacher"]["pearson"], own=own)
    return said + table(["last step", "pearson", "minutes"], lines)


def main() -> None:
    """Writes page and picture, of the runs that have ended."""
    found = [runs for recipe in RECIPES for task in TASKS if len(runs := Runs(recipe, task))]
    draw(found, PICTURE)
    text = f"{_INTRODUCTION}{results(found)}\n![Kept against faster]({PICTURE.name})\n{_DRAWN}{choices()}"
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
