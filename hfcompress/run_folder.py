"""The folders of a run: who may use them, what is recorded as done, and for which inputs."""

from __future__ import annotations

import hashlib
import json
import logging
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

logger = logging.getLogger(__name__)

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
    """Leaves alone a folder that no run wrote, and a card that somebody else did.

    Raises:
        RunFolderError: It holds something, and no report; or its card would have to be replaced.
    """
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / REPORT).is_file())):
        raise RunFolderError(
            f"{output} holds something that no run wrote",
            hint="Choose another folder with --output, or empty it.",
        )
    from hfcompress.publishing.contents import CARD, added_by_people

    if output.exists() and CARD in added_by_people(output):
        raise RunFolderError(
            f"{output / CARD} was not written by hfcompress, and the card of this run would replace it",
            hint="Move it away, or choose another folder with --output.",
        )


def say_what_goes(output: Path, recipe: dict[str, Any]) -> None:
    """Warns where a result of other settings will be replaced.

    Args:
        output: The result's folder.
        recipe: The recipe as a report would hold it.
    """
    report = read_json(output / REPORT)
    there, recipe = report and report.get("recipe"), json.loads(json.dumps(recipe))
    if there and there != recipe:
        fields = [name for name in {**there, **recipe} if there.get(name) != recipe.get(name)]
        logger.warning(
            "%s holds a result of another recipe (%s differ); it is replaced when this run is done. "
            "--output keeps both",
            output,
            ", ".join(fields),
        )


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Holds a run's working folder for one run.

    Raises:
        RunFolderError: Another run holds it, or it cannot be made.
    """
    from filelock import FileLock, Timeout

    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"{work} cannot be made: {error.strerror}", hint="Choose another folder with --output."
        ) from None
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

    Raises:
        RunFolderError: Somebody has put something there since the run began.
    """
    from hfcompress.publishing import write_documents

    refuse_foreign(output)  # a card may have been written since the run began
    scratch = output.with_name(f".{output.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(checkpoint, scratch, copy_function=_link_or_copy)
    try:
        report.save(scratch / REPORT)
        book = AnswerBook.of_run(report, answers, **trials)
        (scratch / PREDICTIONS).write_text(book.to_json(), encoding="utf-8")
        write_documents(scratch, report)
        _carry_over(output, scratch)
        replace_directory(scratch, output)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _carry_over(old: Path, new: Path) -> None:
    """Takes along what people have added to a result, such as a licence or an export."""
    from hfcompress.publishing.contents import added_by_people

    for name in added_by_people(old) if old.is_dir() else ():
        there = new / name
        there.parent.mkdir(exist_ok=True)
        if (old / name).is_dir() and not (old / name).is_symlink():
            shutil.copytree(old / name, there, symlinks=True, copy_function=_link_or_copy)
        else:
            shutil.copy2(old / name, there, follow_symlinks=False)


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
