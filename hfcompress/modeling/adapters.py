"""Where LoRA goes in a compressed model: PEFT's names for layers, turned into those of their low-rank factors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.configuration import suggest
from hfcompress.errors import CompressionError, MissingBackendError
from hfcompress.modeling.anatomy import ROLES, attention_blocks, base_model, feed_forward_blocks
from hfcompress.modeling.architectures import architectures
from hfcompress.modeling.layers.low_rank import LowRankLinear

_HALVES = ("down", "up")


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
    factors = {
        f"{name}.{half}" for name, each in modules.items() if isinstance(each, LowRankLinear) for half in _HALVES
    }
    layers = [
        name
        for name, each in modules.items()
        if isinstance(each, (nn.Linear, Conv1D, LowRankLinear)) and name not in factors
    ]
    chosen: set[str] = set()
    for layer in _matching(model, [*layers, *sorted(factors)], wanted):
        whole = not isinstance(modules[layer], LowRankLinear)
        chosen |= {layer} if whole else {f"{layer}.{half}" for half in _HALVES}
    return sorted({_shortest(name, chosen, modules) for name in chosen})


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
