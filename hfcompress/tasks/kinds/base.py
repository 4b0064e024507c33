"""What a kind of task is: how rows are read, which head a model needs, and what its outputs answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from hfcompress.errors import DataError
from hfcompress.tasks.task import Generation, Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel

    Rows = Sequence[Mapping[str, Any]]
    Collator = Callable[[Rows], dict[str, torch.Tensor]]


class Given(NamedTuple):
    """A model's answers.

    Attributes:
        predictions: One an example, in the data's order.
        references: The right ones, in the same order.
        confidences: The probability given to each prediction; nothing where a kind has none.
    """

    predictions: list[Any]
    references: list[Any]
    confidences: list[float]


class Kind:
    """One kind of task; subclasses say what differs.

    Attributes:
        name: Its name in recipes.
        auto_class: The class of transformers that loads a model with its head.
        pipeline_tag: Its name on the Hub.
        metrics: What tasks of this kind may be judged by.
        defaults: What they are judged by where nothing is said.
        columns: The columns that are read, where nothing is said.
        label: The column of right answers, where nothing is said; empty where there is none.
        labelled: Whether answers are among a task's labels.
        exact: Whether answers are the same on any machine, as ids and texts are and losses are not.
        flips: Whether two models' answers can be told to be the same or not.
        unit: What an example is called.
        reads: What enters the model.
        generation: How answers are written where nothing is said, or None where they are not.
        encoded: Columns that encoded rows have at least.
    """

    name: str
    auto_class: str
    pipeline_tag: str
    metrics: tuple[str, ...]
    defaults: tuple[str, ...]
    columns: tuple[str, ...]
    label: str = "label"
    labelled: bool = False
    exact: bool = True
    flips: bool = True
    unit: str = "rows"
    reads: Literal["text", "images", "audio"] = "text"
    generation: Generation | None = None
    encoded: tuple[str, ...] = ("input_ids", "labels")

    # Data

    def check(self, task: Task, split: Dataset, where: str, *, training: bool) -> None:
        """Refuses a split that is not what the kind needs; its columns are there and it is not empty.

        Raises:
            DataError: It is not.
        """
        raise NotImplementedError

    def named(self, task: Task, split: Dataset) -> Dataset:
        """Returns the split with the names of its labels, where there are any."""
        return split

    def texts(self, task: Task, rows: Dataset) -> list[str]:
        """Returns all that a tokenizer must be able to cut."""
        return [text for column in task.columns for text in rows[column]]

    def sources(self, task: Task, rows: Dataset) -> list[str] | list[tuple[str, str]] | list[list[str]]:
        """Returns what each encoded row was made of, for a teacher that cuts texts by a tokenizer of its own.

        Raises:
            DataError: Rows of this kind are not one text, one pair or one list of words each.
        """
        raise DataError(
            f"a teacher with another tokenizer cannot teach {self.name}, whose rows are not one text each",
            hint="Take a teacher with the model's own tokenizer.",
        )

    # What a model reads

    def load_processor(self, checkpoint: str | Path) -> Any:
        """Loads what turns data into a model's inputs."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(checkpoint)

    def processor_key(self, processor: Any) -> Any:
        """Returns JSON values that are the same for processors that make the same inputs."""
        return {"vocabulary": processor.get_vocab(), "inputs": sorted(processor.model_input_names)}

    def encode(self, dataset: Dataset, task: Task, processor: Any, *, max_length: int) -> Dataset:
        """Returns what a model reads and `labels`, by the task's own label ids, not padded."""
        raise NotImplementedError

    def with_label_ids(self, rows: Dataset, ids: Sequence[int]) -> Dataset:
        """Returns encoded rows with a model's label ids in place of the task's; `ids` is in the task's order."""
        return rows

    def collator(self, processor: Any) -> Collator:
        """Returns what makes a batch of encoded rows."""
        raise NotImplementedError

    def lengths(self, rows: Dataset) -> list[int]:
        """Returns a number for each row by which rows of like size are batched."""
        return [len(row) for row in rows["input_ids"]]

    def speed_inputs(self, config: Any, batch_size: int) -> dict[str, torch.Tensor] | None:
        """Returns the batch that costs are measured on, or None where it is one of tokens."""
        return None

    def decoder_inputs(self, config: Any, batch_size: int) -> dict[str, torch.Tensor]:
        """Returns what such a batch of tokens must hold besides, for models that read their own answers."""
        return {}

    # The model

    def load(self, checkpoint: str | Path, **options: Any) -> PreTrainedModel:
        """Loads a model with this kind's head."""
        import transformers

        return getattr(transformers, self.auto_class).from_pretrained(checkpoint, **options)

    def has_head(self, config: Any) -> bool:
        """Tells whether a checkpoint's own config names a class with this kind's head."""
        import transformers

        mapping = getattr(transformers, self.auto_class)._model_mapping
        if type(config) not in mapping:
            return False
        found = mapping[type(config)]
        names = {each.__name__ for each in (found if isinstance(found, tuple) else (found,))}
        return bool(names & {str(name) for name in config.architectures or ()})

    def head_fits(self, task: Task, config: Any) -> bool:
        """Tells whether a head that is there is one for this task."""
        return True

    def head(self, task: Task) -> dict[str, Any]:
        """Returns the options that make a new head for a task."""
        return {}

    def require_head(self, task: Task, model: PreTrainedModel) -> None:
        """Refuses a model whose head is for other answers.

        Raises:
            DataError: It is.
        """

    # Answers

    def ask(self, model: PreTrainedModel, batch: Mapping[str, torch.Tensor], processor: Any, task: Task) -> Any:
        """Returns a model's outputs on a batch without labels, as `read` takes them."""
        return model(**batch)

    def batch_size(self, processor: Any, asked: int) -> int:
        """Returns how many rows may be asked at once; fewer where rows would change one another's answers."""
        return asked

    def told(self, task: Task) -> str:
        """Returns a sentence on how answers are come by, where that needs one."""
        return ""

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[Any]:
        """Returns what is kept of a batch's outputs, one a row."""
        raise NotImplementedError

    def answers(self, task: Task, ids: Sequence[int], rows: Dataset, kept: Sequence[Any]) -> Given:
        """Turns what was kept of the outputs into answers in the task's own terms.

        Args:
            task: What was asked.
            ids: The model's id of every label of the task, in the task's order.
            rows: The encoded rows.
            kept: What `read` returned for each of them.
        """
        raise NotImplementedError


class Labelled(Kind):
    """A kind whose answers are labels: one head output a label."""

    labelled = True

    def head_fits(self, task: Task, config: Any) -> bool:
        """Tells whether the head has the task's labels, by name."""
        from hfcompress.tasks.labels import align_labels

        try:
            align_labels(task, config.label2id)
        except DataError:
            return False
        return config.num_labels == len(task.labels)

    def head(self, task: Task) -> dict[str, Any]:
        """Returns the options of a head with the task's labels."""
        names = dict(enumerate(task.labels))
        return {
            "num_labels": len(names),
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
        }

    def require_head(self, task: Task, model: PreTrainedModel) -> None:
        """Refuses a head with other outputs.

        Raises:
            DataError: It has.
        """
        if model.config.num_labels != len(task.labels):
            raise DataError(
                f"task '{task.name}' needs {len(task.labels)} outputs; the model has {model.config.num_labels}"
            )


def pad(rows: Rows, padding: Mapping[str, int], *, leave_out: frozenset[str] = frozenset()) -> dict[str, torch.Tensor]:
    """Makes a batch of rows: lists are padded on the right to the longest, numbers become a vector.

    Args:
        rows: Mappings with the same keys.
        padding: What each list is padded with; 0 where nothing is said.
        leave_out: Keys that no model reads.

    Returns:
        For each key a tensor `(rows, longest)` or `(rows,)` of integers.
    """
    import torch

    batch = {}
    for key in rows[0]:
        if key in leave_out:
            continue
        values = [row[key] for row in rows]
        if not isinstance(values[0], list | torch.Tensor):
            batch[key] = torch.tensor(values)
            continue
        longest = max(len(value) for value in values)
        batch[key] = torch.full((len(values), longest), padding.get(key, 0), dtype=torch.long)
        for place, value in enumerate(values):
            batch[key][place, : len(value)] = torch.as_tensor(value)
    return batch
