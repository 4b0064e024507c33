"""The picture of `scripts.studies.gradual_pruning_page`: what is kept of a metric against measured speed-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median


@dataclass(frozen=True)
class Point:
    """What the seeds of one machine came to at one place.

    Args:
        task: The task and its metric, as the legend has it: a color.
        cpu: The machine: a line style.
        gone: How much of the encoder is gone, written above.
        seeds: Of each seed, how many times faster and % kept of the original's metric.
        hollow: `seeds` is one mean, all that is known.
    """

    task: str
    cpu: str
    gone: str
    seeds: Sequence[tuple[float, float]]
    hollow: bool = False

    @property
    def middle(self) -> tuple[float, float]:
        """Returns the median speed-up and the mean that is kept."""
        speeds, kept = zip(*self.seeds, strict=True)
        return median(speeds), mean(kept)


def draw(points: Sequence[Point], file: Path) -> None:
    """Draws a line for each task and a dot for each seed; points alone for a machine of which no more is known."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import NullLocator

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    colors = {task: f"C{number}" for number, task in enumerate(dict.fromkeys(point.task for point in points))}
    hollow = {point.cpu: point.hollow for point in points}
    for task, color in colors.items():
        for cpu, only_means in hollow.items():
            mine = sorted((point for point in points if (point.task, point.cpu) == (task, cpu)), key=_speed)
            for point in mine:
                if not only_means:
                    axes.plot(*zip(*point.seeds, strict=True), "o", color=color, alpha=0.4, markersize=4)
            if only_means:  # no line: nothing is known of what lies between
                places = [point.middle for point in mine]
                axes.plot(*zip(*places, strict=True), "o", color=color, markerfacecolor="white")
            else:
                axes.plot(*zip((1.0, 100.0), *(point.middle for point in mine), strict=True), "o-", color=color)
    drawn = [point for point in points if not point.hollow]
    for gone in dict.fromkeys(point.gone for point in drawn):  # those of 50% and 60% are close
        place = mean(point.middle[0] for point in drawn if point.gone == gone)
        side = "right" if gone.startswith("5") else "left"
        axes.text(place, 0.95, gone, transform=axes.get_xaxis_transform(), fontsize=8, ha=side)
    shown = (1, 2, 4, 8, 16)
    axes.set(xscale="log", xlabel="times faster, measured", ylabel="% kept of the original's metric", xlim=(0.93, 25))
    axes.margins(y=0.15)
    axes.set_xticks(shown, [f"{tick}x" for tick in shown])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_title("MPNet-base, as multiply-adds of its encoder go", fontsize=10)
    axes.grid(alpha=0.3)
    lines = [Line2D([], [], color=color, marker="o", label=task) for task, color in colors.items()]
    for cpu, only_means in hollow.items():
        face, style = ("white", "") if only_means else ("gray", "-")
        lines.append(Line2D([], [], color="gray", linestyle=style, marker="o", markerfacecolor=face, label=cpu))
    axes.legend(handles=lines, loc="lower left")
    FigureCanvasAgg(figure).print_figure(file, dpi=120, metadata={"Software": None})


def _speed(point: Point) -> float:
    return point.middle[0]
