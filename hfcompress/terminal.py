"""What the commands show: results on stdout; progress and logs on stderr, so that `--json` can be piped."""

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

if TYPE_CHECKING:
    from hfcompress.configuration import Config
    from hfcompress.evaluation.report import Report
    from hfcompress.recipe import Recipe

REPORT_FILE = "report.json"


def console() -> Console:
    """A console of 100 columns where nobody says how wide it is (a pipe, a log file)."""
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(highlight=False, width=None if known else 100)


def fields_table(fields: Sequence[Mapping[str, Any]]) -> Table:
    """Returns a config's fields as a table."""
    table = Table(box=None, padding=(0, 1))
    table.add_column("field", no_wrap=True)
    for heading in ("type", "default", "allowed", "meaning"):
        table.add_column(heading)
    for entry in fields:
        default = "required" if entry["required"] else json.dumps(entry["default"])
        cells = (entry["name"], entry["type"], default, entry["allowed"], entry["description"])
        table.add_row(*(escape(cell) for cell in cells))
    return table


def show_plan(recipe: Recipe, folder: Path, as_json: bool) -> None:
    """Shows what a recipe would do."""
    from hfcompress.methods.registry import method_of

    if as_json:
        print(json.dumps(recipe.to_dict(), indent=2, allow_nan=False))
        return
    table = Table("step", "how", "what differs from the defaults")
    seeds = f", with seeds {', '.join(map(str, recipe.seeds))}" if recipe.seeds else ""
    table.title = escape(f"{recipe.name}: {recipe.model} on {recipe.described_task.name}{seeds}")
    for step in recipe.steps:
        parts: dict[str, Config] = {method_of(config).name: config for config in step.methods}
        how = "at once"
        if step.training is not None:
            parts["training"], how = step.training, "in training"
        chosen = {name: part.model_dump(mode="json", exclude_defaults=True) for name, part in parts.items()}
        lines = [f"{name}: {json.dumps(fields)}" for name, fields in chosen.items()]
        table.add_row(escape(step.name), how, escape("\n".join(lines)))
    screen = console()
    screen.print(table)
    screen.print(escape(f"output: {folder}"), soft_wrap=True)


def show_result(report: Report, folder: Path) -> None:
    """Shows what a run came to, and where it lies."""
    from hfcompress.tasks import kind_of, task_of

    screen = console()
    screen.print(report.table())
    screen.print(escape(f"checkpoint: {folder}"), soft_wrap=True)
    screen.print(escape(f"card:       {folder / 'README.md'}"), soft_wrap=True)
    screen.print(escape(f"page:       {folder / 'report.html'}"), soft_wrap=True)
    screen.print(escape(f"report:     {folder / REPORT_FILE}"), soft_wrap=True)
    print("\nimport hfcompress")
    auto = kind_of(task_of(report.task, report.recipe)).auto_class
    print(f"from transformers import {auto}")
    print(f"model = {auto}.from_pretrained({str(folder)!r})")


def show_progress(quiet: bool) -> None:
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
def stdout_kept_clean(quiet: bool) -> Iterator[None]:
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
