"""Low-rank factorization of fine-tuned encoders without training: quality against bytes and against time.

    python -m scripts.studies.low_rank_encoders curves      # methods beside each other, 10 to 60% of linear parameters
    python -m scripts.studies.low_rank_encoders together    # with pruning and 4 bits, and each alone
    python -m scripts.studies.low_rank_encoders claim       # NMF: its time beside SVD's, and its loss at 9% off
    python -m scripts.studies.low_rank_encoders summary     # table of what is there

Teachers and data are those of `scripts.studies.material`. Factors are fitted to 512 sentences of train; every point is
measured on validation once (with `--data choices` on a part of train, where choices are made). Bytes are those of the
saved checkpoint, time is that of a batch of 8 rows of 128 tokens beside the original's in the same run, and a row of
the results is one point; points that are there are not measured again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding
from transformers.utils import logging

from hfcompress import LowRankConfig, QuantizationConfig, StructuredPruningConfig, compress
from hfcompress.configuration import Config
from hfcompress.evaluation.cost import measure_speed, speed_inputs
from hfcompress.evaluation.quality import evaluate_quality
from hfcompress.methods.low_rank import low_rank as factorize
from hfcompress.methods.low_rank.maths import nonnegative, truncate
from hfcompress.methods.registry import Context
from hfcompress.modeling.anatomy import base_model, modules_of
from hfcompress.modeling.checkpoint import save
from hfcompress.modeling.measure import weight_bytes
from hfcompress.tasks import get_task, load_data, preprocess
from scripts.studies.low_rank import Statistics
from scripts.studies.material import TASKS, add_row, glue_folder, read_rows, results_file, teacher_folder

RESULTS = results_file("low_rank_encoders.jsonl")
EXAMPLES = 512
BATCH = 32
REPEATS = 9  # timed passes of a point's model and of the original, by turns
MAX_LENGTH = 128
CLAIMED_SHARE = 0.09  # what the claim takes off without training, for 4 to 10 points

Arm = Callable[[float], Sequence[Config]]


def low_rank(removed: float, **settings: Any) -> LowRankConfig:
    """Returns the config that keeps the rest of the linear layers' parameters."""
    size = settings.pop("size", "keep")
    return LowRankConfig(targets=("attention", "ffn"), **{size: round(1 - removed, 6)}, **settings)


def pruning(removed: float) -> StructuredPruningConfig:
    """Returns the config that removes heads and neurons with that share of the layers' parameters."""
    settings: dict[str, Any] = {"parameters": round(removed, 6)}
    return StructuredPruningConfig(**settings)


BEST: dict[str, Any] = {"size": "budget", "pivoted": True}
# In pivoted form an output's rounding is passed on to all that are made of it.
TWO_FACTORS = BEST | {"pivoted": False}
FOUR_BITS = QuantizationConfig(weights="nf4", embeddings="int8")
CURVES: dict[str, Arm] = {
    "plain": lambda share: [low_rank(share, method="svd")],
    "fisher": lambda share: [low_rank(share, method="fisher")],
    "whitened": lambda share: [low_rank(share, weigh_outputs=False)],
    "whitened, budget": lambda share: [low_rank(share, weigh_outputs=False, size="budget")],
    "curvature, budget": lambda share: [low_rank(share, **TWO_FACTORS)],
    "curvature, budget, pivoted": lambda share: [low_rank(share, **BEST)],
    "non-negative": lambda share: [low_rank(share, method="nmf")],
}
SLOW = ("non-negative",)
TOGETHER: dict[str, Arm] = {
    "low rank": lambda share: [low_rank(share, **BEST)],
    "pruning": lambda share: [pruning(share)],
    "4 bits": lambda share: [FOUR_BITS],
    "low rank, 4 bits": lambda share: [low_rank(share, **TWO_FACTORS), FOUR_BITS],
    "pivoted low rank, 4 bits": lambda share: [low_rank(share, **BEST), FOUR_BITS],
    "pruning, 4 bits": lambda share: [pruning(share), FOUR_BITS],
    # Half of the share by each.
    "pruning, low rank, 4 bits": lambda share: [
        pruning(1 - (1 - share) ** 0.5),
        low_rank(1 - (1 - share) ** 0.5, **TWO_FACTORS),
        FOUR_BITS,
    ],
}
STUDIES = {"curves": CURVES, "together": TOGETHER}


# Points


class Bench:
    """A fine-tuned model, its calibration batches, what is read off it once, and what it is judged on."""

    def __init__(self, model: str, name: str, data: str, examples: int = EXAMPLES) -> None:
        self.teacher, self.task = teacher_folder(model, name), get_task(name)
        self.tokenizer = AutoTokenizer.from_pretrained(self.teacher)
        self.original = self.load()
        splits = load_data(self.task, str(glue_folder(data)), progress=False)
        options: dict[str, Any] = {"max_length": MAX_LENGTH, "label2id": self.original.config.label2id}
        drawn = splits["train"].shuffle(seed=0).select(range(examples))
        self.rows: list[Any] = list(preprocess(drawn, self.task, self.tokenizer, **options))
        self.statistics: Statistics | None = None
        self.judged_on = preprocess(splits["validation"], self.task, self.tokenizer, **options)

    def load(self) -> Any:
        """Loads the fine-tuned model."""
        return AutoModelForSequenceClassification.from_pretrained(self.teacher).eval()

    def calibration(self) -> list[dict[str, torch.Tensor]]:
        """Returns batches of sentences of similar length."""
        collate = DataCollatorWithPadding(self.tokenizer)
        rows = sorted(self.rows, key=lambda row: len(row["input_ids"]))
        return [dict(collate(rows[start : start + BATCH])) for start in range(0, len(rows), BATCH)]

    def measure(self, configs: Sequence[Config]) -> dict[str, Any]:
        """Compresses, saves, loads again and measures."""
        model, started = self.load(), time.perf_counter()
        if len(configs) == 1 and isinstance(configs[0], LowRankConfig):
            self.statistics = self.statistics or Statistics(self.load, self.calibration())
            context = Context(calibration=self.statistics.batches)
            factorize(model, configs[0], context, knowledge=self.statistics.of(configs[0]))
        elif configs:
            compress(model, list(configs), calibration=self.calibration())
        seconds = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as folder:
            save(model, Path(folder) / "saved")
            size = weight_bytes(Path(folder) / "saved")
            model = AutoModelForSequenceClassification.from_pretrained(Path(folder) / "saved").eval()
            quality = evaluate_quality(
                model, self.judged_on, self.task, self.tokenizer, batch_size=BATCH, progress=False
            )
            inputs = speed_inputs(self.original.config.vocab_size, 8, 128)
            speed = measure_speed(self.original, model, inputs, repeats=REPEATS) if configs else None
        row = {"metric": self.task.metrics[0], "metrics": quality.metrics, "bytes": size, "seconds": round(seconds, 1)}
        return row | ({"speed_up": [speed.ratio, speed.low, speed.high]} if speed else {})


def read() -> list[dict[str, Any]]:
    """Returns the rows that are there."""
    return read_rows(RESULTS)


def write(row: dict[str, Any]) -> None:
    """Adds a row."""
    add_row(RESULTS, row)


def work(asked: argparse.Namespace) -> None:
    """Measures every point of a study that is not there yet."""
    arms = STUDIES[asked.study]
    for name in asked.tasks:
        points = [(arm, share) for share in asked.removed for arm in (asked.arms or arms) if arm in arms]
        points = [point for point in points if point[0] not in SLOW or point[0] in (asked.arms or ())]
        bench = None
        for arm, share in [("original", 0.0), *dict.fromkeys((a, 0.0 if a == "4 bits" else s) for a, s in points)]:
            point = {"model": asked.model, "task": name, "data": asked.data, "arm": arm, "removed": share}
            if any(point.items() <= row.items() for row in read()):
                continue
            bench = bench or Bench(asked.model, name, asked.data)
            write(point | bench.measure([] if arm == "original" else arms[arm](share)))


def claim(asked: argparse.Namespace) -> None:
    """Measures what is said of non-negative factors: that they are quicker, and 9% off costs 4 to 10 points."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(768, 768, generator=generator)
    for name, factorise in (("singular values", truncate), ("non-negative", nonnegative)):
        times = []
        for _ in range(3):
            started = time.perf_counter()
            factorise(matrix, 192)
            times.append(time.perf_counter() - started)
        write({"claim": "seconds, 768 x 768, rank 192", "arm": name, "seconds": statistics.median(times)})
    for name in asked.tasks:
        bench = Bench(asked.model, name, asked.data)
        base, paths = base_model(bench.original), modules_of(bench.original, ("attention", "ffn"))
        inside = sum(base.get_parameter(f"{path}.weight").numel() for path in paths)
        # A share of the whole model, taken off the layers that are factorised.
        share = CLAIMED_SHARE * sum(each.numel() for each in bench.original.parameters()) / inside
        before = bench.measure([])
        for arm in ("non-negative", "plain", "curvature, budget, pivoted"):
            found = bench.measure(CURVES[arm](share))
            points = 100 * (before["metrics"][before["metric"]] - found["metrics"][before["metric"]])
            said = {"claim": f"points lost at {CLAIMED_SHARE:.0%} off", "model": asked.model, "task": name, "arm": arm}
            write(said | {"points": round(points, 2)} | found)


# What came of it


def summary(asked: argparse.Namespace) -> None:
    """Prints the table; `scripts.studies.low_rank_page` writes it with a picture."""
    rows = [row for row in read() if row.get("data") == asked.data and row.get("model") == asked.model]
    for name in [name for name in TASKS if any(row["task"] == name for row in rows)]:
        mine = sorted((row for row in rows if row["task"] == name), key=lambda row: (row["arm"], row["removed"]))
        base = next(row for row in mine if row["arm"] == "original")
        metric, whole = base["metric"], base["metrics"][base["metric"]]
        print(f"{name}: {metric} {whole:.4f}, {base['bytes'] / 1e6:.1f} MB")
        for row in mine:
            kept, size = row["metrics"][metric] / whole, row["bytes"] / base["bytes"]
            speed = row.get("speed_up", [1.0])[0]
            print(f"  {row['arm']:30} {row['removed']:4.0%} retained {kept:.4f}  bytes {size:.3f}  speed {speed:.2f}")


def arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=(*STUDIES, "claim", "summary"))
    parser.add_argument("--model", default="mpnet-base", choices=("mpnet-base", "minilm-l6"))
    parser.add_argument("--tasks", nargs="+", default=["sst2", "mrpc", "stsb"], choices=TASKS)
    parser.add_argument("--removed", nargs="+", type=float, default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    parser.add_argument("--arms", nargs="+", choices=sorted({*CURVES, *TOGETHER}))
    parser.add_argument("--data", choices=("whole", "choices"), default="whole")
    return parser.parse_args()


def main() -> None:
    """Does what was asked."""
    logging.disable_progress_bar()
    asked = arguments()
    {"claim": claim, "summary": summary}.get(asked.study, work)(asked)


if __name__ == "__main__":
    main()
