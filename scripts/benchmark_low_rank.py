"""What low-rank factorization gains in time, takes to make, and moves.

    python scripts/benchmark_low_rank.py speed                    # of random encoders: seconds
    python scripts/benchmark_low_rank.py making CHECKPOINT        # beside bare LAPACK calls and one calibration pass
    python scripts/benchmark_low_rank.py outputs CHECKPOINT       # how far they move on texts not seen; minutes

`speed` times encoders of BERT's form and random weights, whole and factorised by turns, and prints the speed-up beside
the ratio of their operations. `making` and `outputs` take a fine-tuned sequence classifier; calibration and held-out
texts are both taken from the training split. Times of `making` are processor time, and what every method needs is timed
beside it: a pass over the calibration texts, and singular values of the same matrices, one of each shape for all.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    DataCollatorWithPadding,
)
from transformers.utils import logging

from hfcompress import LowRankConfig, compress
from hfcompress.evaluation.cost import measure_speed, speed_inputs
from hfcompress.evaluation.usage import count_operations
from hfcompress.methods.low_rank.sensitivity import divergence
from hfcompress.modeling.anatomy import base_model, modules_of
from hfcompress.modeling.measure import count_parameters
from hfcompress.tasks import get_task, load_data, preprocess

BATCH = 32
VOCABULARY = 1000  # a table is looked up, whatever its size
# Width, share kept, and the part of the operations' ratio that is asked of the speed-up.
SPEEDS = ((384, 0.4, 0.55), (768, 0.6, 0.85))
FORMS: dict[str, dict[str, Any]] = {
    "two factors": {},
    "shared": {"share": True},
    "pivoted": {"pivoted": True},
    "per head": {"per_head": True},
}


def main() -> None:
    """Does what was asked."""
    logging.disable_progress_bar()
    asked = arguments()
    asked.work(asked)


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for work in (speed, making, outputs):
        command = commands.add_parser(work.__name__, help=work.__doc__)
        command.set_defaults(work=work)
        if work is speed:
            command.add_argument("--layers", type=int, default=2, help="all layers of an encoder are alike")
            command.add_argument("--repeats", type=int, default=12)
            command.add_argument("--forms", nargs="+", choices=tuple(FORMS), default=list(FORMS)[:2])
            continue
        command.add_argument("checkpoint", help="a fine-tuned sequence classifier")
        command.add_argument("--task", default="demo/movie-reviews")
        command.add_argument("--data", help="local folder of the task's data")
        command.add_argument("--keep", type=float, default=0.6, help="share of the layers' parameters kept")
        command.add_argument("--calibration", type=int, default=128, help="texts to calibrate on")
        command.add_argument("--max-length", type=int, default=64)
        command.add_argument("--methods", nargs="+", help="of those that are compared; else the usual ones")
        command.add_argument("--seed", type=int, default=0)
        if work is outputs:
            command.add_argument("--held-out", type=int, default=256, help="other texts of the training split")
    return parser.parse_args()


# The time of what is made


def speed(asked: argparse.Namespace) -> None:
    """Prints how much faster factorised encoders are, beside what their operations promise."""
    table = Table("width", "keep", "form", "operations / whole's", "speed-up", "of the ratio", "asked")
    inputs = speed_inputs(VOCABULARY, 8, 128)
    for width, keep, least in SPEEDS:
        whole = encoder(width, asked.layers)
        operations = count_operations(whole, inputs)
        for form in asked.forms:
            model = compress(encoder(width, asked.layers), [LowRankConfig(keep=keep, method="svd", **FORMS[form])])
            ratio = operations / count_operations(model, inputs)
            found = measure_speed(whole, model, inputs, repeats=asked.repeats)
            table.add_row(
                str(width),
                str(keep),
                form,
                f"1 / {ratio:.2f}",
                f"{found.ratio:.2f} ({found.low:.2f} to {found.high:.2f})",
                f"{found.ratio / ratio:.2f}",
                str(least),
            )
    Console(width=110).print(table)


def encoder(width: int, layers: int) -> Any:
    """Makes an encoder of BERT's form with heads of 32 dimensions up to MiniLM's width, else of 64."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // (32 if width <= 384 else 64),
        intermediate_size=4 * width,
    )
    return BertModel(config, add_pooling_layer=False).eval()


# The time it takes to make


def making(asked: argparse.Namespace) -> None:
    """Prints the processor time that methods take, beside what none can do without."""
    calibration, original = batches(asked, 0, asked.calibration), load(asked)
    one_pass = seconds(lambda: run(original, calibration))
    bare = {dtype: one_pass + decompositions(original, dtype) for dtype in (torch.float64, torch.float32)}
    table = Table("method", "seconds", "/ (SVD in float64 + pass)", "/ (SVD in float32 + pass)")
    for name, config in chosen(asked, ("svd", "whitened", "whitened, shared", "curvature, budget")).items():
        model = load(asked)
        spent = seconds(lambda model=model, config=config: compress(model, [config], calibration=calibration))
        table.add_row(name, f"{spent:.1f}", *(f"{spent / each:.2f}" for each in bare.values()))
    Console(width=110).print(f"a pass over {len(calibration)} batches: {one_pass:.1f} s", table)


def seconds(work: Callable[[], Any]) -> float:
    """Returns the processor time that something takes."""
    started = time.process_time()
    work()
    return time.process_time() - started


@torch.no_grad()
def decompositions(model: Any, dtype: torch.dtype) -> float:
    """Returns the time of bare decompositions of all matrices: that of one of each shape, times how many there are."""
    paths = modules_of(model, ("attention", "ffn"))
    matrices = {(each := base_model(model).get_submodule(path).weight).shape: each.to(dtype) for path in paths}
    counts = Counter(base_model(model).get_submodule(path).weight.shape for path in paths)
    torch.linalg.svd(next(iter(matrices.values())), full_matrices=False)  # the first call loads the library
    times = {
        shape: seconds(lambda matrix=matrix: torch.linalg.svd(matrix, full_matrices=False))
        for shape, matrix in matrices.items()
    }
    return sum(count * times[shape] for shape, count in counts.items())


# How far they move


def outputs(asked: argparse.Namespace) -> None:
    """Prints how far methods move a classifier's outputs on texts not seen, and the share of parameters kept."""
    calibration, held_out = batches(asked, 0, asked.calibration), batches(asked, asked.calibration, asked.held_out)
    original = load(asked)
    wanted, size = run(original, held_out), count_parameters(original)
    table = Table("method", "parameters", "KL", "logit error", "same label", "seconds")
    for name, config in chosen(asked, tuple(configs(asked))[:-3]).items():
        model = load(asked)
        spent = seconds(lambda model=model, config=config: compress(model, [config], calibration=calibration))
        found = run(model, held_out)
        table.add_row(
            name,
            f"{count_parameters(model) / size:.3f}",
            f"{divergence(wanted, found):.4f}",
            f"{((found - wanted).norm() / wanted.norm()).item():.3f}",
            f"{(found.argmax(1) == wanted.argmax(1)).float().mean().item():.3f}",
            f"{spent:.1f}",
        )
    Console(width=110).print(table)


def configs(asked: argparse.Namespace) -> dict[str, LowRankConfig]:
    """Names what can be compared; the last three take minutes."""
    keep: dict[str, Any] = {"keep": asked.keep}
    inputs: dict[str, Any] = {"weigh_outputs": False}
    shared: dict[str, Any] = {"budget": asked.keep, "sensitivity_batches": 1} | inputs
    return {
        "svd": LowRankConfig(method="svd", **keep),
        "fisher": LowRankConfig(method="fisher", **keep),
        "svd, refit, bias": LowRankConfig(method="svd", refit=True, correct_bias=True, **keep),
        "whitened": LowRankConfig(**inputs, **keep),
        "whitened, shared": LowRankConfig(share=True, **inputs, **keep),
        "whitened, bias": LowRankConfig(correct_bias=True, **inputs, **keep),
        "whitened, sequential, bias": LowRankConfig(sequential=True, correct_bias=True, **inputs, **keep),
        "curvature": LowRankConfig(**keep),
        "curvature, per head": LowRankConfig(per_head=True, **keep),
        "curvature, pivoted": LowRankConfig(pivoted=True, **keep),
        "curvature, budget": LowRankConfig(budget=asked.keep),
        "curvature, budget, shared": LowRankConfig(budget=asked.keep, share=True),
        "curvature, budget, pivoted": LowRankConfig(budget=asked.keep, pivoted=True),
        "budget by outputs": LowRankConfig(**shared),
        "budget by outputs, sequential, bias": LowRankConfig(sequential=True, correct_bias=True, **shared),
        "budget by loss": LowRankConfig(sensitivity="loss", **shared),
        "nmf": LowRankConfig(method="nmf", **keep),
    }


def chosen(asked: argparse.Namespace, usual: Sequence[str]) -> dict[str, LowRankConfig]:
    """Returns the configs that were asked for."""
    known = configs(asked)
    wrong = [name for name in asked.methods or () if name not in known]
    if wrong:
        raise SystemExit(f"there is no method '{wrong[0]}'; there are: {'; '.join(known)}")
    return {name: known[name] for name in asked.methods or usual}


def load(asked: argparse.Namespace) -> Any:
    """Loads the original."""
    return AutoModelForSequenceClassification.from_pretrained(asked.checkpoint)


def batches(asked: argparse.Namespace, start: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Makes batches of some texts of the training split."""
    task, tokenizer = get_task(asked.task), AutoTokenizer.from_pretrained(asked.checkpoint)
    train = load_data(task, asked.data)["train"].shuffle(seed=asked.seed).select(range(start, start + count))
    rows = preprocess(train, task, tokenizer, max_length=asked.max_length, label2id=None)
    collate = DataCollatorWithPadding(tokenizer)
    places = range(0, len(rows), BATCH)
    return [dict(collate([rows[i] for i in range(at, min(at + BATCH, len(rows)))])) for at in places]


@torch.no_grad()
def run(model: Any, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Returns all logits."""
    return torch.cat([model.eval()(**batch).logits for batch in data])


if __name__ == "__main__":
    main()
