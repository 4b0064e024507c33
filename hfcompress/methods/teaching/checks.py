"""What can be refused before training: rows without labels, labels that do not exist, models that do not match."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError, DataError
from hfcompress.methods.teaching.signals import head_name, is_token_level
from hfcompress.methods.training import Rows, plain_model, shifts_labels

_LABELS = ("labels", "label", "label_ids", "start_positions")
_FIND_OBJECTS = ("ObjectDetection", "Segmentation", "InstanceSegmentation", "UniversalSegmentation")
_SAY_NO_LABELS = ("QuestionAnswering", "MultipleChoice", "CTC", "XVector")


def check_rows(rows: Rows, model: PreTrainedModel, *, needs_labels: bool) -> None:
    """Refuses training rows that a student cannot learn from.

    Args:
        rows: The training set; only lists and `datasets.Dataset`s are looked through, since other rows may be costly to
            make.
        model: The student.
        needs_labels: Whether the loss on the labels counts.

    Raises:
        DataError: There are no rows, no labels, or labels that the model does not have.
    """
    dataset = rows.dataset
    if len(dataset) == 0:
        raise DataError("the training set is empty: it has no rows")
    values = _labels(dataset)
    makes_tokens = model.config.is_encoder_decoder and is_token_level(model)
    if values is None and makes_tokens and not {"labels", "decoder_input_ids"} & _collated(rows):
        raise DataError(
            "the training rows have no 'labels', which a decoder reads to say something about them",
            hint="Give each row labels; with hard: 0 they may be what the teacher generates.",
        )
    if values is None:
        first = dataset[0]
        if needs_labels and hasattr(first, "keys") and not set(_LABELS) & {*first.keys(), *_collated(rows)}:
            raise DataError(
                f"the training rows have no column 'labels'; they have {', '.join(map(str, first))}",
                hint="Add labels, let the collator make them, or set hard: 0 to learn from the teacher alone.",
            )
        return
    if model.loss_type == "ForQuestionAnswering" or head_name(model) == "MultipleChoice":
        return  # any place, or any of a row's choices, is an answer
    of_tokens = model.loss_type == "ForTokenClassification"
    if _count(model) < 2 or (is_token_level(model) and not of_tokens):
        return
    if not of_tokens and any(np.ndim(value) for value in values):
        return  # several labels at once
    _check_labels(values, _count(model), needs_labels=needs_labels)


def _collated(rows: Rows) -> Set[str]:
    """Returns what a batch holds: collators of language models make the labels."""
    with torch.random.fork_rng(devices=[]):
        return rows.batch(range(1)).keys()


def _check_labels(values: Sequence[Any], count: int, *, needs_labels: bool) -> None:
    each = [np.asarray(value).reshape(-1) for value in values]
    found = np.concatenate(each)
    if found.dtype.kind not in "iu":
        return  # numbers, or names
    known = found != -100
    wrong = np.flatnonzero(known & ((found < 0) | (found >= count)))
    if len(wrong):
        row = int(np.searchsorted(np.cumsum([len(some) for some in each]), wrong[0], side="right"))
        raise DataError(
            f"row {row} of the training set has label {found[wrong[0]]}; the model's are 0 to {count - 1}",
            hint="Rows without a label (-1 in GLUE's test sets) cannot be trained on; mark them -100 to learn "
            "from the teacher alone there.",
        )
    if needs_labels and not known.any():
        raise DataError("no training row has a label", hint="Set hard: 0 to learn from the teacher alone.")
    only = np.unique(found[known])
    if needs_labels and known.sum() > 1 and len(only) == 1:
        raise DataError(f"every training row has label {only[0]}: there is nothing to tell apart")


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


def require_same_vocabulary(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Refuses a teacher of another vocabulary, which cannot read the student's tokens.

    Raises:
        CompressionError: The vocabularies differ in size.
    """
    ours, theirs = getattr(student.config, "vocab_size", None), getattr(teacher.config, "vocab_size", None)
    if ours != theirs:
        hint = "Say what it reads: teacher_tokens=OtherTokens(texts, student_tokenizer, teacher_tokenizer)."
        if ours and theirs:  # models of one family often differ in rows that their one tokenizer never uses
            larger = "teacher" if theirs > ours else "student"
            hint += f" If they share one, cut the rows it never uses: {larger}.resize_token_embeddings(...)."
        raise CompressionError(f"the teacher's vocabulary has {theirs} tokens, the student's {ours}", hint=hint)


def label_order(student: PreTrainedModel, teacher: PreTrainedModel) -> list[int] | None:
    """Returns the teacher's output for each of the student's labels, by name; None where outputs are no labels.

    Raises:
        CompressionError: Labels or kinds of outputs differ.
    """
    ours, theirs = student.config, teacher.config
    if head_name(student) in _FIND_OBJECTS:
        raise CompressionError(
            f"what a {type(student).__name__} finds has no order, and cannot be laid beside what a teacher finds",
            hint="Set soft: 0 to learn what lies between alone.",
        )
    if _kind_of_head(student) != _kind_of_head(teacher):
        raise CompressionError(
            f"a {type(student).__name__} cannot learn from the outputs of a {type(teacher).__name__}",
            hint="Teacher and student must have the same kind of head; set soft: 0 to learn what lies between alone.",
        )
    if student.get_output_embeddings() is not None or _unlabelled(student):
        return None
    names, known = _label_names(ours), _label_names(theirs)
    if len(names) == len(known) == 1:
        return [0]  # one number, whatever it is called
    if sorted(names) != sorted(known) or len(set(names)) != len(names):
        raise CompressionError(
            f"the teacher's labels ({', '.join(known)}) are not the student's ({', '.join(names)})",
            hint="Fine-tune the teacher on the same task, or name its labels alike in its config's id2label.",
        )
    return [known.index(name) for name in names]


def _kind_of_head(model: PreTrainedModel) -> tuple[Any, ...]:
    """Returns what two models must have in common for their outputs to be about the same."""
    kind = _unlabelled(model)
    width = model.config.xvector_output_dim if kind == "XVector" else None
    return is_token_level(model), shifts_labels(model), kind, width


def _unlabelled(model: PreTrainedModel) -> str | None:
    """Returns what a head is for whose outputs are none of the config's labels, though it may have some."""
    said = "QuestionAnswering" if model.loss_type == "ForQuestionAnswering" else head_name(model)
    return said if said in _SAY_NO_LABELS else None


def refuse_outputs_of_some_tokens(student: PreTrainedModel) -> None:
    """Refuses a student whose outputs are about labelled tokens alone, in one row.

    Raises:
        CompressionError: It is such a one.
    """
    if getattr(student, "sparse_prediction", False):
        raise CompressionError(
            f"this {type(student).__name__} gives outputs at labelled tokens only (sparse_prediction), and they cannot "
            "be laid beside the teacher's",
            hint="Load the student with sparse_prediction=False, or set soft: 0.",
        )


# Models


def as_teachers(given: Any) -> list[PreTrainedModel]:
    """Returns one teacher, or several, as a list of plain models.

    Raises:
        CompressionError: There is none, or one is not a model.
    """
    several = given if isinstance(given, list | tuple) else [] if given is None else [given]
    if not several:
        raise CompressionError("distillation needs a teacher", hint="Pass teacher=..., a fine-tuned model.")
    for each in several:
        if getattr(getattr(each, "active_peft_config", None), "is_prompt_learning", False):
            raise CompressionError(
                "a teacher with learnt prompts gives outputs at the prompts too, which no student has",
                hint="Take an adapter without prompts, such as LoRA.",
            )
    models = [plain_model(each) for each in several]
    for each in models:
        if not isinstance(each, PreTrainedModel):
            raise CompressionError(
                f"a teacher is a model of transformers, not {each!r:.80}",
                hint="Load it: AutoModelForSequenceClassification.from_pretrained(...), say.",
            )
    return models


def refuse_shared_weights(student: PreTrainedModel, teachers: Sequence[PreTrainedModel]) -> None:
    """Refuses a teacher that changes with its student, and has frozen what they share.

    Raises:
        CompressionError: A parameter belongs to both.
    """
    own = {id(each): name for name, each in student.named_parameters()}
    for teacher in teachers:
        shared = next((own[id(each)] for each in teacher.parameters() if id(each) in own), None)
        if shared:
            raise CompressionError(
                f"the teacher shares '{shared}' with the student: it would be frozen, or the teacher would change",
                hint="Load the teacher for itself, or take a copy: teacher=copy.deepcopy(model).",
            )


def same_problem(student: PreTrainedModel, teachers: Sequence[PreTrainedModel]) -> str | None:
    """Returns what transformers calls the problem that models of whole examples solve; None where no config says it.

    Raises:
        CompressionError: They say different things.
    """
    taught = zip(_names(teachers), teachers, strict=True)
    said = {name: each.config.problem_type for name, each in [("student", student), *taught]}
    known = {name: problem for name, problem in said.items() if problem}
    if len(set(known.values())) > 1:
        raise CompressionError(
            f"problem_type differs: {', '.join(f'{problem} in the {name}' for name, problem in known.items())}",
            hint="Say the same in the configs of both.",
        )
    return next(iter(known.values()), None)


def _names(teachers: Sequence[PreTrainedModel]) -> list[str]:
    return ["teacher"] if len(teachers) == 1 else [f"teacher {number}" for number in range(1, len(teachers) + 1)]


def _label_names(config: Any) -> list[str]:
    return [str(config.id2label[index]).lower() for index in range(config.num_labels)]
