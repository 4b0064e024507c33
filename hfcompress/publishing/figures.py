"""A report's figures as tables of text and sentences, for the card and for the page alike."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hfcompress.evaluation.comparison import Difference
from hfcompress.evaluation.cost import Speed
from hfcompress.evaluation.glue_average import TASKS, glue_average
from hfcompress.evaluation.layers import LayerCost
from hfcompress.evaluation.report import Report, Row
from hfcompress.evaluation.seeds import Spread
from hfcompress.evaluation.usage import LINEAR, QUANTIZED, REST, Usage
from hfcompress.publishing.markup import number, size
from hfcompress.tasks import kind_of, task_of
from hfcompress.tasks.catalog import GLUE_DATASET

_MOST_CLASSES = 20
_KEPT = 0.95  # of a promised speed-up
ABOUT_GRID = "The median time of a pass, the two timed by turns, and the speed-up with its 95% interval."


ABOUT_LAYERS = (
    "The linear layers of the result beside those of the original, the slowest first: layers of one kind together, "
    "with the median times of a pass, timed by turns. Those of quantized layers count operations as if they were float."
)


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


def how_answered(report: Report) -> str:
    """Returns a sentence on how answers are come by, or nothing where the task needs none."""
    task = task_of(report.task, report.recipe)
    return kind_of(task).told(task)


def length(speed: Speed) -> str:
    """Returns the length of what was timed with a comma after it; nothing where it is not made of tokens."""
    return f"{speed.sequence_length} tokens, " if speed.sequence_length else ""


def threads(speed: Speed) -> str:
    """Returns on how many threads something was timed."""
    return f"{speed.threads} thread" if speed.threads == 1 else f"{speed.threads} threads"


def speed_up(row: Row) -> str:
    """Returns a row's speed-up with its interval."""
    if row.speed is None:
        return "not measured"
    low, high = (number(end, ".2f") for end in (row.speed.low, row.speed.high))
    return f"{number(row.speed.ratio, '.2f', 'x')} ({low} to {high})"


def beside_first(row: Row, report: Report) -> str:
    """Returns the same in a table of all rows: the first one is what the others are timed beside."""
    is_beside = row is report.rows[0] and len(report.rows) > 1
    return "1.00x" if is_beside else speed_up(row)


def change(difference: Difference) -> str:
    """Returns a metric's change with its interval."""
    text = number(difference.value, "+.4f")
    if math.isfinite(difference.low):
        text += f" ({difference.low:+.4f} to {difference.high:+.4f})"
    return text


def spread(values: Spread | None) -> str:
    """Returns a mean with its standard deviation."""
    if values is None:
        return "n/a"
    return f"{number(values.mean)} ± {number(values.deviation)}" if len(values.values) > 1 else number(values.mean)


def seeds(report: Report) -> Table | None:
    """Returns mean and deviation of every step over the seeds, or None where there was one alone."""
    known = report.seeds
    if known is None:
        return None
    names = metric_names(report)
    head = ("step", *names, "retention", *(f"change of {name}" for name in names))
    rows = []
    for row in known.rows:
        kept = [number(100 * each, ".1f") for each in (row.retention.mean, row.retention.deviation)]
        changed = [change(row.differences[name]) if name in row.differences else "-" for name in names]
        rows.append((row.name, *(spread(row.metrics.get(name)) for name in names), f"{kept[0]}% ± {kept[1]}", *changed))
    return Table(head=head, rows=tuple(rows))


def each_seed(report: Report) -> Table | None:
    """Returns the first metric of every step with every seed."""
    known = report.seeds
    if known is None:
        return None
    head = (f"{report.metric} of", *(f"seed {seed}" for seed in known.seeds))
    measured = [(row.name, row.metrics[report.metric]) for row in known.rows if report.metric in row.metrics]
    return Table(head=head, rows=tuple((name, *map(number, each.values)) for name, each in measured))


def about_seeds(report: Report) -> str:
    """Says how seeds were used: which one is published, and what the intervals are over."""
    assert report.seeds is not None
    seeds = ", ".join(map(str, report.seeds.seeds))
    return (
        f"Every step was done with the seeds {seeds}. What is published, and what all other tables are of, is the "
        f"result of seed {report.seeds.seeds[0]}: the first that the recipe names, and not the best. Means are over "
        "all seeds, ± their standard deviation. A change is the mean change against the original of the same seed, "
        "with its 95% interval over draws of seeds and of examples (paired bootstrap)."
    )


def glue(reports: Sequence[Report]) -> str:
    """Says what results of several GLUE tasks, one each, come to on average; nothing where they are not that."""
    names = [report.task for report in reports]
    ours = all(task_of(report.task, report.recipe).dataset == GLUE_DATASET for report in reports)
    if not ours or len(names) < 2 or len(names) != len(set(names)):
        return ""
    (before, tasks), (after, _) = (
        glue_average({report.task: report.rows[place].metrics for report in reports}) for place in (0, -1)
    )
    return (
        f"The GLUE average over {len(tasks)} of its {len(TASKS)} tasks ({', '.join(tasks)}): {number(after)}, of the "
        f"originals {number(before)}. A task of several metrics counts by their mean."
    )


def not_again(report: Report) -> str:
    """Says which figures are not measured again, but held to what the run wrote, by a digest."""
    said = ["what a step took", "memory, loading times and where the time of a pass goes"]
    if len(report.rows) > 2:
        said.insert(0, "speed-ups and bytes of the steps before the last")
    if report.layers:
        said.append("times of single layers")
    if report.robustness:
        said.append("the original's figures on changed texts")
    if report.explanations or report.attack:
        said.append("what explains the original's answers, or fools it (figures are computed again from what was kept)")
    if report.seeds is not None:
        said.append("checkpoints of the seeds after the first (their figures are computed again from their answers)")
    return f"Not measured again, but compared with what the run wrote: {'; '.join(said)}."


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
        times = beside_first(row, report)
        held, loading = size(use.memory), milliseconds(use.load_seconds)
        rows.append((row.name, operations(use.operations), fewer, times, held, loading, *parts))
    return _with_energy(report, Table(head=head, rows=tuple(rows)))


def _with_energy(report: Report, table: Table) -> Table:
    """Adds what a pass takes of energy, where the machine counted it."""
    joules = [row.speed.compressed_joules if row.speed else None for row in report.rows]
    counted = [row.speed.original_joules for row in report.rows if row.speed and row.speed.original_joules is not None]
    if not counted:
        return table
    joules[0] = counted[-1]
    cells = [number(math.nan if each is None else each, ".3f", " J") for each in joules]
    place = table.head.index("loading")
    rows = tuple((*row[:place], cell, *row[place:]) for row, cell in zip(table.rows, cells, strict=True))
    return Table(head=(*table.head[:place], "energy of the processor", *table.head[place:]), rows=rows)


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
        if not speed.high < promised * _KEPT:
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
    slow = slow_layers(report)
    return [*said, slow] if slow else said


def layers(report: Report) -> Table | None:
    """Returns what became of the linear layers: those of one kind, shape and reason together, the slowest first."""
    if not report.layers:
        return None
    groups: dict[tuple[str, ...], list[LayerCost]] = {}
    for each in report.layers:
        groups.setdefault((_role(each.path), each.kind, each.reason, _shapes(each)), []).append(each)
    ordered = sorted(groups.items(), key=lambda item: -sum(each.seconds for each in item[1]))
    rows = []
    for (role, kind, reason, shapes), own in ordered[:_MOST_LAYERS]:
        before, after = (sum(getattr(each, name) for each in own) for name in ("original_seconds", "seconds"))
        fewer = sum(each.original_operations for each in own) / max(1, sum(each.operations for each in own))
        gained = before / after if after > 0 else math.nan
        times = [f"{seconds * 1e3:.2f} ms" for seconds in (before, after)]
        said = _REASONS.get(reason, reason) if reason else "-"
        name = f"{role} x {len(own)}" if len(own) > 1 else role
        rows.append((name, f"{shapes}, {kind}", *times, number(fewer, ".2f", "x"), number(gained, ".2f", "x"), said))
    head = ("layers", "shape and kind now", "before", "now", "fewer operations", "as fast", "what costs speed")
    return Table(head=head, rows=tuple(rows))


def slow_layers(report: Report) -> str:
    """Says in a sentence or two which layers have less speed than their operations promise, and why."""
    slow = [each for each in report.layers if each.reason]
    if not slow or not _promises_more(report):
        return ""
    said = []
    for reason in dict.fromkeys(each.reason for each in sorted(slow, key=lambda each: -each.seconds)):
        own = [each for each in slow if each.reason == reason]
        worst = max(own, key=lambda each: each.seconds * each.promised / max(each.gained, 1e-9))
        spent = sum(each.seconds for each in own)
        said.append(
            f"{len(own)} of {len(report.layers)} take {spent * 1e3:.1f} ms of a pass: {_REASONS[reason]} (such as "
            f"{worst.path}, {_shapes(worst)}, {worst.kind}: {worst.promised:.2f}x fewer operations, "
            f"{worst.gained:.2f}x as fast)"
        )
    return f"Of the linear layers of {report.rows[-1].name}, {'; '.join(said)}."


_MOST_LAYERS = 24
_REASONS = {
    "dequantization": "their weights are unpacked or their inputs rounded in every pass",
    "two thin factors": "two products of thin matrices take longer than one of as many operations",
    "small matrix": "the product is so small that calling it costs as much",
    "odd width": "a width that is no multiple of 16 leaves vector instructions half empty",
    "not compressed": "they were left as they were",
    "other": "the product is slower for no reason that is known here",
}


def _promises_more(report: Report) -> bool:
    first, last = report.rows[0], report.rows[-1]
    if first.usage is None or last.usage is None or last.speed is None or not last.usage.operations:
        return False
    return last.speed.high < _KEPT * first.usage.operations / last.usage.operations


def _role(path: str) -> str:
    """Returns a layer's path without the number of its block."""
    return re.sub(r"\.\d+\.", ".*.", path, count=1)


def _shapes(layer: LayerCost) -> str:
    before, after = ("x".join(map(str, shape)) for shape in (layer.original_shape, layer.shape))
    return before if before == after else f"{before} to {after}"


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
