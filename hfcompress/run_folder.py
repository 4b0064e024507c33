"""The folders of a run: who may use them, what is recorded as done, and for which inputs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.errors import RunFolderError
from hfcompress.evaluation.answer_book import AnswerBook
from hfcompress.methods.resuming import digest
from hfcompress.modeling.checkpoint import replace_directory

if TYPE_CHECKING:
    from datasets import Dataset

    from hfcompress.evaluation.comparison import Answers
    from hfcompress.evaluation.report import Report

REPORT = "report.json"
PREDICTIONS = "predictions.json"
RECORD = "step.json"
ANSWERS = "answers.json"
COSTS = "costs.json"
GRID = "grid.json"
ROBUSTNESS = "robustness.json"
LAYERS = "layers.json"
EXPLANATIONS = "explanations.json"
ATTACK = "attack.json"


@dataclass(frozen=True)
class Done:
    """A model of a run that is saved and measured: the original, or what a step made."""

    name: str
    methods: tuple[str, ...]
    checkpoint: Path
    folder: Path
    key: str
    record: dict[str, Any]


def refuse_foreign(output: Path) -> None:
    """Leaves alone a folder that no run wrote.

    Raises:
        RunFolderError: It holds something, and no report.
    """
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / REPORT).is_file())):
        raise RunFolderError(
            f"{output} holds something that no run wrote",
            hint="Choose another folder with --output, or empty it.",
        )


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Holds a run's working folder for one run.

    Raises:
        RunFolderError: Another run holds it.
    """
    from filelock import FileLock, Timeout

    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / ".lock", timeout=0):
            yield
    except Timeout:
        raise RunFolderError(
            f"another run is using {work}", hint="Wait for it, or choose another folder with --output."
        ) from None


def prepare(folder: Path, key: str) -> None:
    """Makes a step's folder; what a run of the same inputs left there is kept, all else goes."""
    intended = folder / "intended.json"
    if read_json(intended) != {"key": key}:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(intended, {"key": key})


def read_record(folder: Path, key: str, *, checkpoint: Path | None = None) -> dict[str, Any] | None:
    """Returns a step's record where the step was done for these inputs and its files are as they were."""
    record = read_json(folder / RECORD)
    if not record or record.get("key") != key:
        return None
    checkpoint = checkpoint or folder / "checkpoint"
    whole = all(
        (checkpoint / name).is_file() and digest(checkpoint / name) == expected
        for name, expected in record["files"].items()
    )
    return record if whole else None


def publish(
    checkpoint: Path, report: Report, answers: Sequence[Sequence[Answers]], output: Path, **trials: Any
) -> None:
    """Makes the result's folder beside its place and moves it there whole.

    Args:
        checkpoint: What is published.
        report: What was measured.
        answers: Those of every seed.
        output: The folder.
        trials: What else `AnswerBook.of_run` keeps.
    """
    from hfcompress.publishing import write_documents

    scratch = output.with_name(f".{output.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(checkpoint, scratch, copy_function=_link_or_copy)
    try:
        report.save(scratch / REPORT)
        book = AnswerBook.of_run(report, answers, **trials)
        (scratch / PREDICTIONS).write_text(book.to_json(), encoding="utf-8")
        write_documents(scratch, report)
        replace_directory(scratch, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _link_or_copy(source: str, target: str) -> str:
    """Weights are never changed in place, so the result may share them with the step that made them.

    Shards are copied: a linked shard could lie anywhere, and loading refuses it. So is what people edit by hand: the
    step must stay as it was.
    """
    if "-of-" in Path(source).name or Path(source).suffix != ".safetensors":
        shutil.copy2(source, target)
        return target
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def key_of(*parts: Any) -> str:
    """Returns a digest of JSON values: what a step's result depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint(checkpoint: Path) -> dict[str, str]:
    """Returns the digest of every file that makes a checkpoint what it is."""
    kinds: tuple[str, ...] = ("*.safetensors", "*.json", "*.txt", "*.model")
    return {file.name: digest(file) for kind in kinds for file in sorted(checkpoint.glob(kind))}


def rows_digest(rows: Dataset) -> str:
    """Returns a digest of an encoded split, row by row; rows hold numbers, texts and, of images, bytes."""
    hasher = hashlib.sha256()
    for start in range(0, len(rows), 1000):
        hasher.update(json.dumps(rows[start : start + 1000], sort_keys=True, default=bytes.hex).encode())
    return hasher.hexdigest()


def read_json(file: Path) -> Any:
    """Returns what a file of ours holds, or None where it is missing or was cut off."""
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def write_json(file: Path, value: Any) -> None:
    """Writes a file whole or not at all."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(json.dumps(value, indent=2))
    os.replace(partial, file)
