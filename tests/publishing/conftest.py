"""A tiny checkpoint as plain transformers saves it, and a Hub of our own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hfcompress.evaluation.cost import Speed
from hfcompress.evaluation.report import Report, Row
from tests.loopback_hub import LoopbackHub

CARD = "---\nlibrary_name: transformers\n---\n\n# tiny\n"


@pytest.fixture(scope="session")
def saved_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT classifier of 30 thousand parameters with its tokenizer."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    directory = tmp_path_factory.mktemp("saved")
    vocabulary = directory / "words.txt"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "film", "good", "bad", "dull", "##ly"]
    vocabulary.write_text("\n".join(words), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    model = BertForSequenceClassification(config).eval()
    model.save_pretrained(directory / "model")
    BertTokenizer(str(vocabulary)).save_pretrained(directory / "model")
    return directory / "model"


@pytest.fixture
def checkpoint(saved_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of that checkpoint, with a card, to do anything to."""
    directory = Path(shutil.copytree(saved_checkpoint, tmp_path / "checkpoint"))
    (directory / "README.md").write_text(CARD, encoding="utf-8")
    return directory


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A Hub without repositories."""
    with LoopbackHub().serving() as server:
        yield server


@pytest.fixture
def report() -> Report:
    """What a run of four steps might have measured; made up, for tests alone."""

    def speed(ratio: float) -> Speed:
        return Speed(
            ratio=ratio,
            low=ratio - 0.05,
            high=ratio + 0.05,
            original_seconds=0.2,
            compressed_seconds=0.2 / ratio,
            batch_size=8,
            sequence_length=128,
            threads=2,
            repeats=20,
        )

    def row(name: str, methods: tuple[str, ...], accuracy: float, size: int, timed: Speed | None, **more: Any) -> Row:
        return Row(
            name=name,
            methods=methods,
            metrics={"accuracy": accuracy, "f1": accuracy + 0.01},
            retention=accuracy / 0.91,
            parameters=size // 4,
            bytes=size,
            speed=timed,
            seconds=12.5,
            findings=more,
        )

    return Report(
        name="quickstart",
        base_model="google-bert/bert-base-uncased",
        task="mrpc",
        recipe={
            "name": "quickstart",
            "model": "google-bert/bert-base-uncased",
            "task": "mrpc",
            "push": {"repo": "org/tiny", "private": True},
            "steps": [
                {"name": "fine_tune", "training": {"learning_rate": 5e-5}},
                {"low_rank": {"keep": 0.6}},
            ],
        },
        environment={"python": "3.11.7", "torch": "2.13.0", "cpu": "Some(R) CPU @ 2.20GHz", "threads": "2"},
        split="validation",
        examples=408,
        metric="accuracy",
        seed=42,
        rows=(
            row("original", (), 0.52, 437_000_000, None),
            row("fine_tune", (), 0.91, 437_000_000, speed(1.0)),
            row("prune", ("structured_pruning", "distillation"), 0.905, 240_000_000, speed(2.1)),
            row("low_rank", ("low_rank",), 0.88, 180_000_000, speed(2.4), low_rank={"rank": 128}),
            row("quantize", ("quantization",), 0.875, 52_000_000, speed(1.9)),
        ),
    )
