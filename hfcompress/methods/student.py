"""Begins a student: a smaller model of the same family, of sizes that are written down, from the model's own weights.

The result has the shape of the family's stock config, so it loads without this package. It knows little until it has
been taught: a step with `distillation` goes after it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
from pydantic import Field
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.configuration import Config, suggest
from hfcompress.errors import CompressionError
from hfcompress.methods.registry import Context, Method, register
from hfcompress.modeling.anatomy import (
    architecture_of,
    attention_blocks,
    base_model,
    feed_forward_blocks,
    find,
    layer_lists,
    prefix_of,
)
from hfcompress.modeling.architectures import Projection
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.depth import evenly
from hfcompress.modeling.measure import count_parameters
from hfcompress.modeling.structure import describe

# What of the larger tensor makes one dimension of the smaller: which entries (1-D), or which mixtures of them (2-D).
_Choice = torch.Tensor
_Choices = dict[tuple[str, int], _Choice]


class StudentConfig(Config):
    """How large the student is, and what it begins with.

    Attributes:
        sizes: Fields of the stock config with their new values, such as `num_hidden_layers`, `hidden_size`,
            `num_attention_heads` and `intermediate_size`, or as the family calls them; what is not named stays.
        initialisation: `weight_selection` takes evenly spaced layers, heads, neurons and dimensions (Xu et al. 2024,
            arXiv 2311.18823); `truncated_svd` takes those mixtures of the hidden width's dimensions that tell most
            of the word embeddings apart, and selects the rest; `random` begins anew.
    """

    sizes: dict[str, int] = Field(min_length=1)
    initialisation: Literal["weight_selection", "truncated_svd", "random"] = "weight_selection"


def _evenly(count: int, kept: int) -> _Choice:
    return torch.tensor(evenly(count, kept))


def principal_directions(table: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the directions in which the rows of a table are largest: its leading right singular vectors.

    Args:
        table: `(rows, width)`.
        count: How many.

    Returns:
        Orthonormal columns `(width, count)`, float32.
    """
    table = table.detach().double()
    return torch.linalg.eigh(table.T @ table).eigenvectors[:, -count:].flip(1).float()


def sizes_of(model: PreTrainedModel) -> dict[str, int]:
    """Returns the config fields by which a student can be smaller, as the family names them, with their values."""
    base = base_model(model)
    sizes = {_own_name(model, "hidden_size"): int(base.config.hidden_size)}
    for stack in architecture_of(model).stacks:
        if layer_lists(model, stack):
            sizes[stack.depth] = int(getattr(base.config, stack.depth))
    for block in attention_blocks(model):
        sizes[block.spec.heads] = block.query_heads
        if block.spec.kv_heads:
            sizes[block.spec.kv_heads] = block.heads
        if block.spec.head_dim_field:
            sizes[block.spec.head_dim_field] = block.head_dim
    return sizes | {block.spec.neurons: block.neurons for block in feed_forward_blocks(model)}


def _own_name(model: PreTrainedModel, field: str) -> str:
    return base_model(model).config.attribute_map.get(field, field)


def student(model: PreTrainedModel, config: StudentConfig, context: Context) -> dict[str, Any]:
    """Turns a model into a student of its own, in place.

    Args:
        model: A float model of stock shapes and a supported family.
        config: How large, and what it begins with.
        context: Nothing of it is needed.

    Returns:
        The sizes before and after, the tensors that nothing was taken over for, and the share of the parameters
        that is left.

    Raises:
        CompressionError: A size is unknown, not smaller, or the family builds no such model; or the model was
            compressed otherwise before. Nothing was changed then.
    """
    if changed := describe(model):
        raise CompressionError(
            f"a student is begun from a model of stock shapes, and this one was compressed ({', '.join(changed)})",
            hint="Put the student's step before the others.",
        )
    own = sizes_of(model)
    sizes = {_own_name(model, name): size for name, size in config.sizes.items()}
    _require_smaller(own, sizes)
    before = count_parameters(model)
    smaller = cast(Any, _build(model, own | sizes)).to(model.dtype)
    anew = [name for name, _ in smaller.named_parameters()]
    if config.initialisation != "random":
        width = int(base_model(smaller).config.hidden_size)
        mixing = config.initialisation == "truncated_svd" and width < base_model(model).config.hidden_size
        anew = _fill(smaller, model, _directions(model, width) if mixing else None)
    _become(model, smaller)
    commit(model)
    return {
        "sizes": {name: [own[name], size] for name, size in sizes.items()},
        "initialisation": config.initialisation,
        "begun_anew": anew,
        "parameters_kept": count_parameters(model) / before,
    }


def _require_smaller(own: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if name not in own:
            raise CompressionError(f"sizes.{name} is no size of this family; {suggest(name, list(own))}")
        if not 0 < size <= own[name]:
            raise CompressionError(f"sizes.{name} must be from 1 to {own[name]}, the model's own, not {size}")
    if all(own[name] == size for name, size in sizes.items()):
        raise CompressionError("sizes: the student would be as large as the model: make one of them smaller")


def _build(model: PreTrainedModel, sizes: Mapping[str, int]) -> PreTrainedModel:
    config = copy.deepcopy(model.config)
    if getattr(config, "pooler_hidden_size", None) == config.hidden_size:
        config.pooler_hidden_size = sizes[_own_name(model, "hidden_size")]
    for stack in architecture_of(model).stacks:
        for field in stack.per_layer_fields if stack.depth in sizes else ():
            if (values := getattr(config, field, None)) is not None:
                setattr(config, field, [values[at] for at in evenly(len(values), sizes[stack.depth])])
    for name, size in sizes.items():
        setattr(config, name, size)
    try:
        built = type(model)(config)
    except (ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise CompressionError(f"sizes: the family builds no such model: {error}") from None
    if any(block.query_heads * block.head_dim == 0 for block in attention_blocks(built)):
        raise CompressionError("sizes: heads would have no width: fewer heads, or a larger hidden_size")
    return built


def _directions(model: PreTrainedModel, width: int) -> torch.Tensor:
    base = base_model(model)
    own = int(base.config.hidden_size)
    found = [table.weight for path in architecture_of(model).embeddings if (table := find(base, path)) is not None]
    table: Any = next((each for each in found if each.shape[-1] == own), None)
    if table is None:
        raise CompressionError(
            "truncated_svd needs a table of embeddings as wide as the hidden width, which this model has not",
            hint="Use initialisation: weight_selection.",
        )
    return principal_directions(table, width)


# What becomes what


def _fill(smaller: PreTrainedModel, model: PreTrainedModel, directions: torch.Tensor | None) -> list[str]:
    """Copies what the student takes of the model's weights; returns what the model has nothing for.

    That is what the family puts between embeddings and layers only where their widths differ (ELECTRA).
    """
    places = _Places(smaller, model)
    sources, of_blocks = model.state_dict(keep_vars=True), _of_blocks(smaller, model, places)
    width = (int(base_model(model).config.hidden_size), int(base_model(smaller).config.hidden_size))
    done: set[int] = set()
    anew: list[str] = []
    for name, target in smaller.state_dict(keep_vars=True).items():
        if id(target) in done or not target.is_floating_point():
            continue
        done.add(id(target))
        if (place := places[name]) not in sources:
            anew.append(name)
            continue
        source = sources[place].detach()
        is_scale = target.dim() == 1 and name.endswith("weight")
        for dim, (has, wants) in enumerate(zip(source.shape, target.shape, strict=True)):
            choice = of_blocks.get((name, dim))
            if choice is None and has != wants:
                mixed = directions is not None and (has, wants) == width
                choice = directions if mixed else _evenly(has, wants)
            if choice is not None:
                source = _choose(source, dim, choice.square() if is_scale and choice.dim() == 2 else choice)
        with torch.no_grad():
            target.copy_(source)
    return anew


def _choose(source: torch.Tensor, dim: int, choice: _Choice) -> torch.Tensor:
    if choice.dim() == 1:
        return source.index_select(dim, choice.to(source.device))
    return (source.movedim(dim, -1) @ choice.to(source)).movedim(-1, dim)


class _Places:
    """Tells which of the model's tensors one of the student's is taken from: that of an evenly spaced layer."""

    def __init__(self, smaller: PreTrainedModel, model: PreTrainedModel) -> None:
        depths = zip(_depths(smaller).items(), _depths(model).values(), strict=True)
        self._layers = {path: evenly(has, wants) for (path, wants), has in depths}

    def __getitem__(self, name: str) -> str:
        for path, kept in self._layers.items():
            if name.startswith(path):
                number, _, rest = name.removeprefix(path).partition(".")
                return f"{path}{kept[int(number)]}.{rest}"
        return name


def _depths(model: PreTrainedModel) -> dict[str, int]:
    """Returns how many layers each list of them has, by what their tensors' names begin with."""
    stacks = [stack for stack in architecture_of(model).stacks if not stack.shared]
    lists = [path for stack in stacks for path in layer_lists(model, stack)]
    return {f"{prefix_of(model)}{path}.": len(cast(Any, base_model(model).get_submodule(path))) for path in lists}


def _of_blocks(smaller: PreTrainedModel, model: PreTrainedModel, places: _Places) -> _Choices:
    """Chooses whole heads and neurons, where evenly spaced entries would mix heads or the parts of fused layers."""
    base, prefix = base_model(smaller), prefix_of(smaller)
    attentions = {f"{prefix}{block.name}": block for block in attention_blocks(model)}
    choices: _Choices = {}

    def say(path: str, dim: int, choice: _Choice) -> None:
        transposed = isinstance(base.get_submodule(path), Conv1D)
        choices[f"{prefix}{path}.weight", 1 - dim if transposed else dim] = choice
        if dim == 0:
            choices[f"{prefix}{path}.bias", 0] = choice

    def say_parts(every: list[tuple[str, Projection, _Choice, int]]) -> None:
        by_path: dict[str, list[_Choice]] = {}
        for path, projection, choice, width in sorted(every, key=lambda each: each[1].part):
            by_path.setdefault(path, []).append(choice + projection.part * width)
        for path, parts in by_path.items():
            say(path, 0, torch.cat(parts))

    for block in attention_blocks(smaller):
        was = attentions[places[f"{prefix}{block.name}"]]
        groups, dims = _evenly(was.heads, block.heads), _evenly(was.head_dim, block.head_dim)
        members = _evenly(was.queries_per_head, block.queries_per_head)
        queries = (groups[:, None] * was.queries_per_head + members).flatten()
        of_heads = {role: (heads[:, None] * was.head_dim + dims).flatten() for role, heads in
                    (("query", queries), ("key", groups), ("value", groups))}  # fmt: skip
        widths = {role: (was.query_heads if role == "query" else was.heads) * was.head_dim for role in of_heads}
        if block.head_dim > was.head_dim and was.queries_per_head == block.queries_per_head == 1:
            # Fewer heads share the same width out among them: each is made of several, and none goes.
            every = _evenly(was.heads * was.head_dim, block.heads * block.head_dim)
            of_heads = dict.fromkeys(of_heads, every)
        say_parts([(block.path(each.path), each, of_heads[role], widths[role]) for role, each in block.projections])
        say(block.path(block.spec.output), 1, of_heads["query"])
    neurons = {f"{prefix}{block.name}": block.neurons for block in feed_forward_blocks(model)}
    for block in feed_forward_blocks(smaller):
        has = neurons[places[f"{prefix}{block.name}"]]
        choice = _evenly(has, block.neurons)
        say_parts([(block.path(each.path), each, choice, has) for each in block.inputs])
        say(block.path(block.spec.output), 1, choice)
    return choices


def _become(model: PreTrainedModel, smaller: PreTrainedModel) -> None:
    """Puts the student in the model's place; who holds the model holds the student then."""
    training, generation = model.training, vars(model).get("generation_config")
    vars(model).update(vars(smaller))
    if generation is not None:
        model.generation_config = generation
    model.train(training)


register(
    Method(
        name="student",
        config=StudentConfig,
        summary="begin a smaller model of the same family from the model's weights, to be taught",
        apply=student,
    )
)
