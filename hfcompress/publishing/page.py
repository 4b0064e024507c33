"""A report as one page of HTML: no script, no request to anywhere, readable on a phone and on paper."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape as escape_html
from pathlib import Path

import yaml

from hfcompress.evaluation.curves import Curve
from hfcompress.evaluation.metrics import less_is_better
from hfcompress.evaluation.report import Report, Row
from hfcompress.publishing import figures
from hfcompress.publishing.charts import MOST_LINES, lines
from hfcompress.publishing.drawing import Point, maps, scatter, sensitivities
from hfcompress.publishing.elements import document, escape, facts_list, heat_map, section, table_of
from hfcompress.publishing.markup import number, plain, ratio, size
from hfcompress.publishing.trials import trials

PAGE = "report.html"


def page_of_report(report: Report) -> str:
    """Returns the whole page of a report, the same for the same report."""
    about = (
        f"{report.base_model} on {report.task}: {report.examples:,} {figures.unit(report)} of the {report.split} split"
    )
    sections = [
        f'<h1>{escape(report.name)}</h1>\n<p class="faint">{escape(about)}, seed {report.seed}.</p>',
        _tiles(report),
        section("Steps", _steps(report)),
        section("What is gained for what is lost", _pictures(report)),
        _seeds(report),
        _changes(report),
        _costs(report),
        _maps(report),
        _sensitivities(report),
        _trainings(report),
        section("How it was measured", _conditions(report)),
        _details(report),
    ]
    return document(report.name, [section for section in sections if section])


def page_of_reports(reports: Sequence[tuple[str, Report]]) -> str:
    """Returns one page that shows several results side by side.

    Args:
        reports: What each is called, and its report.
    """
    kinds = {(report.task, report.split, report.examples, report.metric) for _, report in reports}
    same = len(kinds) == 1
    first = reports[0][1]
    worth = first.metric if same else "share of the original's metric kept"
    about = (
        f"{worth} on {first.task}, {first.examples:,} {figures.unit(first)} of the {first.split} split"
        if same
        else worth
    )
    notes = []
    if not same:
        notes.append("The results are not of the same task and rows, so what is compared is the share kept.")
    if len({_machine(report) for _, report in reports}) > 1:
        notes.append("They were timed on different machines or versions: each speed-up is against its own original.")
    if average := figures.glue([report for _, report in reports]):
        notes.append(average)
    marks = [str(place) for place in range(1, len(reports) + 1)]
    bytes_points, speed_points = [], []
    for mark, (name, report) in zip(marks, reports, strict=True):
        last = report.rows[-1]
        value = last.metrics.get(report.metric, math.nan) if same else last.retention
        bytes_points.append(Point(x=last.bytes / 1e6, y=value, mark=mark, name=name))
        times = 1 / last.speed.ratio if last.speed and last.speed.ratio > 0 else math.nan
        speed_points.append(Point(x=times, y=value, mark=mark, name=name))
    body = [
        f'<h1>{len(reports)} results</h1>\n<p class="faint">{escape(about)}</p>',
        "".join(f"<p>{escape(note)}</p>" for note in notes),
        section("What is gained for what is lost", _figures(bytes_points, speed_points, worth, relative=True)),
        section("Results", _compared(reports, marks)),
        section("Machines", facts_list({name: _machine(report) for name, report in reports})),
    ]
    return document(f"{len(reports)} results compared", [part for part in body if part])


def write_page(directory: Path, report: Report) -> Path:
    """Writes the page into a checkpoint folder and returns its path."""
    path = directory / PAGE
    path.write_text(page_of_report(report), encoding="utf-8", newline="\n")
    return path


def _tiles(report: Report) -> str:
    first, last = report.rows[0], report.rows[-1]
    tiles = [("smaller on disk", ratio(first.bytes, last.bytes), f"{size(first.bytes)} to {size(last.bytes)}")]
    values = [number(row.metrics.get(report.metric, math.nan)) for row in (first, last)]
    tiles.append((f"of {report.metric} kept", number(last.retention, ".1%"), " to ".join(values)))
    if last.speed is not None:
        ends = f"{number(last.speed.low, '.2f')} to {number(last.speed.high, '.2f')}"
        tiles.append(("as fast", number(last.speed.ratio, ".2f", "x"), ends))
    if last.comparison and last.comparison.flips is not None:
        share = number(last.comparison.flips / report.examples if report.examples else math.nan, ".1%")
        right = f"{last.comparison.flips_were_right:,} were right before"
        tiles.append(("of the answers flipped", share, right))
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<span>{escape(more)}</span></dd></div>"
        for name, value, more in tiles
    )
    return f'<dl class="tiles">{cells}</dl>'


def _steps(report: Report) -> str:
    names, first = figures.metric_names(report), report.rows[0]
    head = ("step", "methods", *names, "kept", "parameters", "on disk", "smaller", "speed-up", "took")
    rows = [
        (
            f"{place} {row.name}",
            ", ".join(row.methods) or ("the original" if row is first else "fine-tuning"),
            *(number(row.metrics.get(name, math.nan)) for name in names),
            number(row.retention, ".1%"),
            f"{row.parameters:,}",
            size(row.bytes),
            ratio(first.bytes, row.bytes),
            figures.beside_first(row, report),
            number(row.seconds, ".0f", " s"),
        )
        for place, row in enumerate(report.rows, start=1)
    ]
    return table_of(figures.Table(head=head, rows=tuple(rows)))


def _compared(reports: Sequence[tuple[str, Report]], marks: Sequence[str]) -> str:
    rows = []
    for mark, (name, report) in zip(marks, reports, strict=True):
        first, last = report.rows[0], report.rows[-1]
        known = last.comparison.differences.get(report.metric) if last.comparison else None
        if report.seeds is not None:
            known = report.seeds.rows[-1].differences.get(report.metric)
        flips = f"{last.comparison.flips:,}" if last.comparison and last.comparison.flips is not None else "n/a"
        methods = list(dict.fromkeys(method for row in report.rows for method in row.methods))
        rows.append(
            (
                f"{mark} {name}",
                f"{report.base_model} on {report.task}",
                ", ".join(methods),
                f"{report.metric} {_worth(report)}",
                figures.change(known) if known else "n/a",
                number(last.retention, ".1%"),
                flips,
                size(last.bytes),
                ratio(first.bytes, last.bytes),
                figures.speed_up(last),
            )
        )
    head = ("result", "of", "methods", "metric", "change", "kept", "flips", "on disk", "smaller", "speed-up")
    return table_of(figures.Table(head=head, rows=tuple(rows)))


def _worth(report: Report) -> str:
    """Returns the result's first metric, over several seeds their mean with its deviation."""
    if report.seeds is not None:
        return figures.spread(report.seeds.rows[-1].metrics.get(report.metric))
    return number(report.rows[-1].metrics.get(report.metric, math.nan))


def _pictures(report: Report) -> str:
    first = report.rows[0]
    bytes_points, speed_points = [], []
    for place, row in enumerate(report.rows, start=1):
        value, (low, high) = row.metrics.get(report.metric, math.nan), _interval(row, first, report.metric)
        about = {"y": value, "mark": str(place), "name": row.name, "low": low, "high": high}
        bytes_points.append(Point(x=row.bytes / 1e6, **about))
        # Only ratios were measured side by side: a time is the original's, divided by them.
        times = 1.0 if row is first else 1 / row.speed.ratio if row.speed and row.speed.ratio > 0 else math.nan
        speed_points.append(Point(x=times, **about))
    return _figures(bytes_points, speed_points, report.metric, relative=True)


def _interval(row: Row, first: Row, metric: str) -> tuple[float, float]:
    known = row.comparison.differences.get(metric) if row.comparison else None
    if known is None:
        return math.nan, math.nan
    base = first.metrics.get(metric, math.nan)
    return base + known.low, base + known.high


def _figures(sizes: Sequence[Point], times: Sequence[Point], worth: str, *, relative: bool) -> str:
    pictures = []
    for points, across, label, what in (
        (sizes, "megabytes on disk", lambda value: f"{value:g}", "size"),
        (times, "time of a pass / the original's", lambda value: f"{value:g}x", "time"),
    ):
        title = f"{worth} against {what}"
        if sum(math.isfinite(point.x) and math.isfinite(point.y) for point in points) > 1:
            falling = less_is_better(worth)
            drawn = scatter(points, title=title, across=across, up=plain(worth), label=label, falling=falling)
            pictures.append(f"<figure>{drawn}<figcaption>{escape(title)}: up and left is better.</figcaption></figure>")
    if not pictures:
        return ""
    keys = ", ".join(f"<b>{escape(point.mark)}</b> {escape(point.name)}" for point in sizes)
    bars = (
        " A bar is the 95% interval of the change against the original."
        if any(math.isfinite(point.low) for point in sizes)
        else ""
    )
    note = f"The dashed line joins what nothing else beats; what lies below it is grey.{bars}"
    return f'<div class="figures">{"".join(pictures)}</div>\n<p class="small">{keys}. {note}</p>'


def _seeds(report: Report) -> str:
    together, each = figures.seeds(report), figures.each_seed(report)
    if together is None or each is None:
        return ""
    told = f"<p>{escape(figures.about_seeds(report))}</p>"
    return section("Over several seeds", f"{told}\n{table_of(together)}\n<h3>Seed by seed</h3>\n{table_of(each)}")


def _changes(report: Report) -> str:
    changes, classes = figures.changes(report), figures.classes(report)
    if changes is None:
        return ""
    told = (
        "<p>Every model answered the same examples. An interval is the 95% interval over draws of these examples "
        "(paired bootstrap); one that holds 0 is no proof of a change. Calibration error: how far confidence is "
        "from accuracy.</p>"
    )
    content = told + table_of(changes)
    if classes is not None:
        content += f"\n<h3>Right answers by class</h3>\n{table_of(classes)}"
    if (grouped := figures.groups(report)) is not None:
        content += f"\n<h3>Right answers by group</h3>\n{table_of(grouped)}"
    for each in trials(report):
        told = f"<p>{escape(each.told)}.</p>\n" if each.told else ""
        content += f"\n<h3>{escape(each.title)}</h3>\n{told}{table_of(each.table)}"
    return section("Answer by answer, against the original", content)


def _costs(report: Report) -> str:
    costs = figures.costs(report)
    if costs is None:
        return ""
    told = (
        "<p>Of one pass on the batch of the speed measurement. Operations of quantized layers are counted as if they "
        "were float. Memory is the weights and the most that a pass holds besides. The last three columns are where "
        "the time of a pass goes.</p>"
    )
    timed = figures.grid(report)
    more = f"<h3>By batch and length</h3>\n<p>{figures.ABOUT_GRID}</p>\n{table_of(timed)}" if timed else ""
    said = "".join(f"<li>{escape(reason)}</li>" for reason in figures.reasons(report))
    why = f"<h3>Why it is not as fast as its operations promise</h3>\n<ul>{said}</ul>" if said else ""
    if (layers := figures.layers(report)) is not None:
        why += f"<h3>Layer by layer</h3>\n<p>{escape(figures.ABOUT_LAYERS)}</p>\n{table_of(layers)}"
    return section("What a pass takes", told + table_of(costs) + more + why)


def _maps(report: Report) -> str:
    found = [each for row in report.rows for each in maps(row)]
    if not found:
        return ""
    told = "<p>What each layer has left: the stronger the colour, the more. Ranks are shaded against the largest.</p>"
    return section("What is left, layer by layer", told + f'<div class="maps">{"".join(map(heat_map, found))}</div>')


def _sensitivities(report: Report) -> str:
    found = [each for row in report.rows for each in sensitivities(row)]
    if not found:
        return ""
    told = (
        "<p>How far the outputs move on the calibration data when one part alone is quantized, or factorised to a "
        "rank, measured, or to second order by the predictions' curvature, that of a very sure model at a higher "
        "temperature: the mean Kullback-Leibler divergence, or of numbers the mean squared difference. The stronger "
        "the colour, the more.</p>"
    )
    return section("What each part loses", told + f'<div class="maps">{"".join(map(heat_map, found))}</div>')


def _trainings(report: Report) -> str:
    blocks, rows = [], 0
    for row in report.rows:
        if row.training is None:
            continue
        losses = _chart(row.training.losses, f"{row.name}: loss", "loss")
        metrics = _chart(row.training.metrics, f"{row.name}: metric", "metric")
        if losses or metrics:
            blocks.append(f'<h3>{escape(row.name)}</h3>\n<div class="figures">{losses}{metrics}</div>')
            rows = max(rows, row.training.examples if metrics else 0)
    if not blocks:
        return ""
    told = "A loss is the mean since the point before; a method's own terms are shown beside the whole."
    if rows:
        told += f" Metrics are of {rows:,} rows of the {report.split} split; nothing was chosen by them."
    return section("How the training went", f"<p>{escape(told)}</p>\n" + "\n".join(blocks))


def _chart(curves: Sequence[Curve], title: str, up: str) -> str:
    drawn = lines(curves, title=plain(title), up=up)
    if not drawn:
        return ""
    keys = "".join(
        f'<span class="key"><svg viewBox="0 0 26 8" aria-hidden="true"><line class="line line{number}" x1="0" x2="26" '
        f'y1="4" y2="4"/></svg>{escape(curve.name.replace("_", " "))}</span>'
        for number, curve in enumerate(curves[:MOST_LINES], start=1)
    )
    return f"<figure>{drawn}<figcaption>{keys}</figcaption></figure>"


def _conditions(report: Report) -> str:
    speeds = [row.speed for row in report.rows if row.speed is not None]
    told = "Speed was not measured."
    if speeds:
        speed = speeds[-1]
        told = (
            "Speed-up is the original's median time / the model's, with its 95% interval, the two timed by turns in "
            f"one run: batch {speed.batch_size}, {figures.length(speed)}{figures.threads(speed)}, "
            f"{speed.repeats} passes each."
        )
    again = f"hfcompress verify, on this folder, measures again and says what holds. {figures.not_again(report)}"
    told = f"{told} {figures.how_answered(report)}"
    return f"<p>{escape(told)}</p><p>{escape(again)}</p>{facts_list(report.environment)}"


def _details(report: Report) -> str:
    recipe = yaml.safe_dump(json.loads(json.dumps(report.recipe)), sort_keys=False, allow_unicode=True)
    blocks = [("The recipe", recipe)]
    for row in report.rows:
        if row.findings:
            blocks.append((f"What {row.name} found out", json.dumps(row.findings, indent=2, ensure_ascii=False)))
    return "\n".join(
        f"<details><summary>{escape(title)}</summary><pre>{escape_html(text)}</pre></details>" for title, text in blocks
    )


def _machine(report: Report) -> str:
    return ", ".join(f"{name} {value}" for name, value in report.environment.items())
