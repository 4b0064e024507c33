from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import DataCollatorForLanguageModeling, default_data_collator

from hfcompress.errors import CompressionError, DataError
from hfcompress.methods.teaching.checks import check_rows, label_order, same_problem
from hfcompress.methods.training import Rows
from tests.tiny_models import make
from tests.workshop import tiny_classifier, tiny_tokenizer


def rows_of(dataset: Any, collate: Any = default_data_collator) -> Rows:
    place, device = Path("unused"), torch.device("cpu")
    return Rows(dataset=dataset, collate=collate, batch_size=2, device=device, autocast=nullcontext, folder=place)


@pytest.mark.parametrize("kind", ["list", "datasets"])
@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([], "no rows"),
        ([0, 1, -1], "row 2 .* label -1"),
        ([0, 2], "row 1 .* label 2"),
        ([1, 1, 1], "nothing to tell apart"),
        ([torch.tensor(0), torch.tensor(-1)], "row 1 .* label -1"),
        ([-100, -100], "no training row has a label"),
        (None, "no column 'labels'"),
    ],
)
def test_rows_that_teach_nothing_are_refused(kind: str, labels: list[int] | None, says: str) -> None:
    columns: dict[str, list[Any]] = {"input_ids": [[5]] * 3} if labels is None else {"labels": labels}
    count = len(next(iter(columns.values())))
    rows: Any = [{name: values[i] for name, values in columns.items()} for i in range(count)]
    data = datasets.Dataset.from_dict(columns) if kind == "datasets" else rows
    with pytest.raises(DataError, match=says):
        check_rows(rows_of(data), tiny_classifier(), needs_labels=True)


def test_rows_without_labels_are_enough_for_the_teacher_alone() -> None:
    check_rows(rows_of([{"input_ids": [5]}]), tiny_classifier(), needs_labels=False)
    check_rows(rows_of([{"labels": -100}, {"labels": 1}]), tiny_classifier(), needs_labels=True)
    check_rows(
        rows_of([{"labels": 0.5}, {"labels": -1.0}]),
        tiny_classifier(num_labels=1, id2label={0: "score"}),
        needs_labels=True,
    )


def test_models_that_do_not_match_are_refused() -> None:
    with pytest.raises(CompressionError, match="kind of head"):
        label_order(make("bert", "SequenceClassification"), make("bert", "TokenClassification"))
    assert label_order(make("bert", "MaskedLM"), make("bert", "MaskedLM")) is None


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([[-100, 1], [0, -1, 0]], "row 1 .* label -1"),
        ([[-100, -100], [-100]], "no training row has a label"),
        ([[0, 0], [0, -100]], "nothing to tell apart"),
    ],
)
def test_labels_of_tokens_are_looked_at_too(labels: list[list[int]], says: str) -> None:
    model = make("bert", "TokenClassification")
    with pytest.raises(DataError, match=says):
        check_rows(rows_of([{"labels": each} for each in labels]), model, needs_labels=True)
    check_rows(rows_of([{"labels": [0, -100, 1]}]), model, needs_labels=True)


def test_a_collator_may_make_the_labels() -> None:
    collator = DataCollatorForLanguageModeling(tiny_tokenizer(), mlm=False)
    check_rows(rows_of([{"input_ids": [5, 6]}], collator), make("gpt2", "LMHeadModel"), needs_labels=True)


def test_answers_to_questions_are_labels() -> None:
    rows = rows_of([{"input_ids": [5, 6], "start_positions": 0, "end_positions": 1}])
    check_rows(rows, make("bert", "QuestionAnswering"), needs_labels=True)


def test_outputs_about_other_things_are_not_compared() -> None:
    with pytest.raises(CompressionError, match="kind of head"):
        label_order(make("bert", "QuestionAnswering"), make("bert", "SequenceClassification"))
    with pytest.raises(CompressionError, match="kind of head"):
        label_order(make("bert", "MaskedLM"), make("bert", "LMHeadModel", is_decoder=True))


def test_models_must_solve_the_same_problem() -> None:
    student, teacher = tiny_classifier(), tiny_classifier(1)
    assert same_problem(student, [teacher]) is None
    teacher.config.problem_type = "multi_label_classification"
    assert same_problem(student, [teacher]) == "multi_label_classification"
    student.config.problem_type = "single_label_classification"
    with pytest.raises(CompressionError, match="multi_label_classification in the teacher"):
        same_problem(student, [teacher])
