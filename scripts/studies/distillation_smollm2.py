"""A language model with half its layers, trained alone and taught by the whole model for the same time: perplexity.

    python -m scripts.studies.distillation_smollm2 run MODEL WIKITEXT   # each arm, rate and seed 15 minutes
    python -m scripts.studies.distillation_smollm2 summary

MODEL, WIKITEXT, the text trained on and perplexity are those of `scripts.studies.language_model`. Layers go one after
another, each time the one whose skipping raises the loss least, and all students begin from what is left. Time is that
of the one thread that trains, and what the teacher takes to speak is part of it. Each arm has the learning rate that
serves it best on the part for choices with the first seed; points that are there are not measured again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments, default_data_collator
from transformers.utils import logging

from hfcompress import DistillationConfig, LayerDroppingConfig, compress
from hfcompress.methods.trainer import CompressionTrainer
from hfcompress.modeling.anatomy import attention_blocks
from hfcompress.modeling.checkpoint import save
from scripts.studies.language_model import (
    BATCH,
    TEST_BLOCKS,
    WARM_UP,
    Material,
    chosen_rate,
    pending,
    perplexity,
    rows_of,
)
from scripts.studies.material import add_row, read_rows, results_file, study_root

RESULTS = results_file("distillation_smollm2.jsonl")
# There is time for one epoch or less: a cache would have the teacher speak about blocks that nobody reads.
TAUGHT: dict[str, Any] = {"temperature": 1.0, "cache": False}
ARMS: dict[str, DistillationConfig | None] = {
    "alone": None,
    "outputs": DistillationConfig(soft=1.0, hard=1.0, **TAUGHT),
    "outputs alone": DistillationConfig(soft=1.0, hard=0.0, **TAUGHT),
}
RATES = (3e-4, 1e-3)
SECONDS = 900.0
CALIBRATION_BLOCKS = 1  # a layer is chosen out of thirty by so many passes for each of them, fifteen times
MOST_STEPS = 100_000  # more than there is time for


class Clock(TrainerCallback):
    """Ends a training when its time is used up, and lets the learning rate fall with it.

    Args:
        seconds: Processor time of the training thread, from now on.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.started = seconds, time.thread_time()

    @property
    def left(self) -> float:
        """Returns the share of the time that is left."""
        return max(0.0, 1 - (time.thread_time() - self.started) / self.seconds)

    def rate_at(self, step: int) -> float:
        """Returns what the learning rate is multiplied by."""
        return min(1.0, (step + 1) / WARM_UP) * self.left

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops."""
        control.should_training_stop = not self.left


def student_of(material: Material) -> Any:
    """Returns the model without half of its layers, those whose skipping raises the loss least; found out once."""
    folder = study_root() / "language_models" / f"{material.model.name}-half"
    if not folder.exists():
        model, calibration = material.load(), [rows_of(material.fitted_to, slice(CALIBRATION_BLOCKS))]
        drop = len(attention_blocks(model)) // 2
        compress(model, [LayerDroppingConfig(drop=drop, which="importance")], calibration=calibration)
        save(model, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(material: Material, arm: str, rate: float, seed: int, seconds: float, folder: Path) -> tuple[Any, int]:
    """Trains a student; returns it and the number of its steps."""
    student, config, clock = student_of(material), ARMS[arm], Clock(seconds)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0, fused=True)
    trainer = CompressionTrainer(
        student,
        TrainingArguments(
            str(folder), max_steps=MOST_STEPS, per_device_train_batch_size=BATCH, bf16=True, seed=seed,
            use_cpu=True, save_strategy="no", logging_steps=50, report_to="none", disable_tqdm=True,
        ),
        teacher=material.load() if config else None,
        distillation=config,
        train_dataset=[rows_of(material.training, row) for row in range(len(material.training["labels"]))],
        data_collator=default_data_collator,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, clock.rate_at)),
        callbacks=[clock],
    )  # fmt: skip
    trainer.train()
    return student, trainer.state.global_step


def run(asked: argparse.Namespace) -> None:
    """Trains and measures every student that is not there yet."""
    torch.set_num_threads(1)
    material = Material(asked.model, asked.wikitext)
    text = rows_of(material.test, slice(asked.blocks or None))
    for seed in asked.seeds:
        for arm in asked.arms:
            known = [row for row in read_rows(RESULTS) if row["arm"] == arm and row["seconds"] == asked.seconds]
            for rate in [chosen_rate(known)] if seed else asked.rates:
                point = {"test_blocks": len(text["labels"]), "arm": arm, "rate": rate}
                point |= {"seconds": asked.seconds, "seed": seed}
                if not pending(known, point):
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    model, steps = train(material, arm, rate, seed, asked.seconds, Path(folder))
                model = model.to(torch.bfloat16)
                row = point | {"steps": steps, "perplexity": perplexity(model, text)}
                add_row(RESULTS, row | {"choices": perplexity(model, material.choices)})


def summary(asked: argparse.Namespace) -> None:
    """Prints every arm's perplexity, seed by seed, at the rate that was chosen for it."""
    rows = read_rows(RESULTS)
    for arm, seconds in dict.fromkeys((row["arm"], row["seconds"]) for row in rows):
        mine = [row for row in rows if (row["arm"], row["seconds"]) == (arm, seconds)]
        found = [row for row in mine if row["rate"] == chosen_rate(mine)]
        figures = " ".join(f"{row['perplexity']:.2f}" for row in found)
        print(f"{arm:20} {seconds:4.0f} s, {found[0]['steps']} steps at {found[0]['rate']:.0e}: {figures}")


def main() -> None:
    """Does what was asked."""
    logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for work in (run, summary):
        command = commands.add_parser(work.__name__, help=work.__doc__)
        command.set_defaults(work=work)
    command = commands.choices["run"]
    command.add_argument("model", type=Path)
    command.add_argument("wikitext", type=Path)
    command.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    command.add_argument("--rates", nargs="+", type=float, default=RATES)
    command.add_argument("--seeds", nargs="+", type=int, default=[0])
    command.add_argument("--seconds", type=float, default=SECONDS)
    command.add_argument("--blocks", type=int, default=TEST_BLOCKS, help="of the test file; 0 for all of it")
    asked = parser.parse_args()
    asked.work(asked)


if __name__ == "__main__":
    main()
