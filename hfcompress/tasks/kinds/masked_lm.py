"""Masked language models: how well masked tokens are filled in, always the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfcompress.errors import DataError
from hfcompress.tasks.checks import check_texts
from hfcompress.tasks.kinds.base import Given, Kind, pad
from hfcompress.tasks.kinds.blocks import blocks, special_tokens
from hfcompress.tasks.task import Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

_MASKED = 0.15  # of the tokens, as in BERT (Devlin et al. 2019)


class MaskedLM(Kind):
    """Masked tokens in blocks of running text.

    Which 15% of a block's tokens are masked follows from the block's number alone, in training and in evaluation:
    every model is asked the same, and what a teacher says of a row can be kept. All of them become the mask token.
    """

    name = "masked_lm"
    auto_class = "AutoModelForMaskedLM"
    pipeline_tag = "fill-mask"
    metrics = ("masked_perplexity", "masked_accuracy")
    defaults = ("masked_perplexity", "masked_accuracy")
    columns = ("text",)
    label = ""
    exact = False
    flips = False
    unit = "blocks"

    def check(self, task: Task, split: Dataset, where: str, *, training: bool) -> None:
        """Texts."""
        for column in task.columns:
            check_texts(split, column, where)

    def encode(self, dataset: Dataset, task: Task, processor: Any, *, max_length: int) -> Dataset:
        """Returns blocks with masks; `labels` holds the tokens behind them and -100 elsewhere."""
        import numpy as np
        from datasets import Dataset

        if processor.mask_token_id is None:
            raise DataError(f"task '{task.name}' needs a tokenizer with a mask token; this one has none")
        before, after = special_tokens(processor)
        columns: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": []}
        size = max_length - len(before) - len(after)
        for number, block in enumerate(blocks(self.texts(task, dataset), processor, size)):
            chosen = np.random.default_rng(number).permutation(len(block))[: max(1, round(len(block) * _MASKED))]
            tokens = [token for token, _ in block]
            labels = [-100] * len(tokens)
            for place in chosen.tolist():
                labels[place], tokens[place] = tokens[place], processor.mask_token_id
            columns["input_ids"].append([*before, *tokens, *after])
            columns["labels"].append([*[-100] * len(before), *labels, *[-100] * len(after)])
            columns["attention_mask"].append([1] * len(columns["input_ids"][-1]))
        return Dataset.from_dict(columns)

    def collator(self, processor: Any) -> Any:
        """Pads with tokens that are neither attended to nor asked for."""
        padding = {"labels": -100, "input_ids": processor.pad_token_id or 0}
        return lambda rows: pad(rows, padding)

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[Any]:
        """Keeps each block's summed loss, its right answers and its masks."""
        import torch

        kept = []
        for logits, labels in zip(outputs.logits, batch["labels"], strict=True):
            asked = labels.ne(-100)
            logits, labels = logits[asked].float(), labels[asked]
            losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            kept.append((float(losses.double().sum()), int(logits.argmax(-1).eq(labels).sum()), len(labels)))
        return kept

    def answers(self, task: Task, ids: Sequence[int], rows: Dataset, kept: Sequence[Any]) -> Given:
        """Returns [negative log-likelihood, right answers] of each block; the references are [masks]."""
        return Given([[loss, float(right)] for loss, right, _ in kept], [[masks] for *_, masks in kept], [])
