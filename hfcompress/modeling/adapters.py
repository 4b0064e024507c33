"""LoRA on compressed models: PEFT's names for layers, turned into those of their low-rank factors; and its layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.configuration import suggest
from hfcompress.errors import CheckpointError, CompressionError, MissingBackendError
from hfcompress.modeling.anatomy import ROLES, attention_blocks, base_model, feed_forward_blocks
from hfcompress.modeling.architectures import architectures
from hfcompress.modeling.layers.low_rank import LowRankLinear

ADAPTERS_FILE = "adapter_model.safetensors"


def lora_targets(model: PreTrainedModel, names: str | Iterable[str] | None = None) -> list[str]:
    """Returns what to give `peft.LoraConfig` as `target_modules`.

    PEFT knows a layer by its name and puts LoRA (Hu et al. 2021) on stock layers only, so that its defaults and names
    such as `query` fail where that layer is a low-rank one. Here they stand for the layer's two factors, and for the
    layer itself where it was left whole:

        config = LoraConfig(task_type="SEQ_CLS", target_modules=hfcompress.lora_targets(model))

    Args:
        model: The model that is given to `get_peft_model`, compressed or not.
        names: As `target_modules` takes them: ends of module names, or one regular expression for whole names. A role
            (`query`, `key`, `value`, `attention_output`, `ffn_input`, `ffn_output`) that is no layer's name in the
            family stands for the layers of that role. None for PEFT's defaults of the family, or queries and values
            where it has none.

    Returns:
        Ends of module names that match the layers that are meant and no others; sorted.

    Raises:
        CompressionError: A name fits no linear layer.
        MissingBackendError: `names` is None and PEFT is not installed.
    """
    wanted = _defaults(model) if names is None else names
    modules = dict(model.named_modules())
    halves = {name: each.own_factors for name, each in modules.items() if isinstance(each, LowRankLinear)}
    factors = {f"{name}.{half}" for name, own in halves.items() for half in own}
    layers = [
        name
        for name, each in modules.items()
        if isinstance(each, (nn.Linear, Conv1D, LowRankLinear)) and name not in factors
    ]
    chosen: set[str] = set()
    for layer in _matching(model, [*layers, *sorted(factors)], wanted):
        chosen |= {f"{layer}.{half}" for half in halves[layer]} if layer in halves else {layer}
    return sorted({_shortest(name, chosen, modules) for name in chosen})


# Adapters that are on a model


def adapted_layers(model: PreTrainedModel) -> dict[str, Any]:
    """Returns PEFT's layers by path in the whole model; each holds the layer that it stands for."""
    if not getattr(model, "_hf_peft_config_loaded", False):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def require_no_adapters(model: nn.Module) -> None:
    """Refuses a model that PEFT has put layers into: of what is changed below them nothing would be saved.

    Raises:
        CompressionError: It has adapters, or is no transformers model but something around one.
    """
    if not isinstance(model, PreTrainedModel):
        raise CompressionError(
            f"a {type(model).__name__} is no model of transformers",
            hint="Pass the model itself; of a PEFT model what merge_and_unload() returns.",
        )
    if adapted := list(adapted_layers(model)):
        raise CompressionError(
            f"the model has adapters (on {adapted[0]} and others), and saving it would save them alone",
            hint="Merge them first, by merge_and_unload() of PEFT's model, or remove them.",
        )


def forget_adapters(model: PreTrainedModel) -> None:
    """Tells a model, whose layers are its own again, that it has no adapters."""
    vars(model).pop("peft_config", None)
    vars(model).pop("_hf_peft_config_loaded", None)


@contextmanager
def without_adapters(model: PreTrainedModel) -> Iterator[None]:
    """Runs the body on the model that the adapters were put on."""
    layers = adapted_layers(model)
    for path, layer in layers.items():
        model.set_submodule(path, layer.get_base_layer())
    # Loading adapters leaves PEFT's names as those that the whole model would be stored by.
    aside = ("_hf_peft_config_loaded", "_weight_conversions") if layers else ()
    kept = {name: vars(model).pop(name) for name in aside if name in vars(model)}
    try:
        yield
    finally:
        for path, layer in layers.items():
            model.set_submodule(path, layer)
        vars(model).update(kept)


def require_reader(files: Sequence[str] | None) -> None:
    """Raises `MissingBackendError` where adapters lie beside weight files and PEFT, which reads them, is not there.

    transformers would load the model without them, and say nothing.
    """
    beside = [file for file in files or () if (Path(file).parent / ADAPTERS_FILE).is_file()]
    if beside and find_spec("peft") is None:
        raise MissingBackendError(
            f"{Path(beside[0]).parent} holds adapters, which PEFT reads", hint="pip install 'hfcompress[peft]'"
        )


def load_adapters(model: PreTrainedModel, folder: Path) -> bool:
    """Gives the adapters on a model the values that are stored in a folder; False where there are none.

    Raises:
        CheckpointError: The stored ones are of other layers or shapes.
    """
    if not adapted_layers(model) or not (folder / ADAPTERS_FILE).is_file():
        return False
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    stored = {name.removeprefix("base_model.model."): each for name, each in load_file(folder / ADAPTERS_FILE).items()}
    live = get_peft_model_state_dict(model, save_embedding_layers=False)
    live = {name.removeprefix("base_model.model."): each for name, each in live.items()}
    if {name: each.shape for name, each in stored.items()} != {name: each.shape for name, each in live.items()}:
        raise CheckpointError(
            f"{folder} holds adapters of other layers or another rank than the model has",
            hint="Start the run again in an empty folder.",
        )
    set_peft_model_state_dict(model, stored)
    return True


def _defaults(model: PreTrainedModel) -> str | Iterable[str]:
    try:
        from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as known
    except ImportError as error:
        raise MissingBackendError(
            "the default targets of LoRA are PEFT's, which is not installed", hint="pip install 'hfcompress[peft]'"
        ) from error
    return known.get(model.config.model_type, ("query", "value"))


def _matching(model: PreTrainedModel, layers: Sequence[str], wanted: str | Iterable[str]) -> list[str]:
    """Returns those of the layers, factors included, that PEFT's names mean."""
    if isinstance(wanted, str):
        try:
            found = [layer for layer in layers if re.fullmatch(wanted, layer)]
        except re.error as error:
            raise CompressionError(f"'{wanted}' is no regular expression: {error}") from None
        if not found:
            raise CompressionError(f"no linear layer's whole name matches '{wanted}'", hint=_known(layers))
        return found
    matches: list[str] = []
    for name in wanted:
        found = [layer for layer in layers if _ends(layer, name)] or _of_role(model, name)
        if not found:
            raise CompressionError(f"no linear layer's name ends in '{name}'", hint=_known(layers, name))
        matches += found
    return matches


def _of_role(model: PreTrainedModel, role: str) -> list[str]:
    """Returns the layers of a role, fused ones (GPT-2's) under each of theirs."""
    if role not in ROLES or model.config.model_type not in architectures():
        return []
    paths: list[str] = []
    for attention in attention_blocks(model):
        paths += [attention.path(each.path) for named, each in attention.projections if named == role]
        paths += [attention.path(attention.spec.output)] if role == "attention_output" else []
    for block in feed_forward_blocks(model):
        paths += [block.path(each.path) for each in block.inputs] if role == "ffn_input" else []
        paths += [block.path(block.spec.output)] if role == "ffn_output" else []
    base = base_model(model)
    prefix = next(path for path, module in model.named_modules() if module is base)
    return [f"{prefix}.{path}" if prefix else path for path in paths]


def _known(layers: Iterable[str], name: str = "") -> str:
    return suggest(name, {layer.rpartition(".")[2] for layer in layers})


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _shortest(name: str, chosen: set[str], modules: Mapping[str, nn.Module]) -> str:
    """Returns the shortest end of a name that no other module's name has unless it is chosen as well."""
    parts = name.split(".")
    for count in range(1, len(parts)):
        end = ".".join(parts[-count:])
        if all(other in chosen for other in modules if _ends(other, end)):
            return end
    return name
