"""Where each model family keeps its parts: one data-only file per family, found by `model_type`.

A new family is one new file here that defines `ARCHITECTURE`; nothing else names a family.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

Quantity = Literal["heads", "kv_heads", "width", "groups"]


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
        shares_bias: Whether a position bias computed elsewhere, for all stock heads, is added to the scores.
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
    shares_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class FeedForward:
    """One feed-forward block of a layer; every path is relative to the layer.

    Attributes:
        inputs: The projections into the neurons (two for gated blocks).
        output: The projection out of the neurons.
        neurons: The config's field with the stock number of neurons.
    """

    inputs: tuple[Projection, ...]
    output: str
    neurons: str = "intermediate_size"


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A stack of alike layers.

    Attributes:
        layers: The `ModuleList`, relative to the base model.
        attentions: The attentions of each layer.
        feed_forwards: The feed-forward blocks of each layer.
        depth: The config's field with the number of layers.
    """

    layers: str
    attentions: tuple[Attention, ...]
    feed_forwards: tuple[FeedForward, ...]
    depth: str = "num_hidden_layers"


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One model family.

    Attributes:
        model_types: The values of `config.model_type` it describes.
        stacks: Its stacks of layers.
        embeddings: Its embedding tables, relative to the base model.
        optional: Children of the base model that a task head may do without (a pooler): like a head, they
            follow stock loading behaviour.
    """

    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    embeddings: tuple[str, ...]
    optional: tuple[str, ...] = ()


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
