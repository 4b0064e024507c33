"""Compares ways to choose what to prune without training, on texts of the training split that were held out.

    python scripts/benchmark_pruning.py --model <fine-tuned checkpoint> --task demo/movie-reviews
    python scripts/benchmark_pruning.py --model <fine-tuned checkpoint> --task mrpc --data <folder> --cost

Every way removes the same share of the layers' FLOPs; the last one removes that share of the time of a forward pass,
by a table of what each block costs on this machine. Told are agreement with the original's predictions, the KL
divergence from them, and the speed-up, by turns with the original (8 texts of 128 tokens); `fisher+reconstruction` is
what StructuredPruningConfig(flops=...) does by default. The last lines compare the time of scoring with that of plain
forward and backward passes over the same batches in the same precision, and tell how long the default takes from a
loaded model to a pruned one; with `--cost` they are all. Run it with both cores free.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hfcompress import StructuredPruningConfig, compress
from hfcompress.evaluation.cost import measure_speed, speed_inputs
from hfcompress.methods.pruning.importance import mask_gradients
from hfcompress.methods.pruning.targets import target_of
from hfcompress.methods.pruning.units import head_units, neuron_units, total_cost
from hfcompress.methods.training import bf16_is_fast
from hfcompress.modeling.checkpoint import commit
from hfcompress.tasks import get_task, load_data, preprocess

Batches = list[dict[str, torch.Tensor]]


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a checkpoint fine-tuned on the task")
    parser.add_argument("--task", default="demo/movie-reviews")
    parser.add_argument("--data", help="a local folder with the task's data")
    parser.add_argument("--flops", type=float, default=0.5, help="share of the layers' FLOPs to remove")
    parser.add_argument("--examples", type=int, default=512, help="calibration examples")
    parser.add_argument("--held-out", type=int, default=1024, help="examples to compare predictions on")
    parser.add_argument("--repeats", type=int, default=15, help="timed passes of each model")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--cost", action="store_true", help="measure only what pruning costs")
    parser.add_argument("--memory", action="store_true", help="measure only what memory pruning takes")
    parser.add_argument("--peak-of", choices=tuple(WORK), help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help="of the draw of examples and of the random scores")
    return parser.parse_args()


def draw(options: argparse.Namespace) -> tuple[Batches, Batches]:
    """Returns calibration and held-out batches, both of the training split and without an example in common."""
    task, tokenizer = get_task(options.task), AutoTokenizer.from_pretrained(options.model)
    rows = load_data(task, options.data)["train"].shuffle(seed=options.seed)
    rows = rows.select(range(min(len(rows), options.examples + options.held_out)))
    labels = AutoModelForSequenceClassification.from_pretrained(options.model).config.label2id
    encoded = list(preprocess(rows, task, tokenizer, max_length=options.max_length, label2id=labels))
    collate = DataCollatorWithPadding(tokenizer)

    def batches(part: list[Any]) -> Batches:
        part = sorted(part, key=lambda row: len(row["input_ids"]))
        return [dict(collate(part[start : start + 32])) for start in range(0, len(part), 32)]

    return batches(encoded[: options.examples]), batches(encoded[options.examples :])


def predict(model: torch.nn.Module, batches: Batches) -> torch.Tensor:
    """Returns the logits of all examples."""
    with torch.no_grad():
        return torch.cat([model(**{k: v for k, v in batch.items() if k != "labels"}).logits for batch in batches])


def prune_at_random(model: Any, share: float, seed: int) -> None:
    """Removes units that chance chooses."""
    target = target_of(model, flops=share, multiple_of=8)
    generator = torch.Generator().manual_seed(seed)
    kept = target.choose([torch.rand(each.count, generator=generator) for each in target.units])
    for each, index in zip(target.units, kept, strict=True):
        each.shrink(index)
    commit(model)


def layer_flops(model: Any) -> float:
    """Returns the multiply-adds of all layers for a token of 128."""
    return total_cost([*head_units(model), *neuron_units(model)], "flops")


def in_product_precision() -> Any:
    """Returns the context that pruning scores in."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_fast())


def print_cost(fresh: Callable[[], Any], calibration: Batches, share: float) -> None:
    """Times scoring beside plain passes, by turns, and the whole of the default."""
    model = fresh()
    units = target_of(model, flops=share, multiple_of=8).units
    passes(model, calibration[:1])
    ratios = []
    for batch in calibration:
        started = time.perf_counter()
        with in_product_precision():
            mask_gradients(model, units, [batch])
        scoring = time.perf_counter() - started
        ratios.append(scoring / passes(model, [batch]))
    model, started = fresh(), time.perf_counter()
    compress(model, [StructuredPruningConfig(flops=share)], calibration=calibration)
    seconds, count = time.perf_counter() - started, sum(len(batch["labels"]) for batch in calibration)
    print(f"scoring / (forward + backward): {sorted(ratios)[len(ratios) // 2]:.2f}, median of {len(ratios)} batches")
    print(f"pruning with {count} calibration texts: {seconds:.0f} s on {torch.get_num_threads()} threads")


def passes(model: Any, batches: Batches) -> float:
    """Times plain forward and backward passes."""
    started = time.perf_counter()
    for batch in batches:
        model.zero_grad()
        with in_product_precision():
            loss = model(**batch).loss
        loss.backward()
    return time.perf_counter() - started


def train_a_step(model: Any, batches: Batches, share: float) -> None:
    """Takes one step of training on the longest texts."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-5)
    with in_product_precision():
        loss = model(**batches[-1]).loss
    loss.backward()
    optimizer.step()


def score_only(model: Any, batches: Batches, share: float) -> None:
    """Takes the derivatives that units are ranked by."""
    with in_product_precision():
        mask_gradients(model, target_of(model, flops=share, multiple_of=8).units, batches)


def prune_by_default(model: Any, batches: Batches, share: float) -> None:
    """Scores, chooses, removes and reconstructs."""
    compress(model, [StructuredPruningConfig(flops=share)], calibration=batches)


WORK: dict[str, Callable[[Any, Batches, float], None]] = {
    "training step": train_a_step,
    "scoring": score_only,
    "pruning": prune_by_default,
}


def print_memory() -> None:
    """Measures each kind of work in a process of its own."""
    step: dict[str, float] = {}
    for name in WORK:
        command = [sys.executable, __file__, *sys.argv[1:], "--peak-of", name]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        step = step or found  # the training step is the first
        ratios = " and ".join(f"{found[part] / step[part]:.2f}" for part in found)
        print(f"{name:15}{found['process']:8.0f} MB, {found['more']:6.0f} on top of the model: {ratios} of the step's")
        sys.stdout.flush()


def print_peak(model: Any, batches: Batches, options: argparse.Namespace) -> None:
    """Does one kind of work, and prints in MB what the process held at most, and how much more than before."""
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
    before = held("VmRSS")
    WORK[options.peak_of](model, batches, options.flops)
    print(json.dumps({"process": held("VmHWM"), "more": held("VmHWM") - before}))


def held(field: str) -> float:
    """Returns a size that Linux tells of this process, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) / 1024


def ways(options: argparse.Namespace, calibration: Any) -> dict[str, Callable[[Any], Any]]:
    """Returns what prunes a model in place, by name."""

    def in_time(model: Any) -> Any:
        return compress(model, [StructuredPruningConfig(latency=options.flops)], calibration=calibration)

    def by(importance: str, reconstruct: bool) -> Callable[[Any], Any]:
        config = StructuredPruningConfig(flops=options.flops, importance=importance, reconstruct=reconstruct)
        return lambda model: compress(model, [config], calibration=calibration)

    return {
        "random": lambda model: prune_at_random(model, options.flops, options.seed),
        "magnitude": by("magnitude", False),
        "taylor": by("taylor", False),
        "activation": by("activation", False),
        "fisher": by("fisher", False),
        "magnitude+reconstruction": by("magnitude", True),
        "taylor+reconstruction": by("taylor", True),
        "activation+reconstruction": by("activation", True),
        "fisher+reconstruction": by("fisher", True),
        "the same, share of time": in_time,
    }


def print_ways(fresh: Callable[[], Any], calibration: Any, held_out: Any, options: argparse.Namespace) -> None:
    """Prints what each way leaves of the answers, and what it takes and gains in time."""
    wanted = predict(fresh(), held_out)
    labels = torch.cat([batch["labels"] for batch in held_out])
    print(
        f"{options.flops:.0%} of FLOPs removed, {options.examples} calibration, {len(labels)} held-out training texts"
    )
    print(f"{'':28}{'agreement':>10}{'accuracy':>10}{'KL':>9}{'seconds':>9}{'speed-up':>10}{'FLOPs':>8}")
    print(f"{'original':28}{1:>10.1%}{(wanted.argmax(1) == labels).float().mean():>10.1%}{0:>9.3f}")
    for name, way in ways(options, calibration).items():
        model, started = fresh(), time.perf_counter()
        way(model)
        seconds = time.perf_counter() - started
        got = predict(model, held_out)
        agreement = (got.argmax(1) == wanted.argmax(1)).float().mean()
        divergence = torch.nn.functional.kl_div(
            got.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="batchmean"
        )
        accuracy = (got.argmax(1) == labels).float().mean()
        original = fresh()
        inputs = speed_inputs(original.config.vocab_size, 8, 128)
        speed = measure_speed(original, model, inputs, repeats=options.repeats).ratio
        work = layer_flops(original) / layer_flops(model)
        print(
            f"{name:28}{agreement:>10.1%}{accuracy:>10.1%}{divergence:>9.3f}{seconds:>9.1f}{speed:>9.2f}x{work:>7.2f}x",
            flush=True,
        )


def main() -> None:
    """Prints the table."""
    warnings.filterwarnings("ignore")
    options = parse()
    if options.memory and not options.peak_of:
        print_memory()
        return
    calibration, held_out = draw(options)

    def fresh() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(options.model).eval()

    if options.peak_of:
        print_peak(fresh(), calibration, options)
        return
    if not options.cost:
        print_ways(fresh, calibration, held_out, options)
    print_cost(fresh, calibration, options.flops)


if __name__ == "__main__":
    main()
