"""The page of `scripts.studies.pruning`: a table and a picture, from the results alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scripts.studies.material import ROOT, table

if TYPE_CHECKING:
    from pathlib import Path

    from scripts.studies.pruning import Losses

PAGE = ROOT / "docs" / "pruning.md"
PICTURE = PAGE.with_suffix(".png")
TITLES = {
    "ours": "hfcompress: empirical Fisher, rearranged masks, reconstruction",
    "torch-pruning": "Torch-Pruning 1.6.1, group Taylor importance",
    "taylor": "first-order Taylor by head and neuron (Michel et al. 2019)",
    "random": "random",
    "magnitude": "magnitude",
}

_INTRODUCTION = """# Half of the encoder's FLOPs, without training

Made by `scripts/studies/pruning.py`. Fine-tuned MPNet-base loses half of the multiply-adds of its layers, by heads and
neurons, with {examples} calibration sentences of train and no training afterwards. Every arm has the same model, the
same sentences and the same share to remove. Each result is measured on the whole validation split, once; its metric is
accuracy, of STS-B Pearson's correlation, and lost are points of it. Intervals are 95%, by a paired bootstrap over the
examples and over the draws of calibration sentences ({draws}).

"""


def write(losses: Losses, examples: int) -> None:
    """Writes page and picture."""
    draws = ", ".join(f"{task} {len(losses.draws[task])}" for task in losses.tasks)
    whole = [losses.rows[task, 0, "original"] for task in losses.tasks]
    before = ", ".join(f"{row['task']} {100 * row['metrics'][row['metric']]:.1f} {row['metric']}" for row in whole)
    head = ["arm", "points lost, mean of tasks", "more than hfcompress", *losses.tasks]
    lines = []
    ours = losses.pooled("ours")
    for arm in losses.arms:
        pooled = losses.pooled(arm)
        more = "" if arm == "ours" else interval(pooled - ours)
        cells = [f"{losses.of(arm, task)[0]:.2f}" for task in losses.tasks]
        lines.append([TITLES[arm], interval(pooled), more, *cells])
    draw(losses, PICTURE)
    parts = [_INTRODUCTION.format(examples=examples, draws=draws), f"The models before: {before}.\n\n"]
    parts += [table(head, lines), f"\n![Points lost by each arm]({PICTURE.name})\n"]
    PAGE.write_text("".join(parts), encoding="utf-8")


def interval(values: np.ndarray) -> str:
    """Returns the measured value, the first, and the 95% interval of the others."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return f"{values[0]:.2f} [{low:.2f}, {high:.2f}]"


def draw(losses: Losses, file: Path) -> None:
    """Draws each arm's pooled loss with its interval."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 0.5 * len(losses.arms) + 1.2), layout="constrained")
    axes = figure.subplots()
    values = [losses.pooled(arm) for arm in losses.arms]
    ends = np.abs(np.array([np.percentile(each[1:], [2.5, 97.5]) - each[0] for each in values])).T
    places = np.arange(len(values))[::-1]
    axes.barh(places, [each[0] for each in values], xerr=ends, color="#4c72b0", ecolor="#333333", capsize=3)
    axes.set_yticks(places, ["hfcompress" if arm == "ours" else arm for arm in losses.arms])
    axes.axvline(1, color="#c44e52", linewidth=1)
    axes.set_xlabel(f"points lost, mean of {', '.join(losses.tasks)}; the red line is at 1")
    axes.set_title("MPNet-base, half of the encoder's FLOPs removed without training", fontsize=10)
    FigureCanvasAgg(figure).print_figure(file, dpi=120, metadata={"Software": None})
