"""The tasks by name: GLUE with its diagnostic set, the demo, and one or more of every other kind."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hfcompress.configuration import suggest
from hfcompress.errors import DataError
from hfcompress.tasks.task import Generation, Task

GLUE_DATASET = "nyu-mll/glue"


def _glue(
    name: str,
    columns: tuple[str, ...],
    labels: tuple[str, ...],
    metrics: tuple[str, ...] = ("accuracy",),
    *,
    evaluation_split: str = "validation",
    training_split: str | None = "train",
    known_as: str = "",
) -> Task:
    return Task(
        name=known_as or name,
        kind="classification" if labels else "regression",
        columns=columns,
        label="label",
        labels=labels,
        metrics=metrics,
        evaluation_split=evaluation_split,
        training_split=training_split,
        dataset=GLUE_DATASET,
        dataset_config=name,
    )


_SENTENCES = ("sentence1", "sentence2")
_NLI = ("entailment", "neutral", "contradiction")
_RTE = ("entailment", "not_entailment")

_ENTITIES = ("corporation", "creative-work", "group", "location", "person", "product")

_TASKS = (
    _glue("cola", ("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    _glue("sst2", ("sentence",), ("negative", "positive")),
    _glue("mrpc", _SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1")),
    _glue("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    _glue("stsb", _SENTENCES, (), ("pearson", "spearmanr")),
    _glue("mnli", ("premise", "hypothesis"), _NLI, evaluation_split="validation_matched"),
    # The same task, judged on texts of kinds that are not in its training data.
    _glue("mnli", ("premise", "hypothesis"), _NLI, evaluation_split="validation_mismatched", known_as="mnli-mm"),
    _glue("qnli", ("question", "sentence"), _RTE),
    _glue("rte", _SENTENCES, _RTE),
    _glue("wnli", _SENTENCES, ("not_entailment", "entailment")),
    _glue(
        "ax",
        ("premise", "hypothesis"),
        _NLI,
        ("matthews_correlation",),
        evaluation_split="test",
        training_split=None,
    ),
    Task(
        name="demo/movie-reviews",
        kind="classification",
        columns=("sentence",),
        label="label",
        labels=("negative", "positive"),
        metrics=("accuracy", "f1"),
        evaluation_split="validation",
        dataset="movie review sentences rated for VADER (Hutto and Gilbert, 2014)",
        dataset_config=None,
    ),
    Task(
        name="wikitext-2",
        kind="causal_lm",
        columns=("text",),
        label="",
        labels=(),
        metrics=("perplexity", "bits_per_byte"),
        evaluation_split="test",
        dataset="Salesforce/wikitext",
        dataset_config="wikitext-2-raw-v1",
    ),
    Task(
        name="wikitext-2-masked",
        kind="masked_lm",
        columns=("text",),
        label="",
        labels=(),
        metrics=("masked_perplexity", "masked_accuracy"),
        evaluation_split="test",
        dataset="Salesforce/wikitext",
        dataset_config="wikitext-2-raw-v1",
    ),
    Task(
        name="wnut17",
        kind="token_classification",
        columns=("tokens",),
        label="ner_tags",
        labels=("O", *(f"{begin}-{entity}" for entity in _ENTITIES for begin in "BI")),
        metrics=("overall_f1", "overall_precision", "overall_recall", "overall_accuracy"),
        evaluation_split="validation",
        dataset="leondz/wnut_17",
        dataset_config=None,
    ),
    Task(
        name="squad",
        kind="question_answering",
        columns=("question", "context"),
        label="answers",
        labels=(),
        metrics=("token_f1", "exact_match"),
        evaluation_split="validation",
        dataset="rajpurkar/squad",
        dataset_config=None,
    ),
    Task(
        name="mnist",
        kind="image_classification",
        columns=("image",),
        label="label",
        labels=tuple("0123456789"),
        metrics=("accuracy",),
        evaluation_split="test",
        dataset="ylecun/mnist",
        dataset_config=None,
    ),
    Task(
        name="xsum",
        kind="summarization",
        columns=("document",),
        label="summary",
        labels=(),
        metrics=("rougeL", "rouge1", "rouge2"),
        evaluation_split="validation",
        dataset="EdinburghNLP/xsum",
        dataset_config=None,
        generation=Generation(tokens=64),
    ),
    Task(
        name="librispeech",
        kind="speech_recognition",
        columns=("audio",),
        label="text",
        labels=(),
        metrics=("wer", "cer"),
        evaluation_split="validation",
        training_split="train.100",
        dataset="openslr/librispeech_asr",
        dataset_config="clean",
    ),
)

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _TASKS})


def task_names() -> tuple[str, ...]:
    """Returns the names of all tasks."""
    return tuple(TASKS)


def get_task(name: str) -> Task:
    """Returns the task of that name.

    Raises:
        DataError: There is none; the message holds the nearest name and all of them.
    """
    if name not in TASKS:
        raise DataError(f"task '{name}' is not known; {suggest(name, TASKS)}")
    return TASKS[name]
