"""Times: what can be measured again is, and two measurements must meet; the rest must agree with itself."""

from __future__ import annotations

import math

from hfcompress.evaluation.cost import Speed
from hfcompress.evaluation.layers import LayerCost
from hfcompress.evaluation.report import Report
from hfcompress.publishing.figures import batch_of
from hfcompress.tasks import kind_of, task_of
from hfcompress.verification.checks import Check, check
from hfcompress.verification.measuring import Measured

# An interval knows the noise within one run. Between runs a ratio moves more, with what else the machine does.
BETWEEN_RUNS = 0.15
_CONDITIONS = ("batch_size", "sequence_length", "repeats")


def timings(report: Report, now: Measured) -> list[Check]:
    """Checks speed-ups, the grid of them and what was counted of each layer."""
    checks = []
    task = task_of(report.task, report.recipe)
    settings = report.recipe.get("evaluation") or {}
    for row in report.rows:
        speed = row.speed
        if speed is None:
            continue
        checks.append(_in_itself(f"{row.name}: speed-up in itself", speed))
        asked = [settings.get(f"speed_{name}", getattr(speed, name)) for name in _CONDITIONS]
        if kind_of(task).reads != "text":
            asked[_CONDITIONS.index("sequence_length")] = 0
        stated = [getattr(speed, name) for name in _CONDITIONS]
        same = stated == asked and str(speed.threads) == report.environment.get("threads")
        said = "" if same else "not those of recipe and machine"
        checks.append(check(f"{row.name}: conditions of the timing", same, said))
    last = report.rows[-1]
    if last.speed is not None:
        checks.append(_again(f"{last.name}: speed-up", last.speed, now.speed, report, now))
    for place, speed in enumerate(report.grid):
        figure = f"{last.name}: speed-up of {batch_of(speed)}"
        checks.append(_in_itself(f"{figure} in itself", speed))
        measured = now.grid[place] if place < len(now.grid) else None
        checks.append(_again(figure, speed, measured, report, now))
    return checks + _layers(report, now)


def _in_itself(figure: str, speed: Speed) -> Check:
    whole = speed.low <= speed.ratio <= speed.high and math.isclose(
        speed.ratio, speed.original_seconds / speed.compressed_seconds, rel_tol=1e-9
    )
    return check(figure, whole, "" if whole else "ratio, ends and times differ")


def _again(figure: str, stated: Speed, measured: Speed | None, report: Report, now: Measured) -> Check:
    if measured is None:
        return Check(figure=figure, state="not checked", said=now.without)
    if (stated.batch_size, stated.sequence_length) != (measured.batch_size, measured.sequence_length):
        return check(figure, False, "another batch was measured")
    found = f"{_times(stated)} in the report, {_times(measured)} now"
    other = [name for name in ("cpu", "threads", "torch") if report.environment.get(name) != now.environment.get(name)]
    if other:
        return Check(figure=figure, state="not checked", said=f"{found}, with another {', '.join(other)}")
    return check(figure, speeds_agree(stated, measured), found)


def _layers(report: Report, now: Measured) -> list[Check]:
    """Kinds, shapes and operations are counted again; the times of single layers are what the run wrote."""
    if not report.layers:
        return []
    wrong = [each.path for each in report.layers if not _as_counted(each, now)]
    said = f"{wrong[0]} is another, and {len(wrong) - 1} more" if wrong else "as counted now"
    return [check(f"{report.rows[-1].name}: layers, shapes and operations", not wrong, said)]


def _as_counted(layer: LayerCost, now: Measured) -> bool:
    found = now.layers.get(layer.path)
    if found is None or found != (layer.kind, layer.shape, layer.operations):
        return False
    before = now.original_layers.get(layer.path)
    stated = (layer.original_shape, layer.original_operations)
    return not now.original_layers or (before is not None and before[1:] == stated)


def speeds_agree(stated: Speed, measured: Speed) -> bool:
    """Tells whether two intervals meet once each end is moved out by half of `BETWEEN_RUNS`."""
    margin = 1 + BETWEEN_RUNS / 2
    return stated.low / margin <= measured.high * margin and measured.low / margin <= stated.high * margin


def _times(speed: Speed) -> str:
    return f"{speed.ratio:.2f}x ({speed.low:.2f} to {speed.high:.2f})"
