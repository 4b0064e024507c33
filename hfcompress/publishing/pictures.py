"""The pictures on the card: PNGs, because the Hub shows no SVG of a repository."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.evaluation.answer_book import seal
from hfcompress.evaluation.curves import Curve, Training
from hfcompress.evaluation.metrics import less_is_better
from hfcompress.evaluation.report import Report
from hfcompress.publishing.markup import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

QUALITY, TRAINING = "pictures/quality.png", "pictures/training.png"
PICTURES = (QUALITY, TRAINING)


def write_pictures(directory: Path, report: Report) -> list[Path]:
    """Draws quality against bytes and time, and how the training went, into a checkpoint folder.

    Each file says which report it was drawn from; one of an earlier report goes where there is nothing to draw.

    Returns:
        Their paths; none where matplotlib is not installed (an optional extra, `plots`).
    """
    written = []
    origin = drawn_from(_stored(directory, report))
    for name, drawn in ((QUALITY, _quality(report)), (TRAINING, _trainings(report))):
        path = directory / name
        if drawn is None:
            path.unlink(missing_ok=True)
            continue
        path.parent.mkdir(exist_ok=True)
        drawn.savefig(path, metadata={"Software": "hfcompress", "Description": origin})
        written.append(path)
    return written


def drawn_from(text: str) -> str:
    """Returns what a picture says of its origin: the digest of the report's text."""
    return f"drawn from report {seal(text)}"


def _stored(directory: Path, report: Report) -> str:
    """Returns the text of the report as it lies in the folder, which an earlier version may have written."""
    file, text = directory / "report.json", report.to_json()
    stored = file.read_text(encoding="utf-8") if file.is_file() else text
    return stored if Report.from_json(stored).to_json() == text else text


def _canvas(width: float, height: float) -> Figure | None:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _quality(report: Report) -> Figure | None:
    first = report.rows[0]
    worth = [row.metrics.get(report.metric, math.nan) for row in report.rows]
    times = [1.0 if row is first else 1 / row.speed.ratio if row.speed else math.nan for row in report.rows]
    if sum(map(math.isfinite, worth)) < 2 or (figure := _canvas(9, 3.6)) is None:
        return None
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
        if less_is_better(report.metric):
            axes.invert_yaxis()  # up is better in every picture
        axes.set_xlim(0, 1.12 * max(filter(math.isfinite, values), default=1.0))
        if place == 0:
            axes.legend(fontsize=8)
    return figure


def _trainings(report: Report) -> Figure | None:
    trained = [(row.name, row.training) for row in report.rows if row.training and _drawable(row.training)]
    if not trained or (figure := _canvas(9, 2.8 * len(trained))) is None:
        return None
    for place, (name, training) in enumerate(trained):
        _lines(figure.add_subplot(len(trained), 2, 2 * place + 1), training.losses, f"{name}: loss")
        if training.metrics:
            _lines(figure.add_subplot(len(trained), 2, 2 * place + 2), training.metrics, f"{name}: metric")
    return figure


def _drawable(training: Training) -> bool:
    return any(sum(map(math.isfinite, curve.values)) > 1 for curve in (*training.losses, *training.metrics))


def _lines(axes: Any, curves: Sequence[Curve], title: str) -> None:
    axes.grid(alpha=0.3)
    axes.set_title(_text(title), fontsize=9)
    axes.set_xlabel("steps")
    styles = ("-", "--", ":", "-.")
    for number, curve in enumerate(curves):
        style = styles[number % len(styles)]
        axes.plot(curve.steps, curve.values, style, marker=".", label=_text(curve.name.replace("_", " ")))
    axes.legend(fontsize=8)


def _text(name: str) -> str:
    """Takes out what matplotlib would read as mathematics."""
    return plain(name).replace("$", "").replace("\\", "")[:40]
