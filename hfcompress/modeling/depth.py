"""Takes whole layers out of a live model; what is left is what the stock config of that depth builds.

As in `surgery`, a function changes the model in place, on any device, and the caller ends with
`checkpoint.commit(model)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.modeling.anatomy import architecture_of, base_model, layer_lists
from hfcompress.modeling.architectures import Stack


def evenly(count: int, kept: int) -> list[int]:
    """Returns `kept` of `count` places, evenly spaced: ascending, the first always among them."""
    return [number * count // kept for number in range(kept)]


def stack_depths(model: PreTrainedModel) -> dict[str, int]:
    """Returns how many layers run in each stack that this model has, by the stack's path."""
    base = base_model(model)
    depths: dict[str, int] = {}
    for stack in architecture_of(model).stacks:
        if not layer_lists(model, stack):
            continue
        if stack.shared:
            depths[stack.layers] = int(getattr(base.config, stack.depth))
        else:
            layers: Any = base.get_submodule(stack.layers)
            depths[stack.layers] = len(layers)
    return depths


def drop_layers(model: PreTrainedModel, kept: Sequence[int], *, stack: str | None = None) -> None:
    """Keeps some layers of a stack; the result is what the stock config of that depth builds.

    Args:
        model: A model of a supported family, compressed or not.
        kept: Which layers stay, ascending.
        stack: The stack's path in the base model (`encoder.block`); needed where there are several.

    Raises:
        CompressionError: No layer would be left, a number is no layer's, the stack is not named, or the family
            cannot do without one of the dropped layers.
    """
    depths = stack_depths(model)
    if stack is None and len(depths) > 1:
        raise CompressionError(f"the model has several stacks of layers; name one: {', '.join(depths)}")
    name = stack or next(iter(depths))
    if name not in depths:
        raise CompressionError(f"the model has no stack '{name}'; allowed: {', '.join(depths)}")
    if not kept or list(kept) != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= depths[name]:
        raise CompressionError(
            f"{name}: the kept layers must be ascending numbers from 0 to {depths[name] - 1}, not {list(kept)}"
        )
    spec = next(each for each in architecture_of(model).stacks if each.layers == name)
    if len(kept) == depths[name]:
        return
    _require_droppable(model, spec, kept)
    if not spec.shared:
        _keep_layers(base_model(model), spec, kept)
    _say_depth(model, spec, kept, depths[name])


def _require_droppable(model: PreTrainedModel, stack: Stack, kept: Sequence[int]) -> None:
    config = base_model(model).config
    if stack.first_stays and kept[0] != 0:
        raise CompressionError(f"{stack.layers}: layer 0 is unlike the others in this family and must stay")
    for switch in stack.numbered_by:
        if getattr(config, switch, False):
            raise CompressionError(f"{stack.layers}: with {switch} a layer depends on its number: none can be dropped")
    if stack.shared and len(layer_lists(model, stack)) > 1:
        raise CompressionError(f"{stack.layers}: layers can be dropped only where all are one group")


def _keep_layers(base: PreTrainedModel, stack: Stack, kept: Sequence[int]) -> None:
    old: Any = base.get_submodule(stack.layers)
    layers = nn.ModuleList([old[index] for index in kept])
    for path, flag in stack.carried.items():
        parent, _, name = path.rpartition(".")
        if layers[0] is not old[0]:
            new_home = layers[0].get_submodule(parent)
            setattr(new_home, name, old[0].get_submodule(path))
            setattr(new_home, flag, True)
    for number, layer in enumerate(layers):
        parts: list[Any] = [module for module in layer.modules() if hasattr(module, "layer_idx")]
        for module in parts:
            module.layer_idx = number  # the place of its keys and values in a cache
    base.set_submodule(stack.layers, layers)


def _say_depth(model: PreTrainedModel, stack: Stack, kept: Sequence[int], before: int) -> None:
    base = base_model(model)
    configs = {id(part.config): part.config for part in (model, base)}
    for config in configs.values():
        setattr(config, stack.depth, len(kept))
        for field in stack.per_layer_fields:
            values = getattr(config, field, None)
            if values is not None:
                setattr(config, field, [values[index] for index in kept])
    owner = base.get_submodule(stack.layers.partition("*")[0].rstrip(".").rpartition(".")[0])
    copied = getattr(owner, "config", None)  # a stack may have a copy of its own
    if copied is not None and id(copied) not in configs:
        copied.num_hidden_layers = len(kept)
    mix = getattr(model, "layer_weights", None)  # some heads weigh the outputs of the embeddings and all layers
    if isinstance(mix, nn.Parameter) and len(mix) == before + 1:
        index = torch.tensor([0, *(number + 1 for number in kept)])
        kept_weights = mix.detach().index_select(0, index.to(mix.device))
        model.layer_weights = nn.Parameter(kept_weights, requires_grad=mix.requires_grad)
