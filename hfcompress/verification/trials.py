"""Explanations and attacks: summed up again from what was kept, and tried again on the result where that can be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hfcompress.errors import CheckpointError, MissingBackendError
from hfcompress.evaluation.answer_book import AnswerBook
from hfcompress.evaluation.attacks import Attempt, attack_model, withstood
from hfcompress.evaluation.explanations import agreement, explain, spread_rows
from hfcompress.evaluation.report import Report
from hfcompress.run_folder import PREDICTIONS
from hfcompress.tasks import Task
from hfcompress.verification.checks import Check, alike, check

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

# Shares of words are differences of what a model computes: on another processor less of them stays than of an answer.
_NEAR = 1e-3


def explain_again(
    directory: Path, report: Report, model: PreTrainedModel, rows: Dataset, task: Task, tokenizer: Any, **how: int
) -> tuple[list[list[float]] | None, str]:
    """Explains the original's kept answers by a folder's checkpoint, or returns why that cannot be done."""
    try:
        book = AnswerBook.from_json((directory / PREDICTIONS).read_text(encoding="utf-8"))
    except (CheckpointError, OSError, UnicodeDecodeError):
        return None, f"{PREDICTIONS} cannot be read"
    if report.explanations is None or book.explanations is None:
        return None, "there are none"
    places = spread_rows(len(book.explanations.original), len(rows))
    answers = book.answers(0).predictions
    if len(answers) != len(rows) or report.explanations.library not in ("captum", "shap"):
        return None, f"{PREDICTIONS} is not of this data"
    chosen, said = rows.select(places, keep_in_memory=True), cast("list[int]", [answers[place] for place in places])
    try:
        return explain(model, chosen, task, tokenizer, report.explanations.library, said, **how), ""
    except MissingBackendError as error:
        return None, error.message


def attack_again(
    report: Report, model: PreTrainedModel, rows: Dataset, task: Task, tokenizer: Any, **how: int
) -> tuple[list[Attempt] | None, str]:
    """Attacks a folder's checkpoint as the run did, or returns why that cannot be done."""
    if report.attack is None or report.attack.name not in ("deepwordbug", "pruthi"):
        return None, "there is none"
    chosen = rows.select(spread_rows(report.attack.examples, len(rows)), keep_in_memory=True)
    try:
        return attack_model(model, chosen, task, tokenizer, report.attack.name, **how), ""
    except MissingBackendError as error:
        return None, error.message


def explanations_hold(report: Report, book: AnswerBook, now: list[list[float]] | None, without: str) -> list[Check]:
    """Checks the figures against what was kept, and this against what the result's words count for now."""
    stated, kept = report.explanations, book.explanations
    asked = (report.recipe.get("evaluation") or {}).get("explanations")
    if stated is None and kept is None and asked is None:
        return []
    if stated is None or kept is None or stated.library != asked or len(kept.original) != len(kept.compressed):
        return [check("explanations", False, "recipe, report and what was kept do not fit together")]
    same = alike(asdict(stated), asdict(agreement(stated.library, kept)))
    said = "as the shares of words have it" if same else "other figures than the shares of words have"
    checks = [check("explanations: correlation, interval, shared words", same, said)]
    figure = f"{report.rows[-1].name}: what words count for"
    if now is None:
        return [*checks, Check(figure=figure, state="not checked", said=without)]
    other = sum(not _near(before, after) for before, after in zip(kept.compressed, now, strict=False))
    other += abs(len(now) - len(kept.compressed))
    return [*checks, check(figure, not other, f"others in {other} of {len(now)} rows" if other else "the same now")]


def attack_holds(report: Report, book: AnswerBook, now: list[Attempt] | None, without: str) -> list[Check]:
    """Checks the figures against what was kept, and this against what the attack on the result comes to now."""
    stated, kept = report.attack, book.attack
    asked = (report.recipe.get("evaluation") or {}).get("attack")
    if stated is None and kept is None and asked is None:
        return []
    if stated is None or kept is None or stated.name != asked or len(kept.original) != len(kept.compressed):
        return [check("attack", False, "recipe, report and what was kept do not fit together")]
    same = alike(asdict(stated), asdict(withstood(stated.name, kept)))
    said = "as its rows have it" if same else "other figures than its rows have"
    checks = [check("attack: accuracy before and under it, words, texts asked about", same, said)]
    figure = f"{report.rows[-1].name}: rows that withstood the attack"
    if now is None:
        return [*checks, Check(figure=figure, state="not checked", said=without)]
    right = kept.compressed == now
    return [*checks, check(figure, right, "the same now" if right else "other rows did now")]


def _near(before: Sequence[float], after: Sequence[float]) -> bool:
    if len(before) != len(after):
        return False
    most = max(map(abs, after), default=0.0)
    return all(
        math.isclose(one, two, rel_tol=_NEAR, abs_tol=_NEAR * most) for one, two in zip(before, after, strict=True)
    )
