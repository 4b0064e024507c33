"""The structure of a compressed model: read off the live module tree, and put back on an empty one.

The record is small JSON, relative to the base model, and holds only what differs from the stock config:

    {"removed": {"encoder.layer.3.attention.self": true},
     "heads": {"encoder.layer.0.attention.self": 7},
     "neurons": {"encoder.layer.0.intermediate.dense": 704},
     "low_rank": {"encoder.layer.*.intermediate.dense": 96},
     "pivoted": {"encoder.layer.*.output.dense": 256},
     "headwise": {"encoder.layer.*.attention.self.value": {"rank": 24, "heads": 12}},
     "shared": {"encoder.layer.*.attention.self.key": "query"},
     "low_rank_embeddings": {"embeddings.word_embeddings": 128},
     "embeddings": {"embeddings.word_embeddings": {"bits": 8, "group_size": 384}},
     "linear": {"encoder.layer.*.attention.self.query": "int8",
                "encoder.layer.*.output.dense": {"kind": "nf4", "compute_dtype": "bfloat16"}},
     "packed": {"encoder.layer.*.output.dense": "ternary"},
     "torchao": {"encoder.layer.*.attention.self.key": "torchao-int8"}}

A name with `*` for a layer's number stands for every layer's module of that name; one of a head's begins with `../`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hfcompress.configuration import suggest
from hfcompress.errors import CheckpointError, CompressionError
from hfcompress.modeling import surgery
from hfcompress.modeling.anatomy import (
    BESIDE,
    architecture_of,
    attention_blocks,
    base_model,
    blocks_and_gaps,
    classifier_layers,
    feed_forward_blocks,
    input_width,
    linear_layers,
    named_parts,
    output_width,
)
from hfcompress.modeling.architectures import architectures
from hfcompress.modeling.layers.bitsandbytes import (
    COMPUTE_DTYPES,
    KINDS,
    Kind,
    Numerics,
    empty_linear,
    kind_of,
    numerics_of,
)
from hfcompress.modeling.layers.headwise import HeadwiseLinear
from hfcompress.modeling.layers.low_rank import LowRankLinear, PivotedLinear
from hfcompress.modeling.layers.packed_linear import PACKED_KINDS, PackedLinear
from hfcompress.modeling.layers.quantized_embedding import QuantizedEmbedding
from hfcompress.modeling.layers.tied import LowRankEmbedding
from hfcompress.modeling.layers.torchao import TORCHAO_KINDS, TorchAOLinear
from hfcompress.modeling.sharing import follow, leaders_of
from hfcompress.modeling.ties import is_table, replace_table, scale_of

Structure = dict[str, dict[str, Any]]


def _pattern(path: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", path)


def _compact(values: Mapping[str, Any], candidates: Iterable[str]) -> dict[str, Any]:
    """Folds layers that agree into one entry, where every candidate of that pattern has the same value."""
    groups: dict[str, list[str]] = {}
    for path in candidates:
        groups.setdefault(_pattern(path), []).append(path)
    folded: dict[str, Any] = {}
    for path, value in values.items():
        pattern = _pattern(path)
        agree = all(values.get(other) == value for other in groups[pattern])
        folded[pattern if agree else path] = value
    return folded


def _unfold(
    section: str, folded: Mapping[str, Any], candidates: Iterable[str], absent: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """Undoes `_compact`.

    Args:
        section: Names the section in an error.
        folded: What `_compact` returned.
        candidates: The paths that a name may stand for.
        absent: Children of the base model that this model is without; names inside them are passed over.

    Raises:
        CheckpointError: A name fits none of the candidates.
    """
    names = list(candidates)
    unfolded: dict[str, Any] = {}
    for name, value in folded.items():
        matches = [path for path in names if name in (path, _pattern(path))]
        if not matches and (name.startswith(BESIDE) or name.partition(".")[0] in absent):
            continue  # another head, or none, as any checkpoint may be loaded with
        if not matches:
            raise CheckpointError(f"config.json: structure.{section}: the model has no module '{name}'")
        unfolded.update(dict.fromkeys(matches, value))
    return unfolded


def _absent(model: PreTrainedModel) -> frozenset[str]:
    """Returns the children that other models of the family have and this one has not: a decoder, a pooler."""
    if model.config.model_type not in architectures():
        return frozenset()
    architecture = architecture_of(model)
    possible = {stack.layers.partition(".")[0] for stack in architecture.stacks} | set(architecture.optional)
    return frozenset(possible - {name for name, _ in base_model(model).named_children()})


def describe(model: PreTrainedModel) -> Structure:
    """Reads how a model differs from what its config builds.

    Args:
        model: A live model, with or without a task head.

    Returns:
        The structure; empty where the stock config says it all.
    """
    base = base_model(model)
    structure: Structure = {}
    if model.config.model_type in architectures():
        attentions, blocks = attention_blocks(model), feed_forward_blocks(model)
        everything = blocks_and_gaps(model)
        gone = {block.name: True for block in everything if block.removed}
        structure["removed"] = _compact(gone, [block.name for block in everything])
        heads = {block.name: block.heads for block in attentions if block.heads != block.stock_heads}
        structure["heads"] = _compact(heads, [block.name for block in attentions])
        neurons = {block.name: block.neurons for block in blocks if block.neurons != block.stock_neurons}
        structure["neurons"] = _compact(neurons, [block.name for block in blocks])
    low_rank = {name: module for name, module in named_parts(model) if isinstance(module, LowRankLinear)}
    wholes = [name for name in linear_layers(model) if name.rpartition(".")[0] not in low_rank]
    for section, kind in (("low_rank", LowRankLinear), ("pivoted", PivotedLinear)):
        ranks = {name: each.rank for name, each in low_rank.items() if type(each) is kind}
        structure[section] = _compact(ranks, [*wholes, *low_rank])
    by_head = {name: each for name, each in low_rank.items() if isinstance(each, HeadwiseLinear)}
    headwise = {name: {"rank": each.rank, "heads": each.heads} for name, each in by_head.items()}
    structure["headwise"] = _compact(headwise, [*wholes, *low_rank])
    structure["shared"] = _compact(leaders_of(model), [*wholes, *low_rank])
    structure["low_rank_embeddings"] = {
        name: module.rank for name, module in base.named_modules() if isinstance(module, LowRankEmbedding)
    }
    structure["embeddings"] = {
        name: {"bits": module.bits, "group_size": module.group_size}
        for name, module in base.named_modules()
        if isinstance(module, QuantizedEmbedding)
    }
    linears = linear_layers(model)
    quantized = {name: kind for name, module in linears.items() if (kind := kind_of(module))}
    for section, kinds in (("linear", KINDS), ("packed", PACKED_KINDS), ("torchao", TORCHAO_KINDS)):
        held = {name: kind for name, kind in quantized.items() if kind in kinds}
        if section == "linear":
            held = {name: _linear_entry(linears[name], kind, model.dtype) for name, kind in held.items()}
        structure[section] = _compact(held, linears)
    return {section: entries for section, entries in structure.items() if entries}


def _linear_entry(module: nn.Module, kind: str, dtype: torch.dtype) -> Any:
    """Returns a layer's kind, with how it computes where that is not as usual."""
    said = {name: value for name, value in numerics_of(module, dtype)._asdict().items() if value}
    return {"kind": kind, **said} if said else kind


def read_linear_entry(name: str, entry: Any) -> tuple[Kind, Numerics]:
    """Returns the kind of a layer and how it computes.

    Raises:
        CheckpointError: The entry is not of that form.
    """
    said = dict(entry) if isinstance(entry, Mapping) else {"kind": entry}
    kind = said.pop("kind", None)
    if kind not in KINDS:
        raise CheckpointError(f"config.json: structure.linear: '{name}' is {kind!r}; allowed: {', '.join(KINDS)}")
    own: dict[str, Any] = said if set(said) == {"threshold" if kind == "int8" else "compute_dtype"} else {}
    threshold, computes = own.get("threshold", 0.0), own.get("compute_dtype")
    wrong = isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1e6
    if len(own) < len(said) or wrong or (computes is not None and computes not in COMPUTE_DTYPES):
        raise CheckpointError(
            f"config.json: structure.linear: '{name}' is {entry!r}; beside its kind an int8 layer may have a threshold "
            f"from 0 to 1e6, others a compute_dtype: {', '.join(COMPUTE_DTYPES)}"
        )
    return kind, Numerics(float(threshold), computes)


def rebuild(model: PreTrainedModel, structure: Mapping[str, Any]) -> None:
    """Gives an empty model (stock, on `meta`) the structure that `describe` read.

    Raises:
        CheckpointError: An entry names no module of the model, or asks for what the stock config cannot hold.
    """
    unknown = set(structure) - set(_SECTIONS)
    if unknown:
        raise CheckpointError(f"config.json: structure.{min(unknown)} is unknown; {suggest(min(unknown), _SECTIONS)}")
    for section, restore in _SECTIONS.items():
        entries = structure.get(section, {})
        if not isinstance(entries, Mapping):
            raise CheckpointError(f"config.json: structure.{section} must map names to values, not {entries!r}")
        if entries:
            restore(model, entries)


def _bounded(section: str, name: str, value: object, most: int) -> int:
    if type(value) is not int or not 1 <= value <= most:
        raise CheckpointError(
            f"config.json: structure.{section}: '{name}' must be an integer from 1 to {most}, not {value!r}"
        )
    return value


def _restore_removed(model: PreTrainedModel, entries: Mapping[str, Any]) -> None:
    blocks = {block.name: block for block in blocks_and_gaps(model)}
    for name, gone in _unfold("removed", entries, blocks, _absent(model)).items():
        if gone is not True:
            raise CheckpointError(f"config.json: structure.removed: '{name}' must be true, not {gone!r}")
        try:
            surgery.remove_block(blocks[name])
        except CompressionError as error:
            raise CheckpointError(f"config.json: structure.removed: {error.message}") from None


def _restore_heads(model: PreTrainedModel, entries: Mapping[str, Any]) -> None:
    blocks = {block.name: block for block in attention_blocks(model)}
    for name, count in _unfold("heads", entries, blocks, _absent(model)).items():
        count = _bounded("heads", name, count, blocks[name].stock_heads)
        surgery.shrink_attention(blocks[name], range(count))


def _restore_neurons(model: PreTrainedModel, entries: Mapping[str, Any]) -> None:
    blocks = {block.name: block for block in feed_forward_blocks(model)}
    for name, count in _unfold("neurons", entries, blocks, _absent(model)).items():
        count = _bounded("neurons", name, count, blocks[name].stock_neurons)
        surgery.shrink_feed_forward(blocks[name], range(count))


def _restore_low_rank(model: PreTrainedModel, entries: Mapping[str, Any]) -> None:
    linears = linear_layers(model) | classifier_layers(model)
    for name, rank in _unfold("low_rank", entries, linears, _absent(model)).items():
        # The wider side is the stock one: the other may have been pruned below the rank since.
        most = max(input_width(linears[name]), output_width(linears[name]))
        surgery.factorize(model, name, _bounded("low_rank", name, rank, most))


def _restore_pivoted(model: PreTrainedModel, entries: Mapping[str, Any]) -> None:
    linears = linear_layers(model) | classifier_layers(model)
    for name, rank in _unfold("pivoted", entries, linears, _absent(model)).items():
        most = output_width(linears[name]) - 1  # the inputs may have been pruned below the rank since
        surgery.factorize(model, name, _bounded("pivoted", name, rank, most), pivoted=True)


def _restore_headwise(model: PreTrainedModel, entries: Mapping[str, Any]) -> None:
    linears = linear_layers(model) | classifier_layers(model)
    for name, form in _unfold("headwise", entries, linears, _absent(model)).items():
        inputs, outputs = input_width(linears[name]), output_width(linears[name])
        if not isinstance(form, Mapping) or set(form) != {"rank", "heads"}:
            raise CheckpointError(f"config.json: structure.headwise: '{name}' must hold rank and heads, not {form!r}")
        heads = _bounded("headwise", f"{name}.heads", form["heads"], outputs)
        if outputs % heads:
            raise CheckpointError(
                f"config.json: structure.headwise: the heads of '{name}' must divide {outputs}, not be {heads}"
            )
        rank = _bounded("headwise", f"{name}.rank", form["rank"], max(inputs, outputs // heads))
        surgery.factorize(model, name, rank, heads=heads)


def _restore_shared(model: PreTrainedModel, entries: Mapping[str, Any]) -> None:
    linears = linear_layers(model)
    for name, leader in _unfold("shared", entries, linears, _absent(model)).items():
        if not isinstance(leader, str) or "." in leader:
            raise CheckpointError(f"config.json: structure.shared: '{name}' must name one beside it, not {leader!r}")
        try:
            follow(model, name, leader)
        except CompressionError as error:
            raise CheckpointError(f"config.json: structure.shared: {error.message}") from None


def _tables(model: PreTrainedModel) -> dict[str, Any]:
    """Returns the float embeddings of the base model by path, the rows of low-rank ones included."""
    return {name: module for name, module in base_model(model).named_modules() if is_table(module)}


def _restore_low_rank_embeddings(model: PreTrainedModel, entries: Mapping[str, Any]) -> None:
    tables = _tables(model)
    for name, rank in _unfold("low_rank_embeddings", entries, tables, _absent(model)).items():
        table = tables[name]
        tokens, width = table.weight.shape
        rank = _bounded("low_rank_embeddings", name, rank, min(tokens, width))
        form = {"scale": scale_of(table), "device": table.weight.device, "dtype": table.weight.dtype}
        replace_table(model, name, LowRankEmbedding(tokens, width, rank, **form))


def _restore_embeddings(model: PreTrainedModel, entries: Mapping[str, Any]) -> None:
    tables = _tables(model)
    for name, form in _unfold("embeddings", entries, tables, _absent(model)).items():
        table = tables[name]
        if not isinstance(form, Mapping) or set(form) != {"bits", "group_size"} or form["bits"] not in (4, 8):
            raise CheckpointError(
                f"config.json: structure.embeddings: '{name}' must hold bits (4 or 8) and group_size, not {form!r}"
            )
        group_size = _bounded("embeddings", f"{name}.group_size", form["group_size"], table.embedding_dim)
        if table.embedding_dim % group_size:
            raise CheckpointError(
                f"config.json: structure.embeddings: the group_size of '{name}' must divide "
                f"{table.embedding_dim}, not be {group_size}"
            )
        weight = table.weight
        quantized = QuantizedEmbedding(
            *weight.shape,
            bits=form["bits"],
            group_size=group_size,
            scale=scale_of(table),
            device=weight.device,
            dtype=weight.dtype,
        )
        replace_table(model, name, quantized)


def _restore_linear(model: PreTrainedModel, entries: Mapping[str, Any]) -> None:
    linears = linear_layers(model)
    for name, entry in _unfold("linear", entries, linears, _absent(model)).items():
        kind, numerics = read_linear_entry(name, entry)
        old: Any = linears[name]
        dtype = old.weight.dtype if old.weight.is_floating_point() else torch.get_default_dtype()
        form = {"bias": old.bias is not None, "kind": kind, "dtype": dtype, "numerics": numerics}
        base_model(model).set_submodule(name, empty_linear(input_width(old), output_width(old), **form))


def _restore_packed(model: PreTrainedModel, entries: Mapping[str, Any]) -> None:
    for old, name, kind in _of_kinds(model, "packed", entries, PACKED_KINDS):
        base_model(model).set_submodule(name, _like(old, PackedLinear, kind))


def _restore_torchao(model: PreTrainedModel, entries: Mapping[str, Any]) -> None:
    for old, name, kind in _of_kinds(model, "torchao", entries, TORCHAO_KINDS):
        base_model(model).set_submodule(name, _like(old, TorchAOLinear, kind))


def _of_kinds(
    model: PreTrainedModel, section: str, entries: Mapping[str, Any], kinds: Sequence[str]
) -> Iterator[tuple[Any, str, Any]]:
    """Yields the linear layers of a section, each with its path and one of the kinds that the section knows."""
    linears = linear_layers(model)
    for name, kind in _unfold(section, entries, linears, _absent(model)).items():
        if kind not in kinds:
            allowed = ", ".join(kinds)
            raise CheckpointError(f"config.json: structure.{section}: '{name}' is {kind!r}; allowed: {allowed}")
        yield linears[name], name, kind


def _like(old: Any, made: Callable[..., nn.Module], kind: str) -> nn.Module:
    form = {"kind": kind, "device": old.weight.device, "dtype": old.weight.dtype}
    return made(input_width(old), output_width(old), old.bias is not None, **form)


# In the order in which they are put back: each section's names are those of the tree at that point.
_SECTIONS: dict[str, Callable[[PreTrainedModel, Mapping[str, Any]], None]] = {
    "removed": _restore_removed,
    "heads": _restore_heads,
    "neurons": _restore_neurons,
    "low_rank": _restore_low_rank,
    "pivoted": _restore_pivoted,
    "headwise": _restore_headwise,
    "shared": _restore_shared,
    "low_rank_embeddings": _restore_low_rank_embeddings,
    "embeddings": _restore_embeddings,
    "linear": _restore_linear,
    "packed": _restore_packed,
    "torchao": _restore_torchao,
}
