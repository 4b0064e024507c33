"""Finds the parts of a live model: its attentions, feed-forward blocks and embeddings, with their sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.configuration import suggest
from hfcompress.errors import UnsupportedModelError
from hfcompress.modeling.architectures import (
    Architecture,
    Attention,
    FeedForward,
    Projection,
    Stack,
    architectures,
)

ROLES = ("query", "key", "value", "attention_output", "ffn_input", "ffn_output")
ROLE_GROUPS = {
    "attention": ("query", "key", "value", "attention_output"),
    "ffn": ("ffn_input", "ffn_output"),
}


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model without its task head; every path of ours is relative to it."""
    return model.base_model


def architecture_of(model: PreTrainedModel) -> Architecture:
    """Returns where the model's family keeps its parts.

    Raises:
        UnsupportedModelError: The family has no file in `architectures/`.
    """
    known = architectures()
    model_type = model.config.model_type
    if model_type not in known:
        raise UnsupportedModelError(
            f"models of type '{model_type}' are not supported; {suggest(model_type, known)}",
            hint="A new family is one data file: see hfcompress/modeling/architectures/bert.py.",
        )
    return known[model_type]


def output_width(module: nn.Module) -> int:
    """Returns the number of outputs of any linear-like module."""
    return module.nf if isinstance(module, Conv1D) else int(module.out_features)


def input_width(module: nn.Module) -> int:
    """Returns the number of inputs of any linear-like module."""
    return module.weight.shape[0] if isinstance(module, Conv1D) else int(module.in_features)


@dataclass(frozen=True)
class _Block:
    base: PreTrainedModel
    stack: Stack
    layer: str

    def path(self, relative: str) -> str:
        return f"{self.layer}.{relative}"

    def at(self, relative: str) -> nn.Module:
        return self.base.get_submodule(self.path(relative))

    def _width(self, projection: Projection) -> int:
        return output_width(self.at(projection.path)) // projection.parts


@dataclass(frozen=True)
class AttentionBlock(_Block):
    """One attention of a live model, sizes read off its modules."""

    spec: Attention

    @property
    def name(self) -> str:
        """Path of the module whose forward splits the heads."""
        return self.path(self.spec.module)

    @property
    def module(self) -> nn.Module:
        """The module whose forward splits the heads."""
        return self.at(self.spec.module)

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return int(getattr(self.module, self.spec.head_dim))

    @property
    def query_heads(self) -> int:
        """Number of query heads."""
        return self._width(self.spec.query) // self.head_dim

    @property
    def heads(self) -> int:
        """Number of key-value heads: what can be removed one by one, each with the queries that read it."""
        return self._width(self.spec.key) // self.head_dim

    @property
    def queries_per_head(self) -> int:
        """Query heads that share one key-value head."""
        return self.query_heads // self.heads

    @property
    def stock_heads(self) -> int:
        """Number of key-value heads that the config says."""
        return int(getattr(self.base.config, self.spec.kv_heads or self.spec.heads))


@dataclass(frozen=True)
class FeedForwardBlock(_Block):
    """One feed-forward block of a live model, sizes read off its modules."""

    spec: FeedForward

    @property
    def name(self) -> str:
        """Path of the module that the neurons come out of."""
        return self.path(self.spec.inputs[0].path)

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        return self._width(self.spec.inputs[0])

    @property
    def stock_neurons(self) -> int:
        """Number of neurons that the config says."""
        return int(getattr(self.base.config, self.spec.neurons))


def _layers(model: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, Stack, str]]:
    base = base_model(model)
    for stack in architecture_of(model).stacks:
        for index in range(len(base.get_submodule(stack.layers))):  # type: ignore[arg-type]
            yield base, stack, f"{stack.layers}.{index}"


def attention_blocks(model: PreTrainedModel) -> list[AttentionBlock]:
    """Returns every attention, layer by layer."""
    return [AttentionBlock(*where, spec) for where in _layers(model) for spec in where[1].attentions]


def feed_forward_blocks(model: PreTrainedModel) -> list[FeedForwardBlock]:
    """Returns every feed-forward block, layer by layer."""
    return [FeedForwardBlock(*where, spec) for where in _layers(model) for spec in where[1].feed_forwards]


def modules_by_role(model: PreTrainedModel) -> dict[str, list[str]]:
    """Returns, for each of `ROLES`, the paths of its modules (relative to the base model, each once)."""
    found: dict[str, list[str]] = {role: [] for role in ROLES}
    for attention in attention_blocks(model):
        spec = attention.spec
        for role, path in (
            ("query", spec.query.path),
            ("key", spec.key.path),
            ("value", spec.value.path),
            ("attention_output", spec.output),
        ):
            found[role].append(attention.path(path))
    for block in feed_forward_blocks(model):
        found["ffn_input"] += [block.path(projection.path) for projection in block.spec.inputs]
        found["ffn_output"].append(block.path(block.spec.output))
    seen: set[str] = set()  # a fused module is listed once, under its first role
    return {
        role: [path for path in paths if not (path in seen or seen.add(path))] for role, paths in found.items()
    }


def embedding_paths(model: PreTrainedModel) -> list[str]:
    """Returns the paths of the embedding tables that this model has."""
    base = base_model(model)
    have = {name for name, _ in base.named_modules()}
    return [path for path in architecture_of(model).embeddings if path in have]
