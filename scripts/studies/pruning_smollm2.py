"""Pruning a small language model: a quarter of its FFN neurons, or of its groups of heads; perplexity on wikitext-2.

    python -m scripts.studies.pruning_smollm2 run MODEL WIKITEXT      # without training; some twenty minutes
    python -m scripts.studies.pruning_smollm2 recover MODEL WIKITEXT  # each 15 minutes of training
    python -m scripts.studies.pruning_smollm2 summary

MODEL, WIKITEXT, the text calibrated and trained on, perplexity and recovery are those of `scripts.studies.low_rank`.
A recovered ratio is against the original with the same training. Points that are there are not measured again.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hfcompress import StructuredPruningConfig
from hfcompress.methods.registry import Context
from hfcompress.methods.structured_pruning import structured_pruning
from hfcompress.modeling.measure import count_parameters
from scripts.studies.low_rank import (
    CALIBRATION_BLOCKS,
    RECOVERY,
    TEST_BLOCKS,
    Material,
    perplexity,
    rows_of,
    train,
)
from scripts.studies.material import add_row, read_rows, results_file

RESULTS = results_file("pruning_smollm2.jsonl")
SHARE = 0.25
ARMS: dict[str, dict[str, Any]] = {
    "original": {},
    "neurons": {"neurons": SHARE},
    "neurons, by activation": {"neurons": SHARE, "importance": "activation"},
    "neurons, not reconstructed": {"neurons": SHARE, "reconstruct": False},
    "neurons, by magnitude": {"neurons": SHARE, "importance": "magnitude", "reconstruct": False},
    "groups of heads": {"heads": SHARE},
    "groups of heads, not reconstructed": {"heads": SHARE, "reconstruct": False},
    "groups of heads, by magnitude": {"heads": SHARE, "importance": "magnitude", "reconstruct": False},
}
RECOVERED = ("original", "neurons", "groups of heads")


def read() -> list[dict[str, Any]]:
    """Returns the rows that are there."""
    return read_rows(RESULTS)


def write(row: dict[str, Any]) -> None:
    """Adds a row, with its ratio to the original's where that is there."""
    same = ("study", "test_blocks", "seed")
    for base in read():
        if base["arm"] == "original" and all(base.get(key) == row.get(key) for key in same):
            row["ratio"] = round(row["perplexity"] / base["perplexity"], 4)
    add_row(RESULTS, row)


def is_there(point: dict[str, Any]) -> bool:
    """Tells whether a row is of this point."""
    return any(all(row.get(key) == value for key, value in point.items()) for row in read())


def pruned(material: Material, arm: str, calibration: int) -> tuple[Any, dict[str, Any]]:
    """Returns the model as an arm makes it, and what was found."""
    model, started = material.load(), time.perf_counter()
    before = count_parameters(model)
    if ARMS[arm]:
        context = Context(calibration=material.calibration(calibration))
        structured_pruning(model, StructuredPruningConfig(**ARMS[arm]), context)
    found = {"parameters_removed": round(1 - count_parameters(model) / before, 4)}
    return model, found | {"seconds": round(time.perf_counter() - started, 1)}


def run(asked: argparse.Namespace) -> None:
    """Measures every arm that is not there yet, without training."""
    material = Material(asked.model, asked.wikitext)
    text = rows_of(material.test, slice(asked.blocks or None))
    for arm in ARMS:
        point = {"study": "without training", "arm": arm, "test_blocks": len(text["labels"])}
        point |= {"calibration_blocks": asked.calibration}
        if not is_there(point):
            model, found = pruned(material, arm, asked.calibration)
            write(point | {"perplexity": perplexity(model, text)} | found)


def recover(asked: argparse.Namespace) -> None:
    """Trains the original and pruned models for the same time, and measures them."""
    torch.set_num_threads(1)
    material = Material(asked.model, asked.wikitext)
    text = rows_of(material.test, slice(asked.blocks or None))
    for seed in asked.seeds:
        for arm in RECOVERED:
            point = {"study": "recovered", "arm": arm, "test_blocks": len(text["labels"]), "seed": seed}
            if not is_there(point):
                model, found = pruned(material, arm, asked.calibration)
                steps = train(model, material.training, asked.train_seconds, seed, asked.rate)
                result = {"perplexity": perplexity(model.to(torch.bfloat16), text), "steps": steps}
                write(point | result | {"train_seconds": asked.train_seconds} | found)


def summary(asked: argparse.Namespace) -> None:
    """Prints the table."""
    for row in read():
        size = f"{row['parameters_removed']:.1%} fewer parameters"
        print(f"{row['study']:17} {row['arm']:36} {size:24} {row['perplexity']:9.2f} {row.get('ratio', 1.0):8.3f}")


def main() -> None:
    """Does what was asked."""
    logging.disable_progress_bar()
    # Activations of a bf16 model are bf16 numbers: products of them are exact in this mode, and three times as fast.
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for work in (run, recover, summary):
        command = commands.add_parser(work.__name__, help=work.__doc__)
        command.set_defaults(work=work)
        if work is not summary:
            command.add_argument("model", type=Path)
            command.add_argument("wikitext", type=Path)
            command.add_argument("--blocks", type=int, default=TEST_BLOCKS, help="of the test file; 0 for all of it")
            command.add_argument("--calibration", type=int, default=CALIBRATION_BLOCKS, help="blocks to fit to")
    commands.choices["recover"].add_argument("--seeds", nargs="+", type=int, default=[0])
    commands.choices["recover"].add_argument("--rate", type=float, default=1e-4)
    commands.choices["recover"].add_argument("--train-seconds", type=float, default=RECOVERY["seconds"])
    asked = parser.parse_args()
    asked.work(asked)


if __name__ == "__main__":
    main()
