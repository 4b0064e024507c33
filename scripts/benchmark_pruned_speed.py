"""How much faster a pruned model is, beside the operations it is spared, and what widths that kernels like give.

    python scripts/benchmark_pruned_speed.py CHECKPOINT --task mrpc --data FOLDER      # some ten minutes

CHECKPOINT is a fine-tuned sequence classifier. It loses shares of its layers' multiply-adds at once, without training:
what stays is chosen as everywhere, from one pass over the calibration texts, so that its uneven widths are real ones.
Each result is timed by turns with the original (8 texts of 128 tokens, 32 bit) and its speed-up printed beside the
ratio of their operations. `multiple` is what each layer's neurons are kept in; `layers` what is left of them where
whole ones go first, those in even places. The last columns name what linear layers fall short of their operations by.
Run it with both cores free.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers.utils import logging

from hfcompress import LayerDroppingConfig, StructuredPruningConfig, compress
from hfcompress.evaluation.cost import measure_speed, speed_inputs
from hfcompress.evaluation.layers import measure_layers
from hfcompress.evaluation.usage import count_operations
from hfcompress.methods.registry import Batch, Context
from hfcompress.methods.structured_pruning import structured_pruning
from hfcompress.modeling.anatomy import attention_blocks
from hfcompress.tasks import get_task, load_data, preprocess

# Shares of the layers' multiply-adds that go: 1.25, 1.5, 2, 2.5 and 20 times fewer.
SHARES = (0.2, 1 / 3, 0.5, 0.6, 0.95)
MULTIPLES = (1, 8, 16, 32)
FEWER_LAYERS = (6, 4, 3)  # tried where 95% go
ASKED_UP_TO, ASKED = 2.6, 0.85
ASKED_AT_MOST_REMOVED = 7.0


def main() -> None:
    """Prints the table."""
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--task", required=True)
    parser.add_argument("--data")
    parser.add_argument("--examples", type=int, default=256, help="calibration texts")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--multiples", type=int, nargs="+", default=MULTIPLES)
    parser.add_argument("--layers", type=int, nargs="*", default=FEWER_LAYERS)
    asked = parser.parse_args()
    whole = load(asked)
    depth = len(attention_blocks(whole))
    table = Table("removed", "multiple", "layers", "operations", "speed-up", "of the ratio", "asked", "slow layers")
    with tempfile.TemporaryDirectory() as folder:
        context = Context(calibration=batches(asked), cache_dir=Path(folder))
        for share in asked.shares:
            for multiple in asked.multiples:
                model = load(asked)
                structured_pruning(model, StructuredPruningConfig(flops=share, multiple_of=multiple), context)
                table.add_row(f"{share:.0%}", str(multiple), str(depth), *compared(whole, model, asked.repeats))
        for layers in asked.layers if max(asked.shares) >= max(SHARES) else ():
            model = compress(load(asked), [LayerDroppingConfig(drop=depth - layers, which="spread")])
            rest = 1 - (1 - max(SHARES)) * depth / layers
            structured_pruning(model, StructuredPruningConfig(flops=rest), context)
            table.add_row(f"{max(SHARES):.0%}", "8", str(layers), *compared(whole, model, asked.repeats))
    Console(width=150).print(f"{torch.get_num_threads()} threads", table)


def load(asked: argparse.Namespace) -> Any:
    """Loads the fine-tuned model."""
    return AutoModelForSequenceClassification.from_pretrained(asked.checkpoint).eval()


def batches(asked: argparse.Namespace) -> list[Batch]:
    """Returns texts of the training split."""
    task, tokenizer = get_task(asked.task), AutoTokenizer.from_pretrained(asked.checkpoint)
    rows = load_data(task, asked.data, progress=False)["train"].shuffle(seed=0).select(range(asked.examples))
    encoded = list(preprocess(rows, task, tokenizer, max_length=128, label2id=load(asked).config.label2id))
    encoded.sort(key=lambda row: len(row["input_ids"]))
    collate = DataCollatorWithPadding(tokenizer)
    return [dict(collate(encoded[start : start + 32])) for start in range(0, len(encoded), 32)]


def compared(whole: Any, model: Any, repeats: int) -> tuple[str, str, str, str, str]:
    """Returns what the table says of a result."""
    inputs = speed_inputs(whole.config.vocab_size, 8, 128)
    ratio = count_operations(whole, inputs) / count_operations(model, inputs)
    found = measure_speed(whole, model, inputs, repeats=repeats)
    asked = str(ASKED) if ratio <= ASKED_UP_TO else f"{ASKED_AT_MOST_REMOVED:g}x" if ratio > 10 else ""
    reasons = Counter(layer.reason for layer in measure_layers(whole, model, inputs) if layer.reason)
    slow = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    speed_up = f"{found.ratio:.2f} ({found.low:.2f} to {found.high:.2f})"
    return f"1 / {ratio:.2f}", speed_up, f"{found.ratio / ratio:.2f}", asked, slow


if __name__ == "__main__":
    main()
