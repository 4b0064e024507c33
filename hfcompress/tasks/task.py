"""What a task is, apart from its data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

KindName = Literal[
    "classification",
    "regression",
    "causal_lm",
    "masked_lm",
    "token_classification",
    "question_answering",
    "image_classification",
    "summarization",
    "speech_recognition",
    "speech_to_text",
]


@dataclass(frozen=True, kw_only=True)
class Generation:
    """How texts are written, the same for every model of a run; nothing is sampled.

    Attributes:
        tokens: The most tokens of a text; the right ones are cut there too where they are learnt from.
        beams: Texts that are followed up at once; 1 is greedy.
    """

    tokens: int = 64
    beams: int = 1


@dataclass(frozen=True, kw_only=True)
class Task:
    """One thing to learn and how it is judged.

    Attributes:
        name: Its name in recipes, such as `sst2` or `demo/movie-reviews`.
        kind: What a model predicts; see `hfcompress.tasks.kinds`.
        columns: What a model reads: a text column, the two of a pair in the order the tokenizer gets them, a column
            of words, or one of images.
        label: The column of right answers; empty where the text itself is the answer, as in language models.
        labels: The label names in the order of the data's label ids; empty where answers are not labels.
        metrics: What is reported; retention is computed on the first.
        evaluation_split: The split that is measured.
        training_split: The split that is learnt from, or None where a task is only measured.
        dataset: The data's id on the Hub, or a name of it for people.
        dataset_config: The configuration of a Hub dataset that holds the task.
        generation: How answers are written, or None where they are not.
    """

    name: str
    kind: KindName
    columns: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    evaluation_split: str
    training_split: str | None = "train"
    dataset: str
    dataset_config: str | None
    generation: Generation | None = None

    @property
    def pair(self) -> bool:
        """Whether the model reads two texts at once."""
        return len(self.columns) == 2
