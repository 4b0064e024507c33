"""Where each model family keeps its parts: one data-only file per family, found by `model_type`.

A new family is one new file here that defines `ARCHITECTURE`; nothing else names a family.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

Quantity = Literal["heads", "kv_heads", "width", "groups"]
Role = Literal["query", "key", "value"]


@dataclass(frozen=True, kw_only=True)
class Projection:
    """A linear map, or one block of the outputs of a fused one.

    Attributes:
        path: The module, relative to its layer.
        part: Which block of the fused module's outputs this is.
        parts: How many equal blocks the fused module's outputs hold.
    """

    path: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One multi-head attention of a layer; every path is relative to the layer.

    Attributes:
        module: The module whose forward splits the heads.
        query, key, value: The projections into the heads.
        output: The projection out of the heads.
        head_dim: The module's attribute that holds the width of a head.
        counts: The module's attributes that must follow the number of heads, and what each counts.
        heads: The config's field with the stock number of query heads.
        kv_heads: The config's field with the stock number of key and value heads, where it has one.
        also: Further projections into the heads that some models have, by the role they are like.
        head_dim_field: The config's field from which stock models take the width of a head, where there is one:
            with it the stock config can say that every layer has fewer heads, if they share no bias.
        heads_divide: The config's field that the stock number of query heads must divide.
        shared_bias: Whether a position bias made for all stock heads is added to the scores: `given` from
            outside, or also `passed_on` to the next layer.
        optional: Whether some models of the family are without it (cross-attention).
        removable: Whether its layer runs without it: nothing else reads what it keeps or hands on.
    """

    module: str
    query: Projection
    key: Projection
    value: Projection
    output: str
    head_dim: str
    counts: Mapping[str, Quantity]
    heads: str = "num_attention_heads"
    kv_heads: str | None = None
    also: Mapping[Role, Projection] = field(default_factory=dict)
    head_dim_field: str | None = None
    heads_divide: str | None = None
    shared_bias: Literal["none", "given", "passed_on"] = "none"
    optional: bool = False
    removable: bool = False


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """One feed-forward block of a layer; every path is relative to the layer.

    Attributes:
        inputs: The projections into the neurons (two for gated blocks); those that a model is without are passed
            over.
        output: The projection out of the neurons.
        neurons: The config's field with the stock number of neurons.
        widths: How many times the config's `hidden_size` that is where the field is None.
        removable: Whether its layer runs, and is built anew, without it.
    """

    inputs: tuple[Projection, ...]
    output: str
    neurons: str = "intermediate_size"
    widths: int = 4
    removable: bool = True


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A stack of alike layers.

    Attributes:
        layers: The `ModuleList`, relative to the base model; `*` stands for every number. Models that have none
            (the decoder of an encoder alone) are without the stack.
        attentions: The attentions of each layer.
        feed_forwards: The feed-forward blocks of each layer.
        depth: The config's field with the number of layers.
        per_layer_fields: The config's lists with one entry for each layer.
        shared: Whether the same layers are run over and over, `depth` times in all.
        first_stays: Whether stock models build the first layer unlike the others, so that it cannot go.
        carried: Modules that only the first layer has and the next first layer takes over, by path relative to
            the layer, with the attribute of their parent that tells of them.
        numbered_by: The config's switches under which a layer computes by its number, so that none can go.
    """

    layers: str
    attentions: tuple[Attention, ...]
    feed_forwards: tuple[FeedForward, ...]
    depth: str = "num_hidden_layers"
    per_layer_fields: tuple[str, ...] = ()
    shared: bool = False
    first_stays: bool = False
    carried: Mapping[str, str] = field(default_factory=dict)
    numbered_by: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model family.

    Attributes:
        model_types: The values of `config.model_type` it describes.
        stacks: Its stacks of layers.
        embeddings: Its embedding tables, relative to the base model; what a model has of them is looked up and
            nothing else, or shared with another module.
        detachable: Parts of the base model, by path, that models of some heads are without (a pooler): like a
            head, they follow stock loading behaviour.
        heads: Parts that belong to a head, of models whose class is its own base model.
    """

    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    embeddings: tuple[str, ...]
    detachable: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()

    @property
    def optional(self) -> tuple[str, ...]:
        """Parts, by path, that a checkpoint of the family may be without."""
        return self.detachable + self.heads


@cache
def architectures() -> Mapping[str, Architecture]:
    """Returns every known architecture by `model_type`."""
    found: dict[str, Architecture] = {}
    for module in pkgutil.iter_modules(__path__):
        architecture: Architecture = importlib.import_module(f"{__name__}.{module.name}").ARCHITECTURE
        for model_type in architecture.model_types:
            assert model_type not in found, model_type
            found[model_type] = architecture
    return found
