"""Texts that are written from texts, such as summaries, by an encoder and a decoder (T5, BART, Pegasus)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hfcompress.tasks.checks import check_texts
from hfcompress.tasks.kinds.base import Given, Kind, pad
from hfcompress.tasks.kinds.writing import told_of, written
from hfcompress.tasks.task import Generation, Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel

_NO_INPUTS = frozenset({"right"})
_SPEED_TOKENS = 32  # of the text that is written, in the batch that costs are measured on


class Summarization(Kind):
    """A text, written token by token.

    It is learnt from the right text, cut at `generation.tokens`, and judged by what the model writes itself, beside
    the whole right text. Costs are those of one pass over a text and 32 tokens of its summary, not of writing it.
    """

    name = "summarization"
    auto_class = "AutoModelForSeq2SeqLM"
    pipeline_tag = "summarization"
    metrics = ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "sacrebleu", "same_text")
    defaults = ("rougeL", "rouge1", "rouge2")
    columns = ("document",)
    label = "summary"
    flips = False
    unit = "texts"
    generation = Generation()
    encoded = ("input_ids", "labels", "right")

    def check(self, task: Task, split: Dataset, where: str, *, training: bool) -> None:
        """Texts, and texts."""
        for column in (*task.columns, task.label):
            check_texts(split, column, where)

    def texts(self, task: Task, rows: Dataset) -> list[str]:
        """Returns what is read and what is written."""
        return [text for column in (*task.columns, task.label) for text in rows[column]]

    def encode(self, dataset: Dataset, task: Task, processor: Any, *, max_length: int) -> Dataset:
        """Returns tokens of both texts, and the right one (`right`)."""
        assert task.generation is not None
        length = task.generation.tokens

        def tokenize(rows: dict[str, list[Any]]) -> dict[str, Any]:
            said = processor(rows[task.columns[0]], truncation=True, max_length=max_length)
            right = processor(text_target=rows[task.label], truncation=True, max_length=length)
            own = {name: said[name] for name in ("input_ids", "attention_mask")}
            return own | {"labels": right["input_ids"], "right": rows[task.label]}

        return dataset.map(
            tokenize,
            batched=True,
            remove_columns=dataset.column_names,
            keep_in_memory=True,
            desc=f"Tokenizing {task.name}",
        )

    def collator(self, processor: Any) -> Any:
        """Pads with tokens that are neither attended to nor learnt."""
        padding = {"labels": -100, "input_ids": processor.pad_token_id or 0}
        return lambda rows: pad(rows, padding, leave_out=_NO_INPUTS)

    def decoder_inputs(self, config: Any, batch_size: int) -> dict[str, torch.Tensor]:
        """Returns the first tokens of what is written: (batch, 32), all of one token."""
        import torch

        return {"decoder_input_ids": torch.full((batch_size, _SPEED_TOKENS), config.decoder_start_token_id or 0)}

    def ask(self, model: PreTrainedModel, batch: Mapping[str, torch.Tensor], processor: Any, task: Task) -> list[str]:
        """Lets the model write."""
        assert task.generation is not None
        return written(model, batch, processor, task.generation)

    def told(self, task: Task) -> str:
        """Says how texts are written."""
        assert task.generation is not None
        return told_of(task.generation)

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[Any]:
        """Keeps the texts."""
        return list(outputs)

    def answers(self, task: Task, ids: Sequence[int], rows: Dataset, kept: Sequence[Any]) -> Given:
        """Returns the texts."""
        return Given(list(kept), list(rows["right"]), [])
