"""How far low-rank factorization moves a fine-tuned classifier's outputs, method by method, on texts not seen.

Calibration and held-out texts are both taken from the training split. Quality is printed beside the share of
parameters kept and the processor time that the method took, and that beside what nothing can do without: bare LAPACK
calls on the same matrices, and a pass over the calibration texts.

    python scripts/benchmark_low_rank.py runs/quickstart.work/1-fine_tune/checkpoint
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers.utils import logging

from hfcompress import LowRankConfig, compress
from hfcompress.methods.low_rank.sensitivity import divergence
from hfcompress.modeling.anatomy import base_model, modules_of
from hfcompress.modeling.measure import count_parameters
from hfcompress.tasks import get_task, load_data, preprocess

BATCH = 32


def main() -> None:
    """Prints the table."""
    asked = arguments()
    logging.disable_progress_bar()
    calibration, held_out = batches(asked, 0, asked.calibration), batches(asked, asked.calibration, asked.held_out)
    original = load(asked)
    wanted, size = outputs(original, held_out), count_parameters(original)
    table = Table("method", "parameters", "KL", "logit error", "same label", "seconds", "/ (SVD + pass)")
    for name, config in configs(asked).items():
        model = load(asked)
        bare = bare_seconds(original, calibration)
        started = time.process_time()
        compress(model, [config], calibration=calibration)
        seconds = time.process_time() - started
        found = outputs(model, held_out)
        table.add_row(
            name,
            f"{count_parameters(model) / size:.3f}",
            f"{divergence(wanted, found):.4f}",
            f"{((found - wanted).norm() / wanted.norm()).item():.3f}",
            f"{(found.argmax(1) == wanted.argmax(1)).float().mean().item():.3f}",
            f"{seconds:.1f}",
            f"{seconds / bare:.2f}",
        )
    Console(width=110).print(table)


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a fine-tuned sequence classifier")
    parser.add_argument("--task", default="demo/movie-reviews")
    parser.add_argument("--data", help="local folder of the task's data")
    parser.add_argument("--keep", type=float, default=0.6, help="share of the layers' parameters kept")
    parser.add_argument("--calibration", type=int, default=128, help="texts to calibrate on")
    parser.add_argument("--held-out", type=int, default=256, help="other texts of the training split")
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", action="store_true", help="also non-negative matrices and other budgets: minutes")
    return parser.parse_args()


def configs(asked: argparse.Namespace) -> dict[str, LowRankConfig]:
    """Names what is compared."""
    keep: dict[str, Any] = {"keep": asked.keep}
    shared: dict[str, Any] = {"budget": asked.keep, "sensitivity_batches": 1}
    made = {
        "svd": LowRankConfig(method="svd", **keep),
        "fisher": LowRankConfig(method="fisher", **keep),
        "svd, refit, bias": LowRankConfig(method="svd", refit=True, correct_bias=True, **keep),
        "whitened": LowRankConfig(method="whitened", **keep),
        "whitened, bias": LowRankConfig(method="whitened", correct_bias=True, **keep),
        "whitened, sequential, bias": LowRankConfig(sequential=True, correct_bias=True, **keep),
        "curvature": LowRankConfig(weigh_outputs=True, **keep),
        "curvature, pivoted": LowRankConfig(weigh_outputs=True, pivoted=True, **keep),
        "curvature, pivoted, budget": LowRankConfig(
            budget=asked.keep, weigh_outputs=True, pivoted=True, sensitivity="curvature"
        ),
        "budget by outputs": LowRankConfig(**shared),
    }
    if asked.every:
        made |= {
            "budget by outputs, sequential, bias": LowRankConfig(sequential=True, correct_bias=True, **shared),
            "budget by loss": LowRankConfig(sensitivity="loss", **shared),
            "nmf": LowRankConfig(method="nmf", **keep),
        }
    return made


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
def outputs(model: Any, data: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Returns all logits."""
    return torch.cat([model.eval()(**batch).logits for batch in data])


@torch.no_grad()
def bare_seconds(model: Any, calibration: list[dict[str, torch.Tensor]]) -> float:
    """Times singular value decompositions of the same matrices, a pass over the texts, and nothing else."""
    base = base_model(model)
    matrices = [base.get_submodule(path).weight.double() for path in modules_of(model, ("attention", "ffn"))]
    started = time.process_time()
    for matrix in matrices:
        torch.linalg.svd(matrix, full_matrices=False)
    for batch in calibration:
        model(**batch)
    return time.process_time() - started


if __name__ == "__main__":
    main()
