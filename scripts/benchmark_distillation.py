"""Times a step of distillation beside a plain step of the same student, and the cache beside the bare teacher.

Every variant trains its own copy of the student on the same batches; calls are interleaved, and medians are compared:
of wall-clock time, and of the processor's time, which other work on the machine disturbs less.

    python scripts/benchmark_distillation.py [--student FOLDER] [--teacher FOLDER] [--steps 20] [--length 64]
    python scripts/benchmark_distillation.py --filling [--teacher FOLDER] [--steps 20] [--length 64]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    TrainingArguments,
)

from hfcompress import DistillationConfig
from hfcompress.methods.distillation import DistillationPart
from hfcompress.methods.teaching.filling import fill
from hfcompress.methods.teaching.signals import Asked
from hfcompress.methods.trainer import CompressionTrainer
from hfcompress.tasks import fetch_model

VARIANTS = {
    "plain": None,
    "cached": DistillationConfig(cache=True),
    "cached, hidden states": DistillationConfig(cache=True, hidden=1.0),
    "live": DistillationConfig(),
    "live, hidden states": DistillationConfig(hidden=1.0),
    "live, relations": DistillationConfig(relations=1.0, relation_heads=12),
}


def make_rows(tokenizer: Any, count: int, length: int) -> list[dict[str, Any]]:
    """Returns rows of random tokens, from half of the length to all of it."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for number in range(count):
        size = int(torch.randint(length // 2, length + 1, (1,), generator=generator))
        ids = torch.randint(1000, tokenizer.vocab_size, (size,), generator=generator).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * size, "labels": number % 2})
    return rows


class Stepper:
    """Takes the steps of one variant, one at a time."""

    def __init__(self, student: PreTrainedModel, trainer: CompressionTrainer) -> None:
        self.student, self.trainer = student, trainer
        trainer._prepare_parts(student)
        trainer.create_optimizer_and_scheduler(1000)
        trainer._begin_parts(1000)
        self.batches = iter(trainer.get_train_dataloader())

    def step(self) -> None:
        """Takes one step: batch, forward, losses, backward, optimizer."""
        trainer, optimizer = self.trainer, self.trainer.optimizer
        assert optimizer is not None
        batches, items = trainer.get_batch_samples(self.batches, 1, trainer.args.device)
        trainer.training_step(self.student, batches[0], items)
        optimizer.step()
        optimizer.zero_grad()


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Returns the seconds that a call takes, by the clock and of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - processor


def build(arguments: argparse.Namespace) -> tuple[Any, PreTrainedModel, PreTrainedModel]:
    """Returns tokenizer, student and teacher; without a folder the teacher is shaped like BERT-base."""
    folder = arguments.student or fetch_model("demo/minilm-l6")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    student = AutoModelForSequenceClassification.from_pretrained(folder, **labels)
    if arguments.teacher:
        teacher = AutoModelForSequenceClassification.from_pretrained(arguments.teacher, **labels)
    else:
        teacher = BertForSequenceClassification(BertConfig(vocab_size=student.config.vocab_size, **labels))
    return tokenizer, student, teacher.eval()


def main() -> None:
    """Prints medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=Path)
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--filling", action="store_true", help="time only how a cache is filled")
    parser.add_argument("--turns", type=int, default=5, help="how often that is timed")
    arguments = parser.parse_args()
    tokenizer, student, teacher = build(arguments)
    size = arguments.batch_size
    rows = make_rows(tokenizer, (arguments.steps + 2) * size, arguments.length)
    with tempfile.TemporaryDirectory() as folder:
        steppers = {
            name: make_stepper(Path(folder), tokenizer, student, teacher, rows, config, arguments)
            for name, config in VARIANTS.items()
            if name == "plain" or not arguments.filling
        }
        turns = time_filling(Path(folder), steppers["plain"].trainer, teacher, arguments.turns)
        if arguments.filling:
            print_filling(turns)
            return
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in [*steppers, "teacher"]}
        for count in range(arguments.steps + 1):
            for name, stepper in steppers.items():
                taken = timed(stepper.step)
                if count:  # the first one warms up
                    seconds[name].append(taken)
            batch = dict(DataCollatorWithPadding(tokenizer)(rows[count * size : (count + 1) * size]))
            taken = timed(lambda batch=batch: forward(teacher, batch))
            if count:
                seconds["teacher"].append(taken)
    print(
        f"{torch.get_num_threads()} threads, batch {size}, length {arguments.length}, {arguments.steps} steps, medians"
    )
    medians = {name: [statistics.median(each) for each in zip(*both, strict=True)] for name, both in seconds.items()}
    for name, both in medians.items():
        is_live = name.startswith("live")
        expected = [plain + is_live * bare for plain, bare in zip(medians["plain"], medians["teacher"], strict=True)]
        ratios = " / ".join(f"{taken / due:.3f}" for taken, due in zip(both, expected, strict=True))
        beside = "plain step + teacher forward" if is_live else "plain step"
        print(f"{name:24}{both[0] * 1e3:8.1f} ms, {both[1] * 1e3:8.1f} ms of the processor; {ratios} of {beside}")
    print_filling(turns)


def make_stepper(
    folder: Path,
    tokenizer: Any,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    rows: list[dict[str, Any]],
    config: DistillationConfig | None,
    arguments: argparse.Namespace,
) -> Stepper:
    """Makes a trainer of a copy of the student."""
    own = copy.deepcopy(student)
    trainer = CompressionTrainer(
        own,
        TrainingArguments(
            str(folder),
            per_device_train_batch_size=arguments.batch_size,
            use_cpu=True,
            report_to="none",
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
        ),
        parts=[DistillationPart(config, teacher, folder / "cache")] if config else [],
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    return Stepper(own, trainer)


def forward(teacher: PreTrainedModel, batch: dict[str, Any]) -> None:
    """Runs the teacher as distillation does, without labels."""
    with torch.no_grad():
        teacher(**{name: value for name, value in batch.items() if name != "labels"})


def time_filling(
    folder: Path, trainer: CompressionTrainer, teacher: PreTrainedModel, repeats: int
) -> list[list[tuple[float, float]]]:
    """Times filling a cache and the teacher alone on the same batches, made beforehand, by turns.

    The first turn does not count: kernels are prepared anew for every shape of a batch.

    Returns:
        For each turn the seconds of filling, and those of the teacher.
    """
    rows = trainer._rows()
    assert rows is not None
    ordered = sorted(range(len(rows)), key=lambda number: len(rows.dataset[number]["input_ids"]))
    batches = [rows.batch(ordered[start : start + rows.batch_size]) for start in range(0, len(rows), rows.batch_size)]
    turns = []
    for turn in range(repeats + 1):
        filling = timed(lambda: fill(teacher, Asked(), rows, folder / f"fresh-{turn}"))  # noqa: B023
        turns.append([filling, timed(lambda: [forward(teacher, batch) for batch in batches])])
    return turns[1:]


def print_filling(turns: list[list[tuple[float, float]]]) -> None:
    """Prints the median ratio of the two by the clock, and by the processor's time."""
    ratios = [statistics.median(bare[kind] / filling[kind] for filling, bare in turns) for kind in (0, 1)]
    seconds = statistics.median(filling[0] for filling, _ in turns)
    said = " / ".join(f"{ratio:.3f}" for ratio in ratios)
    print(f"filling the cache: {seconds:.2f} s; {said} of the bare teacher's speed, medians of {len(turns)} turns")


if __name__ == "__main__":
    main()
