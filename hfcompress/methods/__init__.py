"""How a model is compressed: one file a method, a registry, and the one call that needs no training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfcompress.configuration import Config
from hfcompress.errors import CompressionError

# Importing a method's file registers it.
from hfcompress.methods import (  # noqa: F401
    distillation,
    gptq,
    layer_dropping,
    low_rank,
    quantization,
    quantization_aware,
    structured_pruning,
    student,
    unstructured_pruning,
    vocabulary,
    width_pruning,
)
from hfcompress.methods.calibration import checked_batches
from hfcompress.methods.registry import Batch, Context, method_of
from hfcompress.modeling.adapters import require_no_adapters

__all__ = ["compress"]

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def compress(
    model: ModelT,
    configs: Sequence[Config],
    *,
    calibration: Iterable[Batch] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: Sequence[str] = (),
    cache_dir: str | Path | None = None,
) -> ModelT:
    """Compresses a model in place by methods that need no training, in the order given.

    Args:
        model: A model of a supported family; it may be compressed already.
        configs: One method's config each.
        calibration: Batches of model inputs, as a tokenizer returns them, or a `DataLoader`; with `labels`, pruning
            ranks units by the loss.
        tokenizer: For methods that change the vocabulary; changed in place, to be saved with the model.
        texts: Texts that such a method must leave as they are cut.
        cache_dir: Where statistics of calibration data and times measured on this machine are kept, so that the same
            model can be compressed to another target without them being taken again.

    Returns:
        The same model; plain `save_pretrained` writes it.

    Raises:
        CompressionError: A method cannot work at once, or not after the ones before it, the model has adapters, or
            the calibration data are no batches: nothing was done then. Or a method found out that it cannot work on
            this model: it changed nothing, but those before it did their work.
        ConfigError: An object in `configs` is no method's config.
    """
    require_no_adapters(model)
    chosen = [method_of(config) for config in configs]
    for method, config in zip(chosen, configs, strict=True):
        if method.apply is None:
            raise CompressionError(
                f"{method.name} works only in training",
                hint="Use DistillationTrainer, or a recipe's step with `training`.",
            )
        if method.why_not and (message := method.why_not(config, False)):
            raise CompressionError(f"{method.name}: {message}")
    for index, method in enumerate(chosen):
        earlier = [other.name for other in chosen[:index] if other.quantizes]
        if method.needs_float and earlier:
            raise CompressionError(
                f"{method.name} cannot follow {earlier[0]}: it needs float weights", hint="Quantize last."
            )
    place = Path(cache_dir) if cache_dir else None
    batches = checked_batches(calibration)
    for method, later in pairwise(chosen):
        if method.renumbers and batches:
            raise CompressionError(
                f"{later.name} cannot follow {method.name} with these calibration batches: their token ids are old",
                hint=f"Call compress with {method.name} alone, and again with batches of the changed tokenizer.",
            )
    context = Context(calibration=batches, tokenizer=tokenizer, texts=texts, cache_dir=place)
    for method, config in zip(chosen, configs, strict=True):
        assert method.apply is not None
        method.apply(model, config, context)
    return model
