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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hfcompress.errors import DataError
from hfcompress.evaluation.comparison import Answers, compare
from hfcompress.evaluation.cost import Speed, measure_speed, speed_inputs
from hfcompress.evaluation.quality import evaluate_quality
from hfcompress.evaluation.report import Report, Row, describe_environment, retention
from hfcompress.evaluation.usage import Usage, measure_usage
from hfcompress.methods.registry import Batch, Context, method_of
from hfcompress.modeling.checkpoint import save
from hfcompress.modeling.measure import count_parameters, weight_bytes
from hfcompress.recipe import Recipe, Step
from hfcompress.recipe.schema import is_local
from hfcompress.run_folder import (
    ANSWERS,
    COSTS,
    RECORD,
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
from hfcompress.tasks import Task, align_labels, fetch_model, get_task, is_demo_model, load_data, preprocess

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


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

        logger.info("pushed to %s", push(output, recipe.push.repo, private=recipe.push.private))
    return report


@dataclass(frozen=True)
class _Done:
    """A model of the run that is saved and measured: the original, or what a step made."""

    name: str
    methods: tuple[str, ...]
    checkpoint: Path
    folder: Path
    key: str
    record: dict[str, Any]


@dataclass(frozen=True)
class _Cut:
    """The task's texts as one tokenizer cuts them."""

    tokenizer: PreTrainedTokenizerBase
    rows: dict[str, Dataset]


class _Bench:
    """What every step of one run shares: the base model, the data, and how tokenizers cut them."""

    def __init__(self, recipe: Recipe, work: Path, quiet: bool) -> None:
        self.recipe, self.work, self.quiet = recipe, work, quiet
        self.task: Task = get_task(recipe.task)
        self.base = find_model(recipe.model, progress=not quiet)
        self.data: DatasetDict = load_data(self.task, recipe.data, progress=not quiet)
        self._cuts: dict[str, _Cut] = {}
        self.start = key_of(
            {"model": fingerprint(self.base), "task": self.task.name, "seed": recipe.seed},
            {split: rows_digest(rows) for split, rows in self._cut(self.base).rows.items()},
        )

    def _cut(self, checkpoint: Path) -> _Cut:
        """Cuts the texts by a checkpoint's own tokenizer, which a step may have changed; each tokenizer once."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        key = key_of(tokenizer.get_vocab())
        if key not in self._cuts:
            length = self.recipe.max_length
            rows = {
                split: preprocess(self.data[split], self.task, tokenizer, max_length=length, label2id=None)
                for split in ("train", self.task.evaluation_split)
            }
            self._cuts[key] = _Cut(tokenizer, rows)
        return self._cuts[key]

    # Steps

    def run_steps(self) -> list[_Done]:
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
            done.append(_Done(step.name, names, folder / "checkpoint", folder, key, record))
        return done

    def _original(self) -> _Done:
        """Measures the base model, which a recipe without leading fine-tuning starts from."""
        folder = self.work / "0-original"
        record = read_record(folder, self.start, checkpoint=self.base)
        if record is None:
            self._with_head()  # says so where there is no head to measure
            prepare(folder, self.start)
            record = self._measure(self.base, folder, self.start) | {"key": self.start, "seconds": 0.0, "findings": {}}
            write_json(folder / RECORD, record)
        return _Done("original", (), self.base, folder, self.start, record)

    def _do(self, step: Step, folder: Path, key: str, before: _Done | None, teacher: _Done | None) -> dict[str, Any]:
        from transformers import set_seed

        prepare(folder, key)
        set_seed(self.recipe.seed)
        started = time.monotonic()
        model = self._load(before)
        cut = self._cut(before.checkpoint if before else self.base)
        # A method may change the tokenizer in place; the steps before keep theirs.
        cut = _Cut(copy.deepcopy(cut.tokenizer), cut.rows)
        if step.training is None:
            findings = self._at_once(model, step, cut)
        else:
            findings = self._in_training(model, step, folder / "training", teacher, cut)
        seconds = round(time.monotonic() - started, 1)
        checkpoint = folder / "checkpoint"
        save(model, checkpoint, tokenizer=cut.tokenizer)
        shutil.rmtree(folder / "training", ignore_errors=True)
        del model
        record = self._measure(checkpoint, folder, key) | {"key": key, "seconds": seconds, "findings": findings}
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
        train = self.data["train"]
        texts = [text for column in self.task.columns for text in train[column]]
        context = Context(calibration=batches, tokenizer=cut.tokenizer, texts=texts)
        findings: dict[str, Any] = {}
        for config in step.methods:
            method = method_of(config)
            assert method.apply is not None
            findings[method.name] = method.apply(model, config, context)
        return findings

    def _in_training(
        self, model: PreTrainedModel, step: Step, folder: Path, teacher: _Done | None, cut: _Cut
    ) -> dict[str, Any]:
        from transformers import DataCollatorWithPadding

        from hfcompress.methods.trainer import CompressionTrainer
        from hfcompress.methods.training import training_arguments

        assert step.training is not None
        taught = any(method_of(config).name == "distillation" for config in step.methods)
        learned_from = self._load(teacher) if taught else None
        context = Context(teacher=learned_from, cache_dir=self.work.parent / "teacher_cache")
        parts = [part(config, context) for config in step.methods if (part := method_of(config).part)]
        del learned_from, context  # with a cache the teacher is dropped as soon as it has spoken
        rows = self._labelled(model, cut.rows["train"])
        arguments = training_arguments(
            step.training, folder, seed=self.recipe.seed, examples=len(rows), quiet=self.quiet
        )
        trainer = CompressionTrainer(
            model,
            arguments,
            parts=parts,
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(cut.tokenizer),
            processing_class=cut.tokenizer,
        )
        trainer.train(resume_from_checkpoint=True)
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        names = [method_of(config).name for config in step.methods]
        return dict(zip(names, trainer.findings, strict=True))

    # What steps work on

    def _load(self, before: _Done | None) -> PreTrainedModel:
        """Loads the model as the step before left it, or the base model with a head for the task."""
        return self._load_from(before.checkpoint) if before else self._with_head()

    def _load_from(self, checkpoint: Path) -> PreTrainedModel:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification.from_pretrained(checkpoint)

    def _with_head(self) -> PreTrainedModel:
        from transformers import AutoConfig, AutoModelForSequenceClassification

        config = AutoConfig.from_pretrained(self.base)
        has_head = any(str(name).endswith("ForSequenceClassification") for name in config.architectures or ())
        if has_head and self._head_fits(config):
            return self._load_from(self.base)
        first = self.recipe.steps[0]
        if first.methods or first.training is None:
            raise DataError(
                f"the model {self.recipe.model} has no head that is trained for {self.task.name}",
                hint="Begin the recipe with a step of `training` alone, which fine-tunes it.",
            )
        names = dict(enumerate(self.task.labels)) or {0: "score"}
        return AutoModelForSequenceClassification.from_pretrained(
            self.base,
            num_labels=len(names),
            id2label=names,
            label2id={name: index for index, name in names.items()},
            problem_type="regression" if self.task.kind == "regression" else None,
            ignore_mismatched_sizes=has_head,  # only the head of another task is made anew
        )

    def _head_fits(self, config: Any) -> bool:
        try:
            align_labels(self.task, config.label2id)
        except DataError:
            return False
        return config.num_labels == (len(self.task.labels) or 1)

    def _labelled(self, model: PreTrainedModel, rows: Dataset) -> Dataset:
        """Returns rows with the model's own label ids."""
        ids = align_labels(self.task, cast("Mapping[str, int]", model.config.label2id))
        if list(ids) == sorted(ids):
            return rows
        return rows.map(lambda row: {"labels": ids[row["labels"]]}, keep_in_memory=True)

    def _calibration(self, model: PreTrainedModel, count: int, cut: _Cut) -> Iterator[Batch]:
        from transformers import DataCollatorWithPadding

        rows = self._labelled(model, cut.rows["train"]).shuffle(seed=self.recipe.seed, keep_in_memory=True)
        rows = rows.select(range(min(count, len(rows))), keep_in_memory=True)
        collate, size = DataCollatorWithPadding(cut.tokenizer), self.recipe.evaluation.batch_size
        for start in range(0, len(rows), size):
            yield dict(collate([rows[i] for i in range(start, min(start + size, len(rows)))]))

    # The report

    def report(self, done: Sequence[_Done]) -> tuple[Report, list[Answers]]:
        """Compares every step with the original: the model after the leading fine-tuning step, or the base."""
        answers = [self._answers(each) for each in done]
        original = done[0].record
        primary = self.task.metrics[0]
        rows = tuple(
            Row(
                name=each.name,
                methods=each.methods,
                metrics=each.record["metrics"],
                retention=retention(each.record["metrics"][primary], original["metrics"][primary]),
                parameters=each.record["parameters"],
                bytes=each.record["bytes"],
                speed=speed,
                seconds=each.record["seconds"],
                findings=each.record["findings"],
                comparison=compare(answers[0], given, self.task) if each is not done[0] else None,
                usage=usage,
            )
            for each, given, (speed, usage) in zip(done, answers, self._costs(done), strict=True)
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
        )
        return report, answers

    def _answers(self, done: _Done) -> Answers:
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
        return values

    def _costs(self, done: Sequence[_Done]) -> list[tuple[Speed | None, Usage]]:
        """Times each step's model beside the original; kept with the step, since it is a measurement."""
        asked = self.recipe.evaluation
        original = None
        costs: list[tuple[Speed | None, Usage]] = []
        for each in done:
            file = each.folder / COSTS
            key = key_of(each.key, asked.model_dump(), describe_environment())
            known = read_json(file)
            if known and known["key"] == key:
                costs.append((known["speed"] and Speed(**known["speed"]), Usage(**known["usage"])))
                continue
            logger.info("timing %s", each.name)
            original = original or self._load_from(done[0].checkpoint)
            model = self._load_from(each.checkpoint)
            vocabulary = min(original.config.vocab_size, model.config.vocab_size)
            inputs = speed_inputs(vocabulary, asked.speed_batch_size, asked.speed_sequence_length)
            speed = None
            if each is not done[0]:
                speed = measure_speed(original, model, inputs, repeats=asked.speed_repeats)
            del model
            usage = measure_usage(partial(self._load_from, each.checkpoint), inputs)
            write_json(file, {"key": key, "speed": speed and asdict(speed), "usage": asdict(usage)})
            costs.append((speed, usage))
        return costs


def find_model(name: str, *, progress: bool) -> Path:
    """Returns the folder of a recipe's model, fetched where it is not here.

    Raises:
        DataError: A local folder holds no checkpoint.
    """
    if is_demo_model(name):
        return fetch_model(name, progress=progress)
    if is_local(name):
        folder = Path(name)
        if not (folder / "config.json").is_file():
            raise DataError(f"model: {name} is not a checkpoint folder: it has no config.json")
        return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))


def _without_folders(name: str, *, always: bool = False) -> str:
    return f"./{Path(name).name}" if always or is_local(name) else name
