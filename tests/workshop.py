"""Tiny real things for tests: a random classifier with its tokenizer, batches, and a task's data on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

WORDS = ("good", "bad", "fine", "dull", "film", "plot", "very", "not", "a", "the", "was", "and")
NEVER_SAID = ("zebra", "quark")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(SPECIAL + WORDS + NEVER_SAID)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=32,
    )


def tiny_classifier(seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "vocab_size": len(SPECIAL + WORDS + NEVER_SAID),
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "id2label": {0: "negative", 1: "positive"},
        "label2id": {"negative": 0, "positive": 1},
    }
    return BertForSequenceClassification(BertConfig(**(config | changes))).eval()


def sentences(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences whose label follows from one of their words."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(3, 10, (1,), generator=generator))
        words = [WORDS[int(i)] for i in torch.randint(2, len(WORDS), (length,), generator=generator)]
        label = int(torch.randint(0, 2, (1,), generator=generator))
        words.insert(int(torch.randint(0, length, (1,), generator=generator)), "good" if label else "bad")
        rows.append({"sentence": " ".join(words), "label": label})
    return rows


def batches(count: int = 2, size: int = 8, *, labels: bool = True, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    tokenizer = tiny_tokenizer()
    rows = sentences(count * size, seed)
    made = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        batch = dict(tokenizer([row["sentence"] for row in part], padding=True, return_tensors="pt"))
        if labels:
            batch["labels"] = torch.tensor([row["label"] for row in part])
        made.append(batch)
    return made


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def save_model(folder: Path, **changes: Any) -> Path:
    tiny_classifier(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_data(folder: Path, train: int = 96, validation: int = 48) -> Path:
    """Writes a task in the layout of nyu-mll/glue's sst2."""
    place = folder / "sst2"
    place.mkdir(parents=True)
    for split, count, seed in (("train", train, 1), ("validation", validation, 2)):
        rows = sentences(count, seed)
        columns = {"sentence": [row["sentence"] for row in rows], "label": [row["label"] for row in rows]}
        columns["idx"] = list(range(count))
        pyarrow.parquet.write_table(pyarrow.table(columns), place / f"{split}.parquet")
    return folder
