"""What the commands do once their arguments are parsed: call the package and show what it returns.

Results go to stdout; progress, logs and hints go to stderr, so that `--json` can be piped.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hfcompress.errors import CheckpointError, ConfigError, Problem

if TYPE_CHECKING:
    from hfcompress.configuration import Config
    from hfcompress.evaluation.report import Report
    from hfcompress.recipe import Recipe

REPORT_FILE = "report.json"


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
        _show_plan(loaded, folder, as_json)
        return
    from hfcompress import pipeline

    _show_progress(quiet)
    with _stdout_kept_clean(quiet):
        report = pipeline.run(loaded, folder, quiet)
    if as_json:
        print(report.to_json())
        return
    _show_result(report, folder)


def evaluate(
    *,
    directory: Path,
    task: str | None,
    data: str | None,
    batch_size: int,
    max_length: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Measures a checkpoint's quality; what is not given is taken from the folder's report.

    Raises:
        HFCompressError: The folder holds no checkpoint, or the task and its data do not fit it.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from hfcompress.evaluation.quality import evaluate_quality
    from hfcompress.tasks import get_task, load_data, preprocess

    _require_checkpoint(directory)
    recorded = _recorded(directory)
    if (name := task or recorded.get("task")) is None:
        problem = Problem(("--task",), "is required, because the folder holds no report that names one")
        raise ConfigError("the command", (problem,))
    chosen = get_task(name)
    length = max_length or recorded.get("max_length", 128)
    with _stdout_kept_clean(quiet):
        model = AutoModelForSequenceClassification.from_pretrained(directory)
        tokenizer = AutoTokenizer.from_pretrained(directory)
        split = load_data(chosen, data, progress=not quiet)[chosen.evaluation_split]
        label2id = model.config.label2id if chosen.labels else None
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
    _console().print(table)


def card(*, directory: Path) -> None:
    """Writes the model card of a checkpoint again.

    Raises:
        HFCompressError: The folder holds no checkpoint or no report.
    """
    _require_checkpoint(directory)
    from hfcompress.publishing.model_card import write_card

    print(write_card(directory))


def push(*, directory: Path, repository: str, private: bool) -> None:
    """Uploads a checkpoint.

    Raises:
        HFCompressError: The folder must not be uploaded as it stands, or the Hub refuses it.
    """
    from hfcompress.publishing.hub import push as upload
    from hfcompress.recipe import PushConfig

    target = PushConfig(repo=repository, private=private)
    _require_checkpoint(directory)
    with _stdout_kept_clean(quiet=False):
        url = upload(directory, target.repo, private=target.private)
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
    console = _console()
    for name, facts in found.items():
        ways = f" [dim]({', '.join(facts['works'])})[/dim]" if facts["works"] else ""
        console.print(f"\n[bold]{escape(name)}[/bold]: {escape(facts['summary'])}{ways}")
        console.print(_fields_table(facts["fields"]))


def _fields_table(fields: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, padding=(0, 1))
    table.add_column("field", no_wrap=True)
    for heading in ("type", "default", "allowed", "meaning"):
        table.add_column(heading)
    for entry in fields:
        default = "required" if entry["required"] else json.dumps(entry["default"])
        cells = (entry["name"], entry["type"], default, entry["allowed"], entry["description"])
        table.add_row(*(escape(cell) for cell in cells))
    return table


def _show_plan(recipe: Recipe, folder: Path, as_json: bool) -> None:
    from hfcompress.methods.registry import method_of

    if as_json:
        print(json.dumps(recipe.to_dict(), indent=2, allow_nan=False))
        return
    table = Table("step", "how", "what differs from the defaults")
    table.title = escape(f"{recipe.name}: {recipe.model} on {recipe.task}")
    for step in recipe.steps:
        parts: dict[str, Config] = {method_of(config).name: config for config in step.methods}
        how = "at once"
        if step.training is not None:
            parts["training"], how = step.training, "in training"
        chosen = {name: part.model_dump(mode="json", exclude_defaults=True) for name, part in parts.items()}
        lines = [f"{name}: {json.dumps(fields)}" for name, fields in chosen.items()]
        table.add_row(escape(step.name), how, escape("\n".join(lines)))
    console = _console()
    console.print(table)
    console.print(escape(f"output: {folder}"), soft_wrap=True)


def _show_result(report: Report, folder: Path) -> None:
    console = _console()
    console.print(report.table())
    console.print(escape(f"checkpoint: {folder}"), soft_wrap=True)
    console.print(escape(f"card:       {folder / 'README.md'}"), soft_wrap=True)
    console.print(escape(f"report:     {folder / REPORT_FILE}"), soft_wrap=True)
    print("\nimport hfcompress")
    print("from transformers import AutoModelForSequenceClassification")
    print(f"model = AutoModelForSequenceClassification.from_pretrained({str(folder)!r})")


def _console() -> Console:
    """A console of 100 columns where nobody says how wide it is (a pipe, a log file)."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if known else 100)


def _require_checkpoint(directory: Path) -> None:
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such folder", hint="Give the folder that a run has written.")
    if not (directory / "config.json").is_file():
        message = f"{directory}: holds no config.json, so it is no checkpoint"
        raise CheckpointError(message, hint="Give the folder that a run has written, such as runs/quickstart.")


def _recorded(directory: Path) -> dict[str, Any]:
    """Returns the task and the length that the folder's report was measured with."""
    from hfcompress.evaluation.report import Report

    file = directory / REPORT_FILE
    if not file.is_file():
        return {}
    report = Report.from_json(file.read_text(encoding="utf-8"))
    length = report.recipe.get("max_length")
    return {"task": report.task} | ({"max_length": length} if isinstance(length, int) else {})


def _show_progress(quiet: bool) -> None:
    """Shows what the package says of its steps on stderr."""
    from rich.logging import RichHandler

    ours = logging.getLogger("hfcompress")
    ours.setLevel(logging.ERROR if quiet else logging.INFO)
    if not ours.handlers:
        console = Console(stderr=True)
        ours.addHandler(RichHandler(console=console, show_level=False, show_path=False, log_time_format="%X"))
        ours.propagate = False
    # It says on import that an optional package for another kernel is not there.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


@contextlib.contextmanager
def _stdout_kept_clean(quiet: bool) -> Iterator[None]:
    """Sends what libraries print (Trainer prints its logs) to stderr, or with `quiet` nowhere."""
    if quiet:
        import datasets
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        datasets.disable_progress_bars()
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            yield
    else:
        with contextlib.redirect_stdout(sys.stderr):
            yield
