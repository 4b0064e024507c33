"""Compress Hugging Face transformers: distil, prune, factorise and quantize, in any order.

Importing the package registers its checkpoint format with transformers, so that plain `from_pretrained` loads
what was compressed. Everything else is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfcompress.methods import compress
    from hfcompress.methods.distillation import DistillationConfig, OtherTokens
    from hfcompress.methods.gptq import GPTQMethodConfig
    from hfcompress.methods.layer_dropping import LayerDroppingConfig
    from hfcompress.methods.low_rank import LowRankConfig
    from hfcompress.methods.quantization import QLoRAConfig, QuantizationConfig
    from hfcompress.methods.quantization_aware import QuantizationAwareConfig
    from hfcompress.methods.structured_pruning import StructuredPruningConfig
    from hfcompress.methods.student import StudentConfig
    from hfcompress.methods.teaching.transfer import transfer_set
    from hfcompress.methods.trainer import DistillationTrainer, PruningTrainer
    from hfcompress.methods.training import TrainingConfig
    from hfcompress.methods.unstructured_pruning import UnstructuredPruningConfig
    from hfcompress.methods.vocabulary import VocabularyConfig
    from hfcompress.methods.width_pruning import WidthPruningConfig
    from hfcompress.modeling.adapters import lora_targets
    from hfcompress.tasks.augmentation import AugmentationConfig, augmented

__version__ = version("hfcompress")

import_module("hfcompress.modeling.checkpoint")  # registers the loader

_HOMES = {
    "compress": "hfcompress.methods",
    "DistillationConfig": "hfcompress.methods.distillation",
    "OtherTokens": "hfcompress.methods.distillation",
    "GPTQMethodConfig": "hfcompress.methods.gptq",
    "LowRankConfig": "hfcompress.methods.low_rank",
    "QLoRAConfig": "hfcompress.methods.quantization",
    "QuantizationAwareConfig": "hfcompress.methods.quantization_aware",
    "QuantizationConfig": "hfcompress.methods.quantization",
    "LayerDroppingConfig": "hfcompress.methods.layer_dropping",
    "UnstructuredPruningConfig": "hfcompress.methods.unstructured_pruning",
    "VocabularyConfig": "hfcompress.methods.vocabulary",
    "StructuredPruningConfig": "hfcompress.methods.structured_pruning",
    "StudentConfig": "hfcompress.methods.student",
    "WidthPruningConfig": "hfcompress.methods.width_pruning",
    "DistillationTrainer": "hfcompress.methods.trainer",
    "PruningTrainer": "hfcompress.methods.trainer",
    "TrainingConfig": "hfcompress.methods.training",
    "lora_targets": "hfcompress.modeling.adapters",
    "transfer_set": "hfcompress.methods.teaching.transfer",
    "AugmentationConfig": "hfcompress.tasks.augmentation",
    "augmented": "hfcompress.tasks.augmentation",
}

__all__ = [
    "AugmentationConfig",
    "DistillationConfig",
    "DistillationTrainer",
    "GPTQMethodConfig",
    "LayerDroppingConfig",
    "LowRankConfig",
    "OtherTokens",
    "PruningTrainer",
    "QLoRAConfig",
    "QuantizationAwareConfig",
    "QuantizationConfig",
    "StructuredPruningConfig",
    "StudentConfig",
    "TrainingConfig",
    "UnstructuredPruningConfig",
    "VocabularyConfig",
    "WidthPruningConfig",
    "augmented",
    "compress",
    "lora_targets",
    "transfer_set",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
