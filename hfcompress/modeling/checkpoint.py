"""Compressed checkpoints: written by plain `save_pretrained`, loaded by plain `from_pretrained`.

Importing this module registers hfcompress with transformers' public quantizer registry. The registry's hook sees
a stock model on `meta` before its weights are loaded; there the structure is put back.
"""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.core_model_loading import WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import (
    AutoHfQuantizer,
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from hfcompress.errors import CheckpointError
from hfcompress.modeling.anatomy import base_model, feed_forward_blocks
from hfcompress.modeling.architectures import architectures
from hfcompress.modeling.layers.bitsandbytes import SERIALIZED_NAMES, LoadBitsAndBytes, require_bitsandbytes, settle
from hfcompress.modeling.structure import Structure, describe, rebuild

METHOD = "hfcompress"
FORMAT_VERSION = 1


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
        if not isinstance(structure, Mapping):
            raise CheckpointError(f"config.json: quantization_config.structure must be a mapping, not {structure!r}")
        self.format_version = format_version
        self.structure = structure

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Reads the record from `config.json`."""
        if "structure" not in config_dict:
            raise CheckpointError("config.json: quantization_config has no structure")
        config = cls(**config_dict)
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

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        rebuild(model, self.quantization_config.structure)
        _require_exact_base(model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if "mark_tied_weights_as_initialized" in vars(model):
            raise CheckpointError(
                "this version of transformers loads weights in a way that hfcompress cannot check",
                hint="pip install 'transformers>=5.23,<6'",
            )
        for module in model.modules():
            settle(module)
        # Saving writes what is there; the conversion is only for loading.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [
            each
            for each in conversions
            if not (isinstance(each, WeightConverter) and isinstance(each.operations[0], LoadBitsAndBytes))
        ]
        _attach(model, self.quantization_config, self if self._has_quantized_linears else None)
        return model

    def is_serializable(self) -> bool:
        """Compressed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters can be trained on quantized layers."""
        return True


def _require_exact_base(model: PreTrainedModel) -> None:
    """Makes missing, unexpected or mismatched weights of the base model an error of the load under way.

    transformers logs them in a table and fills the gaps with random values. Its step that first sees the
    whole account is wrapped for this one load; `_process_model_after_weight_loading` checks that it ran.
    """
    stock = model.mark_tied_weights_as_initialized
    base = base_model(model)
    prefix = "" if base is model else f"{model.base_model_prefix}."
    optional: tuple[str, ...] = ()
    if model.config.model_type in architectures():
        optional = architectures()[model.config.model_type].optional
    required = {name for name, _ in base.named_children()} - set(optional)

    def inside(key: str) -> bool:
        return key.startswith(prefix) and key.removeprefix(prefix).split(".")[0] in required

    def checked(loading_info: Any) -> None:
        del model.mark_tied_weights_as_initialized
        account = copy.copy(loading_info)
        account.missing_keys = set(account.missing_keys) - set(model.all_tied_weights_keys)
        account.unexpected_keys = set(account.unexpected_keys)
        model._adjust_missing_and_unexpected_keys(account)
        wrong = {
            "missing": sorted(filter(inside, account.missing_keys)),
            "unexpected": sorted(filter(inside, account.unexpected_keys)),
            "of another shape": sorted(key for key, *_ in account.mismatched_keys if inside(key)),
            "not readable": sorted(filter(inside, account.conversion_errors)),
        }
        found = [f"{len(keys)} {what}: {', '.join(keys[:3])}" for what, keys in wrong.items() if keys]
        if found:
            for keys in (loading_info.missing_keys, loading_info.unexpected_keys, loading_info.mismatched_keys):
                keys.clear()  # this error says it all: no table after it, no other error over it
            loading_info.conversion_errors.clear()
            raise CheckpointError(
                f"the weights do not fit the structure in config.json ({'; '.join(found)})",
                hint="The checkpoint is damaged or was edited: save or download it again.",
            )
        stock(loading_info)

    vars(model)["mark_tied_weights_as_initialized"] = checked


def _attach(model: PreTrainedModel, config: QuantizationConfigMixin, quantizer: HfQuantizer | None) -> None:
    """Leaves a model in the state in which transformers would have loaded it."""
    for part in (model, base_model(model)):
        part.config.quantization_config = config
        part.config._is_quantized = quantizer is not None
    if quantizer is not None:
        model.hf_quantizer = quantizer
        model.is_quantized = True
        model.quantization_method = quantizer.quantization_config.quant_method
        return
    # Only shapes differ: an ordinary model, which may be trained, cast and moved.
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(attribute, None)


def _detach(model: PreTrainedModel) -> None:
    for part in (model, base_model(model)):
        vars(part.config).pop("quantization_config", None)
        part.config._is_quantized = False
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(attribute, None)


def _say_it_in_stock_fields(model: PreTrainedModel) -> None:
    """Moves what the stock config can express into it: feed-forward blocks of one width."""
    if model.config.model_type not in architectures():
        return
    widths: dict[str, set[int]] = {}
    for block in feed_forward_blocks(model):
        widths.setdefault(block.spec.neurons, set()).add(block.neurons)
    for field, found in widths.items():
        if len(found) == 1:
            setattr(model.config, field, found.pop())


def _stock_quantization(model: PreTrainedModel, structure: Structure) -> BitsAndBytesConfig | None:
    """Returns the stock record where the only difference is that bitsandbytes holds every linear layer alike."""
    kinds = set(structure.get("linear", {}).values())
    if set(structure) != {"linear"} or len(kinds) != 1:
        return None
    kind = kinds.pop()
    skipped = [name for name, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=skipped)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind.removesuffix("-double"),
        bnb_4bit_use_double_quant=kind.endswith("-double"),
        bnb_4bit_compute_dtype=model.dtype,
        llm_int8_skip_modules=skipped,
    )


def commit(model: PreTrainedModel) -> None:
    """Writes a model's structure into its config, so that plain `save_pretrained` is right from here on.

    Every change of structure ends here. What the stock config can say is said there, and a model that needs
    nothing else is an ordinary checkpoint that loads without hfcompress.
    """
    _say_it_in_stock_fields(model)
    structure = describe(model)
    if not structure:
        _detach(model)
        return
    stock = _stock_quantization(model, structure)
    if stock is not None:
        _attach(model, stock, AutoHfQuantizer.from_config(stock, pre_quantized=True))
        return
    config = HFCompressConfig(structure)
    _attach(model, config, HFCompressQuantizer(config) if "linear" in structure else None)


def needs_plugin(model: PreTrainedModel) -> bool:
    """Tells whether a saved copy of the model loads only where hfcompress is imported."""
    return isinstance(getattr(model.config, "quantization_config", None), HFCompressConfig)


def save(model: PreTrainedModel, directory: Path, *, tokenizer: Any = None) -> None:
    """Saves a checkpoint as a whole or not at all.

    It is written beside its place and moved there; what was at that place before is replaced only by a whole
    successor. File modes follow the umask.

    Args:
        model: A committed model.
        directory: Where the checkpoint goes.
        tokenizer: Saved along when given.

    Raises:
        OSError: The disk is full, or the place cannot be written.
    """
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        model.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _open_modes(partial)
        replace_directory(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_directory(new: Path, place: Path) -> None:
    """Moves a finished folder to its place, over what is there."""
    old = place.with_name(f".{place.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.rename(place, old)
    os.rename(new, place)
    shutil.rmtree(old, ignore_errors=True)


def _open_modes(directory: Path) -> None:
    """safetensors makes its files private; the user's umask decides instead."""
    umask = os.umask(0)
    os.umask(umask)
    for file in directory.iterdir():
        file.chmod(0o666 & ~umask)


def _register() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    if METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(METHOD)(HFCompressConfig)
        register_quantizer(METHOD)(HFCompressQuantizer)


_register()
