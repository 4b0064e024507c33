"""Drawings for the page: the picture of what is gained for what is lost, as SVG, and maps of what is left."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Any

from hfcompress.evaluation.report import Row

WIDTH, HEIGHT = 460, 320
LEFT, RIGHT, TOP, BOTTOM = 74, 20, 14, 48
_RADIUS = 10


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model in a picture.

    Attributes:
        x: What it costs; less is better.
        y: What it is worth; more is better, or less where a picture is told so.
        mark: What stands in its mark: a number, one or two letters.
        name: Its name, shown where the pointer rests.
        low: The lower end of y's interval; NaN for none.
        high: Its upper end.
    """

    x: float
    y: float
    mark: str
    name: str
    low: float = math.nan
    high: float = math.nan


def front(points: Sequence[Point], *, falling: bool = False) -> list[Point]:
    """Returns the points that no other beats: none costs less for as much worth, or is worth more for as little.

    Where worth is `falling`, the smaller y is worth more.
    """
    best: list[Point] = []
    sign = -1 if falling else 1
    for point in sorted(points, key=lambda each: (each.x, -sign * each.y)):
        if not best or sign * point.y > sign * best[-1].y:
            best.append(point)
    return best


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Returns round numbers that span a range: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(times * power for times in (1, 2, 5, 10) if times * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(place * step, 12) for place in range(first, math.floor(high / step + 1e-9) + 1)]


def scatter(
    points: Sequence[Point],
    *,
    title: str,
    across: str,
    up: str,
    label: Callable[[float], str],
    falling: bool = False,
) -> str:
    """Draws models by cost and worth, with the line of those that no other beats.

    Args:
        points: The models; those without a finite place are left out.
        title: What a screen reader says.
        across: What x is.
        up: What y is.
        label: Writes a tick of x.
        falling: Whether less y is better; it is then drawn from the top down, so that up is better still.

    Returns:
        An SVG element; its colours come from the page's style.
    """
    shown = [point for point in points if math.isfinite(point.x) and math.isfinite(point.y)]
    if not shown:
        return ""
    x_ends = span([0.0, *(point.x for point in shown)], at_least=1e-9)
    heights = [y for point in shown for y in (point.y, point.low, point.high) if math.isfinite(y)]
    y_ends = span(heights, at_least=0.01)

    def x(value: float) -> float:
        return LEFT + (value - x_ends[0]) / (x_ends[1] - x_ends[0]) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        share = (value - y_ends[0]) / (y_ends[1] - y_ends[0])
        return HEIGHT - BOTTOM - (1 - share if falling else share) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title, quote=True)}">']
    parts += axes(x, y, x_ends, y_ends, label, across, up)
    best = front(shown, falling=falling)
    corners = [f"{x(best[0].x):.1f},{y(best[0].y):.1f}"]
    for before, after in pairwise(best):
        corners += [f"{x(after.x):.1f},{y(before.y):.1f}", f"{x(after.x):.1f},{y(after.y):.1f}"]
    parts.append(f'<polyline class="front" points="{" ".join(corners)}"/>')
    parts += [_whisker(point, x, y) for point in shown if math.isfinite(point.low)]
    parts += [_mark(point, x, y, beaten=point not in best) for point in reversed(shown)]
    return "\n".join([*parts, "</svg>"])


def span(values: Sequence[float], *, at_least: float) -> tuple[float, float]:
    """Returns the ends of an axis: a little more than the values, and from 0 where they start there."""
    low, high = min(values), max(values)
    middle, wide = (low + high) / 2, max(high - low, at_least, abs(high) * 1e-6) * 1.16
    return (0.0 if low == 0 and high > 0 else middle - wide / 2), middle + wide / 2


def axes(
    x: Callable[[float], float],
    y: Callable[[float], float],
    x_ends: tuple[float, float],
    y_ends: tuple[float, float],
    label: Callable[[float], str],
    across: str,
    up: str,
) -> list[str]:
    """Returns the frame, the ticks and the names of a picture of `WIDTH` x `HEIGHT`.

    Args:
        x: Places a value from left to right.
        y: Places a value from the top down.
        x_ends: The range of x.
        y_ends: The range of y.
        label: Writes a tick of x.
        across: What x is.
        up: What y is.
    """
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = [f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{right - LEFT}" height="{bottom - TOP}"/>']
    for value in ticks(*x_ends):
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 18}" text-anchor="middle">{escape(label(value))}</text>')
    heights = ticks(*y_ends)
    digits = max(2, math.ceil(-math.log10(heights[1] - heights[0]) - 1e-9)) if len(heights) > 1 else 3
    for value in heights:
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.{digits}f}</text>')
    middle = (TOP + bottom) / 2
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(across)}</text>')
    parts.append(
        f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">{escape(up)}</text>'
    )
    return parts


def _whisker(point: Point, x: Callable[[float], float], y: Callable[[float], float]) -> str:
    at = f"{x(point.x):.1f}"
    return f'<line class="whisker" x1="{at}" x2="{at}" y1="{y(point.low):.1f}" y2="{y(point.high):.1f}"/>'


def _mark(point: Point, x: Callable[[float], float], y: Callable[[float], float], *, beaten: bool) -> str:
    across, up = x(point.x), y(point.y)
    return (
        f'<g><title>{escape(point.name)}</title><circle class="mark{" beaten" if beaten else ""}" '
        f'cx="{across:.1f}" cy="{up:.1f}" r="{_RADIUS}"/><text class="place" x="{across:.1f}" y="{up + 4.3:.1f}" '
        f'text-anchor="middle">{escape(point.mark)}</text></g>'
    )


# Maps of what is left


Cell = tuple[str, float] | None


@dataclass(frozen=True, kw_only=True)
class Map:
    """What is left of each layer after one method.

    Attributes:
        title: What is counted.
        columns: The kinds of units or matrices.
        rows: The layers, from the input on: a name, and a cell for each column: what is shown and the share
            of it that is left (from 0 to 1), or None.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[tuple[str, float] | None, ...]], ...]


def maps(row: Row) -> list[Map]:
    """Finds in a step's findings what was counted layer by layer: `{path: {kept, of}}` or `{path: rank}`."""
    found = []
    for method, findings in row.findings.items():
        if not isinstance(findings, Mapping):
            continue
        left: dict[str, dict[str, tuple[str, float]]] = {}
        for kind, values in findings.items():
            cells = _cells(values)
            single = len({_split(path)[1] for path in cells}) == 1
            for path, cell in cells.items():
                layer, rest = _split(path)
                left.setdefault(layer, {})[kind if single else rest] = cell
        if left:
            found.append(_map(f"{row.name}: {method}", left))
    return found


def sensitivities(row: Row) -> list[Map]:
    """Finds in a step's findings what each part loses in each kind: `sensitivity: {part: {kind: loss}}`.

    A cell's share is where its loss lies between the least and the greatest of them, by their logarithms. Kinds that
    are ranks differ from part to part: a column then has the largest of each, and so on.
    """
    found = []
    for method, findings in row.findings.items():
        measured = findings.get("sensitivity") if isinstance(findings, Mapping) else None
        if not isinstance(measured, Mapping) or not measured:
            continue
        # A report in memory has numbers where one that was read has texts.
        parts = {
            str(part): {str(kind): loss for kind, loss in kinds.items()}
            for part, kinds in measured.items()
            if isinstance(kinds, Mapping)
        }
        if not parts:
            continue
        columns = tuple(dict.fromkeys(kind for kinds in parts.values() for kind in kinds))
        ranks = all(kind.isdigit() for kind in columns)
        sizes = [math.log(loss) for kinds in parts.values() for loss in kinds.values() if loss > 0]
        least, most = min(sizes, default=0.0), max(sizes, default=0.0)

        def cell(loss: float | None, of: str = "", least: float = least, most: float = most) -> Cell:
            if loss is None:
                return None
            share = (math.log(loss) - least) / (most - least) if loss > 0 and most > least else 0.0
            return f"{of}{loss:.2g}", share

        if ranks:
            count = max(map(len, parts.values()))
            columns = ("largest rank", *["smaller"] * (count - 2), "smallest")[:count]
            rows = tuple((part, _by_rank(kinds, count, cell)) for part, kinds in parts.items())
        else:
            rows = tuple((part, tuple(cell(kinds.get(kind)) for kind in columns)) for part, kinds in parts.items())
        found.append(Map(title=f"{row.name}: {method}", columns=columns, rows=rows))
    return found


def _by_rank(kinds: Mapping[str, float], count: int, cell: Callable[[float | None, str], Cell]) -> tuple[Cell, ...]:
    made = [cell(kinds[rank], f"{rank}: ") for rank in sorted(kinds, key=int, reverse=True)]
    return (*made, *[None] * (count - len(made)))


def _map(title: str, left: Mapping[str, Mapping[str, tuple[str, float]]]) -> Map:
    columns = tuple(dict.fromkeys(kind for cells in left.values() for kind in cells))
    stems = {layer.rpartition(".")[0] for layer in left}
    order = sorted(left, key=lambda layer: (layer.rpartition(".")[0], int(layer.rpartition(".")[2])))
    rows = []
    for layer in order:
        stem, _, place = layer.rpartition(".")
        name = f"layer {place}" if len(stems) == 1 else f"{stem} {place}"
        rows.append((name, tuple(left[layer].get(kind) for kind in columns)))
    return Map(title=title, columns=columns, rows=tuple(rows))


def _cells(values: Any) -> dict[str, tuple[str, float]]:
    """Returns what to show for each path with a layer's number in it; nothing where the values are not of that kind."""
    if not isinstance(values, Mapping):
        return {}
    places = {str(path): value for path, value in values.items() if _LAYER.match(str(path))}
    ranks = [value for value in places.values() if _is_count(value)]
    most = max(ranks, default=0)
    cells = {}
    for path, value in places.items():
        kept, whole = (value.get("kept"), value.get("of")) if isinstance(value, Mapping) else (None, None)
        if isinstance(kept, int) and isinstance(whole, int) and _is_count(kept) and whole > 0:
            cells[path] = (f"{kept}/{whole}", min(1.0, kept / whole))
        elif isinstance(value, int) and _is_count(value) and most:
            cells[path] = (str(value), value / most)
    return cells


_LAYER = re.compile(r"(.*?\.\d+)(?:\.(.*))?$")


def _split(path: str) -> tuple[str, str]:
    found = _LAYER.match(path)
    assert found is not None
    rest = found[2] or "layer"
    return found[1], ".".join(part for part in rest.split(".") if part not in ("self", "dense")) or rest


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
