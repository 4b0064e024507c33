"""Lines over the steps of a training, as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from hfcompress.evaluation.curves import Curve
from hfcompress.publishing.drawing import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, axes, span

# As many as the page's style has colours and dashes for.
MOST_LINES = 5
_DOTS = 12


def lines(curves: Sequence[Curve], *, title: str, up: str) -> str:
    """Draws curves over training steps.

    Args:
        curves: At most `MOST_LINES` are drawn; points that are not finite are left out.
        title: What a screen reader says.
        up: What the values are.

    Returns:
        An SVG element whose colours come from the page's style, or nothing where no curve has two points.
    """
    drawn = [(number, _points(curve)) for number, curve in enumerate(curves[:MOST_LINES], start=1)]
    drawn = [(number, points) for number, points in drawn if len(points) > 1]
    if not drawn:
        return ""
    x_ends = (0.0, float(max(step for _, points in drawn for step, _ in points)))
    y_ends = span([value for _, points in drawn for _, value in points], at_least=1e-3)

    def x(value: float) -> float:
        return LEFT + value / x_ends[1] * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_ends[0]) / (y_ends[1] - y_ends[0]) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">']
    parts += axes(x, y, x_ends, y_ends, lambda value: f"{value:g}", "steps", up)
    for number, points in drawn:
        places = [(f"{x(step):.1f}", f"{y(value):.1f}") for step, value in points]
        parts.append(f'<polyline class="line line{number}" points="{" ".join(",".join(place) for place in places)}"/>')
        if len(places) <= _DOTS:
            parts += [f'<circle class="dot{number}" cx="{across}" cy="{down}" r="3"/>' for across, down in places]
    return "\n".join([*parts, "</svg>"])


def _points(curve: Curve) -> list[tuple[int, float]]:
    return [pair for pair in zip(curve.steps, curve.values, strict=True) if math.isfinite(pair[1])]
