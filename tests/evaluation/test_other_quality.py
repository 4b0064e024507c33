"""Quality of the other kinds of tasks: the same for any size of batch, and what plain transformers computes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from hfcompress.errors import CompressionError, DataError
from hfcompress.evaluation import evaluate_quality
from hfcompress.tasks import Kind, Task, TaskConfig, kind_of, load_data, preprocess
from tests.other_tasks import KINDS, save_task

Loaded = tuple[Kind, Task, Any, Any, Dataset]


def loaded(folder: Path, name: str) -> Loaded:
    said = save_task(folder, name, train=8, validation=21)["task"]
    task = TaskConfig(**{key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}).task()
    kind = kind_of(task)
    model, processor = kind.load(folder / "model"), kind.load_processor(folder / "model")
    with torch.no_grad():
        for parameter in model.parameters():  # random answers, and not the same one everywhere
            parameter += 0.2 * torch.randn_like(parameter)
    rows = load_data(task, str(folder / "data"))["validation"]
    label2id: Any = model.config.label2id if task.labels else None
    return kind, task, model, processor, preprocess(rows, task, processor, max_length=16, label2id=label2id)


@pytest.fixture(scope="module", params=list(KINDS))
def one(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    return loaded(tmp_path_factory.mktemp(request.param), request.param)


def test_answers_do_not_depend_on_the_batch(one: Loaded) -> None:
    kind, task, model, processor, rows = one
    alone = evaluate_quality(model, rows, task, processor, batch_size=1, progress=False)
    together = evaluate_quality(model, rows, task, processor, batch_size=8, progress=False)
    assert together.references == alone.references and together.examples == alone.examples == len(alone.references)
    if kind.exact:
        assert together.predictions == alone.predictions and together.metrics == alone.metrics
    else:
        assert torch.tensor(together.predictions).flatten() == pytest.approx(
            torch.tensor(alone.predictions).flatten(), rel=1e-5
        )
        assert together.metrics == pytest.approx(alone.metrics)


def test_outputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    _, task, model, processor, rows = loaded(tmp_path, "question_answering")
    with torch.no_grad():
        next(model.parameters())[6] = torch.nan
    with pytest.raises(CompressionError, match="not finite"):
        evaluate_quality(model, rows, task, processor, progress=False)


def test_a_head_of_another_size_is_refused(tmp_path: Path) -> None:
    _, task, model, processor, rows = loaded(tmp_path, "image_classification")
    model.config.id2label = {0: "dark", 1: "light", 2: "grey"}
    model.config.label2id = {"dark": 0, "light": 1, "grey": 2}
    with pytest.raises(DataError, match="the model's labels"):
        evaluate_quality(model, rows, task, processor, progress=False)


@pytest.mark.parametrize("name", ["causal_lm", "masked_lm"])
def test_perplexity_is_that_of_the_losses_that_transformers_computes(tmp_path: Path, name: str) -> None:
    kind, task, model, processor, rows = loaded(tmp_path, name)
    losses, tokens, model = 0.0, 0, model.eval()
    for row in rows:
        batch = kind.collator(processor)([row])
        asked = batch["labels"][:, 1:] if name == "causal_lm" else batch["labels"]
        count = int(asked.ne(-100).sum())
        with torch.no_grad():
            losses += float(model(**batch).loss) * count
        tokens += count
    metrics = evaluate_quality(model, rows, task, processor, progress=False).metrics
    assert metrics[task.metrics[0]] == pytest.approx(math.exp(losses / tokens), rel=1e-5)
    if name == "causal_lm":
        assert metrics["bits_per_byte"] == pytest.approx(losses / math.log(2) / sum(rows["bytes"]), rel=1e-5)


def test_a_token_classifier_answers_as_the_stock_pipeline_does(tmp_path: Path) -> None:
    _, task, model, processor, rows = loaded(tmp_path, "token_classification")
    said = evaluate_quality(model, rows, task, processor, progress=False).predictions
    words = load_data(task, str(tmp_path / "data"))["validation"]["tokens"]
    for sentence, answers in list(zip(words, said, strict=True))[:8]:
        with torch.no_grad():
            logits = model(**processor(sentence, is_split_into_words=True, return_tensors="pt")).logits[0, 1:-1]
        assert answers == [model.config.id2label[number] for number in logits.argmax(-1).tolist()]
