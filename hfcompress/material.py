"""What every step of a run works with: the base model, the task's data, and how tokenizers cut them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hfcompress.errors import DataError
from hfcompress.evaluation import attacks, explanations
from hfcompress.evaluation.groups import group_labels
from hfcompress.evaluation.robustness import KINDS
from hfcompress.methods.registry import Batch
from hfcompress.modeling.integrity import require_undamaged
from hfcompress.recipe import Recipe
from hfcompress.recipe.schema import Step, is_local
from hfcompress.run_folder import fingerprint, key_of, rows_digest
from hfcompress.tasks import Task, align_labels, fetch_model, is_demo_model, kind_of, load_data, preprocess
from hfcompress.tasks.augmentation import augmented
from hfcompress.tasks.data import read_splits

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedModel


# Beside the splits of the task: what only a teacher has an answer to.
UNLABELLED = "unlabelled"
# The loss of these is not one over classes.
_NOT_SMOOTHED = ("regression", "question_answering", "speech_recognition")
_TAUGHT_WITHOUT_LABELS = ("classification", "regression")


@dataclass(frozen=True)
class Cut:
    """The task's rows as one tokenizer cuts them, or as one image processor takes them."""

    tokenizer: Any
    rows: dict[str, Dataset]


class Material:
    """The base model and the data of a recipe; the same for every seed.

    Args:
        recipe: What to do.
        progress: Whether a download shows its progress.

    Raises:
        DataError: Model or data are not what the recipe needs.
    """

    def __init__(self, recipe: Recipe, *, progress: bool) -> None:
        self.recipe = recipe
        self.task: Task = recipe.described_task
        self.kind = kind_of(self.task)
        for asked, kinds in (
            ("robustness", KINDS),
            ("explanations", (explanations.KIND,)),
            ("attack", (attacks.KIND,)),
        ):
            if getattr(recipe.evaluation, asked) and self.kind.name not in kinds:
                raise DataError(f"evaluation.{asked}: is for tasks of kind {' or '.join(kinds)}, not {self.kind.name}")
        self.training_split = _training_split(self.task)
        _refuse_smoothing(recipe.steps, self.kind.name)
        self.base = find_model(recipe.model, progress=progress)
        self.teacher = find_model(recipe.teacher, progress=progress) if recipe.teacher else None
        self.more_teachers = [find_model(each, progress=progress) for each in recipe.more_teachers]
        self.data: DatasetDict = load_data(self.task, recipe.data_folder, progress=progress)
        if (further := self._unlabelled()) is not None:
            self.data[UNLABELLED] = further
        self._cuts: dict[str, Cut] = {}
        self.groups = self._groups()
        teachers = [("teacher", recipe.teacher, self.teacher)] if self.teacher else []
        teachers += [("more_teachers", *each) for each in zip(recipe.more_teachers, self.more_teachers, strict=True)]
        for field, name, folder in teachers:
            if not self._is_trained(folder):
                raise DataError(
                    f"{field}: {name} has no head that is trained for {self.task.name}",
                    hint="Fine-tune it first, by a recipe with one step of `training`, and name that run's folder.",
                )

    def start(self, seed: int) -> str:
        """Returns the key of what the first step of a seed begins with."""
        # What is generated is said of tasks that generate alone.
        task = {name: value for name, value in asdict(self.task).items() if name != "generation" or value is not None}
        taught: dict[str, Any] = {"teacher": fingerprint(self.teacher)} if self.teacher else {}
        if self.more_teachers:
            taught["more_teachers"] = [fingerprint(each) for each in self.more_teachers]
        rows = {split: digest for split, digest in self._rows_digests.items() if split != UNLABELLED}
        return key_of({"model": self._base_digests, "task": task, "seed": seed} | taught, rows)

    @property
    def unlabelled_digest(self) -> str | None:
        """Returns a digest of the rows that only teachers have an answer to; None where there are none."""
        return self._rows_digests.get(UNLABELLED)

    @cached_property
    def _base_digests(self) -> dict[str, str]:
        return fingerprint(self.base)

    @cached_property
    def _rows_digests(self) -> dict[str, str]:
        return {split: rows_digest(rows) for split, rows in self.cut(self.base).rows.items()}

    def _groups(self) -> dict[str, list[str]]:
        columns, split = self.recipe.evaluation.groups, self.task.evaluation_split
        labels = group_labels(self.data[split], columns)
        alike = len(self.cut(self.base).rows[split]) == len(self.data[split])
        if columns and not (alike and self.kind.flips):
            raise DataError(
                f"evaluation.groups: an answer of task '{self.task.name}' is not right or wrong row by row",
                hint="Leave `groups` out.",
            )
        return labels

    def cut(self, checkpoint: Path) -> Cut:
        """Cuts the texts by a checkpoint's own tokenizer, which a step may have changed; each tokenizer once."""
        tokenizer = self.kind.load_processor(checkpoint)
        key = key_of(self.kind.processor_key(tokenizer))
        if key not in self._cuts:
            length = self.recipe.max_length
            rows = {
                split: preprocess(self.data[split], self.task, tokenizer, max_length=length, label2id=None)
                for split in (self.training_split, self.task.evaluation_split, UNLABELLED)
                if split in self.data
            }
            self._cuts[key] = Cut(tokenizer, rows)
        return self._cuts[key]

    def _unlabelled(self) -> Dataset | None:
        """Returns rows that only teachers have an answer to, given and made, or None where none are asked for."""
        from datasets import concatenate_datasets

        given, made = self.recipe.unlabelled, self.recipe.augmentation
        train, label = self.data[self.training_split], self.task.label
        if given is None and made is None:
            return None
        field = "augmentation" if given is None else "unlabelled"
        if self.kind.name not in _TAUGHT_WITHOUT_LABELS or not label:
            kinds = " or ".join(_TAUGHT_WITHOUT_LABELS)
            raise DataError(
                f"{field}: is for tasks of kind {kinds}, not {self.kind.name}", hint=f"Leave `{field}` out."
            )
        if self.kind.name == "regression" and any(_learns_labels(step) for step in self.recipe.steps):
            raise DataError(
                f"{field}: rows without a number cannot be learnt beside rows with one",
                hint="Set hard: 0 in `distillation`, to learn from the teacher alone.",
            )
        parts: list[Any] = [] if given is None else [self._texts_of(given)]
        parts += [] if made is None else [augmented(train, self.task.columns, made)]
        # The column is there because the kind wants it; nobody reads it.
        labels = train.features[label]
        return concatenate_datasets(
            [each.add_column(label, [0] * len(each)).cast_column(label, labels) for each in parts]
        )

    def _texts_of(self, folder: str) -> Dataset:
        splits = read_splits(self.task, folder, progress=False)
        if self.training_split not in splits:
            raise DataError(f"unlabelled: {folder} has no split '{self.training_split}'")
        rows = splits[self.training_split]
        if missing := [name for name in self.task.columns if name not in rows.column_names]:
            raise DataError(f"unlabelled: the rows of {folder} lack the column '{missing[0]}'")
        return rows.select_columns(list(self.task.columns))

    def labelled(self, model: PreTrainedModel, rows: Dataset) -> Dataset:
        """Returns rows with the model's own label ids."""
        ids = align_labels(self.task, cast("Mapping[str, int]", model.config.label2id))
        return self.kind.with_label_ids(rows, ids)

    def calibration(self, model: PreTrainedModel, count: int, cut: Cut, *, seed: int) -> Iterator[Batch]:
        """Yields batches of training examples, drawn by the seed."""
        train = cut.rows[self.training_split]
        rows = self.labelled(model, train).shuffle(seed=seed, keep_in_memory=True)
        rows = rows.select(range(min(count, len(rows))), keep_in_memory=True)
        collate, size = self.kind.collator(cut.tokenizer), self.recipe.evaluation.batch_size
        for start in range(0, len(rows), size):
            yield dict(collate([rows[i] for i in range(start, min(start + size, len(rows)))]))

    def with_head(self) -> PreTrainedModel:
        """Loads the base model with a head for the task, a new one where the recipe begins with training.

        Raises:
            DataError: It has no head for the task, and none is trained.
        """
        from transformers import AutoConfig

        if self._is_trained(self.base):
            return self.kind.load(self.base)
        has_head = self.kind.has_head(AutoConfig.from_pretrained(self.base))
        first = self.recipe.steps[0]
        if first.training is None or (first.methods and self.teacher is None):
            raise DataError(
                f"the model {self.recipe.model} has no head that is trained for {self.task.name}",
                hint="Begin the recipe with a step of `training`, which fine-tunes it.",
            )
        # Only the head of another task is made anew.
        return self.kind.load(self.base, ignore_mismatched_sizes=has_head, **self.kind.head(self.task))

    def _is_trained(self, checkpoint: Path) -> bool:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(checkpoint)
        return self.kind.has_head(config) and self.kind.head_fits(self.task, config)

    def teacher_tokens(self, teacher: Path, cut: Cut) -> Any:
        """Returns what a teacher reads where its tokenizer is not the model's, or None.

        Raises:
            DataError: The rows are not one text each.
        """
        if self.kind.reads != "text":
            return None
        from hfcompress.methods.distillation import OtherTokens

        own = self.kind.load_processor(teacher)
        if self.kind.processor_key(own) == self.kind.processor_key(cut.tokenizer):
            return None
        splits = [self.training_split, UNLABELLED] if UNLABELLED in self.data else [self.training_split]
        texts: Any = [text for split in splits for text in self.kind.sources(self.task, self.data[split])]
        return OtherTokens(texts, cut.tokenizer, own, self.recipe.max_length)


def find_model(name: str, *, progress: bool) -> Path:
    """Returns the folder of a recipe's model, fetched where it is not here.

    Raises:
        DataError: A local folder holds no checkpoint, or the Hub has or gives none.
        CheckpointError: What was fetched is not what hfcompress saved.
    """
    if is_demo_model(name):
        return fetch_model(name, progress=progress)
    if is_local(name):
        folder = Path(name)
        if not (folder / "config.json").is_file():
            raise DataError(f"model: {name} is not a checkpoint folder: it has no config.json")
        return folder
    folder = _from_hub(name)
    require_undamaged(folder)
    return folder


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "README.md"]  # the last states the licence
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except (OSError, HfHubHTTPError) as error:
        raise DataError(
            f"model: {name} could not be had from the Hub: {' '.join(str(error).split())}",
            hint=f"For the folder of this name write ./{name}." if Path(name).is_dir() else "",
        ) from error


def _refuse_smoothing(steps: Sequence[Step], kind: str) -> None:
    for step in steps:
        if kind in _NOT_SMOOTHED and step.training is not None and step.training.label_smoothing:
            raise DataError(
                f"steps.{step.name}.training.label_smoothing: answers of tasks of kind {kind} are no classes whose "
                "labels could be smoothed",
                hint="Leave it out.",
            )


def _learns_labels(step: Step) -> bool:
    """Tells whether a step that distils learns from labels too."""
    from hfcompress.methods.distillation import DistillationConfig

    return any(isinstance(config, DistillationConfig) and config.hard > 0 for config in step.methods)


def _training_split(task: Task) -> str:
    if task.training_split is None:
        raise DataError(f"task '{task.name}' has no training data, which a run needs at least to calibrate on")
    return task.training_split
