"""A report's figures as tables of text and sentences, for the card and for the page alike."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hfcompress.evaluation.comparison import Difference
from hfcompress.evaluation.cost import Speed
from hfcompress.evaluation.report import Report, Row
from hfcompress.evaluation.usage import LINEAR, QUANTIZED, REST, Usage
from hfcompress.publishing.markup import number, size
from hfcompress.tasks import kind_of, task_of

_MOST_CLASSES = 20
ABOUT_ROBUSTNESS = "With slips of the keyboard, and in capitals"
ABOUT_GRID = "The median time of a pass, the two timed by turns, and the speed-up with its 95% interval."


@dataclass(frozen=True, kw_only=True)
class Table:
    """Text in rows and columns.

    Attributes:
        head: Names of the columns, not escaped.
        rows: The first cell is a name, not escaped; the others are figures, or words of ours.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def metric_names(report: Report) -> list[str]:
    """Returns the metrics of all rows, the one that retention is computed on first."""
    return list(dict.fromkeys([report.metric, *(name for row in report.rows for name in row.metrics)]))


def unit(report: Report) -> str:
    """Returns what an example of the report's task is called, such as rows or blocks."""
    return kind_of(task_of(report.task, report.recipe)).unit


def length(speed: Speed) -> str:
    """Returns the length of what was timed with a comma after it; nothing where it is not made of tokens."""
    return f"{speed.sequence_length} tokens, " if speed.sequence_length else ""


def speed_up(row: Row) -> str:
    """Returns a row's speed-up with its interval."""
    if row.speed is None:
        return "not measured"
    low, high = (number(end, ".2f") for end in (row.speed.low, row.speed.high))
    return f"{number(row.speed.ratio, '.2f', 'x')} ({low} to {high})"


def change(difference: Difference) -> str:
    """Returns a metric's change with its interval."""
    text = number(difference.value, "+.4f")
    if math.isfinite(difference.low):
        text += f" ({difference.low:+.4f} to {difference.high:+.4f})"
    return text


def changes(report: Report) -> Table | None:
    """Returns each row's change against the original, or None where no answers were kept."""
    compared = [(row, row.comparison) for row in report.rows if row.comparison is not None]
    if not compared:
        return None
    metrics = [name for name in metric_names(report) if any(name in each.differences for _, each in compared)]
    classified = any(each.flips is not None for _, each in compared)
    rows = []
    for row, each in compared:
        cells = [change(each.differences[name]) if name in each.differences else "n/a" for name in metrics]
        if classified:
            cells += [f"{count:,}" if count is not None else "n/a" for count in _flips(row)]
            cells.append(f"{number(each.calibration_before)} to {number(each.calibration_after)}")
        rows.append((row.name, *cells))
    head = ["step", *(f"change of {name}" for name in metrics)]
    if classified:
        head += ["answers flipped", "were right before", "are right now", "calibration error"]
    return Table(head=tuple(head), rows=tuple(rows))


def _flips(row: Row) -> tuple[int | None, int | None, int | None]:
    assert row.comparison is not None
    return row.comparison.flips, row.comparison.flips_were_right, row.comparison.flips_are_right


def classes(report: Report) -> Table | None:
    """Returns the share right of each class, model by model; of many classes those that lost most at the end."""
    compared = [row for row in report.rows if row.comparison is not None and row.comparison.classes]
    if not compared:
        return None
    last = compared[-1].comparison
    assert last is not None
    losses = [each.after - each.before if each.examples else math.inf for each in last.classes]
    kept = sorted(sorted(range(len(losses)), key=losses.__getitem__)[:_MOST_CLASSES])
    rows = []
    for place in kept:
        entries = [row.comparison.classes[place] for row in compared if row.comparison is not None]
        shares = [entries[0].before, *(entry.after for entry in entries)]
        rows.append((entries[0].label, f"{entries[0].examples:,}", *(number(share, ".1%") for share in shares)))
    head = ("class", "examples", report.rows[0].name, *(row.name for row in compared))
    return Table(head=head, rows=tuple(rows))


def groups(report: Report) -> Table | None:
    """Returns the share right of each group, model by model, or None where the recipe names no columns."""
    compared = [row for row in report.rows if row.comparison is not None and row.comparison.groups]
    if not compared:
        return None
    rows = []
    for entries in zip(*(row.comparison.groups for row in compared if row.comparison is not None), strict=True):
        first = entries[0]
        shares = [first.before, *(entry.after for entry in entries)]
        rows.append(
            (f"{first.column}: {first.group}", f"{first.examples:,}", *(number(share, ".1%") for share in shares))
        )
    return Table(head=("group", "examples", report.rows[0].name, *(row.name for row in compared)), rows=tuple(rows))


def robustness(report: Report) -> Table | None:
    """Returns what the original and the result score on changed texts, or None where it was not asked for."""
    if not report.robustness:
        return None
    names = (report.rows[0].name, report.rows[-1].name)
    rows = [("none", *(number(row.metrics.get(report.metric, math.nan)) for row in (report.rows[0], report.rows[-1])))]
    for each in report.robustness:
        values = (scores.get(report.metric, math.nan) for scores in (each.original, each.compressed))
        rows.append((each.change, *(number(value) for value in values)))
    return Table(head=("change of the texts", *(f"{report.metric} of {name}" for name in names)), rows=tuple(rows))


def costs(report: Report) -> Table | None:
    """Returns what a pass of each model takes, or None where it was not measured."""
    if not any(row.usage for row in report.rows):
        return None
    first = report.rows[0].usage
    head = ("step", "operations", "fewer", "speed-up", "memory", "loading", "linear", "quantized linear", "the rest")
    rows = []
    for row in report.rows:
        use = row.usage
        if use is None:
            rows.append((row.name, *["n/a"] * (len(head) - 1)))
            continue
        parts = [number(use.parts[name], ".0%") if name in use.parts else "-" for name in (LINEAR, QUANTIZED, REST)]
        fewer = number(first.operations / use.operations, ".2f", "x") if first and use.operations else "n/a"
        times = "1.00x" if row is report.rows[0] else speed_up(row)
        held, loading = size(use.memory), milliseconds(use.load_seconds)
        rows.append((row.name, operations(use.operations), fewer, times, held, loading, *parts))
    return Table(head=head, rows=tuple(rows))


def grid(report: Report) -> Table | None:
    """Returns the result's times beside the original's by batch and length, or None where they were not measured."""
    if not report.grid:
        return None
    head = ("batch x length", report.rows[0].name, report.rows[-1].name, "speed-up")
    rows = []
    for speed in report.grid:
        ends = f"({number(speed.low, '.2f')} to {number(speed.high, '.2f')})"
        times = [milliseconds(seconds) for seconds in (speed.original_seconds, speed.compressed_seconds)]
        rows.append((batch_of(speed), *times, f"{number(speed.ratio, '.2f', 'x')} {ends}"))
    return Table(head=head, rows=tuple(rows))


def batch_of(speed: Speed) -> str:
    """Says how many examples, of how many tokens each, a speed was measured with."""
    tokens = f" x {speed.sequence_length:,} tokens" if speed.sequence_length else ""
    return f"{speed.batch_size:,}{tokens}"


def reasons(report: Report) -> list[str]:
    """Says, for each row that gained less speed than its operations promise, where its time goes."""
    first, said = report.rows[0], []
    if first.usage is None:
        return []
    for row in report.rows[1:]:
        use, speed = row.usage, row.speed
        if use is None or speed is None or not use.operations:
            continue
        promised = first.usage.operations / use.operations
        if not speed.high < promised * 0.95:
            continue
        text = (
            f"{row.name} has {promised:.2f}x fewer operations and is {speed.ratio:.2f}x as fast. "
            f"Of the {milliseconds(speed.compressed_seconds)} of a pass it spends "
            f"{_spent(use, speed.compressed_seconds)}; the original, of {milliseconds(speed.original_seconds)}, "
            f"{_spent(first.usage, speed.original_seconds)}."
        )
        if QUANTIZED in use.parts:
            text += " Storing weights in fewer bits leaves out no operation: these layers unpack or round first."
        elif use.parts.get(REST, 0) > first.usage.parts.get(REST, 1):
            text += " What is not a linear layer shrank less, or not at all."
        said.append(text)
    return said


def _spent(usage: Usage, seconds: float) -> str:
    worth = {name: share for name, share in usage.parts.items() if share >= 0.005}
    return ", ".join(f"{milliseconds(share * seconds)} in {name}" for name, share in worth.items())


def operations(count: int) -> str:
    """Returns operations with a unit that suits them."""
    for scale, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= scale:
            return f"{count / scale:.2f} {unit}FLOP"
    return f"{count} FLOP"


def milliseconds(seconds: float) -> str:
    """Returns seconds as milliseconds."""
    return number(seconds * 1e3, ".1f", " ms")
