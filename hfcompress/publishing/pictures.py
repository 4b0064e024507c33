"""The picture on the card: a PNG, because the Hub shows no SVG of a repository."""

from __future__ import annotations

import math
from pathlib import Path

from hfcompress.evaluation.answer_book import seal
from hfcompress.evaluation.report import Report
from hfcompress.publishing.markup import plain

PICTURE = "pictures/quality.png"


def write_picture(directory: Path, report: Report) -> Path | None:
    """Draws quality against bytes and time into a checkpoint folder.

    The file says which report it was drawn from.

    Returns:
        Its path, or None where matplotlib is not installed (an optional extra, `plots`) or there is nothing to draw.
    """
    path = directory / PICTURE
    first = report.rows[0]
    worth = [row.metrics.get(report.metric, math.nan) for row in report.rows]
    times = [1.0 if row is first else 1 / row.speed.ratio if row.speed else math.nan for row in report.rows]
    if sum(map(math.isfinite, worth)) < 2:
        path.unlink(missing_ok=True)
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        path.unlink(missing_ok=True)
        return None
    figure = Figure(figsize=(9, 3.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for place, (values, label) in enumerate(
        [([row.bytes / 1e6 for row in report.rows], "megabytes on disk"), (times, "time of a pass / the original's")]
    ):
        axes = figure.add_subplot(1, 2, place + 1)
        axes.grid(alpha=0.3)
        axes.set_xlabel(label)
        axes.set_ylabel(_text(report.metric))
        for number, (x, y) in enumerate(zip(values, worth, strict=True), start=1):
            if math.isfinite(x) and math.isfinite(y):
                name = f"{number} {_text(report.rows[number - 1].name)}"
                axes.plot([x], [y], "o", markersize=9, label=name)
                axes.annotate(str(number), (x, y), xytext=(7, 6), textcoords="offset points")
        axes.margins(y=0.15)
        axes.set_xlim(0, 1.12 * max(filter(math.isfinite, values), default=1.0))
        if place == 0:
            axes.legend(fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, metadata={"Software": "hfcompress", "Description": drawn_from(report)})
    return path


def drawn_from(report: Report) -> str:
    """Returns what a picture says of its origin."""
    return f"drawn from report {seal(report.to_json())}"


def _text(name: str) -> str:
    """Takes out what matplotlib would read as mathematics."""
    return plain(name).replace("$", "").replace("\\", "")[:40]
