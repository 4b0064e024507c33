"""Compares what a folder's documents state with what was measured, and with one another."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path

from hfcompress.evaluation.answer_book import AnswerBook, seal
from hfcompress.evaluation.comparison import compare
from hfcompress.evaluation.quality import score_task
from hfcompress.evaluation.report import Report, retention
from hfcompress.evaluation.seeds import over_seeds
from hfcompress.run_folder import PREDICTIONS, REPORT
from hfcompress.tasks import Task, kind_of, task_of
from hfcompress.verification.checks import ALIKE, EXACT, Check, agreement, alike, check, close, equal
from hfcompress.verification.documents import documents, text_of
from hfcompress.verification.measuring import Measured
from hfcompress.verification.timing import timings
from hfcompress.verification.trials import attack_holds, explanations_hold


def judge(directory: Path, measured: Measured) -> list[Check]:
    """Compares what a folder's documents state with what was measured, and with one another."""
    text = text_of(directory / REPORT)
    report = Report.from_json(text)
    checks = _result(report, measured)
    book = None
    if (directory / PREDICTIONS).is_file():
        book = AnswerBook.from_json(text_of(directory / PREDICTIONS))
        checks += _kept(report, book, measured)
    else:
        checks.append(Check(figure=PREDICTIONS, state="fails", said="it is missing, and with it what the run answered"))
    if book is not None:
        checks += explanations_hold(report, book, *measured.explained)
        checks += attack_holds(report, book, *measured.attacked)
    checks += timings(report, measured)
    checks += _told_twice(report)
    checks += documents(directory, report)
    if book is not None:
        said = "" if book.report == seal(text) else "the report is not the one that the run wrote"
        checks.append(check("everything else in report.json", not said, said or "as the run wrote it"))
    return checks


def _result(report: Report, now: Measured) -> list[Check]:
    last, first = report.rows[-1], report.rows[0]
    checks = [
        equal("examples", report.examples, now.quality.examples),
        equal("split", report.split, now.split),
        equal("metric", report.metric, now.quality.primary),
        equal("metrics measured", sorted(last.metrics), sorted(now.quality.metrics)),
    ]
    # Losses are sums of real numbers, which another processor rounds otherwise; ids and texts are the same on any.
    exact = kind_of(task_of(report.task, report.recipe)).exact
    checks += [
        close(f"{last.name}: {name}", last.metrics.get(name, math.nan), value, within=EXACT if exact else ALIKE)
        for name, value in now.quality.metrics.items()
    ]
    checks += [
        close(f"{last.name}: {name} with {each.change}", value, now.robustness.get(each.change, {}).get(name, math.nan))
        for each in report.robustness
        for name, value in each.compressed.items()
    ]
    checks.append(equal(f"{last.name}: parameters", last.parameters, now.parameters))
    checks.append(equal(f"{last.name}: bytes", last.bytes, now.bytes))
    if last.usage is not None and now.operations is not None:
        checks.append(equal(f"{last.name}: operations", last.usage.operations, now.operations))
    if now.original_parameters is None:
        checks.append(Check(figure=f"{first.name}: parameters", state="not checked", said=now.without))
    else:
        checks.append(equal(f"{first.name}: parameters", first.parameters, now.original_parameters))
        if first.usage is not None:
            checks.append(equal(f"{first.name}: operations", first.usage.operations, now.original_operations))
    return checks


def _kept(report: Report, book: AnswerBook, now: Measured) -> list[Check]:
    """Computes every row's metrics again from the answers that the run kept."""
    if [row.name for row in report.rows] != [row.name for row in book.rows]:
        return [Check(figure="rows", state="fails", said=f"{PREDICTIONS} holds answers of other rows")]
    task = task_of(report.task, report.recipe)
    checks = [equal("right answers kept", book.references, now.quality.references, shown=False)]
    if book.groups or now.groups:
        checks.append(equal("groups kept", book.groups, now.groups, shown=False))
    wrong = len({len(book.references), *(len(row.predictions) for row in book.rows)}) != 1
    if wrong or not book.references:
        return [*checks, Check(figure=PREDICTIONS, state="fails", said="its rows are not of one length")]
    differing = agreement(book.answers(-1).predictions, now.quality.predictions)
    checks.append(check(f"{book.rows[-1].name}: answers", not differing, differing or "the same, one by one"))
    scores = [score_task(task, row.predictions, book.references, row.confidences) for row in book.rows]
    for place, (row, score) in enumerate(zip(report.rows, scores, strict=True)):
        checks += [close(f"{row.name}: {name}, from its answers", row.metrics.get(name), score[name]) for name in score]
        kept = math.nan
        if report.metric in score:
            kept = retention(score[report.metric], scores[0][report.metric], report.metric)
        checks.append(close(f"{row.name}: retention", row.retention, kept))
        expected = compare(book.answers(0), book.answers(place), task) if place else None
        same = alike(row.comparison and asdict(row.comparison), expected and asdict(expected))
        checks.append(check(f"{row.name}: change, flips, classes, calibration", same, "" if same else "other figures"))
    return checks + _seeds(report, book, task)


def _seeds(report: Report, book: AnswerBook, task: Task) -> list[Check]:
    """Sums up again what every seed answered; the checkpoint that is measured again is the first seed's."""
    if report.seeds is None and not book.seeds:
        return []
    stated = report.seeds.seeds if report.seeds else ()
    asked = tuple(report.recipe.get("seeds") or ())
    kept = (report.seed, *(each.seed for each in book.seeds))
    checks = [check("seeds", stated == asked == kept, f"{', '.join(map(str, stated))} in the report")]
    names = [row.name for row in report.rows]
    if any([row.name for row in each.rows] != names for each in book.seeds):
        return [*checks, check("seeds: rows", False, f"{PREDICTIONS} holds answers of other rows")]
    lengths = {len(row.predictions) for each in book.seeds for row in each.rows}
    if lengths and lengths != {len(book.references)}:
        return [*checks, check("seeds: answers", False, "they are not of one length")]
    found = over_seeds(kept, names, book.every_seed(), task)
    same = alike(report.seeds and asdict(report.seeds), asdict(found))
    said = "as their answers have it" if same else "other figures than their answers have"
    return [*checks, check("seeds: metrics, means, deviations, changes and intervals", same, said)]


def _told_twice(report: Report) -> list[Check]:
    """What the report repeats of its recipe."""
    recipe = report.recipe
    pairs = {"name": report.name, "seed": report.seed, "model": report.base_model}
    checks = [equal(f"{key} of the run", value, recipe.get(key, value)) for key, value in pairs.items()]
    described = recipe.get("task", report.task)
    name = described if isinstance(described, str) else task_of(report.task, recipe).name
    return [*checks, equal("task of the run", report.task, name)]
