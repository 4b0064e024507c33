"""Times a checkpoint in PyTorch and in its exports, by turns, and prints a table.

    bash scripts/environment_export.sh scripts/benchmark_export.py CHECKPOINT --exports FOLDER --task demo/movie-reviews

The study of several models and of the engines by hand is `scripts/studies/engines.py`.

Exports that are in FOLDER already are used as they are. What is timed is the graph alone, without tokenizing.
Accuracy is that of `--rows` validation rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hfcompress.deployment import ExportConfig, Pipeline, export
from hfcompress.deployment.calibration import calibration_data
from hfcompress.modeling.measure import weight_bytes
from hfcompress.tasks import get_task, load_data

EXPORTS: dict[str, dict[str, Any]] = {
    "onnx": {"format": "onnx"},
    "onnx-dynamic": {"format": "onnx", "int8": "dynamic"},
    "onnx-static": {"format": "onnx", "int8": "static"},
    "openvino": {"format": "openvino"},
    "openvino-dynamic": {"format": "openvino", "int8": "dynamic"},
    "openvino-static": {"format": "openvino", "int8": "static"},
}
Run = Callable[[dict[str, np.ndarray]], np.ndarray]


def arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--exports", type=Path, required=True)
    parser.add_argument("--task", required=True)
    parser.add_argument("--data")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--shapes", default="1x16,1x128,8x128", help="batch x tokens, separated by commas")
    parser.add_argument("--seconds", type=float, default=120, help="for all timing together")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def in_torch(checkpoint: Path, dtype: torch.dtype) -> Run:
    """Returns PyTorch's own forward."""
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint, dtype=dtype).eval()

    def run(inputs: dict[str, np.ndarray]) -> np.ndarray:
        with torch.inference_mode():
            return model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits.float().numpy()

    return run


def runs(options: argparse.Namespace) -> tuple[dict[str, Run], dict[str, int]]:
    """Opens every form of the checkpoint; returns how to run each, and its bytes."""
    found: dict[str, Run] = {
        "torch fp32": in_torch(options.checkpoint, torch.float32),
        "torch bf16": in_torch(options.checkpoint, torch.bfloat16),
    }
    sizes = {"torch fp32": weight_bytes(options.checkpoint), "torch bf16": weight_bytes(options.checkpoint) // 2}
    how: dict[str, Any] = {"examples": 256, "max_length": 64, "measure": lambda name, given: 0.0}
    batches, _ = calibration_data(options.checkpoint, get_task(options.task), options.data, **how, progress=False)
    for name, how in EXPORTS.items():
        folder = options.exports / name
        if not folder.exists():
            export(options.checkpoint, folder, ExportConfig(**how), calibration=batches)
        sizes[name] = sum(file.stat().st_size for file in folder.glob("*model.*"))
        found[name] = Pipeline.from_pretrained(folder, threads=options.threads).run
        if name == "openvino":
            found["openvino bf16"] = Pipeline.from_pretrained(folder, threads=options.threads, precision="bf16").run
            sizes["openvino bf16"] = sizes[name]
    return found, sizes


def timed(forms: dict[str, Run], inputs: dict[str, np.ndarray], seconds: float) -> dict[str, list[float]]:
    """Times all forms by turns until the time is up; at least five turns."""
    for run in forms.values():
        run(inputs)
        run(inputs)
    times: dict[str, list[float]] = {name: [] for name in forms}
    end = time.perf_counter() + seconds
    while len(times["torch fp32"]) < 5 or (time.perf_counter() < end and len(times["torch fp32"]) < 100):
        for name, run in forms.items():
            start = time.perf_counter()
            run(inputs)
            times[name].append(time.perf_counter() - start)
    return times


def accuracy(options: argparse.Namespace, forms: dict[str, Run]) -> dict[str, float]:
    """Returns the share of right answers on validation rows."""
    task = get_task(options.task)
    rows = load_data(task, options.data)[task.evaluation_split]
    rows = rows.select(range(min(len(rows), options.rows)))
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    right = dict.fromkeys(forms, 0)
    for start in range(0, len(rows), 25):
        part = rows[start : start + 25]
        texts = [part[column] for column in task.columns]
        inputs = dict(tokenizer(*texts, padding=True, truncation=True, max_length=128, return_tensors="np"))
        for name, run in forms.items():
            right[name] += int((run(inputs).argmax(-1) == np.array(part[task.label])).sum())
    return {name: count / len(rows) for name, count in right.items()}


def main() -> None:
    """Measures and prints."""
    options = arguments()
    torch.set_num_threads(options.threads)
    forms, sizes = runs(options)
    right = accuracy(options, forms)
    shapes = [tuple(map(int, each.split("x"))) for each in options.shapes.split(",")]
    generator = np.random.default_rng(0)
    measured: dict[str, dict[str, list[float]]] = {}
    for rows, tokens in shapes:
        ids = generator.integers(1000, 20000, (rows, tokens))
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        names = AutoTokenizer.from_pretrained(options.checkpoint).model_input_names
        inputs = {name: value for name, value in inputs.items() if name in names}
        measured[f"{rows}x{tokens}"] = timed(forms, inputs, options.seconds / len(shapes))
    table = Table("form", "MB", "accuracy", *(f"{shape}: ms (speed-up)" for shape in measured))
    for name in forms:
        cells = []
        for times in measured.values():
            base, own = np.median(times["torch fp32"]), np.median(times[name])
            cells.append(f"{own * 1000:.1f} ({base / own:.2f}x)")
        table.add_row(name, f"{sizes[name] / 1e6:.1f}", f"{right[name]:.3f}", *cells)
    Console(width=120).print(table)
    if options.json:
        options.json.write_text(json.dumps({"bytes": sizes, "accuracy": right, "seconds": measured}, indent=1))


if __name__ == "__main__":
    main()
