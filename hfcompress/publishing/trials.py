"""What was tried beyond the data as they are: changed texts, reasons, attacks; as tables for card and page."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hfcompress.evaluation.attacks import QUERIES
from hfcompress.evaluation.report import Report
from hfcompress.publishing.figures import Table
from hfcompress.publishing.markup import number


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One thing that was tried.

    Attributes:
        title: What, in our words and in names that were checked.
        told: A sentence on how to read the table, or nothing.
        table: What came of it.
    """

    title: str
    told: str
    table: Table


def trials(report: Report) -> list[Trial]:
    """Returns what the recipe asks to be tried."""
    return [each for each in (_robustness(report), _explanations(report), _attack(report)) if each is not None]


def _robustness(report: Report) -> Trial | None:
    if not report.robustness:
        return None
    names = (report.rows[0].name, report.rows[-1].name)
    rows = [("none", *(number(row.metrics.get(report.metric, math.nan)) for row in (report.rows[0], report.rows[-1])))]
    for each in report.robustness:
        values = (scores.get(report.metric, math.nan) for scores in (each.original, each.compressed))
        rows.append((each.change, *(number(value) for value in values)))
    table = Table(head=("change of the texts", *(f"{report.metric} of {name}" for name in names)), rows=tuple(rows))
    return Trial(title="With slips of the keyboard, and in capitals", told="", table=table)


def _explanations(report: Report) -> Trial | None:
    known = report.explanations
    if known is None:
        return None
    ends = f"({number(known.rank_low, '+.3f')} to {number(known.rank_high, '+.3f')})"
    cells = (
        f"{known.examples:,}",
        f"{number(known.rank_correlation, '+.3f')} {ends}",
        number(known.strongest_shared, ".1%"),
        number(known.same_strongest, ".1%"),
    )
    head = ("explained by", "rows", "rank correlation of words", "strongest quarter shared", "same strongest word")
    told = (
        "How much each word speaks for the original's answer was asked of the original and of the result. A rank "
        "correlation of 1 is the same order of words in every row, 0 is one of chance; with its 95% interval over rows"
    )
    return Trial(title="The same reasons?", told=told, table=Table(head=head, rows=((known.library, *cells),)))


def _attack(report: Report) -> Trial | None:
    known = report.attack
    if known is None:
        return None
    rows = []
    for name, each in ((report.rows[0].name, known.original), (report.rows[-1].name, known.compressed)):
        shares = [number(share, ".1%") for share in (each.accuracy, each.under_attack, each.changed)]
        rows.append((name, *shares, number(each.queries, ".1f")))
    head = ("model", "right before", "right under attack", "words changed to fool it", "texts asked about a row")
    told = (
        f"{known.name} looks for slips of the keyboard that change an answer: in {known.examples:,} rows, each model "
        f"by itself, which it asks about {QUERIES} texts a row at most"
    )
    return Trial(title="Under attack", told=told, table=Table(head=head, rows=tuple(rows)))
