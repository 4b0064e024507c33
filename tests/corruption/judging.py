"""Loads what was damaged, each in a process of its own, and says what came of it."""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import select
import shutil
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from hfcompress.errors import HFCompressError
from hfcompress.modeling.integrity import verify_files
from tests.corruption.mutations import CLASSES
from tests.corruption.originals import Original, load, logits_of
from tests.forking import fork

MOST_SECONDS = 5.0
MOST_MEMORY = 1.5


@dataclass(frozen=True)
class Verdict:
    """What became of one mutation: `error`, `named`, `harmless`, or what must not be."""

    outcome: str
    detail: str
    seconds: float
    megabytes: float

    @property
    def caught(self) -> bool:
        """Whether it was an error or was named."""
        return self.outcome in ("error", "named")


_OWN = (HFCompressError, SafetensorError)
_STOCK_ERRORS = (OSError, ValueError, RuntimeError)


def _is_clean(error: BaseException) -> bool:
    if isinstance(error, _OWN):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if any(frame.name == "get_checkpoint_shard_files" for frame in frames):
        return True  # transformers reads the index before any hook of ours; `verify_files` names what is wrong in it
    packages = {part for frame in frames[-3:] for part in Path(frame.filename).parts}
    stock = bool(packages & {"transformers", "huggingface_hub", "safetensors"})
    strict = type(error).__name__.startswith("StrictDataclass")  # transformers' configs check themselves by these
    return (stock and isinstance(error, _STOCK_ERRORS) and not isinstance(error, RecursionError)) or strict


def _memory(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise AssertionError(field)


def _judge_here(folder: Path, logits: torch.Tensor) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, began = _memory("VmRSS"), time.process_time()
    outcome, detail = "SILENT", ""
    try:
        model = load(folder)
    except Exception as error:
        outcome = "error" if _is_clean(error) else "UNCLEAN"
        detail = f"{type(error).__name__}: {str(error)[:300]}"
    seconds, megabytes = time.process_time() - began, _memory("VmHWM") - before
    if outcome == "SILENT":
        findings = verify_files(folder)
        if findings:
            outcome, detail = "named", str(findings[0])
        elif torch.equal(logits_of(model), logits):
            outcome = "harmless"
    return {"outcome": outcome, "detail": detail, "seconds": seconds, "megabytes": megabytes}


def judge(folder: Path, original: Original) -> Verdict:
    """Loads a checkpoint in a process of its own and says what came of it."""
    gc.collect()
    gc.freeze()  # a collection in the child would copy every page
    reading, writing = os.pipe()

    def tell() -> None:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (int(2 * MOST_SECONDS), int(2 * MOST_SECONDS) + 1))
        try:
            said = _judge_here(folder, original.logits)
        except BaseException as error:  # whatever it is, the judge must hear of it
            said = {"outcome": "UNCLEAN", "detail": repr(error), "seconds": 0.0, "megabytes": 0.0}
        os.write(writing, json.dumps(said).encode())

    process = fork(tell)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], 60)
    text = os.read(reading, 1 << 16) if ready else b""
    os.close(reading)
    if not text:
        os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    if not text:
        return Verdict("HANG", "no answer", 60.0, 0.0)
    verdict = Verdict(**json.loads(text))
    if verdict.seconds > MOST_SECONDS:
        return Verdict("HANG", verdict.detail, verdict.seconds, verdict.megabytes)
    if original.megabytes and verdict.megabytes > MOST_MEMORY * original.megabytes:
        return Verdict("MEMORY", verdict.detail, verdict.seconds, verdict.megabytes)
    return verdict


def measure_controls(originals: dict[str, Original]) -> dict[str, Original]:
    """Judges the undamaged checkpoints: each must load as it is, and its memory is the measure of the others."""
    measured: dict[str, Original] = {}
    for name, original in originals.items():
        verdicts = [judge(original.folder, original) for _ in range(3)]
        for verdict in verdicts:
            if verdict.outcome != "harmless":
                raise AssertionError(f"the undamaged {name} does not load as saved: {verdict}")
        megabytes = max(verdict.megabytes for verdict in verdicts)
        measured[name] = Original(original.folder, original.other, original.logits, megabytes)
    return measured


def run_class(
    name: str, count: int, seed: int, originals: dict[str, Original], place: Path
) -> list[tuple[str, Verdict]]:
    """Makes and judges `count` mutations of a class; returns what each did, and its verdict."""
    mutate, of = CLASSES[name]
    fitting = [key for key in sorted(originals) if of == "any" or of in key]
    judged: list[tuple[str, Verdict]] = []
    for number in range(count):
        rng = random.Random(f"{name}/{seed}/{number}")
        key = fitting[number % len(fitting)]
        folder = place / "mutated"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(originals[key].folder, folder)
        said = mutate(folder, originals[key], rng)
        judged.append((f"{key}: {said}", judge(folder, originals[key])))
    return judged


def quiet() -> None:
    """One thread, so that forks are safe and memory counts; no bars and tables of what is expected."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
