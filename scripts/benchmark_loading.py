"""What the checks cost: loading against a stock load of as many bytes, and verifying against raw sha256.

    python scripts/benchmark_loading.py [--method pruned] [--repeats 15] [--hidden 768] [--layers 12]

The sides of each ratio take turns in one run; medians of CPU seconds are compared. Peak memory is that of a fresh
process each. A checkpoint pruned to uneven layers has as many tensors as a stock one. For `--method low-rank` there are
two stock checkpoints of as many bytes: one with as many layers, whose tensors are fewer (a low-rank layer is three
tensors where a stock one is two), and one with as many tensors (to half a layer), which has more layers. transformers
takes about as long for a small tensor as for a large one, so the first tells what a user pays for the layout of
low-rank layers, and the second what hfcompress's own work and checks take.

The defaults are the sizes of BERT-base and MPNet-base; MiniLM-L6 is --hidden 384 --layers 6.
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
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification
from transformers.utils import logging

from hfcompress import LowRankConfig, compress
from hfcompress.modeling.anatomy import feed_forward_blocks
from hfcompress.modeling.checkpoint import commit, save
from hfcompress.modeling.headers import read_header
from hfcompress.modeling.integrity import verify_files
from hfcompress.modeling.surgery import shrink_feed_forward

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


def make(place: Path, method: str, hidden: int, layers: int) -> dict[str, Path]:
    """Saves a compressed checkpoint, and stock ones of as many bytes."""
    torch.manual_seed(0)
    model = BertForSequenceClassification(config(hidden, layers, 4 * hidden)).eval()
    stocks = {"stock": layers}
    if method == "pruned":
        for number, block in enumerate(feed_forward_blocks(model)):
            shrink_feed_forward(block, range(2 * hidden + 8 * number))
        commit(model)
    else:
        compress(model, [LowRankConfig(keep=0.6, method="svd", targets=("ffn",))])
        # A layer of BERT has 16 tensors, and 4 more where both its feed-forward matrices are factors.
        stocks["stock, as many tensors"] = layers + layers // 4
    save(model, place / "compressed")
    wanted = weight_bytes(place / "compressed")
    for name, depth in stocks.items():
        without = BertForSequenceClassification(config(hidden, depth, 1)).num_parameters()
        neurons = (wanted // 4 - without) // (depth * (2 * hidden + 1))
        BertForSequenceClassification(config(hidden, depth, neurons)).save_pretrained(place / name)
    return {name: place / name for name in ("compressed", *stocks)}


def count_tensors(folder: Path) -> int:
    """Counts the tensors of a checkpoint of one file."""
    return len(read_header(folder / "model.safetensors").tensors)


def alternate(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the median CPU seconds of calls that take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            began = time.process_time()  # what else the machine does is left out
            call()
            if turn:  # the first turn fills caches
                seconds[name].append(time.process_time() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def ratios(seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns what the compressed checkpoint takes, over what each of the others takes."""
    return {name: seconds["compressed"] / value for name, value in seconds.items() if name != "compressed"}


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
    parser.add_argument("--method", choices=("low-rank", "pruned"), default="low-rank")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as text:
        folders = make(Path(text), options.method, options.hidden, options.layers)
        tiny = make(Path(text) / "tiny", options.method, 64, 4)["compressed"]
        lazy = alternate({name: partial(load_only, each) for name, each in folders.items()}, options.repeats)
        whole = alternate({name: partial(load, each) for name, each in folders.items()}, options.repeats)
        compressed = folders["compressed"]
        digests = alternate(
            {"verify": lambda: verify_files(compressed), "sha256": lambda: raw_digest(compressed)}, options.repeats
        )
        memory = {name: float(peak(each, tiny)) for name, each in folders.items()}
        found = {
            "megabytes": {name: weight_bytes(each) / 1e6 for name, each in folders.items()},
            "tensors": {name: count_tensors(each) for name, each in folders.items()},
            "load, compressed over": ratios(lazy),
            "load and read every weight, compressed over": ratios(whole),
            "peak memory, compressed over": ratios(memory),
            "load seconds": lazy,
            "load and read seconds": whole,
            "peak megabytes": {name: kilobytes / 1024 for name, kilobytes in memory.items()},
            "verify speed, of raw sha256": digests["sha256"] / digests["verify"],
            "megabytes a second": {name: weight_bytes(compressed) / 1e6 / took for name, took in digests.items()},
        }
        print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
