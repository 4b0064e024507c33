"""How many frames a model makes of sound, and which of them are padding."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel


def count_frames(model: PreTrainedModel, samples: int, **adapter: bool) -> int:
    """Returns how many frames a model makes of so many samples of sound."""
    made: Any = model
    return int(made._get_feat_extract_output_lengths(torch.tensor(samples), **adapter))


def mask_of_frames(model: PreTrainedModel, mask: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Returns which frames are no padding.

    Args:
        model: The model.
        mask: Which samples are none, `(batch, samples)`.
        size: `(batch, frames)` of what is masked: what the model makes of so many samples, its adapter's included.

    Returns:
        Of that size; the mask itself where the model does not make so many frames of the samples, or reads no sound.
    """
    made: Any = model
    if mask.shape[:1] != size[:1] or len(size) != 2 or not hasattr(model, "_get_feature_vector_attention_mask"):
        return mask
    adapted = getattr(model.config, "add_adapter", False)  # shortens the outputs, but not what lies between
    for adapter in ({"add_adapter": True}, {"add_adapter": False}) if adapted else ({},):
        if count_frames(model, mask.shape[1], **adapter) == size[1]:
            return made._get_feature_vector_attention_mask(size[1], mask, **adapter)
    return mask
