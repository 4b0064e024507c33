"""The pages of `scripts.studies.pruning`: a table and a picture each, from the results alone.

python -m scripts.studies.pruning_page
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.studies.material import ROOT, TASKS, table
from scripts.studies.pruning import ARMS, DRAWS, EXAMPLES, PAGES, SAME_IN_EVERY_DRAW, SHARE, read, rows_of

RESAMPLES = 2000
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
same sentences and the same share to remove. Each result is measured on the whole validation split, once; lost are
points of its metric. Intervals are 95%, by a paired bootstrap over the examples and over the draws of calibration
sentences ({draws}).

"""


def weighted(metric: str, weights: np.ndarray, predictions: np.ndarray, references: np.ndarray) -> np.ndarray:
    """Returns a metric of every resample.

    Args:
        metric: `accuracy` or `pearson`.
        weights: How often each example was drawn, `(resamples, examples)`.
        predictions: `(examples,)`.
        references: `(examples,)`.

    Returns:
        `(resamples,)`.
    """
    weights = weights / weights.sum(1, keepdims=True)
    if metric == "accuracy":
        return weights @ (predictions == references)
    x, y = predictions.astype(float), references.astype(float)
    mean_x, mean_y = weights @ x, weights @ y
    covariance = weights @ (x * y) - mean_x * mean_y
    return covariance / np.sqrt((weights @ x**2 - mean_x**2) * (weights @ y**2 - mean_y**2))


class Losses:
    """What every arm loses against the original, in points, pooled over tasks."""

    def __init__(self, rows: Sequence[Mapping[str, Any]], seed: int = 0) -> None:
        self.rows = {(row["task"], row["draw"], row["arm"]): row for row in rows}
        self.tasks = [task for task in TASKS if (task, 0, "original") in self.rows]
        self.arms = [arm for arm in ARMS if any(key[2] == arm for key in self.rows)]
        self.draws = {task: list(self._draws(task)) for task in self.tasks}
        self.tasks = [task for task in self.tasks if self.draws[task]]
        generator = np.random.default_rng(seed)
        self._examples, self._drawn = {}, {}
        for task in self.tasks:
            count = len(self.rows[task, 0, "original"]["references"])
            again = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES - 1)
            self._examples[task] = np.concatenate([np.ones((1, count), dtype=int), again])  # the first is as it is
            draws = len(self.draws[task])
            taken = generator.multinomial(draws, np.full(draws, 1 / draws), size=RESAMPLES - 1) / draws
            self._drawn[task] = np.concatenate([np.full((1, draws), 1 / draws), taken])

    def _draws(self, task: str) -> Iterator[int]:
        """Yields the draws for which every arm is there."""
        for draw in range(DRAWS):
            if all(self._row(task, draw, arm) for arm in self.arms):
                yield draw

    def _row(self, task: str, draw: int, arm: str) -> Mapping[str, Any] | None:
        return self.rows.get((task, 0 if arm in SAME_IN_EVERY_DRAW else draw, arm))

    def of(self, arm: str, task: str) -> np.ndarray:
        """Returns points lost on a task: as measured, and of every resample `(RESAMPLES,)`."""
        original = self.rows[task, 0, "original"]
        right, weights = np.array(original["references"]), self._examples[task]
        before = weighted(original["metric"], weights, np.array(original["predictions"]), right)
        after = [
            weighted(original["metric"], weights, np.array(row["predictions"]), right)
            for draw in self.draws[task]
            if (row := self._row(task, draw, arm))
        ]
        return 100 * (before - (np.stack(after, 1) * self._drawn[task]).sum(1))

    def pooled(self, arm: str) -> np.ndarray:
        """Returns the mean over tasks of the points lost, `(RESAMPLES,)`."""
        return np.mean([self.of(arm, task) for task in self.tasks], axis=0)

    def seconds(self, arm: str) -> float:
        """Returns the median time of one pruning."""
        return float(np.median([row["seconds"] for key, row in self.rows.items() if key[2] == arm]))


def write(losses: Losses, page: Path) -> None:
    """Writes page and picture."""
    picture = page.with_suffix(".png")
    draws = ", ".join(f"{task} {len(losses.draws[task])}" for task in losses.tasks)
    whole = [losses.rows[task, 0, "original"] for task in losses.tasks]
    before = ", ".join(f"{row['task']} {100 * row['metrics'][row['metric']]:.1f} {row['metric']}" for row in whole)
    several = losses.tasks if len(losses.tasks) > 1 else []
    head = ["arm", f"points lost, {mean_of(losses)}", "more than hfcompress", *several]
    lines = []
    ours = losses.pooled("ours")
    for arm in losses.arms:
        pooled = losses.pooled(arm)
        more = "" if arm == "ours" else interval(pooled - ours)
        cells = [f"{losses.of(arm, task)[0]:.2f}" for task in several]
        lines.append([TITLES[arm], interval(pooled), more, *cells])
    draw(losses, picture)
    parts = [_INTRODUCTION.format(examples=EXAMPLES, draws=draws), f"Before: {before}.\n\n"]
    parts += [table(head, lines), f"\n![Points lost by each arm]({picture.name})\n"]
    page.write_text("".join(parts), encoding="utf-8")


def mean_of(losses: Losses) -> str:
    """Returns over what points lost are the mean, in words."""
    return "mean of tasks" if len(losses.tasks) > 1 else f"mean of {len(losses.draws[losses.tasks[0]])} draws"


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
    axes.set_xlabel(f"points lost on {', '.join(losses.tasks)}, {mean_of(losses)}; the red line is at 1")
    axes.set_title("MPNet-base, half of the encoder's FLOPs removed without training", fontsize=10)
    FigureCanvasAgg(figure).print_figure(file, dpi=120, metadata={"Software": None})


def show(losses: Losses) -> None:
    """Prints the table."""
    counts = ", ".join(f"{task} {len(losses.draws[task])}" for task in losses.tasks)
    print(f"points lost at {1 / (1 - SHARE):.1f}x fewer encoder FLOPs; draws: {counts}; 95% over draws and examples")
    print(f"{'':15}{'pooled':>24}{'beyond ours':>24}{'seconds':>9}" + "".join(f"{task:>8}" for task in losses.tasks))
    ours = losses.pooled("ours")
    for arm in losses.arms:
        pooled = losses.pooled(arm)
        by_task = "".join(f"{losses.of(arm, task)[0]:8.2f}" for task in losses.tasks)
        print(f"{arm:15}{interval(pooled):>24}{interval(pooled - ours):>24}{losses.seconds(arm):9.0f}{by_task}")


def main() -> None:
    """Prints the table of other rows, or writes the pages whose rows are there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, help="another file of rows: its table is printed, no page is written")
    results = parser.parse_args().results
    files = {"": results} if results else {page: rows_of(page) for page in PAGES}
    for page, file in files.items():
        losses = Losses(read(file))
        if not losses.tasks:
            print(f"no draw is complete in {file}")
            continue
        show(losses)
        if page:
            write(losses, ROOT / "docs" / f"{page}.md")


if __name__ == "__main__":
    main()
