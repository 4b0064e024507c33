"""Letting a model write texts, in one and the same way for every model that is compared."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfcompress.errors import CompressionError
from hfcompress.tasks.task import Generation

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def written(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], processor: Any, generation: Generation
) -> list[str]:
    """Returns what a model writes, without special tokens.

    What the checkpoint's own generation config says of tokens and penalties stays; nothing is sampled.

    Args:
        model: A model with `generate`.
        batch: What it reads.
        processor: Decodes tokens.
        generation: How it writes.

    Raises:
        CompressionError: A score is not a number.
    """
    from transformers import LogitsProcessorList

    settings = copy.deepcopy(model.generation_config)
    assert settings is not None
    settings.update(
        max_new_tokens=generation.tokens, max_length=None, num_beams=generation.beams, do_sample=False, min_length=0
    )
    watched = LogitsProcessorList([_numbers_only])
    tokens = model.generate(**batch, generation_config=settings, logits_processor=watched)  # type: ignore[operator]
    return [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]


def told_of(generation: Generation) -> str:
    """Says how texts are written."""
    way = "greedily" if generation.beams == 1 else f"with {generation.beams} beams"
    return f"Texts are written {way}, of at most {generation.tokens} tokens, and nothing is sampled."


def _numbers_only(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    if scores.isnan().any():
        raise CompressionError(
            "the model's outputs are not finite, so it cannot be measured",
            hint="Its weights were damaged by the last step: compress less, or train it further.",
        )
    return scores
