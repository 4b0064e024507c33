"""What the checks cost: loading against a stock load of as many bytes, and verifying against raw sha256.

    python scripts/benchmark_loading.py [--repeats 15] [--hidden 768] [--layers 12]

The two sides of each ratio take turns in one run; medians are compared. Peak memory is that of a fresh process each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers.utils import logging

from hfcompress import LowRankConfig, compress
from hfcompress.modeling.checkpoint import save
from hfcompress.modeling.integrity import verify_files

PEAK = """
import resource, sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification
from transformers.utils import logging
import hfcompress  # both sides, so that only the load differs
logging.set_verbosity_error(); logging.disable_progress_bar()
from pathlib import Path
AutoModelForSequenceClassification.from_pretrained(sys.argv[2])  # a tiny one: what the first load imports
before = int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmRSS")).split()[1])
Path("/proc/self/clear_refs").write_text("5")
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
sum(float(parameter.detach().sum()) for parameter in model.parameters())  # weights are mapped: read them all
peak = int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmHWM")).split()[1])
print(peak - before)
"""


def config(hidden: int, layers: int, neurons: int) -> BertConfig:
    """Returns a BERT config of these sizes."""
    return BertConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64, intermediate_size=neurons
    )


def weight_bytes(folder: Path) -> int:
    """Counts the bytes of a checkpoint's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def make(place: Path, hidden: int, layers: int) -> tuple[Path, Path]:
    """Saves a compressed checkpoint, and a stock one of as many bytes and as many layers."""
    torch.manual_seed(0)
    compressed = compress(
        BertForSequenceClassification(config(hidden, layers, 4 * hidden)).eval(),
        [LowRankConfig(keep=0.6, method="svd", targets=("ffn",))],
    )
    save(compressed, place / "compressed")
    wanted = weight_bytes(place / "compressed")
    without = BertForSequenceClassification(config(hidden, layers, 1)).num_parameters()
    neurons = (wanted // 4 - without) // (layers * (2 * hidden + 1))
    BertForSequenceClassification(config(hidden, layers, neurons)).save_pretrained(place / "stock")
    return place / "compressed", place / "stock"


def alternate(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Returns the median CPU seconds of two calls that take turns."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):
        for place, call in enumerate((first, second)):
            began = time.process_time()  # on one thread; what else the machine does is left out
            call()
            if turn:  # the first turn fills caches
                seconds[place].append(time.process_time() - began)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def load(folder: Path) -> float:
    """Loads a checkpoint and reads every weight once, so that lazy mapping hides nothing."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    return sum(float(parameter.detach().sum()) for parameter in model.parameters())


def load_only(folder: Path) -> object:
    """Loads a checkpoint."""
    return AutoModelForSequenceClassification.from_pretrained(folder)


def raw_digest(folder: Path) -> None:
    """Takes the sha256 of the weight files as they are."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as stream:
            hashlib.file_digest(stream, "sha256").hexdigest()


def peak(folder: Path, tiny: Path) -> int:
    """Returns the kilobytes that loading takes at its peak, in a fresh process."""
    command = [sys.executable, "-c", PEAK, str(folder), str(tiny)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Measures and prints the ratios as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as text:
        compressed, stock = make(Path(text), options.hidden, options.layers)
        tiny, _ = make(Path(text) / "tiny", 64, 1)
        lazy = alternate(lambda: load_only(compressed), lambda: load_only(stock), options.repeats)
        whole = alternate(lambda: load(compressed), lambda: load(stock), options.repeats)
        digests = alternate(lambda: verify_files(compressed), lambda: raw_digest(compressed), options.repeats)
        memory = peak(compressed, tiny), peak(stock, tiny)
        megabytes = weight_bytes(compressed) / 1e6
        print(
            json.dumps(
                {
                    "megabytes": {"compressed": megabytes, "stock": weight_bytes(stock) / 1e6},
                    "load, compressed / stock": lazy[0] / lazy[1],
                    "load and read, compressed / stock": whole[0] / whole[1],
                    "load seconds": {"compressed": lazy[0], "stock": lazy[1]},
                    "load and read seconds": {"compressed": whole[0], "stock": whole[1]},
                    "peak memory, compressed / stock": memory[0] / memory[1],
                    "peak megabytes": {"compressed": memory[0] / 1024, "stock": memory[1] / 1024},
                    "verify speed, of raw sha256": digests[1] / digests[0],
                    "megabytes a second": {"verify": megabytes / digests[0], "sha256": megabytes / digests[1]},
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
