"""What the commands do once their arguments are parsed: call the package and show what it returns.

Results go to stdout; progress, logs and hints go to stderr, so that `--json` can be piped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.markup import escape
from rich.table import Table

from hfcompress.errors import CheckpointError, ConfigError, Problem
from hfcompress.terminal import (
    REPORT_FILE,
    console,
    fields_table,
    show_plan,
    show_progress,
    show_result,
    stdout_kept_clean,
)

if TYPE_CHECKING:
    import torch

    from hfcompress.deployment import Pipeline
    from hfcompress.tasks import Task


def run(
    *,
    recipe: Path,
    output: Path | None,
    overrides: Sequence[str],
    plan: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Runs a recipe, or with `plan` only checks it and prints its steps.

    Raises:
        HFCompressError: The recipe, the data or the output folder is not right.
    """
    from hfcompress.recipe import load_recipe

    loaded = load_recipe(recipe, overrides)
    folder = output or Path("runs") / loaded.name
    if plan:
        show_plan(loaded, folder, as_json)
        return
    from hfcompress import pipeline

    show_progress(quiet)
    with stdout_kept_clean(quiet):
        report = pipeline.run(loaded, folder, quiet)
    if as_json:
        print(report.to_json())
        return
    show_result(report, folder)


def evaluate(
    *,
    directory: Path,
    task: str | None,
    data: str | None,
    batch_size: int,
    max_length: int | None,
    submission: Path | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measures a checkpoint's quality; what is not given is taken from the folder's report.

    With `submission` it answers GLUE's test set instead and writes the files that GLUE's server takes.

    Raises:
        HFCompressError: The folder holds no checkpoint, or the task and its data do not fit it.
    """
    from hfcompress.evaluation.quality import evaluate_quality
    from hfcompress.tasks import get_task, kind_of, load_data, preprocess

    _require_checkpoint(directory)
    recorded = _recorded(directory)
    chosen = recorded["described"] if task is None and recorded else get_task(_task_name(task, recorded))
    kind = kind_of(chosen)
    length = max_length or recorded.get("max_length", 128)
    if submission is not None:
        _submit(directory, chosen, submission, data, {"batch_size": batch_size, "max_length": length}, quiet, as_json)
        return
    with stdout_kept_clean(quiet):
        model = kind.load(directory)
        tokenizer = kind.load_processor(directory)
        split = load_data(chosen, data, progress=not quiet)[chosen.evaluation_split]
        label2id = cast("dict[str, int]", model.config.label2id) if chosen.labels else None
        examples = preprocess(split, chosen, tokenizer, max_length=length, label2id=label2id)
        quality = evaluate_quality(model, examples, chosen, tokenizer, batch_size=batch_size, progress=not quiet)
    facts = {"task": chosen.name, "split": chosen.evaluation_split, "examples": quality.examples}
    # JSON has no NaN: a metric that is not defined on these predictions is null.
    metrics = {key: value if value == value else None for key, value in quality.metrics.items()}
    if as_json:
        print(json.dumps({**facts, "max_length": length, "metrics": metrics}, indent=2, allow_nan=False))
        return
    table = Table(title=escape(f"{directory} on {chosen.name} ({chosen.evaluation_split}, {quality.examples})"))
    table.add_column("metric")
    table.add_column("value", justify="right")
    for key, value in metrics.items():
        table.add_row(escape(key), "n/a" if value is None else f"{value:.4f}")
    console().print(table)


def _submit(
    directory: Path,
    task: Task,
    folder: Path,
    data: str | None,
    how: Mapping[str, int],
    quiet: bool,
    as_json: bool,
) -> None:
    from hfcompress.evaluation.submission import files_of, write_submission
    from hfcompress.tasks import kind_of
    from hfcompress.tasks.data import read_splits

    files_of(task)  # says so before anything is loaded where GLUE has no such file
    with stdout_kept_clean(quiet):
        splits = read_splits(task, data, progress=not quiet)
        kind = kind_of(task)
        model, tokenizer = kind.load(directory), kind.load_processor(directory)
        written = write_submission(folder, model, tokenizer, task, splits, **how, progress=not quiet)
    paths = [str(path) for path in written]
    print(json.dumps({"files": paths}, indent=2) if as_json else "\n".join(paths))


def export(
    *,
    directory: Path,
    output: Path,
    how: Mapping[str, Any],
    task: str | None,
    data: str | None,
    calibration: int,
    max_length: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Exports a checkpoint for another engine.

    Raises:
        HFCompressError: The folder holds no checkpoint, or it cannot be exported in this way.
    """
    from hfcompress.deployment import ExportConfig
    from hfcompress.deployment import export as write
    from hfcompress.tasks import get_task

    config = ExportConfig(**how)
    _require_checkpoint(directory)
    with stdout_kept_clean(quiet):
        batches, score = [], None
        if config.int8 == "static" or config.floor is not None:
            recorded = _recorded(directory)
            chosen = recorded["described"] if task is None and recorded else get_task(_task_name(task, recorded))
            length = max_length or recorded.get("max_length", 128)
            batches, score = _export_data(directory, chosen, data, calibration, length, quiet)
        made = write(directory, output, config, calibration=batches, score=score)
    facts = {
        "folder": str(made.folder),
        "difference": made.difference,
        "source_bytes": made.source_bytes,
        "graph_bytes": made.graph_bytes,
        "layers_in_int8": made.quantized,
        "layers_in_float": len(made.in_float),
        "score": made.score,
        "float_score": made.float_score,
    }
    if as_json:
        print(json.dumps(facts, indent=2, allow_nan=False))
        return
    table = Table(title=escape(f"{directory} for {config.format}"), show_header=False)
    for key, value in facts.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.3g}" if isinstance(value, float) else value
        table.add_row(key.replace("_", " "), escape("n/a" if shown is None else shown))
    console().print(table)


def _export_data(
    directory: Path, task: Task, data: str | None, calibration: int, max_length: int, quiet: bool
) -> tuple[list[dict[str, torch.Tensor]], Callable[[Pipeline], float]]:
    """Returns calibration batches and a score, on two parts of the task's training data."""
    from hfcompress.deployment.calibration import calibration_data
    from hfcompress.evaluation.metrics import answered
    from hfcompress.evaluation.metrics import score as measure

    return calibration_data(
        directory,
        task,
        data,
        examples=calibration,
        max_length=max_length,
        measure=lambda name, given: measure([name], answered(name, given), given.references)[name],
        progress=not quiet,
    )


def verify(*, directory: Path, original: str | None, data: str | None, quiet: bool, as_json: bool) -> bool:
    """Measures a result again, shows what holds and what does not, and returns whether nothing fails.

    Raises:
        HFCompressError: The folder holds no checkpoint with a report, or its task's data are not here.
    """
    from dataclasses import asdict

    from hfcompress import verification

    _require_checkpoint(directory)
    with stdout_kept_clean(quiet):
        checks = verification.verify(directory, original=original, data=data, progress=not quiet)
    whole = verification.holds(checks)
    if as_json:
        print(json.dumps({"holds": whole, "checks": [asdict(check) for check in checks]}, indent=2))
        return whole
    table = Table("figure", "", "found", title=escape(str(directory)))
    colours = {"holds": "green", "fails": "bold red", "not checked": "yellow"}
    for check in checks:
        state = f"[{colours[check.state]}]{check.state}[/]"
        table.add_row(escape(check.figure), state, escape(check.said))
    screen = console()
    screen.print(table)
    counted = {state: sum(check.state == state for check in checks) for state in colours}
    screen.print(", ".join(f"{count} {state}" for state, count in counted.items()))
    return whole


def verify_files(*, directory: Path, as_json: bool) -> bool:
    """Checks a checkpoint's files against the digests they were saved with; returns whether all hold.

    Raises:
        HFCompressError: The folder holds no checkpoint.
    """
    from dataclasses import asdict

    from hfcompress.modeling.integrity import verify_files as check

    _require_checkpoint(directory)
    findings = check(directory)
    if as_json:
        print(json.dumps({"holds": not findings, "findings": [asdict(finding) for finding in findings]}, indent=2))
    else:
        for finding in findings:
            print(finding)
        print(f"{directory}: {len(findings) or 'no'} damage found")
    return not findings


def densify(*, directory: Path, output: Path) -> None:
    """Writes a checkpoint's stock twin.

    Raises:
        HFCompressError: The folder holds no checkpoint, or has no counterpart in stock shapes.
    """
    from hfcompress.modeling.densify import densify as write_dense

    _require_checkpoint(directory)
    write_dense(directory, output)
    print(output)


def factorize(
    *, directory: Path, output: Path, settings: Mapping[str, Any], shard_size: str, quiet: bool, as_json: bool
) -> None:
    """Factorises a checkpoint matrix by matrix, and copies the files that go with its weights.

    Raises:
        HFCompressError: The folder holds no stock checkpoint, an option is not right, or `output` holds something.
    """
    from hfcompress.methods.low_rank.config import LowRankConfig
    from hfcompress.methods.low_rank.streaming import stream_factorize

    _require_checkpoint(directory)
    config = LowRankConfig(method="svd", **settings)
    with stdout_kept_clean(quiet):
        found = stream_factorize(directory, output, config, max_shard_size=shard_size, progress=not quiet)
    print(json.dumps(found, indent=2) if as_json else output)


def compare(*, directories: Sequence[Path], output: Path) -> None:
    """Draws several results into one page.

    Raises:
        HFCompressError: A folder holds no report.
    """
    from hfcompress.publishing import page_of_reports, read_report

    names = [directory.resolve().name for directory in directories]
    if len(set(names)) < len(names):
        names = [str(directory) for directory in directories]
    page = page_of_reports([(name, read_report(path)) for name, path in zip(names, directories, strict=True)])
    try:
        output.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError("the command", (Problem(("--output",), f"{output}: {error.strerror}"),)) from None
    print(output)


def card(*, directory: Path) -> None:
    """Writes the model card, its picture and the page of a checkpoint again.

    Raises:
        HFCompressError: The folder holds no checkpoint or no report.
    """
    _require_checkpoint(directory)
    from hfcompress.publishing import write_documents

    print(write_documents(directory))


def push(*, directory: Path, target: Mapping[str, Any]) -> None:
    """Uploads a checkpoint.

    Raises:
        HFCompressError: The folder must not be uploaded as it stands, or the Hub refuses it.
    """
    from hfcompress.publishing.hub import push as upload
    from hfcompress.recipe import PushConfig

    checked = PushConfig(**target)
    _require_checkpoint(directory)
    with stdout_kept_clean(quiet=False):
        url = upload(directory, checked.repo, **checked.options())
    print(url)


def methods(*, as_json: bool) -> None:
    """Lists the methods with the fields of their configs."""
    from hfcompress.methods.registry import methods as registered
    from hfcompress.methods.training import TrainingConfig
    from hfcompress.recipe.fields import describe_fields

    found: dict[str, dict[str, Any]] = {}
    for name, method in registered().items():
        found[name] = {
            "summary": method.summary,
            "works": [way for way, does in (("at once", method.apply), ("in training", method.part)) if does],
            "quantizes": method.quantizes,
            "fields": describe_fields(method.config),
        }
    training = {"summary": "how a step trains", "works": [], "quantizes": False}
    found["training"] = training | {"fields": describe_fields(TrainingConfig)}
    if as_json:
        print(json.dumps(found, indent=2, allow_nan=False))
        return
    screen = console()
    for name, facts in found.items():
        ways = f" [dim]({', '.join(facts['works'])})[/dim]" if facts["works"] else ""
        screen.print(f"\n[bold]{escape(name)}[/bold]: {escape(facts['summary'])}{ways}")
        screen.print(fields_table(facts["fields"]))


def _require_checkpoint(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such folder", hint="Give the folder that a run has written.")
    if not (directory / "config.json").is_file():
        message = f"{directory}: holds no config.json, so it is no checkpoint"
        raise CheckpointError(message, hint="Give the folder that a run has written, such as runs/quickstart.")


def _recorded(directory: Path) -> dict[str, Any]:
    """Returns the task and the length that the folder's report was measured with."""
    from hfcompress.evaluation.report import Report
    from hfcompress.tasks import task_of

    file = directory / REPORT_FILE
    if not file.is_file():
        return {}
    report = Report.from_json(file.read_text(encoding="utf-8"))
    length = report.recipe.get("max_length")
    described = task_of(report.task, report.recipe)
    return {"task": report.task, "described": described} | ({"max_length": length} if isinstance(length, int) else {})


def _task_name(task: str | None, recorded: Mapping[str, Any]) -> str:
    name = task or recorded.get("task")
    if name is None:
        problem = Problem(("--task",), "is required, because the folder holds no report that names one")
        raise ConfigError("the command", (problem,))
    return name
