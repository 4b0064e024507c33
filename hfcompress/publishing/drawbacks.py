"""Where a result is slower or worse than the original, said in sentences for the card."""

from __future__ import annotations

import math
from itertools import pairwise

from hfcompress.evaluation.metrics import less_is_better
from hfcompress.evaluation.report import Report, Row
from hfcompress.publishing import figures
from hfcompress.publishing.figures import metric_names, speed_up
from hfcompress.publishing.markup import escape, size


def drawbacks(report: Report) -> str:
    """Returns the section of the card, in Markdown."""
    found = [*_lost_quality(report), *_lost_speed(report)]
    first, last = report.rows[0], report.rows[-1]
    if last.bytes >= first.bytes:
        found.append(f"It is not smaller on disk: {size(last.bytes)} against {size(first.bytes)}.")
    if not found:
        found = ["Nothing that was measured is worse than the original."]
    return "## Where it is slower or worse\n\n" + "\n".join(f"- {line}" for line in found)


def _lost_quality(report: Report) -> list[str]:
    rows, lines = from_reference(report), []
    for name in metric_names(report):
        before, after = (row.metrics.get(name, math.nan) for row in (rows[0], rows[-1]))
        if not math.isfinite(after):
            lines.append(f"{escape(name)} is not defined on its answers.")
        elif less_is_better(name) and after > before:
            lines.append(f"{escape(name)} grows from {before:.4f} to {after:.4f}, where less is better.")
        elif not less_is_better(name) and after < before:
            lines.append(f"{escape(name)} falls from {before:.4f} to {after:.4f}.")
    lines += _lost_answers(report)
    sign = -1 if less_is_better(report.metric) else 1
    losses = [
        (sign * (before.metrics.get(report.metric, math.nan) - after.metrics.get(report.metric, math.nan)), after.name)
        for before, after in pairwise(rows)
    ]
    loss, name = max(((loss, name) for loss, name in losses if loss > 0), default=(0.0, ""))
    if loss > 0 and len(losses) > 1:
        lines.append(f"The step that costs most {escape(report.metric)} is {escape(name)}: {loss:.4f}.")
    return lines


def _lost_answers(report: Report) -> list[str]:
    known, lines = report.rows[-1].comparison, []
    if known is None:
        return []
    if known.flips:
        lines.append(
            f"{known.flips:,} of {report.examples:,} answers differ from the original's; the original had "
            f"{known.flips_were_right:,} of them right."
        )
    if worst := known.worst_class:
        lines.append(
            f"Of the classes {escape(worst.label)} loses most: {worst.before:.1%} right before, {worst.after:.1%} "
            f"after ({worst.examples:,} examples)."
        )
    if worst := known.worst_group:
        lines.append(
            f"Of the groups {escape(worst.column)}: {escape(worst.group)} loses most: {worst.before:.1%} right before, "
            f"{worst.after:.1%} after ({worst.examples:,} examples)."
        )
    if known.calibration_after > known.calibration_before:
        lines.append(
            f"Its calibration error grows from {known.calibration_before:.4f} to {known.calibration_after:.4f}."
        )
    return lines


def _lost_speed(report: Report) -> list[str]:
    lines, last = [], report.rows[-1].speed
    if last is None:
        lines.append("Speed was not measured: do not expect a speed-up.")
    elif last.high < 1:
        lines.append(f"It is slower than the original on the machine named above: {speed_up(report.rows[-1])}.")
    elif not last.low > 1:
        lines.append(f"No speed-up can be told from no change: {speed_up(report.rows[-1])}.")
    slow = [f"{figures.batch_of(each)} ({each.ratio:.2f}x)" for each in report.grid if each.high < 1]
    if slow:
        lines.append(f"It is slower than the original at these batches: {', '.join(slow)}.")
    for before, after in pairwise(report.rows):
        if before.speed and after.speed and after.speed.high < before.speed.low:
            times = f"{speed_up(before)} before, {speed_up(after)} after"
            lines.append(f"The step {escape(after.name)} made it slower: {times}.")
    return lines


def from_reference(report: Report) -> list[Row]:
    """Returns the rows from the one that retention compares with: a base model's new head has nothing to lose."""
    at = next((index for index, row in enumerate(report.rows) if row.retention == 1), 0)
    return list(report.rows[at:])
