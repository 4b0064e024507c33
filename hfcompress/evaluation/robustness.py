"""Answers to the same texts with slips of the keyboard, or in capitals: does compression make a model brittle?"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from hfcompress.evaluation.quality import Quality, evaluate_quality
from hfcompress.evaluation.records import STRICT, Figure
from hfcompress.tasks import Task, preprocess

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel

# Kinds of task whose right answers stay right when a text is spelt otherwise; spans and tags would move.
KINDS = ("classification", "regression")
_SHARE_OF_WORDS = 0.15
_WORD = re.compile(r"[^\W\d_]{4,}")


@dataclass(frozen=True, kw_only=True)
class Robustness:
    """What the original and the result score on changed texts.

    Attributes:
        change: Which change, from `CHANGES`.
        original: The original's metrics.
        compressed: The result's.
    """

    __pydantic_config__ = STRICT

    change: str
    original: dict[str, Figure]
    compressed: dict[str, Figure]


def typos(text: str) -> str:
    """Makes one slip in about every seventh word of four letters or more; the same ones for the same text.

    A slip swaps two letters that stand side by side, leaves one out, or doubles one; never the word's first letter.
    """
    generator = random.Random(text)

    def slip(found: re.Match[str]) -> str:
        word = found[0]
        if generator.random() >= _SHARE_OF_WORDS:
            return word
        place, way = generator.randrange(1, len(word) - 1), generator.randrange(3)
        if way == 0:
            return word[:place] + word[place + 1] + word[place] + word[place + 2 :]
        return word[:place] + (word[place] * 2 if way == 1 else "") + word[place + 1 :]

    return _WORD.sub(slip, text)


def capitals(text: str) -> str:
    """Writes a text in capital letters."""
    return text.upper()


CHANGES: Mapping[str, Callable[[str], str]] = MappingProxyType({"typos": typos, "case": capitals})


def evaluate_changed(
    model: PreTrainedModel,
    rows: Dataset,
    task: Task,
    tokenizer: Any,
    change: str,
    *,
    max_length: int,
    batch_size: int,
) -> Quality:
    """Measures a model on changed texts.

    Args:
        model: A model with the task's head.
        rows: The split, as `load_data` returns it.
        task: The task, of one of `KINDS`.
        tokenizer: The model's.
        change: A name from `CHANGES`.
        max_length: Tokens after which a text is cut.
        batch_size: Rows of a forward pass.
    """
    altered = rows.map(
        lambda row: {column: CHANGES[change](row[column]) for column in task.columns},
        keep_in_memory=True,
        desc=f"Changing {task.name} ({change})",
    )
    label2id = cast("dict[str, int]", model.config.label2id) if task.labels else None
    encoded = preprocess(altered, task, tokenizer, max_length=max_length, label2id=label2id)
    return evaluate_quality(model, encoded, task, tokenizer, batch_size=batch_size, progress=False)
