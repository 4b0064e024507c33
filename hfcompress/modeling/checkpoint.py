"""Compressed checkpoints: written by plain `save_pretrained`, loaded by plain `from_pretrained`.

Importing this module registers hfcompress with transformers' public quantizer registry. The registry's hook sees
a stock model on `meta` before its weights are loaded; there the structure is put back.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AutoHfQuantizer,
    AutoQuantizationConfig,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfcompress.errors import CheckpointError
from hfcompress.modeling.adapters import require_reader
from hfcompress.modeling.anatomy import base_model, find
from hfcompress.modeling.architectures import architectures
from hfcompress.modeling.layers.bitsandbytes import (
    SERIALIZED_NAMES,
    LoadBitsAndBytes,
    kind_of,
    require_bitsandbytes,
    runs_without_cure,
    settle_all,
)
from hfcompress.modeling.loading import guard_config, guard_files, require_checked, require_exact_base
from hfcompress.modeling.saving import forget_reading, replace_directory, save, save_as_stock, seal_when_saved
from hfcompress.modeling.stock_fields import say_in_stock_fields
from hfcompress.modeling.structure import Structure, describe, read_linear_entry, rebuild

__all__ = ["HFCompressConfig", "HFCompressQuantizer", "commit", "needs_plugin", "replace_directory", "save"]

METHOD = "hfcompress"
FORMAT_VERSION = 1
_MOST_ENTRIES = 20_000


class HFCompressConfig(QuantizationConfigMixin):
    """What `config.json` says about a compressed model, under `quantization_config`.

    Args:
        structure: What `describe` read off the live model.
        format_version: Version of this record's format.

    Raises:
        CheckpointError: The record is of a newer format, or not of this form.
    """

    def __init__(self, structure: Structure, format_version: int = FORMAT_VERSION, **unknown: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        if type(format_version) is not int or format_version < 1:
            raise CheckpointError(f"config.json: format_version must be a positive integer, not {format_version!r}")
        if format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"config.json: format_version is {format_version}, this hfcompress reads up to {FORMAT_VERSION}",
                hint="pip install --upgrade hfcompress",
            )
        unknown.pop("quant_method", None)
        if unknown:
            raise CheckpointError(f"config.json: quantization_config has unknown keys: {', '.join(sorted(unknown))}")
        if not isinstance(structure, Mapping) or not all(isinstance(each, Mapping) for each in structure.values()):
            raise CheckpointError("config.json: quantization_config.structure must be a mapping of mappings")
        if sum(map(len, structure.values())) > _MOST_ENTRIES:
            raise CheckpointError(f"config.json: quantization_config.structure has more than {_MOST_ENTRIES} entries")
        self.format_version = format_version
        self.structure = structure

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Reads the record from `config.json`."""
        if "structure" not in config_dict:
            raise CheckpointError("config.json: quantization_config has no structure")
        config = cls(**{str(name): value for name, value in config_dict.items() if name != "self"})
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """Returns the record as plain JSON values."""
        return {
            "quant_method": METHOD,
            "format_version": self.format_version,
            "structure": copy.deepcopy(dict(self.structure)),
        }


class HFCompressQuantizer(HfQuantizer):
    """Puts the structure back while transformers loads a checkpoint, and holds loading to it."""

    quantization_config: HFCompressConfig
    requires_calibration = True  # transformers then refuses to make such a model from a config alone

    @property
    def _has_quantized_linears(self) -> bool:
        return "linear" in self.quantization_config.structure

    @property
    def serialized_names(self) -> dict[str, list[str]]:  # type: ignore[override]
        """The tensors that one `weight` was stored as."""
        return {"weight": list(SERIALIZED_NAMES)} if self._has_quantized_linears else {}

    def get_load_operations(self) -> dict[str, Any]:
        """The operation that reads them back."""
        return {"deserialize": LoadBitsAndBytes}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Checks that the engine of the quantized layers is there."""
        if self._has_quantized_linears:
            require_bitsandbytes()

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Sees the config before a module is built from it, and holds it to what is possible."""
        guard_config(config)
        return config

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Adds the stored parts of quantized weights to a plan; where there is no plan there is nothing to look up."""
        if plan:
            super().update_parallel_plan(model, plan)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        structure = self.quantization_config.structure
        guard_files(kwargs.get("checkpoint_files"), model.config, structure)
        require_reader(kwargs.get("checkpoint_files"))
        rebuild(model, structure)
        require_exact_base(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        require_checked(model)
        if self._has_quantized_linears:
            settle_all(model)
        forget_reading(model)
        _attach(model, self.quantization_config, self if self._has_quantized_linears else None)
        return model

    def is_serializable(self) -> bool:
        """Compressed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on quantized layers."""
        return True


def _attach(model: PreTrainedModel, config: QuantizationConfigMixin, quantizer: HfQuantizer | None) -> None:
    """Leaves a model in the state in which transformers would have loaded it."""
    seal_when_saved(model)
    for part in (model, base_model(model)):
        part.config.quantization_config = config
        part.config._is_quantized = quantizer is not None
    if quantizer is not None:
        vars(model).update(
            hf_quantizer=quantizer, is_quantized=True, quantization_method=quantizer.quantization_config.quant_method
        )
        return
    # Only shapes differ: an ordinary model, which may be trained, cast and moved.
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(attribute, None)


def _detach(model: PreTrainedModel) -> None:
    save_as_stock(model)
    for part in (model, base_model(model)):
        vars(part.config).pop("quantization_config", None)
        part.config._is_quantized = False
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(attribute, None)


def _detached(model: PreTrainedModel) -> list[str]:
    """Returns the parts that models of other heads have and this one has not, by the names they have there.

    A load makes them anew, and transformers cannot draw random values for 8-bit weights.
    """
    base = base_model(model)
    known = architectures().get(model.config.model_type)
    absent = [each for each in known.detachable if find(base, each) is None] if known else []
    return [name for each in absent for name in (each, f"{model.base_model_prefix}.{each}")]


def _any_head(model: PreTrainedModel) -> str:
    """Returns a pattern, as transformers matches such names, of every module outside the base model.

    A head of another task that is put on the checkpoint is drawn at random, which 8-bit weights cannot be.
    """
    inside = [model.base_model_prefix, *(name for name, _ in base_model(model).named_children())]
    return rf"(?!(?:{'|'.join(map(re.escape, filter(None, inside)))})(?:\.|$)).*"


def _stock_quantization(model: PreTrainedModel, structure: Structure) -> BitsAndBytesConfig | None:
    """Returns the stock record where the only difference is that bitsandbytes holds every linear layer alike.

    None as well where some layer's widths crash or go wrong on CPU unless hfcompress has loaded it.
    """
    if set(structure) != {"linear"}:
        return None
    entries = {read_linear_entry(name, entry) for name, entry in structure["linear"].items()}
    if len(entries) != 1:
        return None
    kind, numerics = entries.pop()
    if kind != "int8" and not all(runs_without_cure(module) for module in model.modules() if kind_of(module)):
        return None
    skipped = [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    skipped += [*_detached(model), _any_head(model)]
    if kind == "int8":
        form = {"llm_int8_threshold": numerics.threshold, "llm_int8_skip_modules": skipped}
        return BitsAndBytesConfig(load_in_8bit=True, **form)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind.removesuffix("-double"),
        bnb_4bit_use_double_quant=kind.endswith("-double"),
        bnb_4bit_compute_dtype=numerics.compute_dtype or model.dtype,
        llm_int8_skip_modules=skipped,
    )


def commit(model: PreTrainedModel, *, stock: bool = True) -> None:
    """Writes a model's structure into its config, so that plain `save_pretrained` is right from here on.

    Every change of structure ends here. What the stock config can say is said there, and a model that needs
    nothing else is an ordinary checkpoint that loads without hfcompress.

    Args:
        model: The model.
        stock: Whether what is quantized alike everywhere may be recorded as bitsandbytes' own.
    """
    settle_all(model)
    forget_reading(model)
    say_in_stock_fields(model)
    structure = describe(model)
    if not structure:
        _detach(model)
        return
    record = _stock_quantization(model, structure) if stock else None
    if record is not None:
        _attach(model, record, AutoHfQuantizer.from_config(record, pre_quantized=True))
        return
    config = HFCompressConfig(structure)
    _attach(model, config, HFCompressQuantizer(config) if "linear" in structure else None)


def attach_stock(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """Leaves a model that another library has quantized as transformers would have loaded it.

    Args:
        model: The model, as its stock config and the record build it.
        record: What `quantization_config` says in its config.
    """
    config = AutoQuantizationConfig.from_dict(record)
    _attach(model, config, AutoHfQuantizer.from_config(config, pre_quantized=True))


def needs_plugin(model: PreTrainedModel) -> bool:
    """Tells whether a saved copy of the model loads only where hfcompress is imported."""
    return isinstance(getattr(model.config, "quantization_config", None), HFCompressConfig)


def _register() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(HFCompressConfig)
        register_quantizer(METHOD)(HFCompressQuantizer)


_register()
