"""Words in sentences, each with one of the labels; named entities are read from labels such as `B-person`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.errors import DataError
from hfcompress.tasks.checks import check_names
from hfcompress.tasks.kinds.base import Given, Labelled, pad
from hfcompress.tasks.kinds.blocks import require_fast
from hfcompress.tasks.task import Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

_NO_INPUTS = frozenset({"words", "tags"})


class TokenClassification(Labelled):
    """One label a word.

    The first token of a word is the one that is learnt and asked; the others have no label (-100). Words that are
    cut off at `max_length`, or that the tokenizer has no token for, are answered with the label `O`, or the first
    label where there is no `O`: they count.
    """

    name = "token_classification"
    auto_class = "AutoModelForTokenClassification"
    pipeline_tag = "token-classification"
    metrics = ("overall_f1", "overall_precision", "overall_recall", "overall_accuracy")
    defaults = ("overall_f1", "overall_precision", "overall_recall", "overall_accuracy")
    columns = ("tokens",)
    label = "ner_tags"
    unit = "sentences"

    def check(self, task: Task, split: Dataset, where: str, *, training: bool) -> None:
        """Lists of words, and of as many label ids."""
        feature = getattr(split.features[task.label], "feature", None)
        check_names(task, getattr(feature, "names", None), where)
        words, tags = split[task.columns[0]], split[task.label]
        for row, (said, given) in enumerate(zip(words, tags, strict=True)):
            if not isinstance(said, list) or not all(isinstance(word, str) for word in said):
                raise DataError(f"{where}: column '{task.columns[0]}' must hold lists of words; row {row} does not")
            if not isinstance(given, list) or len(given) != len(said):
                raise DataError(f"{where}: column '{task.label}' must hold one label a word; row {row} does not")
            strange = [tag for tag in given if type(tag) is not int or not 0 <= tag < len(task.labels)]
            if strange:
                raise DataError(
                    f"{where}: column '{task.label}' holds {strange[0]!r} in row {row}; "
                    f"allowed: 0 to {len(task.labels) - 1} ({', '.join(task.labels)})"
                )

    def texts(self, task: Task, rows: Dataset) -> list[str]:
        """Returns the sentences, their words joined by blanks."""
        return [" ".join(words) for words in rows[task.columns[0]]]

    def load_processor(self, checkpoint: str | Path) -> Any:
        """Loads a tokenizer that takes words one by one."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        if getattr(tokenizer, "add_prefix_space", None) is False:  # byte-level: else words are glued together
            tokenizer = AutoTokenizer.from_pretrained(checkpoint, add_prefix_space=True)
        return tokenizer

    def sources(self, task: Task, rows: Dataset) -> list[list[str]]:
        """Returns the words of each row."""
        return [list(each) or [" "] for each in rows[task.columns[0]]]

    def encode(self, dataset: Dataset, task: Task, processor: Any, *, max_length: int) -> Dataset:
        """Returns tokens with labels, the numbers of the words asked (`words`) and the right labels (`tags`)."""
        require_fast(processor)

        def tokenize(rows: dict[str, list[Any]]) -> dict[str, Any]:
            words, tags = rows[task.columns[0]], rows[task.label]
            # The tokenizer takes a sentence without words for a text; with one blank in it it has no tokens either.
            said = [each or [" "] for each in words]
            encoded = processor(said, is_split_into_words=True, truncation=True, max_length=max_length)
            made: dict[str, Any] = dict(encoded) | {"labels": [], "words": [], "tags": tags}
            for row, given in enumerate(tags):
                labels, asked, before = [], [], None
                for word in encoded.word_ids(row):
                    first = word is not None and word != before and word < len(given)
                    labels.append(given[word] if first else -100)
                    asked += [word] if first else []
                    before = word
                made["labels"].append(labels)
                made["words"].append(asked)
            return made

        return dataset.map(
            tokenize,
            batched=True,
            remove_columns=dataset.column_names,
            keep_in_memory=True,
            desc=f"Tokenizing {task.name}",
        )

    def with_label_ids(self, rows: Dataset, ids: Sequence[int]) -> Dataset:
        """Translates each labelled token."""
        if list(ids) == sorted(ids):
            return rows
        return rows.map(
            lambda row: {"labels": [ids[label] if label >= 0 else label for label in row["labels"]]},
            keep_in_memory=True,
        )

    def collator(self, processor: Any) -> Any:
        """Pads with tokens that are neither attended to nor asked."""
        padding = {"labels": -100, "input_ids": processor.pad_token_id or 0}
        return lambda rows: pad(rows, padding, leave_out=_NO_INPUTS)

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[Any]:
        """Keeps the model's label id of each token that is asked."""
        found = outputs.logits.argmax(-1)
        return [row[labels.ne(-100)].tolist() for row, labels in zip(found, batch["labels"], strict=True)]

    def answers(self, task: Task, ids: Sequence[int], rows: Dataset, kept: Sequence[Any]) -> Given:
        """Returns each sentence's labels by name, one a word."""
        names = {model_id: task.labels[task_id] for task_id, model_id in enumerate(ids)}
        none = "O" if "O" in task.labels else task.labels[0]
        predictions, references = [], []
        for asked, tags, found in zip(rows["words"], rows["tags"], kept, strict=True):
            said = dict(zip(asked, found, strict=True))
            predictions.append([names[said[word]] if word in said else none for word in range(len(tags))])
            references.append([task.labels[tag] for tag in tags])
        return Given(predictions, references, [])
