"""Runs a recipe: step after step, each from the saved result of the one before, each done once.

A run has two folders. `runs/<name>` is the result: a checkpoint with its card and report, there whole or not at
all. `runs/<name>.work` holds one folder a step; a step that is recorded as done, for the same inputs, is not done
again, and one that was cut off goes on from its last whole training checkpoint.
"""

from __future__ import annotations

import copy
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hfcompress.costing import Costing
from hfcompress.errors import DataError
from hfcompress.evaluation.comparison import Answers, compare
from hfcompress.evaluation.curves import EVALUATED, Training, training_of
from hfcompress.evaluation.groups import group_labels
from hfcompress.evaluation.quality import evaluate_quality
from hfcompress.evaluation.report import Report, Row, describe_environment, retention
from hfcompress.evaluation.robustness import KINDS
from hfcompress.methods.registry import Batch, Context, method_of
from hfcompress.modeling.checkpoint import save
from hfcompress.modeling.integrity import require_undamaged
from hfcompress.modeling.measure import count_parameters, weight_bytes
from hfcompress.recipe import Recipe, Step
from hfcompress.recipe.schema import is_local
from hfcompress.run_folder import (
    ANSWERS,
    RECORD,
    Done,
    fingerprint,
    key_of,
    locked,
    prepare,
    publish,
    read_json,
    read_record,
    refuse_foreign,
    rows_digest,
    write_json,
)
from hfcompress.tasks import Task, align_labels, fetch_model, is_demo_model, kind_of, load_data, preprocess

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedModel, Trainer

logger = logging.getLogger(__name__)

_CURVE_ROWS = 256  # a curve shows where a training went; what it came to is measured on all rows


def run(recipe: Recipe, output: Path, quiet: bool = False) -> Report:
    """Runs a recipe to its end and writes the result.

    Args:
        recipe: What to do.
        output: The result's folder; `<output>.work` holds the steps.
        quiet: No progress bars.

    Returns:
        The report, which is also in the result's folder.

    Raises:
        RunFolderError: Another run uses the folder, or it holds something that no run wrote.
        HFCompressError: Model, data or a step is not right; steps that were done stay done.
    """
    output = Path(output)
    refuse_foreign(output)
    work = output.with_name(f"{output.name}.work")
    with locked(work):
        bench = _Bench(recipe, work, quiet)
        done = bench.run_steps()
        report, answers = bench.report(done)
        publish(done[-1].checkpoint, report, answers, output)
    if recipe.push is not None:
        from hfcompress.publishing.hub import push

        logger.info("pushed to %s", push(output, recipe.push.repo, **recipe.push.options()))
    return report


@dataclass(frozen=True)
class _Cut:
    """The task's rows as one tokenizer cuts them, or as one image processor takes them."""

    tokenizer: Any
    rows: dict[str, Dataset]


class _Bench:
    """What every step of one run shares: the base model, the data, and how tokenizers cut them."""

    def __init__(self, recipe: Recipe, work: Path, quiet: bool) -> None:
        self.recipe, self.work, self.quiet = recipe, work, quiet
        self.task: Task = recipe.described_task
        self.kind = kind_of(self.task)
        self.training_split = _training_split(self.task)
        self.base = find_model(recipe.model, progress=not quiet)
        self.data: DatasetDict = load_data(self.task, recipe.data_folder, progress=not quiet)
        self._cuts: dict[str, _Cut] = {}
        self.groups = self._groups()
        if recipe.evaluation.robustness and self.kind.name not in KINDS:
            raise DataError(f"evaluation.robustness: is for tasks of kind {' or '.join(KINDS)}, not {self.kind.name}")
        self.start = key_of(
            {"model": fingerprint(self.base), "task": asdict(self.task), "seed": recipe.seed},
            {split: rows_digest(rows) for split, rows in self._cut(self.base).rows.items()},
        )

    def _groups(self) -> dict[str, list[str]]:
        columns, split = self.recipe.evaluation.groups, self.task.evaluation_split
        labels = group_labels(self.data[split], columns)
        alike = len(self._cut(self.base).rows[split]) == len(self.data[split])
        if columns and not (alike and self.kind.flips):
            raise DataError(
                f"evaluation.groups: an answer of task '{self.task.name}' is not right or wrong row by row",
                hint="Leave `groups` out.",
            )
        return labels

    def _cut(self, checkpoint: Path) -> _Cut:
        """Cuts the texts by a checkpoint's own tokenizer, which a step may have changed; each tokenizer once."""
        tokenizer = self.kind.load_processor(checkpoint)
        key = key_of(self.kind.processor_key(tokenizer))
        if key not in self._cuts:
            length = self.recipe.max_length
            rows = {
                split: preprocess(self.data[split], self.task, tokenizer, max_length=length, label2id=None)
                for split in (self.training_split, self.task.evaluation_split)
            }
            self._cuts[key] = _Cut(tokenizer, rows)
        return self._cuts[key]

    # Steps

    def run_steps(self) -> list[Done]:
        """Does what is not done yet; the first model returned is the one that all others are compared with."""
        steps = self.recipe.steps
        begins_with_fine_tuning = steps[0].training is not None and not steps[0].methods
        done = [] if begins_with_fine_tuning else [self._original()]
        for index, step in enumerate(steps, start=1):
            folder = self.work / f"{index}-{step.name}"
            before = done[-1] if done else None
            key = key_of(before.key if before else self.start, step.to_dict())
            record = read_record(folder, key)
            state = "done already" if record else "starting"
            logger.info("step %d of %d: %s (%s)", index, len(steps), step.name, state)
            if record is None:
                record = self._do(step, folder, key, before, teacher=done[0] if done else None)
            names = tuple(method_of(config).name for config in step.methods)
            done.append(Done(step.name, names, folder / "checkpoint", folder, key, record))
        return done

    def _original(self) -> Done:
        """Measures the base model, which a recipe without leading fine-tuning starts from."""
        folder = self.work / "0-original"
        record = read_record(folder, self.start, checkpoint=self.base)
        if record is None:
            self._with_head()  # says so where there is no head to measure
            prepare(folder, self.start)
            record = self._measure(self.base, folder, self.start) | {"key": self.start, "seconds": 0.0, "findings": {}}
            write_json(folder / RECORD, record)
        return Done("original", (), self.base, folder, self.start, record)

    def _do(self, step: Step, folder: Path, key: str, before: Done | None, teacher: Done | None) -> dict[str, Any]:
        from transformers import set_seed

        prepare(folder, key)
        set_seed(self.recipe.seed)
        started = time.monotonic()
        model = self._load(before)
        cut = self._cut(before.checkpoint if before else self.base)
        # A method may change the tokenizer in place; the steps before keep theirs.
        cut = _Cut(copy.deepcopy(cut.tokenizer), cut.rows)
        training = None
        if step.training is None:
            findings = self._at_once(model, step, cut)
        else:
            findings, training = self._in_training(model, step, folder / "training", teacher, cut)
        seconds = round(time.monotonic() - started, 1)
        checkpoint = folder / "checkpoint"
        save(model, checkpoint, tokenizer=cut.tokenizer)
        shutil.rmtree(folder / "training", ignore_errors=True)
        del model
        record = self._measure(checkpoint, folder, key) | {"key": key, "seconds": seconds, "findings": findings}
        record["training"] = training and asdict(training)
        write_json(folder / RECORD, record)
        return record

    def _measure(self, checkpoint: Path, folder: Path, key: str) -> dict[str, Any]:
        """Judges what a user would load, never what is left in memory; the answers are kept in `folder`."""
        model, cut = self._load_from(checkpoint), self._cut(checkpoint)
        quality = evaluate_quality(
            model,
            self._labelled(model, cut.rows[self.task.evaluation_split]),
            self.task,
            cut.tokenizer,
            batch_size=self.recipe.evaluation.batch_size,
            progress=not self.quiet,
        )
        write_json(folder / ANSWERS, {"key": key, "answers": asdict(quality.answers)})
        return {
            "metrics": quality.metrics,
            "examples": quality.examples,
            "parameters": count_parameters(model),
            "bytes": weight_bytes(checkpoint),
            "files": fingerprint(checkpoint),
        }

    def _at_once(self, model: PreTrainedModel, step: Step, cut: _Cut) -> dict[str, Any]:
        batches = list(self._calibration(model, step.calibration, cut))
        texts = self.kind.texts(self.task, self.data[self.training_split])
        tokenizer = cut.tokenizer if self.kind.reads == "text" else None
        cache = self.work.parent / "hfcompress_cache"
        context = Context(calibration=batches, tokenizer=tokenizer, texts=texts, cache_dir=cache)
        findings: dict[str, Any] = {}
        for config in step.methods:
            method = method_of(config)
            assert method.apply is not None
            findings[method.name] = method.apply(model, config, context)
        return findings

    def _in_training(
        self, model: PreTrainedModel, step: Step, folder: Path, teacher: Done | None, cut: _Cut
    ) -> tuple[dict[str, Any], Training]:
        from hfcompress.methods.trainer import CompressionTrainer
        from hfcompress.methods.training import training_arguments

        assert step.training is not None
        taught = any(method_of(config).name == "distillation" for config in step.methods)
        learned_from = self._load(teacher) if taught else None
        context = Context(teacher=learned_from, cache_dir=self.work.parent / "hfcompress_cache")
        parts = [part(config, context) for config in step.methods if (part := method_of(config).part)]
        del learned_from, context  # with a cache the teacher is dropped as soon as it has spoken
        rows = self._labelled(model, cut.rows[self.training_split])
        arguments = training_arguments(
            step.training, folder, seed=self.recipe.seed, examples=len(rows), quiet=self.quiet
        )
        if self.kind.reads != "text":
            arguments.train_sampling_strategy = "random"  # rows have no lengths,
            arguments.remove_unused_columns = False  # and become what a model reads in the batch only
        # Small updates are lost in 16-bit weights: they are trained in 32 bits and go back to what they were.
        dtype = model.dtype
        model.float()
        trainer = CompressionTrainer(
            model,
            arguments,
            parts=parts,
            train_dataset=rows,
            data_collator=self.kind.collator(cut.tokenizer),
            processing_class=cut.tokenizer,
        )
        examples = self._watch(trainer, model, cut)
        trainer.train(resume_from_checkpoint=True)
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if model.dtype != dtype:
            model.to(dtype)  # pyright: ignore[reportArgumentType]
        names = [method_of(config).name for config in step.methods]
        findings = dict(zip(names, trainer.findings, strict=True))
        return findings, training_of(trainer.state.log_history, examples)

    def _watch(self, trainer: Trainer, model: PreTrainedModel, cut: _Cut) -> int:
        """Lets a training measure itself for its curves; returns on how many rows."""
        from hfcompress.methods.watching import MeasureWhileTraining

        points = self.recipe.evaluation.curve_points
        rows = cut.rows[self.task.evaluation_split]
        # From all over the split: data are often sorted, by class too.
        count = min(_CURVE_ROWS, len(rows))
        spread = [place * len(rows) // count for place in range(count)]
        rows = self._labelled(model, rows.select(spread, keep_in_memory=True))

        def measure() -> dict[str, float]:
            size = self.recipe.evaluation.batch_size
            quality = evaluate_quality(model, rows, self.task, cut.tokenizer, batch_size=size, progress=False)
            return {f"{EVALUATED}{name}": value for name, value in quality.metrics.items()}

        if points:
            MeasureWhileTraining(trainer, measure, points)
        return len(rows) if points else 0

    # What steps work on

    def _load(self, before: Done | None) -> PreTrainedModel:
        """Loads the model as the step before left it, or the base model with a head for the task."""
        return self._load_from(before.checkpoint) if before else self._with_head()

    def _load_from(self, checkpoint: Path) -> PreTrainedModel:
        return self.kind.load(checkpoint)

    def _with_head(self) -> PreTrainedModel:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.base)
        has_head = self.kind.has_head(config)
        if has_head and self.kind.head_fits(self.task, config):
            return self._load_from(self.base)
        first = self.recipe.steps[0]
        if first.methods or first.training is None:
            raise DataError(
                f"the model {self.recipe.model} has no head that is trained for {self.task.name}",
                hint="Begin the recipe with a step of `training` alone, which fine-tunes it.",
            )
        # Only the head of another task is made anew.
        return self.kind.load(self.base, ignore_mismatched_sizes=has_head, **self.kind.head(self.task))

    def _labelled(self, model: PreTrainedModel, rows: Dataset) -> Dataset:
        """Returns rows with the model's own label ids."""
        ids = align_labels(self.task, cast("Mapping[str, int]", model.config.label2id))
        return self.kind.with_label_ids(rows, ids)

    def _calibration(self, model: PreTrainedModel, count: int, cut: _Cut) -> Iterator[Batch]:
        train = cut.rows[self.training_split]
        rows = self._labelled(model, train).shuffle(seed=self.recipe.seed, keep_in_memory=True)
        rows = rows.select(range(min(count, len(rows))), keep_in_memory=True)
        collate, size = self.kind.collator(cut.tokenizer), self.recipe.evaluation.batch_size
        for start in range(0, len(rows), size):
            yield dict(collate([rows[i] for i in range(start, min(start + size, len(rows)))]))

    # The report

    def report(self, done: Sequence[Done]) -> tuple[Report, list[Answers]]:
        """Compares every step with the original: the model after the leading fine-tuning step, or the base."""
        answers = [replace(self._answers(each), groups=self.groups) for each in done]
        costing = Costing(self.recipe, self.task, lambda each: self._cut(each).tokenizer)
        original = done[0].record
        primary = self.task.metrics[0]
        rows = tuple(
            Row(
                name=each.name,
                methods=each.methods,
                metrics=each.record["metrics"],
                retention=retention(each.record["metrics"][primary], original["metrics"][primary], primary),
                parameters=each.record["parameters"],
                bytes=each.record["bytes"],
                speed=speed,
                seconds=each.record["seconds"],
                findings=each.record["findings"],
                comparison=compare(answers[0], given, self.task) if each is not done[0] else None,
                usage=usage,
                training=Training.of_record(kept) if (kept := each.record.get("training")) else None,
            )
            for each, given, (speed, usage) in zip(done, answers, costing.costs(done), strict=True)
        )
        report = Report(
            name=self.recipe.name,
            base_model=_without_folders(self.recipe.model),
            task=self.task.name,
            recipe=self._published_recipe(),
            environment=describe_environment(),
            split=self.task.evaluation_split,
            examples=original["examples"],
            metric=primary,
            seed=self.recipe.seed,
            rows=rows,
            grid=costing.grid(done[0], done[-1]),
            robustness=costing.robustness(done[0], done[-1], self.data[self.task.evaluation_split]),
        )
        return report, answers

    def _answers(self, done: Done) -> Answers:
        """Returns what a model answered when it was measured; it is measured again where that was lost."""
        kept = read_json(done.folder / ANSWERS)
        if not kept or kept["key"] != done.key:
            done.record.update(self._measure(done.checkpoint, done.folder, done.key))
            write_json(done.folder / RECORD, done.record)
            kept = read_json(done.folder / ANSWERS)
        return Answers(**kept["answers"])

    def _published_recipe(self) -> dict[str, Any]:
        """Returns the recipe without the folders of this machine."""
        values = self.recipe.to_dict()
        for field in {"model", "data"} & set(values):
            values[field] = _without_folders(values[field], always=field == "data")
        if isinstance(values["task"], dict):
            values["task"] = values["task"] | {"data": _without_folders(values["task"]["data"])}
        return values


def find_model(name: str, *, progress: bool) -> Path:
    """Returns the folder of a recipe's model, fetched where it is not here.

    Raises:
        DataError: A local folder holds no checkpoint.
        CheckpointError: What was fetched is not what hfcompress saved.
    """
    if is_demo_model(name):
        return fetch_model(name, progress=progress)
    if is_local(name):
        folder = Path(name)
        if not (folder / "config.json").is_file():
            raise DataError(f"model: {name} is not a checkpoint folder: it has no config.json")
        return folder
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    require_undamaged(folder)
    return folder


def _training_split(task: Task) -> str:
    if task.training_split is None:
        raise DataError(f"task '{task.name}' has no training data, which a run needs at least to calibrate on")
    return task.training_split


def _without_folders(name: str, *, always: bool = False) -> str:
    return f"./{Path(name).name}" if always or is_local(name) else name
