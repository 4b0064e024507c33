"""Memory and time of factorising a checkpoint that need not fit into memory, against its number of layers.

A model of random weights is written shard by shard, with as many layers as make `--gigabytes`, then with half and a
quarter of them; `hfcompress factorize` or a whole `hfcompress run` works on each, and the anonymous resident memory of
that process (RssAnon: mapped files do not count) is read while it does. Time is the process's own on the processor,
whatever else the machine does. The exit code says whether the largest peak is below `--limit`. The recipe of a run has
one step of plain factors, on a task of a few rows, for what is measured is not the quality of random weights.

    python scripts/benchmark_streaming.py --folder FOLDER
    python scripts/benchmark_streaming.py --folder FOLDER --command run
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from hfcompress.material import find_model

WIDTH, INNER = 512, 1408
TOKENIZER = "demo/minilm-l6"
REVIEWS = ("a warm, funny film", "a dull and lazy one")
GIGABYTE = 2**30
SAMPLES_A_SECOND = 50


def main() -> int:
    """Prints the table."""
    asked = arguments()
    most = round(asked.gigabytes * GIGABYTE / layer_bytes())
    table = Table("layers", "checkpoint, GiB", "result, GiB", "CPU seconds", "/ layer", "peak RssAnon, GiB")
    peaks = []
    for layers in (most, most // 2, most // 4):
        source, out = asked.folder / f"source-{layers}", asked.folder / f"out-{layers}"
        write_checkpoint(source, layers, asked.seed)
        command = factorize(source, out, asked.keep) if asked.command == "factorize" else run(source, out, asked.keep)
        seconds, peak = measure(command)
        sizes = [weight_bytes(folder) / GIGABYTE for folder in (source, out)]
        table.add_row(
            str(layers), *(f"{size:.2f}" for size in sizes), f"{seconds:.1f}", f"{seconds / layers:.3f}", f"{peak:.3f}"
        )
        peaks.append(peak)
        for folder in (source, out, out.with_name(f"{out.name}.work")):
            if folder.exists():
                shutil.rmtree(folder)
    Console(width=110).print(table)
    return 0 if max(peaks) < asked.limit else 1


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where there is room for twice the checkpoint")
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the largest checkpoint")
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--limit", type=float, default=1.5, help="GiB of anonymous memory")
    parser.add_argument("--command", choices=("factorize", "run"), default="factorize")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def layer_bytes() -> int:
    """Returns what a layer takes in float32."""
    return 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER + 2 * WIDTH)


def write_checkpoint(folder: Path, layers: int, seed: int) -> None:
    """Writes a stock checkpoint, each layer into a shard of its own, so that this takes little memory too."""
    tokenizer = AutoTokenizer.from_pretrained(find_model(TOKENIZER, progress=False))
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        id2label={0: "bad", 1: "good"},
        label2id={"bad": 0, "good": 1},
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=8,
        architectures=["LlamaForSequenceClassification"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForSequenceClassification(config).state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        part = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    for file, names in shards.items():
        tensors = {name: 0.02 * torch.randn(shapes[name], generator=generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    places = {name: file for file, names in shards.items() for name in names}
    total = sum(4 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def factorize(source: Path, out: Path, keep: float) -> list[str]:
    """Returns the arguments of `hfcompress` that factorise a checkpoint."""
    return ["factorize", str(source), str(out), f"--keep={keep}"]


def run(source: Path, out: Path, keep: float) -> list[str]:
    """Writes a recipe and a few rows beside the checkpoint; returns the arguments of `hfcompress` that run it."""
    data, recipe = source.with_name("data"), source.with_name("recipe.yaml")
    data.mkdir(exist_ok=True)
    rows = [{"text": text, "label": label} for text, label in zip(REVIEWS, (1, 0), strict=True)] * 4
    for split in ("train", "validation"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe.write_text(
        json.dumps(
            {
                "name": "streamed",
                "model": str(source.resolve()),
                "task": {"kind": "classification", "data": str(data.resolve()), "columns": ["text"], "label": "label"}
                | {"labels": ["bad", "good"]},
                "max_length": 16,
                "evaluation": {"batch_size": 2, "speed_batch_size": 1, "speed_sequence_length": 8, "speed_repeats": 3}
                | {"grid_batch_sizes": []},
                "steps": [{"name": "factorize", "low_rank": {"method": "svd", "keep": keep}}],
            }
        )
    )
    return ["run", str(recipe), "--output", str(out)]


def measure(arguments: Sequence[str]) -> tuple[float, float]:
    """Runs the command; returns its CPU seconds and the peak of its anonymous memory in GiB."""
    command = [sys.executable, "-m", "hfcompress_cli", *arguments, "--quiet"]
    before, peak = children_seconds(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            peak = max(peak, anonymous_kib(status))
            time.sleep(1 / SAMPLES_A_SECOND)
    if process.returncode:
        raise SystemExit(f"hfcompress {arguments[0]} failed with exit code {process.returncode}")
    return children_seconds() - before, peak / 2**20


def children_seconds() -> float:
    """Returns the processor time of all child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def anonymous_kib(status: Path) -> int:
    """Returns a process's anonymous resident memory; 0 where it has ended."""
    lines = status.read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def weight_bytes(folder: Path) -> int:
    """Counts the bytes of a folder's weight files."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    raise SystemExit(main())
