"""Language models: how well the next token is predicted, on blocks of running text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfcompress.tasks.checks import check_texts
from hfcompress.tasks.kinds.base import Given, Kind, pad
from hfcompress.tasks.kinds.blocks import blocks, special_tokens
from hfcompress.tasks.task import Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

_NO_INPUTS = frozenset({"bytes"})


class CausalLM(Kind):
    """The next token, each block by itself.

    Texts are joined as they are and cut into blocks of `max_length` tokens. Where the tokenizer begins a text with a
    token of its own, every block begins with it; else the first token of a block is read and not predicted, and its
    bytes are not counted. A block's answer is the negative log-likelihood of its predicted tokens, in nats.
    """

    name = "causal_lm"
    auto_class = "AutoModelForCausalLM"
    pipeline_tag = "text-generation"
    metrics = ("perplexity", "bits_per_byte")
    defaults = ("perplexity", "bits_per_byte")
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
        """Returns blocks, with the number of `bytes` that their predicted tokens stand for."""
        from datasets import Dataset

        before, _ = special_tokens(processor)
        columns: dict[str, list[Any]] = {"input_ids": [], "attention_mask": [], "labels": [], "bytes": []}
        for block in blocks(self.texts(task, dataset), processor, max_length - len(before)):
            ids = [*before, *(token for token, _ in block)]
            columns["input_ids"].append(ids)
            columns["attention_mask"].append([1] * len(ids))
            columns["labels"].append(ids)
            columns["bytes"].append(sum(count for _, count in block[0 if before else 1 :]))
        return Dataset.from_dict(columns)

    def collator(self, processor: Any) -> Any:
        """Pads with tokens that are neither attended to nor predicted."""
        return lambda rows: pad(rows, {"labels": -100}, leave_out=_NO_INPUTS)

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[Any]:
        """Keeps each block's summed negative log-likelihood and its number of predicted tokens."""
        import torch

        kept = []
        for logits, labels in zip(outputs.logits, batch["labels"], strict=True):  # a vocabulary is wide: row by row
            losses = torch.nn.functional.cross_entropy(logits[:-1].float(), labels[1:], reduction="none")
            kept.append((float(losses.double().sum()), int(labels[1:].ne(-100).sum())))
        return kept

    def answers(self, task: Task, ids: Sequence[int], rows: Dataset, kept: Sequence[Any]) -> Given:
        """Returns negative log-likelihoods; the references are [predicted tokens, bytes]."""
        references = [[tokens, count] for (_, tokens), count in zip(kept, rows["bytes"], strict=True)]
        return Given([loss for loss, _ in kept], references, [])
