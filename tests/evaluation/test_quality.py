"""Quality: the right rows, in order, in the task's own labels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfcompress.errors import CompressionError, DataError
from hfcompress.evaluation import evaluate_quality
from hfcompress.evaluation.named import load_metric
from hfcompress.tasks import get_task, load_data, preprocess

GLUE = Path(os.environ.get("HFCOMPRESS_GLUE", Path(__file__).parents[2] / ".." / "shared" / "data" / "glue"))
SENTENCES = [" ".join(f"w{(row * 7 + place) % 45}" for place in range(1 + row * 5 % 17)) for row in range(37)]
REGRESSION = {"num_labels": 1}
SWAPPED = {
    "label2id": {"equivalent": 0, "not_equivalent": 1},
    "id2label": {0: "equivalent", 1: "not_equivalent"},
}


def rows_of(name: str, model: PreTrainedModel, tokenizer: Any, labels: list[Any]) -> Dataset:
    columns = {column: SENTENCES for column in get_task(name).columns}
    label2id: Any = model.config.label2id
    data = Dataset.from_dict({**columns, "label": labels})
    return preprocess(data, get_task(name), tokenizer, max_length=32, label2id=label2id)


def one_by_one(model: PreTrainedModel, data: Dataset) -> torch.Tensor:
    """The logits of each row alone, without padding, batches or sorting."""
    model.eval()
    with torch.no_grad():
        return torch.cat(
            [model(input_ids=torch.tensor([row]), token_type_ids=torch.tensor([kinds])).logits
             for row, kinds in zip(data["input_ids"], data["token_type_ids"], strict=True)]
        )  # fmt: skip


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_predictions_are_those_of_each_row_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> None:
    labels = [row % 2 for row in range(37)]
    data = rows_of("sst2", model, tokenizer, labels)
    expected = one_by_one(model, data).argmax(-1).tolist()
    assert len(set(expected)) == 2
    quality = evaluate_quality(model, data, get_task("sst2"), tokenizer, batch_size=batch_size, progress=False)
    assert quality.predictions == expected
    right = sum(found == label for found, label in zip(expected, labels, strict=True))
    assert quality.metrics == {"accuracy": pytest.approx(right / 37)}
    assert (quality.primary, quality.value, quality.examples) == ("accuracy", quality.metrics["accuracy"], 37)


def test_any_module_of_evaluate_judges_too(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    data = rows_of("sst2", model, tokenizer, [row % 2 for row in range(37)])
    modules = [load_metric("precision"), load_metric("accuracy")]
    quality = evaluate_quality(model, data, get_task("sst2"), tokenizer, progress=False, extra_metrics=modules)
    hits = sum(a == b == 1 for a, b in zip(quality.predictions, quality.references, strict=True))
    assert quality.metrics["precision"] == pytest.approx(hits / sum(quality.predictions))
    # A name that is taken has its module's before it.
    assert quality.metrics["accuracy_accuracy"] == quality.metrics["accuracy"]


@pytest.mark.parametrize("model", [REGRESSION], indirect=True)
def test_regression_predicts_numbers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    data = rows_of("stsb", model, tokenizer, [row / 10 for row in range(37)])
    quality = evaluate_quality(model, data, get_task("stsb"), tokenizer, progress=False)
    assert quality.predictions == pytest.approx(one_by_one(model, data)[:, 0].tolist(), abs=1e-5)
    assert set(quality.metrics) == {"pearson", "spearmanr"}


@pytest.mark.parametrize("model", [SWAPPED], indirect=True)
def test_labels_of_a_model_with_another_order_are_read_back(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = rows_of("mrpc", model, tokenizer, [0] * 37)
    expected = (1 - one_by_one(model, data).argmax(-1)).tolist()
    again = rows_of("mrpc", model, tokenizer, expected)
    quality = evaluate_quality(model, again, get_task("mrpc"), tokenizer, progress=False)
    assert quality.predictions == expected
    assert quality.metrics == {"accuracy": 1.0, "f1": 1.0}


def test_f1_counts_the_tasks_positive_class(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    task = get_task("mrpc")
    model.config.label2id = {"equivalent": 0, "not_equivalent": 1}
    model.config.id2label = {0: "equivalent", 1: "not_equivalent"}
    labels = [row % 3 > 0 for row in range(37)]
    quality = evaluate_quality(
        model,
        rows_of("mrpc", model, tokenizer, [int(label) for label in labels]),
        task,
        tokenizer,
        progress=False,
    )
    hits = sum(bool(found) and label for found, label in zip(quality.predictions, labels, strict=True))
    assert quality.metrics["f1"] == pytest.approx(2 * hits / (sum(quality.predictions) + sum(labels)))


def test_the_demo_task_needs_no_evaluate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    data = rows_of("demo/movie-reviews", model, tokenizer, [row % 2 for row in range(37)])
    quality = evaluate_quality(model, data, get_task("demo/movie-reviews"), tokenizer, progress=False)
    assert set(quality.metrics) == {"accuracy", "f1"}


def test_the_model_stays_in_training(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    model.train()
    data = rows_of("sst2", model, tokenizer, [0] * 37)
    first = evaluate_quality(model, data, get_task("sst2"), tokenizer, progress=False)
    assert model.training
    assert evaluate_quality(model, data, get_task("sst2"), tokenizer, progress=False) == first


def test_a_bar_is_shown_on_standard_error(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, capfd: pytest.CaptureFixture[str]
) -> None:
    data = rows_of("sst2", model, tokenizer, [0] * 37)
    capfd.readouterr()
    evaluate_quality(model, data, get_task("sst2"), tokenizer)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "37/37" in shown.err


def test_outputs_that_are_not_finite_are_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    data = rows_of("sst2", model, tokenizer, [0] * 37)
    with torch.no_grad():
        next(model.parameters())[7] = torch.nan
    with pytest.raises(CompressionError, match="not finite"):
        evaluate_quality(model, data, get_task("sst2"), tokenizer, progress=False)


def test_a_head_of_another_size_is_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    data = rows_of("sst2", model, tokenizer, [0] * 37)
    with pytest.raises(DataError, match="are not those of task 'mnli'"):
        evaluate_quality(model, data, get_task("mnli"), tokenizer, progress=False)
    with pytest.raises(DataError, match="task 'stsb' needs 1 outputs; the model has 2"):
        evaluate_quality(model, data, get_task("stsb"), tokenizer, progress=False)


def test_rows_that_cannot_be_measured_are_refused(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    raw = Dataset.from_dict({"sentence": SENTENCES, "label": [0] * 37})
    with pytest.raises(DataError, match="lack 'input_ids' or 'labels'; found: sentence, label"):
        evaluate_quality(model, raw, get_task("sst2"), tokenizer, progress=False)
    none = rows_of("sst2", model, tokenizer, [0] * 37).select([])
    with pytest.raises(DataError, match="there are no rows"):
        evaluate_quality(model, none, get_task("sst2"), tokenizer, progress=False)


@pytest.mark.skipif(not GLUE.is_dir(), reason="no GLUE folder: set HFCOMPRESS_GLUE to one")
def test_a_real_split_goes_all_the_way(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    task = get_task("sst2")
    split = load_data(task, str(GLUE))["validation"]
    label2id: Any = model.config.label2id
    data = preprocess(split, task, tokenizer, max_length=32, label2id=label2id)
    quality = evaluate_quality(model, data, task, tokenizer, progress=False)
    right = sum(found == label for found, label in zip(quality.predictions, split["label"], strict=True))
    assert quality.metrics["accuracy"] == pytest.approx(right / 872)
