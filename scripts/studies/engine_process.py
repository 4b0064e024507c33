"""One form of a model in a process of its own: how long it takes to open, and how much memory it takes.

    python -m scripts.studies.engine_process FOLDER KIND

KIND is `export` (with `export:bf16` for that precision), or `torch:CLASS` or `torch-bf16:CLASS` with one of
transformers' Auto classes. An export is opened without torch, which is not imported for it. Prints one JSON object.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 2
Arrays = dict[str, np.ndarray]
Run = Callable[[Arrays], Any]


def open_form(folder: Path, kind: str) -> Run:
    """Opens a form; returns what runs it on ids and mask, int64 `(batch, tokens)`, and returns its outputs by name."""
    how, _, which = kind.partition(":")
    if how == "export":
        from hfcompress_runtime import Pipeline

        precision: Any = which or None
        pipeline = Pipeline.from_pretrained(folder, threads=THREADS, precision=precision)
        return pipeline.outputs
    import torch
    import transformers

    import hfcompress  # registers the loader

    assert hfcompress
    torch.set_num_threads(THREADS)
    dtype = torch.bfloat16 if how == "torch-bf16" else torch.float32
    model: Any = getattr(transformers, which).from_pretrained(folder, dtype=dtype).eval()
    more = {"use_cache": False} if which == "AutoModelForCausalLM" else {}

    def run(inputs: Arrays) -> dict[str, np.ndarray]:
        with torch.inference_mode():
            logits = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}, **more).logits
        return {"logits": logits.float().numpy()}

    return run


def random_inputs(rows: int, tokens: int, vocabulary: int) -> Arrays:
    """Returns the same random ids every time, without padding."""
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, tokens))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}


def needed(folder: Path, inputs: Arrays) -> Arrays:
    """Leaves out token types where the family has none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    typed = config.get("type_vocab_size", 0) > 1
    return {name: value for name, value in inputs.items() if typed or name != "token_type_ids"}


def _peak() -> int:
    """Returns the most bytes that this process had in memory; `getrusage` would begin with those of its parent."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def main() -> None:
    """Opens, runs once, and prints the seconds and the bytes."""
    folder, kind = Path(sys.argv[1]), sys.argv[2]
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    if kind.startswith("torch"):  # libraries are not the model
        import torch
        import transformers

        import hfcompress

        assert torch and hfcompress and transformers.AutoModel
    else:
        from hfcompress_runtime import Manifest

        importlib.import_module({"onnx": "onnxruntime", "openvino": "openvino"}[Manifest.read(folder).engine])
    start = time.perf_counter()
    run = open_form(folder, kind)
    run(needed(folder, random_inputs(1, 16, vocabulary)))
    seconds = time.perf_counter() - start
    run(needed(folder, random_inputs(8, 128, vocabulary)))
    print(json.dumps({"load_seconds": seconds, "peak_bytes": _peak()}))


if __name__ == "__main__":
    main()
