"""What can be refused before training: rows without labels, labels that do not exist, models that do not match."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from hfcompress.errors import CompressionError, DataError
from hfcompress.methods.teaching.signals import is_token_level

_LABELS = ("labels", "label", "label_ids")


def check_rows(dataset: Any, model: PreTrainedModel, *, needs_labels: bool) -> None:
    """Refuses training rows that a student cannot learn from.

    Args:
        dataset: Rows; only lists and `datasets.Dataset`s are looked into, since other rows may be costly to make.
        model: The student.
        needs_labels: Whether the loss on the labels counts.

    Raises:
        DataError: There are no rows, no labels, or labels that the model does not have.
    """
    if not hasattr(dataset, "__len__"):
        return
    if len(dataset) == 0:
        raise DataError("the training set is empty: it has no rows")
    values = _labels(dataset)
    if values is None:
        first = dataset[0]
        if needs_labels and hasattr(first, "keys") and not set(_LABELS) & set(first.keys()):
            raise DataError(
                f"the training rows have no column 'labels'; they have {', '.join(map(str, first))}",
                hint="Add labels, or set hard: 0 to learn from the teacher alone.",
            )
        return
    if is_token_level(model) or _count(model) < 2 or not all(type(value) is int for value in values):
        return
    known = [value for value in values if value != -100]
    wrong = next((row for row, value in enumerate(values) if value != -100 and not 0 <= value < _count(model)), None)
    if wrong is not None:
        raise DataError(
            f"row {wrong} of the training set has label {values[wrong]}; the model's are 0 to {_count(model) - 1}",
            hint="Rows without a label (-1 in GLUE's test sets) cannot be trained on; mark them -100 to learn from "
            "the teacher alone there.",
        )
    if needs_labels and not known:
        raise DataError("no training row has a label", hint="Set hard: 0 to learn from the teacher alone.")
    if needs_labels and len(known) > 1 and len(set(known)) == 1:
        raise DataError(f"every training row has label {known[0]}: there is nothing to tell apart")


def _count(model: PreTrainedModel) -> int:
    return int(model.config.num_labels or 0)


def _labels(dataset: Any) -> list[Any] | None:
    columns = getattr(dataset, "column_names", None)
    if columns is not None:
        name = next((name for name in _LABELS if name in columns), None)
        return list(dataset.with_format(None)[name]) if name else None
    if isinstance(dataset, list | tuple) and hasattr(dataset[0], "keys"):
        name = next((name for name in _LABELS if name in dataset[0]), None)
        return [row[name] for row in dataset] if name else None
    return None


def label_order(student: PreTrainedModel, teacher: PreTrainedModel, *, same_tokens: bool = True) -> list[int] | None:
    """Returns the teacher's output for each of the student's labels, by name; None where tokens are predicted.

    Args:
        student: The student.
        teacher: The teacher.
        same_tokens: Whether both read the same tokens, as they must where the teacher is not told the texts.

    Raises:
        CompressionError: Labels, vocabularies or kinds of outputs differ.
    """
    ours, theirs = student.config, teacher.config
    if same_tokens and getattr(ours, "vocab_size", None) != getattr(theirs, "vocab_size", None):
        raise CompressionError(
            f"the teacher's vocabulary has {theirs.vocab_size} tokens, the student's {ours.vocab_size}",
            hint="Say what it reads: teacher_tokens=OtherTokens(texts, student_tokenizer, teacher_tokenizer).",
        )
    if is_token_level(student) != is_token_level(teacher):
        raise CompressionError(
            f"a {type(student).__name__} cannot learn from the outputs of a {type(teacher).__name__}",
            hint="Teacher and student must have the same kind of head.",
        )
    if student.get_output_embeddings() is not None:
        return None
    names, known = _label_names(ours), _label_names(theirs)
    if sorted(names) != sorted(known) or len(set(names)) != len(names):
        raise CompressionError(
            f"the teacher's labels ({', '.join(known)}) are not the student's ({', '.join(names)})",
            hint="Fine-tune the teacher on the same task, or name its labels alike in its config's id2label.",
        )
    return [known.index(name) for name in names]


def _label_names(config: Any) -> list[str]:
    return [str(config.id2label[index]).lower() for index in range(config.num_labels)]
