"""A tiny real model and tokenizer."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(45)))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return BertTokenizer(vocab={word: number for number, word in enumerate(WORDS)}, model_max_length=32)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A BERT with two labels, or with what an indirect parameter asks for."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.5,
        **getattr(request, "param", {"label2id": {"negative": 0, "positive": 1}, "num_labels": 2}),
    )
    return BertForSequenceClassification(config)
