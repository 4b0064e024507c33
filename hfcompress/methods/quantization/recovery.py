"""Recovers what quantization lost by training adapters on the quantized weights (Dettmers et al. 2023, QLoRA)."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel

from hfcompress.configuration import Config
from hfcompress.errors import CompressionError, MissingBackendError
from hfcompress.methods.quantization.kinds import LinearKind, quantize_layer, require_engine, spread
from hfcompress.methods.registry import Context
from hfcompress.methods.training import Part
from hfcompress.modeling.adapters import adapted_layers, forget_adapters, lora_targets, without_adapters
from hfcompress.modeling.anatomy import ROLES, base_model, input_width, output_width
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.layers.bitsandbytes import KINDS, Numerics, dequantize, kind_of, numerics_of


class QLoRAConfig(Config):
    """How to train adapters on a quantized model.

    Attributes:
        weights: What linear layers that are still float become before training, and stay while it lasts: any kind of
            `quantization`, or None to leave them as they are.
        rank: Of the adapters.
        alpha: Adapters are multiplied by this, divided by their rank.
        dropout: Of what enters the adapters.
        targets: Where adapters go: roles, or ends of layers' names as PEFT takes them.
        then: `keep` stores the adapters in files of their own beside the quantized model; `merge` makes float weights
            of both; `requantize` merges, and quantizes each layer again to the kind that it had.
    """

    weights: LinearKind | None = "nf4-double"
    rank: int = Field(16, ge=1, le=1024)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.05, ge=0, lt=1)
    targets: tuple[str, ...] = Field(ROLES, strict=False, min_length=1)
    then: Literal["keep", "merge", "requantize"] = "requantize"


class QLoRAPart(Part):
    """Freezes the quantized model, trains adapters on it, and does with them as the config says.

    Raises:
        MissingBackendError: PEFT is not installed.
    """

    def __init__(self, config: QLoRAConfig, context: Context | None = None) -> None:
        self.config = config
        _require_peft()

    def prepare(self, model: PreTrainedModel) -> None:
        """Quantizes what is float, and puts adapters on it, before a Trainer looks at the model.

        Raises:
            CompressionError: The model has adapters already, a target fits no layer, or there is nothing quantized.
            MissingBackendError: The engine of a kind is not installed.
        """
        peft = _require_peft()
        if adapted_layers(model):
            raise CompressionError(
                "the model has adapters already", hint="Merge them first, or go on training them with PEFT."
            )
        targets = lora_targets(model, self.config.targets)
        base = base_model(model)
        if self.config.weights:
            require_engine(self.config.weights)
        kinds = spread(model, self.config.weights, {}, {})
        self._made = {path: kind for path, kind in kinds.items() if not kind_of(base.get_submodule(path))}
        if not self._made and not any(kind_of(module) for module in base.modules()):
            raise CompressionError("no layer is quantized", hint="Set weights, or quantize in a step before this one.")
        for path, kind in self._made.items():
            layer = quantize_layer(base.get_submodule(path), cast(LinearKind, kind), Numerics())
            base.set_submodule(path, layer)
        commit(model)
        form = {"r": self.config.rank, "lora_alpha": self.config.alpha, "lora_dropout": self.config.dropout}
        model.add_adapter(peft.LoraConfig(target_modules=targets, **form))
        for each in cast(Any, model).peft_config.values():
            each.base_model_name_or_path = None  # a folder of this machine, perhaps; the base lies beside them

    def end(self, model: PreTrainedModel) -> dict[str, Any]:
        """Keeps the adapters apart, or makes one weight of each layer and its adapter."""
        layers = adapted_layers(model)
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        found = {"adapters": len(layers), "trained_parameters": trained, "then": self.config.then}
        if self.config.then == "keep":
            with without_adapters(model):
                # A stock record would load without its adapters where PEFT is not, and say nothing.
                commit(model, stock=False)
            return found
        with torch.no_grad():
            for path, layer in layers.items():
                model.set_submodule(path, _merged(layer, model.dtype, again=self.config.then == "requantize"))
        forget_adapters(model)
        if self.config.then == "merge":
            for path, module in list(model.named_modules()):
                if kind_of(module):
                    model.set_submodule(path, _float(module, dequantize(module), model.dtype))
        for name, parameter in model.named_parameters():
            # As in a model that was loaded: what is no number of bits can be trained.
            holder = model.get_submodule(name.rpartition(".")[0])
            parameter.requires_grad_(parameter.is_floating_point() and not kind_of(holder))
        commit(model)
        return found


def _merged(layer: Any, dtype: torch.dtype, *, again: bool) -> nn.Module:
    """Returns one layer in the place of another and its adapter."""
    whole = layer.get_base_layer()
    kind = kind_of(whole)
    if kind is None:
        layer.merge(safe_merge=True)
        return whole
    weight = dequantize(whole).float() + layer.get_delta_weight(layer.active_adapter[0]).float()
    if not torch.isfinite(weight).all():
        raise CompressionError("an adapter is not finite", hint="Lower the learning rate.")
    made = _float(whole, weight, dtype)
    numerics = numerics_of(whole, dtype) if kind in KINDS else Numerics()
    return quantize_layer(made, kind, numerics) if again else made


def _float(module: nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(input_width(module), output_width(module))
    bias = cast("nn.Parameter | None", module.bias)
    linear.weight = nn.Parameter(weight.to(dtype))
    linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
    return linear.train(module.training)


def _require_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        hint = "pip install 'hfcompress[peft]'"
        raise MissingBackendError("qlora needs PEFT, which is not installed", hint=hint) from error
    return peft
