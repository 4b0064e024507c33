"""Does a recipe's steps with one seed: each from the saved result of the one before, each measured as it was saved."""

from __future__ import annotations

import copy
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from hfcompress.evaluation.comparison import Answers
from hfcompress.evaluation.curves import EVALUATED, Training, training_of
from hfcompress.evaluation.quality import evaluate_quality
from hfcompress.material import UNLABELLED, Cut, Material
from hfcompress.methods.registry import Context, method_of
from hfcompress.modeling.checkpoint import save
from hfcompress.modeling.measure import count_parameters, weight_bytes
from hfcompress.modeling.tables import cast_floats
from hfcompress.recipe import Step
from hfcompress.run_folder import (
    ANSWERS,
    RECORD,
    Done,
    fingerprint,
    key_of,
    prepare,
    read_json,
    read_record,
    write_json,
)
from hfcompress.tasks.labels import are_generic

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, Trainer

    from hfcompress.methods.watching import Stopwatch

logger = logging.getLogger(__name__)

_CURVE_ROWS = 256  # a curve shows where a training went; what it came to is measured on all rows
_LOGS = "logs"


class Bench:
    """Where the steps of one seed are done.

    Args:
        material: The base model and the data.
        seed: Of the order of the data, of dropout and of new heads.
        work: Where each step has its folder.
        cache: Where methods keep what other runs may use again.
        quiet: No progress bars.
    """

    def __init__(self, material: Material, seed: int, work: Path, cache: Path, quiet: bool) -> None:
        self.material, self.recipe, self.seed = material, material.recipe, seed
        self.task, self.kind = material.task, material.kind
        self.work, self.cache, self.quiet = work, cache, quiet

    def run_steps(self, original: Done | None = None) -> list[Done]:
        """Does what is not done yet; the first model returned is the one that all others are compared with.

        Args:
            original: The base model as another seed measured it, which is the same for all.
        """
        key = self.material.start(self.seed)
        done = [] if self.begins_with_fine_tuning else [original or self._original(key)]
        # A teacher is another model than the one the steps begin with.
        before = done[-1] if done and self.material.teacher is None else None
        steps = self.recipe.steps
        for index, step in enumerate(steps, start=1):
            folder = self.work / f"{index}-{step.name}"
            key = key_of(key, step.key(), *self._further_rows(step))
            record = read_record(folder, key)
            state = "done already" if record else "starting"
            logger.info("step %d of %d: %s (%s)", index, len(steps), step.name, state)
            if record is None:
                record = self._do(step, folder, key, before, teacher=done[0] if done else None)
            names = tuple(method_of(config).name for config in step.methods)
            before = Done(step.name, names, folder / "checkpoint", folder, key, record)
            done.append(before)
        return done

    def _further_rows(self, step: Step) -> list[str]:
        """Returns a digest of the rows that a step learns beside train, of which only teachers speak."""
        digest = self.material.unlabelled_digest
        return [digest] if digest and _is_taught(step) else []

    def answers(self, done: Done) -> Answers:
        """Returns what a model answered when it was measured; it is measured again where that was lost."""
        kept = read_json(done.folder / ANSWERS)
        if not kept or kept["key"] != done.key:
            done.record.update(self._measure(done.checkpoint, done.folder, done.key))
            write_json(done.folder / RECORD, done.record)
            kept = read_json(done.folder / ANSWERS)
        return Answers(**kept["answers"])

    @property
    def begins_with_fine_tuning(self) -> bool:
        """Whether the first step makes the model that all others are compared with."""
        first = self.recipe.steps[0]
        return self.material.teacher is None and first.training is not None and not first.methods

    def _original(self, key: str) -> Done:
        """Measures the teacher, or the base model, which a recipe without leading fine-tuning starts from."""
        name = "original" if self.material.teacher is None else "teacher"
        base, folder = self.material.teacher or self.material.base, self.work / f"0-{name}"
        record = read_record(folder, key, checkpoint=base)
        if record is None:
            if self.material.teacher is None:
                self.material.with_head()  # says so where there is no head to measure
            prepare(folder, key)
            record = self._measure(base, folder, key) | {"key": key, "seconds": 0.0, "findings": {}}
            write_json(folder / RECORD, record)
        return Done(name, (), base, folder, key, record)

    def _do(self, step: Step, folder: Path, key: str, before: Done | None, teacher: Done | None) -> dict[str, Any]:
        from transformers import set_seed

        from hfcompress.methods.watching import Stopwatch

        prepare(folder, key)
        set_seed(self.seed)
        watch = Stopwatch()
        checkpoint, training = folder / "checkpoint", None
        findings = self._on_disk(step, before, checkpoint)
        if findings is None:
            findings, training = self._in_memory(step, folder, before, teacher, watch)
        seconds = round(watch.seconds, 1)
        _keep_logs(folder / "training" / "runs", folder / _LOGS)
        shutil.rmtree(folder / "training", ignore_errors=True)
        record = self._measure(checkpoint, folder, key) | {"key": key, "seconds": seconds, "findings": findings}
        record["training"] = training and asdict(training)
        write_json(folder / RECORD, record)
        return record

    def _on_disk(self, step: Step, before: Done | None, checkpoint: Path) -> dict[str, Any] | None:
        """Does a step on the files of the one before, where its method can; None where the model is to be loaded."""
        from transformers import AutoConfig

        method = method_of(step.methods[0]) if len(step.methods) == 1 else None
        if before is None or step.training is not None or method is None or method.stream is None:
            return None
        if self._names_to_tell(AutoConfig.from_pretrained(before.checkpoint)):
            return None
        findings = method.stream(before.checkpoint, checkpoint, step.methods[0], not self.quiet)
        return None if findings is None else {method.name: findings}

    def _in_memory(
        self, step: Step, folder: Path, before: Done | None, teacher: Done | None, watch: Stopwatch
    ) -> tuple[dict[str, Any], Training | None]:
        model = self._load(before)
        cut = self.material.cut(before.checkpoint if before else self.material.base)
        # A method may change the tokenizer in place; the steps before keep theirs.
        cut = Cut(copy.deepcopy(cut.tokenizer), cut.rows)
        training = None
        if step.training is None:
            findings = self._at_once(model, step, cut)
        else:
            findings, training = self._in_training(model, step, folder / "training", teacher, cut, watch)
        model.config.update(self._names_to_tell(model.config))
        save(model, folder / "checkpoint", tokenizer=cut.tokenizer)
        return findings, training

    def _names_to_tell(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Returns the names of the task's labels where the model was never told any, and is taken to use that order."""
        head = self.kind.head(self.task)
        if not self.task.labels or not are_generic(cast("dict[str, int]", config.label2id or {})):
            return {}
        return {name: head[name] for name in ("id2label", "label2id") if name in head}

    def _measure(self, checkpoint: Path, folder: Path, key: str) -> dict[str, Any]:
        """Judges what a user would load, never what is left in memory; the answers are kept in `folder`."""
        model, cut = self.kind.load(checkpoint), self.material.cut(checkpoint)
        quality = evaluate_quality(
            model,
            self.material.labelled(model, cut.rows[self.task.evaluation_split]),
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

    def _at_once(self, model: PreTrainedModel, step: Step, cut: Cut) -> dict[str, Any]:
        material = self.material
        batches = list(material.calibration(model, step.calibration, cut, seed=self.seed))
        texts = self.kind.texts(self.task, material.data[material.training_split])
        tokenizer = cut.tokenizer if self.kind.reads == "text" else None
        context = Context(calibration=batches, tokenizer=tokenizer, texts=texts, cache_dir=self.cache)
        findings: dict[str, Any] = {}
        for config in step.methods:
            method = method_of(config)
            assert method.apply is not None
            findings[method.name] = method.apply(model, config, context)
        return findings

    def _in_training(
        self, model: PreTrainedModel, step: Step, folder: Path, teacher: Done | None, cut: Cut, watch: Stopwatch
    ) -> tuple[dict[str, Any], Training]:
        from hfcompress.methods.teaching.transfer import transfer_set
        from hfcompress.methods.trainer import CompressionTrainer
        from hfcompress.methods.training import training_arguments

        assert step.training is not None
        taught = _is_taught(step)
        learned_from = [self._load(teacher), *map(self.kind.load, self.material.more_teachers)] if taught else None
        tokens = self._teachers_tokens(teacher, cut) if taught else None
        context = Context(teacher=learned_from, teacher_tokens=tokens, cache_dir=self.cache)
        parts = [part(config, context) for config in step.methods if (part := method_of(config).part)]
        del learned_from, context  # with a cache the teacher is dropped as soon as it has spoken
        rows = self.material.labelled(model, cut.rows[self.material.training_split])
        if taught and UNLABELLED in cut.rows:
            if not all(part.label_weight for part in parts):
                rows = rows.remove_columns("labels")  # that of a regression has no value that says none
            rows = transfer_set(rows, cut.rows[UNLABELLED])
        arguments = training_arguments(step.training, folder, seed=self.seed, examples=len(rows), quiet=self.quiet)
        if self.kind.reads != "text":
            arguments.train_sampling_strategy = "random"  # rows have no lengths,
            arguments.remove_unused_columns = False  # and become what a model reads in the batch only
        # Small updates are lost in 16-bit weights: they are trained in 32 bits and go back to what they were.
        dtype = model.dtype
        cast_floats(model, torch.float32)
        trainer = CompressionTrainer(
            model,
            arguments,
            parts=parts,
            train_dataset=rows,
            data_collator=self.kind.collator(cut.tokenizer),
            processing_class=cut.tokenizer,
        )
        trainer.add_callback(watch)
        examples = self._measure_along(trainer, model, cut)
        trainer.train(resume_from_checkpoint=True)
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if model.dtype != dtype:
            cast_floats(model, dtype)
        names = [method_of(config).name for config in step.methods]
        findings = dict(zip(names, trainer.findings, strict=True))
        return findings, training_of(trainer.state.log_history, examples)

    def _teachers_tokens(self, teacher: Done | None, cut: Cut) -> list[Any]:
        """Returns what each teacher reads; a step since then may have changed the student's tokenizer."""
        assert teacher is not None, "the first row of a run teaches"
        return [self.material.teacher_tokens(each, cut) for each in (teacher.checkpoint, *self.material.more_teachers)]

    def _measure_along(self, trainer: Trainer, model: PreTrainedModel, cut: Cut) -> int:
        """Lets a training measure itself for its curves; returns on how many rows."""
        from hfcompress.methods.watching import MeasureWhileTraining

        points = self.recipe.evaluation.curve_points
        rows = cut.rows[self.task.evaluation_split]
        # From all over the split: data are often sorted, by class too.
        count = min(_CURVE_ROWS, len(rows))
        spread = [place * len(rows) // count for place in range(count)]
        rows = self.material.labelled(model, rows.select(spread, keep_in_memory=True))

        def measure() -> dict[str, float]:
            size = self.recipe.evaluation.batch_size
            quality = evaluate_quality(model, rows, self.task, cut.tokenizer, batch_size=size, progress=False)
            return {f"{EVALUATED}{name}": value for name, value in quality.metrics.items()}

        if points:
            MeasureWhileTraining(trainer, measure, points)
        return len(rows) if points else 0

    def _load(self, before: Done | None) -> PreTrainedModel:
        """Loads the model as the step before left it, or the base model with a head for the task."""
        return self.kind.load(before.checkpoint) if before else self.material.with_head()


def _is_taught(step: Step) -> bool:
    return any(method_of(config).name == "distillation" for config in step.methods)


def _keep_logs(written: Path, kept: Path) -> None:
    """Moves what a tracker wrote beside its checkpoints out of the folder that goes."""
    if written.is_dir():
        shutil.rmtree(kept, ignore_errors=True)
        shutil.move(written, kept)
