"""Measures a result again and compares every figure that its report and its card state.

What can be measured is measured: the quality of the checkpoint, its parameters, bytes and operations, and, where the
original can be had, the speed-up. What was measured on models that are not in the folder (the steps before the last)
is computed again from the answers that the run kept. What is neither is held to what the run wrote, by a digest.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from hfcompress.errors import CheckpointError, HFCompressError
from hfcompress.evaluation.answer_book import AnswerBook, seal
from hfcompress.evaluation.comparison import compare
from hfcompress.evaluation.cost import Speed, measure_speed, speed_inputs
from hfcompress.evaluation.groups import group_labels
from hfcompress.evaluation.quality import Quality, evaluate_quality, score_task
from hfcompress.evaluation.report import Report, describe_environment, retention
from hfcompress.evaluation.robustness import CHANGES, evaluate_changed
from hfcompress.evaluation.usage import count_operations
from hfcompress.modeling.measure import count_parameters, weight_bytes
from hfcompress.pipeline import find_model
from hfcompress.publishing.metadata import License
from hfcompress.publishing.model_card import card_texts, quant_method, read_config, read_report
from hfcompress.publishing.page import PAGE, page_of_report
from hfcompress.publishing.pictures import PICTURES, drawn_from
from hfcompress.run_folder import PREDICTIONS, REPORT
from hfcompress.tasks import kind_of, load_data, preprocess, task_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

State = Literal["holds", "fails", "not checked"]

# Answers are compared one by one; of what is computed from them floats keep this much on any machine.
_EXACT = 1e-6
# Numbers that a model computes are alike, as shares of them, on machines that add up in other orders.
_ALIKE = 1e-4
# An interval knows the noise within one run. Between runs a ratio moves more, with what else the machine does.
BETWEEN_RUNS = 0.15
_CONDITIONS = ("batch_size", "sequence_length", "repeats")


@dataclass(frozen=True, kw_only=True)
class Check:
    """What became of one figure, or of some that belong together.

    Attributes:
        figure: Which.
        state: Whether it holds.
        said: What was found.
    """

    figure: str
    state: State
    said: str = ""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a folder's checkpoint, and the original where it can be had, measure now.

    Attributes:
        quality: The checkpoint's.
        split: What was measured.
        parameters: The checkpoint's.
        bytes: The checkpoint's.
        operations: The checkpoint's, or None where the report has none.
        original_parameters: The original's, or None without one.
        original_operations: The original's, or None without one.
        speed: Beside the original, or None without one.
        without: Why there is no original.
        environment: Where this was measured.
        groups: Each example's group, by the columns that the report's recipe names.
        robustness: The checkpoint's metrics on changed texts, by change.
    """

    quality: Quality
    split: str
    parameters: int
    bytes: int
    operations: int | None
    original_parameters: int | None
    original_operations: int | None
    speed: Speed | None
    without: str
    environment: dict[str, str]
    groups: dict[str, list[str]] = field(default_factory=dict)
    robustness: dict[str, dict[str, float]] = field(default_factory=dict)


def verify(
    directory: Path, *, original: str | None = None, data: str | None = None, progress: bool = True
) -> list[Check]:
    """Measures a result again and compares.

    Args:
        directory: A folder that a run has written, or a download of one.
        original: The original, for the speed-up: a checkpoint folder or a model's name. By default it is looked for
            in the run's working folder, and else made from the report's base model.
        data: A local folder with the task's data.
        progress: Whether to show progress bars.

    Returns:
        What holds, what does not, and what cannot be checked here.

    Raises:
        HFCompressError: The folder holds no checkpoint with a report, or its task's data are not here.
    """
    return judge(directory, measure_again(directory, original=original, data=data, progress=progress))


def measure_again(
    directory: Path, *, original: str | None = None, data: str | None = None, progress: bool = True
) -> Measured:
    """Measures a folder's checkpoint as its report says that it was measured; see `verify`."""
    report = read_report(directory)
    task, settings = task_of(report.task, report.recipe), report.recipe.get("evaluation") or {}
    kind = kind_of(task)
    with _threads(report):
        model = kind.load(directory)
        tokenizer = kind.load_processor(directory)
        rows = load_data(task, data, progress=progress)[task.evaluation_split]
        labels = cast("dict[str, int]", model.config.label2id) if task.labels else None
        cut = _whole(report.recipe.get("max_length"), 128)
        examples = preprocess(rows, task, tokenizer, max_length=cut, label2id=labels)
        batch = _whole(settings.get("batch_size"), 32)
        quality = evaluate_quality(model, examples, task, tokenizer, batch_size=batch, progress=progress)
        speed_batch = _whole(settings.get("speed_batch_size"), 8)
        length = _whole(settings.get("speed_sequence_length"), 128)
        inputs = kind.speed_inputs(model.config, speed_batch)
        inputs = inputs or speed_inputs(model.config.vocab_size, speed_batch, length)
        first, without = _original(directory, report, original, kind.head(task), progress)
        repeats = max(3, _whole(settings.get("speed_repeats"), 20))
        return Measured(
            quality=quality,
            split=task.evaluation_split,
            parameters=count_parameters(model),
            bytes=weight_bytes(directory),
            operations=count_operations(model, inputs),
            original_parameters=None if first is None else count_parameters(first),
            original_operations=None if first is None else count_operations(first, inputs),
            speed=None if first is None else measure_speed(first, model, inputs, repeats=repeats),
            without=without,
            environment=describe_environment(),
            groups=group_labels(rows, settings.get("groups") or ()),
            robustness={
                each.change: evaluate_changed(
                    model, rows, task, tokenizer, each.change, max_length=cut, batch_size=batch
                ).metrics
                for each in report.robustness
                if each.change in CHANGES
            },
        )


def judge(directory: Path, measured: Measured) -> list[Check]:
    """Compares what a folder's documents state with what was measured, and with one another."""
    text = _text(directory / REPORT)
    report = Report.from_json(text)
    checks = _result(report, measured)
    book = None
    if (directory / PREDICTIONS).is_file():
        book = AnswerBook.from_json(_text(directory / PREDICTIONS))
        checks += _kept(report, book, measured)
    else:
        checks.append(Check(figure=PREDICTIONS, state="fails", said="it is missing, and with it what the run answered"))
    checks += _speed(report, measured)
    checks += _told_twice(report)
    checks += _documents(directory, report)
    if book is not None:
        said = "" if book.report == seal(text) else "the report is not the one that the run wrote"
        checks.append(_check("everything else in report.json", not said, said or "as the run wrote it"))
    return checks


def holds(checks: Sequence[Check]) -> bool:
    """Tells whether nothing fails."""
    return all(check.state != "fails" for check in checks)


def _result(report: Report, now: Measured) -> list[Check]:
    last, first = report.rows[-1], report.rows[0]
    checks = [
        _equal("examples", report.examples, now.quality.examples),
        _equal("split", report.split, now.split),
        _equal("metric", report.metric, now.quality.primary),
        _equal("metrics measured", sorted(last.metrics), sorted(now.quality.metrics)),
    ]
    # Losses are sums of real numbers, which another processor rounds otherwise; ids and texts are the same on any.
    exact = kind_of(task_of(report.task, report.recipe)).exact
    checks += [
        _close(f"{last.name}: {name}", last.metrics.get(name, math.nan), value, within=_EXACT if exact else _ALIKE)
        for name, value in now.quality.metrics.items()
    ]
    checks += [
        _close(
            f"{last.name}: {name} with {each.change}", value, now.robustness.get(each.change, {}).get(name, math.nan)
        )
        for each in report.robustness
        for name, value in each.compressed.items()
    ]
    checks.append(_equal(f"{last.name}: parameters", last.parameters, now.parameters))
    checks.append(_equal(f"{last.name}: bytes", last.bytes, now.bytes))
    if last.usage is not None and now.operations is not None:
        checks.append(_equal(f"{last.name}: operations", last.usage.operations, now.operations))
    if now.original_parameters is None:
        checks.append(Check(figure=f"{first.name}: parameters", state="not checked", said=now.without))
    else:
        checks.append(_equal(f"{first.name}: parameters", first.parameters, now.original_parameters))
        if first.usage is not None:
            checks.append(_equal(f"{first.name}: operations", first.usage.operations, now.original_operations))
    return checks


def _kept(report: Report, book: AnswerBook, now: Measured) -> list[Check]:
    """Computes every row's metrics again from the answers that the run kept."""
    if [row.name for row in report.rows] != [row.name for row in book.rows]:
        return [Check(figure="rows", state="fails", said=f"{PREDICTIONS} holds answers of other rows")]
    task = task_of(report.task, report.recipe)
    checks = [_equal("right answers kept", book.references, now.quality.references, shown=False)]
    if book.groups or now.groups:
        checks.append(_equal("groups kept", book.groups, now.groups, shown=False))
    wrong = len({len(book.references), *(len(row.predictions) for row in book.rows)}) != 1
    if wrong or not book.references:
        return [*checks, Check(figure=PREDICTIONS, state="fails", said="its rows are not of one length")]
    same = _agreement(book.answers(-1).predictions, now.quality.predictions)
    checks.append(_check(f"{book.rows[-1].name}: answers", not same, same or "the same, one by one"))
    scores = [score_task(task, row.predictions, book.references) for row in book.rows]
    for place, (row, score) in enumerate(zip(report.rows, scores, strict=True)):
        checks += [
            _close(f"{row.name}: {name}, from its answers", row.metrics.get(name), score[name]) for name in score
        ]
        kept = math.nan
        if report.metric in score:
            kept = retention(score[report.metric], scores[0][report.metric], report.metric)
        checks.append(_close(f"{row.name}: retention", row.retention, kept))
        expected = compare(book.answers(0), book.answers(place), task) if place else None
        alike = _alike(row.comparison and asdict(row.comparison), expected and asdict(expected))
        checks.append(
            _check(f"{row.name}: change, flips, classes, calibration", alike, "" if alike else "other figures")
        )
    return checks


def _speed(report: Report, now: Measured) -> list[Check]:
    checks = []
    settings = report.recipe.get("evaluation") or {}
    for row in report.rows:
        speed = row.speed
        if speed is None:
            continue
        whole = speed.low <= speed.ratio <= speed.high and math.isclose(
            speed.ratio, speed.original_seconds / speed.compressed_seconds, rel_tol=1e-9
        )
        checks.append(_check(f"{row.name}: speed-up in itself", whole, "" if whole else "ratio, ends and times differ"))
        asked = [settings.get(f"speed_{name}", getattr(speed, name)) for name in _CONDITIONS]
        if kind_of(task_of(report.task, report.recipe)).reads != "text":
            asked[_CONDITIONS.index("sequence_length")] = 0
        stated = [getattr(speed, name) for name in _CONDITIONS]
        alike = stated == asked and str(speed.threads) == report.environment.get("threads")
        checks.append(
            _check(f"{row.name}: conditions of the timing", alike, "" if alike else "not those of recipe and machine")
        )
    last = report.rows[-1]
    if last.speed is None:
        return checks
    figure = f"{last.name}: speed-up"
    if now.speed is None:
        return [*checks, Check(figure=figure, state="not checked", said=now.without)]
    found = f"{_times(last.speed)} in the report, {_times(now.speed)} now"
    other = [name for name in ("cpu", "threads", "torch") if report.environment.get(name) != now.environment.get(name)]
    if other:
        return [*checks, Check(figure=figure, state="not checked", said=f"{found}, with another {', '.join(other)}")]
    return [*checks, _check(figure, speeds_agree(last.speed, now.speed), found)]


def speeds_agree(stated: Speed, measured: Speed) -> bool:
    """Tells whether two intervals meet once each end is moved out by half of `BETWEEN_RUNS`."""
    margin = 1 + BETWEEN_RUNS / 2
    return stated.low / margin <= measured.high * margin and measured.low / margin <= stated.high * margin


def _told_twice(report: Report) -> list[Check]:
    """What the report repeats of its recipe."""
    recipe = report.recipe
    pairs = {"name": report.name, "seed": report.seed, "model": report.base_model}
    checks = [_equal(f"{key} of the run", value, recipe.get(key, value)) for key, value in pairs.items()]
    described = recipe.get("task", report.task)
    name = described if isinstance(described, str) else task_of(report.task, recipe).name
    return [*checks, _equal("task of the run", report.task, name)]


def _documents(directory: Path, report: Report) -> list[Check]:
    card = directory / "README.md"
    checks = []
    licence = _licence(card)
    for path, text in card_texts(directory, report, quant_method(read_config(directory)), licence).items():
        checks.append(_document(path, text, str(path.relative_to(directory))))
    if (directory / PAGE).is_file():
        checks.append(_document(directory / PAGE, page_of_report(report), PAGE))
    for picture in PICTURES:
        if (directory / picture).is_file():
            drawn = drawn_from(report).encode() in (directory / picture).read_bytes()
            checks.append(_check(picture, drawn, "drawn from this report" if drawn else "drawn from another report"))
    return checks


def _document(path: Path, expected: str, name: str) -> Check:
    if not path.is_file():
        return Check(figure=name, state="fails", said="it is missing")
    found = _text(path)
    if found == expected:
        return Check(figure=name, state="holds", said="says what the report says")
    pairs = zip(found.splitlines(), expected.splitlines(), strict=False)
    line = next((place for place, (one, other) in enumerate(pairs, start=1) if one != other), None)
    where = f"line {line}" if line else "its end"
    return Check(figure=name, state="fails", said=f"does not say what the report says, from {where} on")


def _licence(card: Path) -> License | None:
    """Returns the licence that the card states: which one it is was known where the card was written."""
    import yaml

    if not card.is_file():
        return None
    head = _text(card).split("\n---\n", 1)[0].removeprefix("---\n")
    try:
        values = yaml.safe_load(head)
    except yaml.YAMLError:
        return None
    if not isinstance(values, dict) or not isinstance(values.get("license"), str):
        return None
    return License(id=values["license"], name=values.get("license_name"), link=values.get("license_link"))


def _original(
    directory: Path, report: Report, given: str | None, head: dict[str, Any], progress: bool
) -> tuple[PreTrainedModel | None, str]:
    """Returns a model of the original's shape, which is all that its cost depends on, or why there is none."""
    kind = kind_of(task_of(report.task, report.recipe))
    kept = directory.with_name(f"{directory.name}.work") / f"1-{report.rows[0].name}" / "checkpoint"
    try:
        if given is not None:
            folder = Path(given) if Path(given).is_dir() else find_model(given, progress=progress)
        elif kept.is_dir():
            folder = kept
        elif report.base_model.startswith(("/", "./", "../")):
            return None, f"the original ({report.base_model}) is not here; name it with --original"
        else:
            folder = find_model(report.base_model, progress=progress)
        return kind.load(folder, ignore_mismatched_sizes=True, **head), ""
    except (HFCompressError, OSError) as error:
        said = str(error).partition("\n")[0]
        return None, f"the original cannot be had ({said}); name it with --original"


@contextlib.contextmanager
def _threads(report: Report) -> Iterator[None]:
    """Works with the report's number of threads, where the machine has that many."""
    import os

    import torch

    before = torch.get_num_threads()
    wanted = report.environment.get("threads", "")
    if wanted.isdecimal() and 0 < int(wanted) <= (os.cpu_count() or 1):
        torch.set_num_threads(int(wanted))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check(figure: str, right: bool, said: str) -> Check:
    return Check(figure=figure, state="holds" if right else "fails", said=said)


def _equal(figure: str, stated: object, found: object, *, shown: bool = True) -> Check:
    said = f"{stated}" if stated == found else f"{stated} in the report, {found} found"
    return _check(figure, stated == found, said if shown else "" if stated == found else "others were found")


def _close(figure: str, stated: float | None, found: float, *, within: float = _EXACT) -> Check:
    stated = math.nan if stated is None else stated
    margin = within * max(1, abs(found))
    right = stated == found or abs(stated - found) <= margin or (math.isnan(stated) and math.isnan(found))
    return _check(figure, right, f"{found:.4f}" if right else f"{stated:.6f} in the report, {found:.6f} found")


def _alike(stated: Any, found: Any) -> bool:
    """Compares two records, floats to `_EXACT`."""
    if isinstance(found, dict):
        return (
            isinstance(stated, dict)
            and stated.keys() == found.keys()
            and all(_alike(stated[key], found[key]) for key in found)
        )
    if isinstance(found, list | tuple):
        return isinstance(stated, list | tuple) and len(stated) == len(found) and all(map(_alike, stated, found))
    if isinstance(found, float) and isinstance(stated, float):
        margin = _EXACT * max(1, abs(found))
        return stated == found or abs(stated - found) <= margin or (math.isnan(stated) and math.isnan(found))
    return stated == found


def _agreement(kept: Sequence[Any], now: Sequence[Any]) -> str:
    """Returns what differs between two models' answers, or nothing."""
    if len(kept) != len(now):
        return f"{len(kept)} were kept, {len(now)} given now"
    other = sum(not _same_answer(one, two) for one, two in zip(kept, now, strict=True))
    return f"{other} of {len(now)} differ from those that the run kept" if other else ""


def _same_answer(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same_answer, one, other))
    return one == other if isinstance(one, str) else math.isclose(one, other, rel_tol=_ALIKE, abs_tol=_ALIKE)


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default


def _times(speed: Speed) -> str:
    return f"{speed.ratio:.2f}x ({speed.low:.2f} to {speed.high:.2f})"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
