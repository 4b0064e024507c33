"""Every way to run a model in fewer bits, side by side: PyTorch, ONNX Runtime, OpenVINO, and each engine by hand.

    bash scripts/beside.sh torchao --version; export PYTHONPATH=.venv/beside/torchao  # torchao, beside the engines
    bash scripts/environment_export.sh -m scripts.studies.engines make              # exports and compresses
    bash scripts/environment_export.sh -m scripts.studies.engines judge WIKITEXT    # quality
    bash scripts/environment_export.sh -m scripts.studies.engines measure           # time and memory; 40 quiet minutes
    bash scripts/environment_export.sh -m scripts.studies.engines_page              # docs/engines.md and its picture

WIKITEXT is a folder with `wiki.test.raw`, of which a prefix is read once. The classifiers are those of
`scripts.studies.material`; each is calibrated on its training rows and judged on validation, once.
Everything that is there is not made or measured again; checkpoints that are not there are left out; `measure --quick`
times one small model a little, into a file of its own.

All forms of a model are timed by turns, in a new order each turn, on the same random ids without padding, with two
threads. Opening and peak memory are those of a process with that form alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.studies.engine_forms import CASES, FORM, TIMED, Form, forms_of, made_forms, open_as, place_of, source_of
from scripts.studies.engine_process import THREADS, Arrays, Run, needed, open_form, random_inputs
from scripts.studies.material import ROOT, glue_folder, results_file

RESULTS = results_file("engines.json")
SHAPES = tuple((rows, tokens) for tokens in (16, 128) for rows in (1, 8, 32))
_CALIBRATION_ROWS = 256
_TEXT_BYTES, _BLOCK = 24_000, 128
_LEAST_TURNS, _MOST_TURNS = 3, 40


def opened(case: str, form: Form) -> Run:
    """Opens a form for timing."""
    return open_form(place_of(case, form), open_as(case, form))


class Results:
    """Rows by key, written after each, so that nothing is measured twice."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.rows: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def add(self, key: str, value: Any) -> None:
        """Writes a row, whole or not at all, beside what another process may have written meanwhile."""
        if self.file.is_file():
            self.rows = json.loads(self.file.read_text(encoding="utf-8"))
        self.rows[key] = value
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(self.file)


# Forms and what they are worth


def make(case: str, form: Form, batches: Sequence[Any]) -> None:
    """Makes a form, or nothing where it is there."""
    place = place_of(case, form)
    if place.exists():
        return
    from hfcompress.deployment import ExportConfig, export

    place.parent.mkdir(parents=True, exist_ok=True)
    if form.how == "export":
        export(source_of(case), place, ExportConfig(**form.values), calibration=batches)
        return
    scratch = place.with_name(f".{place.name}.partial")
    shutil.rmtree(scratch, ignore_errors=True)
    if form.how == "compress":
        _save_compressed(case, form, scratch)
    else:
        from scripts.studies import engines_by_hand

        getattr(engines_by_hand, form.how)(place_of(case, FORM[form.floats]), scratch, batches)
    scratch.replace(place)


def _save_compressed(case: str, form: Form, place: Path) -> None:
    import transformers

    from hfcompress import QuantizationConfig, compress

    auto = getattr(transformers, open_as(case, form).partition(":")[2])
    model = auto.from_pretrained(source_of(case)).eval()
    compress(model, [QuantizationConfig(**form.values)]).save_pretrained(place)
    transformers.AutoTokenizer.from_pretrained(source_of(case)).save_pretrained(place)


def weight_files(place: Path) -> int:
    """Returns the bytes of weights, with the graph where there is one."""
    files = [
        file
        for pattern in ("*.safetensors", "*model.onnx*", "*model.xml", "*model.bin")
        for file in place.glob(pattern)
    ]
    return sum(file.stat().st_size for file in files)


def calibration(case: str) -> list[dict[str, Any]]:
    """Returns batches of training rows to calibrate on; no form of the language model needs any."""
    from hfcompress.deployment.calibration import calibration_data
    from hfcompress.tasks import get_task

    if case == "smollm2":
        return []
    task = case.rpartition("-")[2]
    how: Any = {"examples": _CALIBRATION_ROWS, "max_length": 128, "measure": lambda name, given: 0.0}
    return calibration_data(source_of(case), get_task(task), str(glue_folder()), **how, progress=False)[0]


def examples(case: str, wikitext: Path) -> tuple[Any, Any, Any]:
    """Returns the kind, the encoded rows and the processor that a case is judged by."""
    from hfcompress.tasks import TaskConfig, get_task, kind_of, load_data, preprocess

    if case == "smollm2":
        from datasets import Dataset

        task = TaskConfig(kind="causal_lm", data="./wikitext").task()
        text = (wikitext / "wiki.test.raw").read_text(encoding="utf-8")[:_TEXT_BYTES]
        rows, length = Dataset.from_dict({"text": [text]}), _BLOCK
    else:
        task = get_task(case.rpartition("-")[2])
        rows, length = load_data(task, str(glue_folder()), progress=False)[task.evaluation_split], 128
    kind = kind_of(task)
    processor = kind.load_processor(source_of(case))
    config = json.loads((source_of(case) / "config.json").read_text(encoding="utf-8"))
    label2id = config["label2id"] if task.labels else None
    return task, preprocess(rows, task, processor, max_length=length, label2id=label2id), processor


def quality(case: str, form: Form, judged: tuple[Any, Any, Any]) -> dict[str, float]:
    """Returns the task's metrics of a form, on rows that are read once."""
    from types import SimpleNamespace

    import torch

    from hfcompress.evaluation.metrics import score
    from hfcompress.tasks import align_labels, kind_of

    task, rows, processor = judged
    kind, run = kind_of(task), opened(case, form)
    collate, kept = kind.collator(processor), []
    config = json.loads((source_of(case) / "config.json").read_text(encoding="utf-8"))
    for start in range(0, len(rows), 8):
        columns = rows[start : start + 8]
        part = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        batch = collate(part)
        inputs = {
            name: batch[name].numpy() for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch
        }
        found = run(needed(source_of(case), inputs))
        kept += kind.read(SimpleNamespace(**{key: torch.from_numpy(value) for key, value in found.items()}), batch)
    given = kind.answers(task, align_labels(task, config["label2id"] if task.labels else None), rows, kept)
    return score(task.metrics, given.predictions, given.references)


def make_all(results: Results, cases: Sequence[str]) -> None:
    """Makes what is not there yet."""
    for case in cases:
        left = [form for form in forms_of(case) if not place_of(case, form).exists()]
        batches = calibration(case) if left else []
        for form in left:
            start = time.perf_counter()
            make(case, form, batches)
            gc.collect()
            print(f"{case}: {form.name}: made in {time.perf_counter() - start:.0f} s", flush=True)
        for form in made_forms(case):
            found = weight_files(place_of(case, form))
            results.add(f"{case}|{form.name}|bytes", found >> (form.open_as == "torch-bf16"))


def judge_all(results: Results, cases: Sequence[str], wikitext: Path) -> None:
    """Judges what is not judged yet."""
    for case in cases:
        left = [form for form in made_forms(case) if f"{case}|{form.name}|quality" not in results.rows]
        judged = examples(case, wikitext) if left else None
        for form in left:
            found = quality(case, form, judged)  # type: ignore[arg-type]
            results.add(f"{case}|{form.name}|quality", found)
            gc.collect()
            print(f"{case}: {form.name}: {found}", flush=True)


# Time and memory


def measure_alone(results: Results, case: str) -> None:
    """Measures opening and memory, three processes a form; the medians."""
    for form in made_forms(case):
        key = f"{case}|{form.name}|alone"
        if key in results.rows:
            continue
        command = [sys.executable, "-m", "scripts.studies.engine_process"]
        command += [str(place_of(case, form)), open_as(case, form)]
        rows = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
            for _ in range(1 if case == "smollm2" else 2)
        ]
        results.add(key, {name: min(row[name] for row in rows) for name in rows[0]})
        print(f"{case}: {form.name}: {results.rows[key]}", flush=True)


def measure_speed(results: Results, case: str, shapes: Sequence[tuple[int, int]], seconds: float) -> None:
    """Times all forms by turns, shape by shape."""
    forms = made_forms(case)
    # Forms of one row were timed together: with another form there, all are timed again.
    names = {form.name for form in forms}
    left = [shape for shape in shapes if set(results.rows.get(f"{case}|{shape[0]}x{shape[1]}|seconds", ())) != names]
    if not left:
        return
    runs = {form.name: opened(case, form) for form in forms}
    vocabulary = json.loads((source_of(case) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    for rows, tokens in left:
        inputs = needed(source_of(case), random_inputs(rows, tokens, vocabulary))
        times: dict[str, list[float]] = {name: [] for name in runs}
        for turn in _turns(runs, inputs, seconds):
            for name, spent in turn.items():
                times[name].append(round(spent, 6))
        results.add(f"{case}|{rows}x{tokens}|seconds", times)
        medians = {name: round(1000 * float(np.median(values)), 1) for name, values in times.items()}
        print(f"{case} {rows}x{tokens}, {len(next(iter(times.values())))} turns, ms: {medians}", flush=True)


def _turns(runs: dict[str, Run], inputs: Arrays, seconds: float) -> Iterator[dict[str, float]]:
    """Yields the seconds of each form, turn by turn; a first turn is for warming up."""
    order = random.Random(0)
    end = time.perf_counter() + seconds
    for turn in range(_MOST_TURNS + 1):
        if turn > _LEAST_TURNS and time.perf_counter() > end:
            return
        names, spent = list(runs), {}
        order.shuffle(names)
        for name in names:
            start = time.perf_counter()
            runs[name](inputs)
            spent[name] = time.perf_counter() - start
        if turn:
            yield spent


def _with_two_threads() -> None:
    """Starts again with what the engines read from the environment when they are loaded."""
    wanted = {"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        arguments = [sys.executable, "-m", "scripts.studies.engines", *sys.argv[1:]]
        os.execve(sys.executable, arguments, os.environ | wanted)


def main() -> None:
    """Makes, judges or measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = commands.add_parser("make", help="make the forms")
    judged = commands.add_parser("judge", help="measure their quality")
    judged.add_argument("wikitext", type=Path)
    measured = commands.add_parser("measure", help="time them, on a quiet machine")
    measured.add_argument("--quick", action="store_true", help="the smallest model, one shape, into another file")
    measured.add_argument(
        "--seconds", type=float, default=30, help="for each shape of each model, if 3 turns take less"
    )
    for each in (made, judged, measured):
        each.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    options = parser.parse_args()
    quick = getattr(options, "quick", False)
    results = Results(RESULTS.with_name("engines-quick.json") if quick else RESULTS)
    cases = [case for case in options.cases if (source_of(case) / "config.json").is_file()]
    for case in set(options.cases) - set(cases):
        print(f"{case}: {source_of(case)} is not there yet", flush=True)
    if options.command == "make":
        make_all(results, cases)
    elif options.command == "judge":
        judge_all(results, cases, options.wikitext)
    else:
        _with_two_threads()
        cases = [case for case in (cases[:1] if quick else cases) if case in TIMED]
        for case in cases:
            measure_speed(results, case, SHAPES[:1] if quick else SHAPES, 3 if quick else options.seconds)
        for case in cases:
            measure_alone(results, case)


if __name__ == "__main__":
    main()
