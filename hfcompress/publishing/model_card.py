"""Writes the card of a compressed model into its folder, with the results that the Hub reads beside it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from hfcompress.errors import CheckpointError, RunFolderError
from hfcompress.evaluation.report import License, Report
from hfcompress.publishing.card_text import MARK, card_of_report
from hfcompress.publishing.metadata import eval_results, find_license
from hfcompress.publishing.pictures import PICTURES

__all__ = ["card_of_report", "card_texts", "quant_method", "read_config", "read_report", "write_card"]

REPORT = "report.json"
_RESULTS_MARK = f"# {MARK}"


def write_card(directory: Path, report: Report | None = None, *, overwrite: bool = False) -> Path:
    """Writes README.md, and the results that the Hub reads, into a checkpoint folder.

    Args:
        directory: A checkpoint folder.
        report: The run's measurements; by default those in the folder's report.json.
        overwrite: Replace files that hfcompress did not write, too.

    Returns:
        The card's path.

    Raises:
        CheckpointError: The folder has no readable config.json or report.json.
        DataError: The report names a task that is not known.
        RunFolderError: There is a card that somebody else wrote.
    """
    directory = Path(directory)
    config = read_config(directory)
    if report is None:
        report = read_report(directory)
    card = directory / "README.md"
    texts = card_texts(directory, report, quant_method(config), find_license(report))
    if not overwrite:
        for path in texts:
            _refuse_foreign(path)
    for path, content in texts.items():
        path.parent.mkdir(exist_ok=True)
        _write(path, content)
    return card


def card_texts(directory: Path, report: Report, quant_method: str | None, license: License | None) -> dict[Path, str]:
    """Returns what `write_card` writes: the text of each file."""
    pictures = [name for name in PICTURES if (directory / name).is_file()]
    card = card_of_report(report, quant_method=quant_method, license=license, pictures=pictures)
    texts = {directory / "README.md": card}
    if results := eval_results(report):
        texts[directory / results[0]] = f"{_RESULTS_MARK}\n{results[1]}"
    return texts


def quant_method(config: dict[str, Any]) -> str | None:
    """Returns what a config's `quantization_config` names, on which it depends what loading needs."""
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return method if isinstance(method, str) else None


def read_config(directory: Path) -> dict[str, Any]:
    """Reads a checkpoint folder's config.json.

    Raises:
        CheckpointError: There is none, or it is no JSON object.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", hint="give a checkpoint folder") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return config


def read_report(directory: Path) -> Report:
    """Reads a checkpoint folder's report.

    Raises:
        CheckpointError: There is none, or it is not valid.
    """
    path = directory / REPORT
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        hint = "`hfcompress run` writes it: a card is written from measurements only"
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", hint=hint) from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8") from error
    return Report.from_json(text)


def _refuse_foreign(path: Path) -> None:
    if path.exists() and MARK.encode() not in path.read_bytes():
        raise RunFolderError(
            f"{path} was not written by hfcompress",
            hint="move it away, or call write_card with overwrite=True",
        )


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with scratch.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
