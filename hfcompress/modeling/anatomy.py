"""Finds the parts of a live model: its attentions, feed-forward blocks and embeddings, with their sizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.configuration import suggest
from hfcompress.errors import CompressionError, UnsupportedModelError
from hfcompress.modeling.architectures import (
    Architecture,
    Attention,
    FeedForward,
    Projection,
    Role,
    Stack,
    architectures,
)
from hfcompress.modeling.layers.low_rank import LowRankLinear
from hfcompress.modeling.layers.removed import Constant

KindT = TypeVar("KindT")

ROLES = ("query", "key", "value", "attention_output", "ffn_input", "ffn_output")
# Every linear layer of the base model, in any family.
ANY_LINEAR = "linear"
# The layer of a head that gives the classes their scores.
CLASSIFIER = "classifier"
# Begins the path of a module that is not in the base model but beside it.
BESIDE = "../"
ROLE_GROUPS = {
    "attention": ("query", "key", "value", "attention_output"),
    "ffn": ("ffn_input", "ffn_output"),
}


def base_model(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model without its task head; every path of ours is relative to it (`module_at`)."""
    return cast(PreTrainedModel, model.base_model)


def module_at(model: PreTrainedModel, path: str) -> nn.Module:
    """Returns a module by its path from the base model; that of a head's begins with `../`."""
    if path.startswith(BESIDE):
        return model.get_submodule(path.removeprefix(BESIDE))
    return base_model(model).get_submodule(path)


def put_module(model: PreTrainedModel, path: str, module: nn.Module) -> None:
    """Puts a module in the place of one that has this path from the base model."""
    if path.startswith(BESIDE):
        model.set_submodule(path.removeprefix(BESIDE), module)
    else:
        base_model(model).set_submodule(path, module)


def named_parts(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yields all modules, those of the base model first, by their paths from it."""
    base = base_model(model)
    yield from base.named_modules()
    inside = set(base.modules())
    for name, module in model.named_modules() if base is not model else ():
        if name and module not in inside:
            yield f"{BESIDE}{name}", module


def prefix_of(model: PreTrainedModel) -> str:
    """Returns what stands before a path of the base model in the names of the whole model's tensors."""
    return "" if base_model(model) is model else f"{model.base_model_prefix}."


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
            hint="A new family is one data file, hfcompress/modeling/architectures/<family>.py: see bert.py there. "
            "Low rank with targets: [linear], and quantization with embeddings: null, work on any family.",
        )
    return known[model_type]


def output_width(module: nn.Module) -> int:
    """Returns the number of outputs of any linear-like module."""
    return module.nf if isinstance(module, Conv1D) else int(cast(Any, module).out_features)


def input_width(module: nn.Module) -> int:
    """Returns the number of inputs of any linear-like module."""
    return module.weight.shape[0] if isinstance(module, Conv1D) else int(cast(Any, module).in_features)


def find(base: nn.Module, path: str) -> nn.Module | None:
    """Returns the module at a path, or None."""
    try:
        return base.get_submodule(path)
    except AttributeError:
        return None


@dataclass(frozen=True)
class _Block:
    base: PreTrainedModel
    stack: Stack
    layer: str

    def path(self, relative: str) -> str:
        return f"{self.layer}.{relative}"

    def at(self, relative: str) -> nn.Module:
        return self.base.get_submodule(self.path(relative))

    def has(self, relative: str) -> bool:
        return find(self.base, self.path(relative)) is not None

    def _has_output(self, output: str) -> bool:
        return not isinstance(self.at(output), Constant)

    def _width(self, projection: Projection) -> int:
        return output_width(self.at(projection.path)) // projection.parts


@dataclass(frozen=True)
class AttentionBlock(_Block):
    """One attention of a live model, sizes read off its modules."""

    spec: Attention

    @property
    def removed(self) -> bool:
        """Whether it was taken out as a whole."""
        return not self._has_output(self.spec.output)

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
    def projections(self) -> list[tuple[Role, Projection]]:
        """The projections into the heads that this model has, by role."""
        spec = self.spec
        always: list[tuple[Role, Projection]] = [("query", spec.query), ("key", spec.key), ("value", spec.value)]
        return always + [(role, each) for role, each in spec.also.items() if self.has(each.path)]

    @property
    def stock_heads(self) -> int:
        """Number of key-value heads that the config says."""
        return int(getattr(self.base.config, self.spec.kv_heads or self.spec.heads))


@dataclass(frozen=True)
class FeedForwardBlock(_Block):
    """One feed-forward block of a live model, sizes read off its modules."""

    spec: FeedForward

    @property
    def removed(self) -> bool:
        """Whether it was taken out as a whole."""
        return not self._has_output(self.spec.output)

    @property
    def name(self) -> str:
        """Path of the module that the neurons come out of."""
        return self.path(self.inputs[0].path)

    @property
    def inputs(self) -> list[Projection]:
        """The projections into the neurons that this model has."""
        return [projection for projection in self.spec.inputs if self.has(projection.path)]

    @property
    def neurons(self) -> int:
        """Number of neurons."""
        return self._width(self.inputs[0])

    @property
    def stock_neurons(self) -> int:
        """Number of neurons that the config says."""
        config = self.base.config
        said = getattr(config, self.spec.neurons)
        return int(config.hidden_size * self.spec.widths if said is None else said)


def heads_by_projection(model: PreTrainedModel) -> dict[str, int]:
    """Returns, by path, how many heads the outputs of each projection into an attention fall into."""
    if model.config.model_type not in architectures():
        return {}
    return {
        block.path(each.path): output_width(block.at(each.path)) // block.head_dim
        for block in attention_blocks(model)
        for _, each in block.projections
    }


def layer_lists(model: PreTrainedModel, stack: Stack) -> list[str]:
    """Returns the paths of a stack's `ModuleList`s in this model: none where it is without that stack."""
    base = base_model(model)
    before, star, after = stack.layers.partition("*")
    if not star:
        return [] if find(base, stack.layers) is None else [stack.layers]
    groups = find(base, before.removesuffix("."))
    return [f"{before}{index}{after}" for index in range(len(groups))] if isinstance(groups, nn.ModuleList) else []


def _layers(model: PreTrainedModel) -> Iterator[tuple[PreTrainedModel, Stack, str]]:
    base = base_model(model)
    for stack in architecture_of(model).stacks:
        for layers in layer_lists(model, stack):
            for index in range(len(base.get_submodule(layers))):  # type: ignore[arg-type]
                yield base, stack, f"{layers}.{index}"


def blocks_and_gaps(model: PreTrainedModel) -> list[AttentionBlock | FeedForwardBlock]:
    """Returns every attention and feed-forward block, layer by layer, those that were taken out included."""
    blocks: list[AttentionBlock | FeedForwardBlock] = []
    for where in _layers(model):
        attentions = [AttentionBlock(*where, spec) for spec in where[1].attentions]
        blocks += [block for block in attentions if not block.spec.optional or block.has(block.spec.module)]
        blocks += [FeedForwardBlock(*where, spec) for spec in where[1].feed_forwards]
    return blocks


def attention_blocks(model: PreTrainedModel) -> list[AttentionBlock]:
    """Returns every attention that is there, layer by layer."""
    blocks = blocks_and_gaps(model)
    return [each for each in blocks if isinstance(each, AttentionBlock) and not each.removed]


def feed_forward_blocks(model: PreTrainedModel) -> list[FeedForwardBlock]:
    """Returns every feed-forward block that is there, layer by layer."""
    blocks = blocks_and_gaps(model)
    return [each for each in blocks if isinstance(each, FeedForwardBlock) and not each.removed]


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Returns every linear-like module of the base model by path, the halves of low-rank ones included.

    Heads are left out, also those of models that are their own base model.
    """
    base = base_model(model)
    heads: tuple[str, ...] = ()
    if model.config.model_type in architectures():
        heads = architecture_of(model).heads
    output = model.get_output_embeddings()
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not output and name.split(".")[0] not in heads
    }


def classifier_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Returns, by path from the base model, the linear layers of the head that give each class its score."""
    known, output = architectures().get(model.config.model_type), model.get_output_embeddings()
    heads = known.heads if known is not None and base_model(model) is model else ()
    return {
        path: module
        for path, module in named_parts(model)
        if (path.startswith(BESIDE) or path.split(".")[0] in heads)
        and isinstance(module, (nn.Linear, LowRankLinear))
        and output_width(module) == getattr(model.config, "num_labels", None)
        and module is not output
    }


def modules_by_role(model: PreTrainedModel) -> dict[str, list[str]]:
    """Returns, for each of `ROLES`, the paths of its modules (relative to the base model, each once).

    Raises:
        UnsupportedModelError: The family has no file in `architectures/`.
    """
    found: dict[str, list[str]] = {role: [] for role in ROLES}
    for attention in attention_blocks(model):
        for role, projection in attention.projections:
            found[role].append(attention.path(projection.path))
        found["attention_output"].append(attention.path(attention.spec.output))
    for block in feed_forward_blocks(model):
        found["ffn_input"] += [block.path(projection.path) for projection in block.inputs]
        found["ffn_output"].append(block.path(block.spec.output))
    seen: set[str] = set()  # a fused module is listed once, under its first role
    return {role: [path for path in paths if not (path in seen or seen.add(path))] for role, paths in found.items()}


def modules_of(model: PreTrainedModel, targets: Iterable[str]) -> list[str]:
    """Returns the paths of the modules that are meant by roles, groups of roles, or `linear`; each once.

    Args:
        model: The model; of any family where `linear` is the only target.
        targets: Members of `ROLES`, keys of `ROLE_GROUPS`, `linear`: every linear layer of the base model,
            low-rank ones as a whole, or `classifier`.

    Raises:
        UnsupportedModelError: A role is asked of a family that has no file in `architectures/`.
        CompressionError: The classifier of a model without one.
    """
    paths: list[str] = []
    for target in targets:
        if target == ANY_LINEAR:
            base = base_model(model)
            for path in linear_layers(model):
                parent = path.rpartition(".")[0]
                paths.append(parent if isinstance(base.get_submodule(parent), LowRankLinear) else path)
        elif target == CLASSIFIER:
            found = classifier_layers(model)
            if not found:
                raise CompressionError(f"{type(model).__name__} has no classifier", hint="Leave it out of the targets.")
            paths += found
        else:
            by_role = modules_by_role(model)
            paths += [path for role in ROLE_GROUPS.get(target, (target,)) for path in by_role[role]]
    return list(dict.fromkeys(paths))


def spread_over_linears(
    model: PreTrainedModel, everywhere: KindT | None, by_group: Mapping[str, KindT | None]
) -> dict[str, KindT]:
    """Returns what is meant for each linear layer of the base model, the halves of low-rank ones included.

    Args:
        model: The model; of any family where no group is given anything.
        everywhere: What is meant for every layer, but for those that the family keeps in float32 by name: its
            forward also asks them to be of a float type (T5's `wo`). None for nothing.
        by_group: The same for the layers of a key of `ROLE_GROUPS` alone, over `everywhere`.
    """
    linears = linear_layers(model)
    in_float = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    meant: dict[str, KindT] = {}
    if everywhere is not None:
        meant |= {name: everywhere for name in linears if not in_float & set(name.split("."))}
    for group, kind in by_group.items():
        if kind is None:
            continue
        paths = modules_of(model, (group,))
        # A low-rank layer is its two factors.
        meant |= {name: kind for name in linears if any(name == p or name.startswith(f"{p}.") for p in paths)}
    return meant


def embedding_paths(model: PreTrainedModel) -> list[str]:
    """Returns the paths of the embedding tables that this model has."""
    base = base_model(model)
    return [path for path in architecture_of(model).embeddings if find(base, path) is not None]


def tied_to(model: PreTrainedModel, path: str) -> list[str]:
    """Returns the paths, in the whole model, of the other modules that hold the same `weight`."""
    base = base_model(model)
    prefix = next(name for name, module in model.named_modules() if module is base)
    own = path.removeprefix(BESIDE) if path.startswith(BESIDE) else f"{prefix}.{path}" if prefix else path
    weight = getattr(module_at(model, path), "weight", None)
    if weight is None:
        return []
    places = model.named_modules(remove_duplicate=False)
    return [name for name, other in places if name != own and getattr(other, "weight", None) is weight]
