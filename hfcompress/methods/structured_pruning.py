"""Structured pruning of attention heads and FFN neurons: at once, or gradually while training.

While training, masks stand for what is going to be removed; the model shrinks once, at the end. So shapes never
change in flight, and data-parallel training, resuming and best-model selection work as in any Trainer.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import are_labelled
from hfcompress.methods.pruning import importance
from hfcompress.methods.pruning.asked import StructuredPruningConfig, shrink, target_for, why_not
from hfcompress.methods.pruning.gradual import GatedPruningPart, PruningPart
from hfcompress.methods.pruning.reconstruction import reconstruct
from hfcompress.methods.pruning.search import rearrange
from hfcompress.methods.registry import Context, Method, register
from hfcompress.methods.training import bf16_is_fast

__all__ = ["GatedPruningPart", "PruningPart", "StructuredPruningConfig", "structured_pruning"]


def structured_pruning(model: PreTrainedModel, config: StructuredPruningConfig, context: Context) -> dict[str, Any]:
    """Removes heads and neurons at once, in place.

    Args:
        model: A float model of a supported family.
        config: What to remove.
        context: Calibration data, with `labels` for `importance: fisher` and `taylor`.

    Returns:
        The importance used, how projections were mended, how many units each layer keeps, and the share of the
        FLOPs of the blocks that could lose some which was removed.

    Raises:
        CompressionError: The model is quantized, the target cannot be reached, calibration data or labels are
            missing, or scores are not finite or all the same. Nothing was removed then.
    """
    labelled = are_labelled(context.calibration)
    ranking = config.importance
    if ranking == "auto":
        ranking = "fisher" if labelled else "activation" if context.calibration else "magnitude"
    _require_data(ranking, config, context, labelled)
    target = target_for(model, config, context)
    folder = context.cache_dir / "pruning" if context.cache_dir else None
    gradients: list[torch.Tensor] = []
    if ranking == "magnitude":
        scores = [importance.magnitude(each) for each in target.units]
    elif ranking == "activation":
        with _computing(model, config):
            scores = importance.kept_energies(model, target.units, context.calibration, folder)
    else:
        with _computing(model, config):
            gradients = importance.kept_gradients(model, target.units, context.calibration, folder)
        scores = [getattr(importance, ranking)(each) for each in gradients]
    target.require_telling(scores)
    kept = target.choose(scores)
    if ranking == "fisher":
        kept = [rearrange(each, index) for each, index in zip(gradients, kept, strict=True)]
    mend = bool(context.calibration) if config.reconstruct == "auto" else config.reconstruct
    made = None
    if mend:
        with _computing(model, config):
            made = reconstruct(model, target.units, kept, context.calibration)
    findings = {"importance": ranking, "reconstructed": made.mode if made else False}
    return findings | shrink(model, target, kept, made)


def _computing(model: PreTrainedModel, config: StructuredPruningConfig) -> Any:
    bf16 = config.precision == "bf16" or (config.precision == "auto" and bf16_is_fast())
    return torch.autocast(model.device.type, torch.bfloat16, enabled=bf16 and model.dtype == torch.float32)


def _require_data(ranking: str, config: StructuredPruningConfig, context: Context, labelled: bool) -> None:
    if message := why_not(config, trains=False):
        raise CompressionError(message)
    if ranking in ("fisher", "taylor") and not labelled:
        raise CompressionError(
            f"importance '{ranking}' needs calibration batches with labels",
            hint="Pass calibration=[batch, ...] with a 'labels' entry, or choose 'activation' or 'magnitude'.",
        )
    if config.reconstruct is True and not context.calibration:
        raise CompressionError(
            "reconstruct needs calibration data, and there is none",
            hint="Pass calibration=[batch, ...], or leave reconstruct at 'auto'.",
        )


def _part(config: StructuredPruningConfig, context: Context) -> PruningPart:
    return (GatedPruningPart if config.importance == "l0" else PruningPart)(config, context)


register(
    Method(
        name="structured_pruning",
        config=StructuredPruningConfig,
        summary="Removes attention heads and FFN neurons, at once or gradually in training.",
        apply=structured_pruning,
        part=_part,
        why_not=why_not,
        shrinks=True,
    )
)
