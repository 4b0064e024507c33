"""Bytes against quality of every way to quantize, on fine-tuned MiniLM-L6.

    python -m scripts.studies.quantization run --task sst2                 # on validation, once
    python -m scripts.studies.quantization run --task sst2 --part choices  # on a tenth of train: choices are made there
    python -m scripts.studies.quantization run --task sst2 --only "nf4" "mixed"
    python -m scripts.studies.quantization table                           # what is there

Teachers and data are those of `scripts.studies.material`. Each arm starts from the teacher, is saved, loaded again by
plain `from_pretrained` and measured; its bytes are those of the weight files on disk. `learned` arms train for as many
epochs as asked, on the teacher's answers too. An arm that is in the results is not done again.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, set_seed

from hfcompress import DistillationConfig, QLoRAConfig, QuantizationAwareConfig, QuantizationConfig, TrainingConfig
from hfcompress.configuration import Config
from hfcompress.evaluation.quality import evaluate_quality
from hfcompress.methods.probing import divergence
from hfcompress.methods.quantization import quantization
from hfcompress.methods.registry import Context, method_of
from hfcompress.methods.trainer import CompressionTrainer
from hfcompress.methods.training import training_arguments
from hfcompress.modeling.checkpoint import save
from hfcompress.modeling.layers.packed_linear import PACKED_KINDS
from hfcompress.modeling.measure import weight_bytes
from hfcompress.tasks import get_task, load_data, preprocess
from scripts.studies.material import TASKS, glue_folder, results_file, study_root, teacher_folder

RESULTS = results_file("quantization.json")
MODEL = "minilm-l6"
MAX_LENGTH = 128
BATCH = 32
CALIBRATION = 128
SEED = 42

FLOAT, AT_ONCE, LEARNED = "float", "at once", "learned"


def arms() -> dict[str, tuple[str, Config | None]]:
    """Returns what is compared: for each name how it comes about, and the config."""
    found: dict[str, tuple[str, Config | None]] = {"float": (FLOAT, None)}
    eights: dict[str, Any] = {"int8": {}, "int8, threshold 6": {"threshold": 6.0}, "packed-8": {}}
    for name, more in eights.items():
        kind: Any = name.partition(",")[0]
        found[name] = (AT_ONCE, QuantizationConfig(weights=kind, embeddings="int8", **more))
    fours: Any = ("nf4", "nf4-double", "fp4", "fp4-double")
    for kind in (*fours, *PACKED_KINDS[1:]):
        found[kind] = (AT_ONCE, QuantizationConfig(weights=kind, embeddings="int4"))
    found["nf4, int8 tables"] = (AT_ONCE, QuantizationConfig(weights="nf4", embeddings="int8"))
    for budget in (0.25, 0.2, 0.16, 0.14, 0.12, 0.1):
        settings: Any = {"weights": "mixed", "embeddings": "mixed", "candidates": ("packed-8", "packed-4", "packed-2")}
        found[f"mixed {budget:g}"] = (AT_ONCE, QuantizationConfig(budget=budget, **settings))
    for kind in PACKED_KINDS:
        tables: Any = "int8" if kind == "packed-8" else "int4"
        for scales in ("fitted", "learned"):
            config = QuantizationAwareConfig(weights=kind, scales=scales, embeddings=tables)
            found[f"{kind}, trained, {scales} scales"] = (LEARNED, config)
    for kind in ("nf4", "packed-2"):
        for then in ("keep", "requantize"):
            found[f"{kind}, adapters, {then}"] = (LEARNED, QLoRAConfig(weights=kind, then=then))
    return found


class Study:
    """A teacher, its data, and what was measured."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.teacher = teacher_folder(MODEL, asked.task)
        self.task = get_task(asked.task)
        self.tokenizer = AutoTokenizer.from_pretrained(self.teacher)
        labels = self.load().config.label2id
        splits = load_data(self.task, str(glue_folder(asked.part)), progress=False)
        options = {"max_length": MAX_LENGTH, "label2id": labels}
        self.train = preprocess(splits["train"], self.task, self.tokenizer, **options)
        self.validation = preprocess(splits["validation"], self.task, self.tokenizer, **options)
        drawn = self.train.shuffle(seed=SEED).select(range(CALIBRATION), keep_in_memory=True)
        self.calibration = list(self.batches(drawn))

    def load(self, folder: Path | None = None) -> Any:
        """Loads the teacher, or what was saved."""
        return AutoModelForSequenceClassification.from_pretrained(folder or self.teacher).eval()

    def batches(self, rows: Any) -> Iterator[dict[str, torch.Tensor]]:
        """Yields rows in batches of their order."""
        collate = DataCollatorWithPadding(self.tokenizer)
        for start in range(0, len(rows), BATCH):
            yield dict(collate([rows[index] for index in range(start, min(start + BATCH, len(rows)))]))

    @torch.no_grad()
    def outputs(self, model: Any) -> torch.Tensor:
        """Returns the outputs on the first 512 rows that it is judged on."""
        rows = self.validation.select(range(min(512, len(self.validation))))
        return torch.cat([model(**batch).logits for batch in self.batches(rows)])

    def train_with(self, model: Any, config: Config, folder: Path) -> None:
        """Trains an arm beside its teacher's answers."""
        # What is usual for fine-tuning, and for adapters; nothing was tried.
        rate = 5e-4 if isinstance(config, QLoRAConfig) else 1e-4
        training = TrainingConfig(epochs=self.asked.epochs, learning_rate=rate, batch_size=BATCH, precision="fp32")
        configs = (DistillationConfig(temperature=2.0, soft=0.9, hard=0.1), config)
        context = Context(teacher=self.load())
        parts = [part(each, context) for each in configs if (part := method_of(each).part)]
        trainer = CompressionTrainer(
            model,
            training_arguments(training, folder, seed=SEED, examples=len(self.train), quiet=True),
            parts=parts,
            train_dataset=self.train,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            processing_class=self.tokenizer,
        )
        trainer.train()

    def measure(self, name: str, way: str, config: Config | None) -> dict[str, Any]:
        """Makes an arm, saves it, loads it and judges what was loaded."""
        set_seed(SEED)
        model, found, started = self.load(), {}, time.perf_counter()
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            if way == LEARNED:
                assert config is not None
                if isinstance(config, QLoRAConfig):  # the tables too, at equal bytes with the other arms
                    first = QuantizationConfig(weights=config.weights, embeddings="int4")
                    quantization(model, first, Context())
                self.train_with(model, config, folder / "training")
                model.eval()
            elif config is not None:
                context = Context(calibration=self.calibration, cache_dir=study_root() / "cache")
                apply = method_of(config).apply
                assert apply is not None
                found = apply(model, config, context)
            seconds = time.perf_counter() - started
            save(model, folder / "saved")
            again = self.load(folder / "saved")
            quality = evaluate_quality(
                again, self.validation, self.task, self.tokenizer, batch_size=BATCH, progress=False
            )
            outputs = self.outputs(again)
            row = {"task": self.asked.task, "part": self.asked.part, "arm": name, "way": way}
            row |= {"bytes": weight_bytes(folder / "saved"), "metrics": quality.metrics}
            row |= {"divergence": float(f"{divergence(self.outputs(self.load()), outputs):.4g}")}
            row |= {"reloaded_exactly": torch.equal(self.outputs(model), outputs), "seconds": round(seconds, 1)}
        if way == LEARNED:
            row["epochs"] = self.asked.epochs
        return row | {name: found[name] for name in ("mixed", "kinds") if name in found}


def run(asked: argparse.Namespace) -> None:
    """Measures every arm that is not there yet."""
    chosen = {
        name: arm
        for name, arm in arms().items()
        if not asked.only or any(name == each or name.startswith(f"{each} ") for each in asked.only)
    }
    done = {(row["task"], row["part"], row["arm"], row.get("epochs")) for row in read()}
    study: Study | None = None
    for name, (way, config) in chosen.items():
        if (asked.task, asked.part, name, asked.epochs if way == LEARNED else None) in done:
            continue
        study = study or Study(asked)
        row = study.measure(name, way, config)
        write([*read(), row])
        print(f"{time.strftime('%H:%M:%S')} {name}: {row['bytes']:,} bytes, {row['metrics']}", flush=True)


def read() -> list[dict[str, Any]]:
    """Returns the rows that are there."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def write(rows: list[dict[str, Any]]) -> None:
    """Writes the rows, whole or not at all."""
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    partial = RESULTS.with_suffix(f".{os.getpid()}")
    partial.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    os.replace(partial, RESULTS)


def table() -> str:
    """Returns a Markdown table of all rows, the largest first."""
    rows = read()
    whole = {(row["task"], row["part"]): row["bytes"] for row in rows if row["arm"] == "float"}
    lines = ["| task | part | arm | MB | smaller | metrics | divergence |", "|---|---|---|---:|---:|---|---:|"]
    for row in sorted(rows, key=lambda row: (row["task"], row["part"], -row["bytes"])):
        metrics = ", ".join(f"{name} {100 * value:.1f}" for name, value in row["metrics"].items())
        first = whole.get((row["task"], row["part"]))
        smaller = f"{first / row['bytes']:.1f}x" if first else "-"
        epochs = f" ({row['epochs']:g} epochs)" if "epochs" in row else ""
        size, moved = f"{row['bytes'] / 1e6:.2f}", f"{row['divergence']:.2g}"
        cells = (row["task"], row["part"], row["arm"] + epochs, size, smaller, metrics, moved)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Does what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "table"))
    parser.add_argument("--task", choices=TASKS, default="sst2")
    parser.add_argument("--part", choices=("whole", "choices"), default="whole")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--only", nargs="*", default=[], help="arms, or how their names begin")
    asked = parser.parse_args()
    if asked.action == "run":
        run(asked)
    else:
        print(table())


if __name__ == "__main__":
    main()
