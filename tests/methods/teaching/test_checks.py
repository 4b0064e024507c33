from __future__ import annotations

from typing import Any

import datasets
import pytest

from hfcompress.errors import CompressionError, DataError
from hfcompress.methods.teaching.checks import check_rows, label_order
from tests.tiny_models import make
from tests.workshop import tiny_classifier


@pytest.mark.parametrize("kind", ["list", "datasets"])
@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([], "no rows"),
        ([0, 1, -1], "row 2 .* label -1"),
        ([0, 2], "row 1 .* label 2"),
        ([1, 1, 1], "nothing to tell apart"),
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
        check_rows(data, tiny_classifier(), needs_labels=True)


def test_rows_without_labels_are_enough_for_the_teacher_alone() -> None:
    check_rows([{"input_ids": [5]}], tiny_classifier(), needs_labels=False)
    check_rows([{"labels": -100}, {"labels": 1}], tiny_classifier(), needs_labels=True)
    check_rows(
        [{"labels": 0.5}, {"labels": -1.0}], tiny_classifier(num_labels=1, id2label={0: "score"}), needs_labels=True
    )


def test_models_that_do_not_match_are_refused() -> None:
    with pytest.raises(CompressionError, match="kind of head"):
        label_order(make("bert", "SequenceClassification"), make("bert", "TokenClassification"))
    assert label_order(make("bert", "MaskedLM"), make("bert", "MaskedLM")) is None
