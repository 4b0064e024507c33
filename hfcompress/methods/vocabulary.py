"""Removes the tokens that a corpus never uses, from the tokenizer and from the model's embeddings alike.

On every text whose tokens all stay, the model computes exactly what it did. The result is a stock checkpoint with a
smaller vocabulary; the tokenizer that belongs to it must be saved with it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hfcompress.configuration import Config
from hfcompress.errors import CompressionError
from hfcompress.methods.registry import Context, Method, register
from hfcompress.methods.token_trimming import needed, rebuilt, state_of, trim, vocabulary_of
from hfcompress.modeling.anatomy import base_model
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.width import cut_tensors, named_tensors

_AT_ONCE = 1000  # texts tokenized together


class VocabularyConfig(Config):
    """Which tokens stay.

    Attributes:
        characters: Keeps single characters too, so that a word the corpus does not know becomes pieces and not
            `[UNK]`; bytes of byte-level tokenizers always stay.
        multiple_of: The vocabulary is filled up to a multiple of this with the unused tokens of the lowest ids.
    """

    characters: bool = True
    multiple_of: int = Field(1, ge=1, le=1024)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[list[int]]:
    for start in range(0, len(texts), _AT_ONCE):
        yield from tokenizer(list(texts[start : start + _AT_ONCE]), truncation=False, padding=False)["input_ids"]


def vocabulary(model: PreTrainedModel, config: VocabularyConfig, context: Context) -> dict[str, Any]:
    """Trims model and tokenizer, both in place.

    Args:
        model: A model with float embeddings.
        config: Which tokens stay.
        context: The `tokenizer`, and the `texts` that it must cut as before.

    Returns:
        Tokens before and after, and the number of texts on which the new tokenizer was proven.

    Raises:
        CompressionError: No tokenizer or texts, a tokenizer that is not fast or of an unknown kind, quantized
            embeddings, generation settings that name single tokens in ways that are not renumbered, or a text that
            would be cut otherwise. Nothing was changed then.
    """
    tokenizer, texts = context.tokenizer, context.texts
    if tokenizer is None or not texts:
        missing = "the tokenizer" if tokenizer is None else "texts"
        raise CompressionError(f"vocabulary needs {missing}", hint="Pass tokenizer=..., texts=[...] to compress.")
    _require_numbered(model)
    state = state_of(tokenizer)
    known = vocabulary_of(state)
    rows = _rows(model)
    if max(known.values()) >= rows:
        raise CompressionError(f"the tokenizer knows {max(known.values()) + 1} tokens, the model only {rows}")
    used = {index for ids in _ids(tokenizer, texts) for index in ids}
    kept = needed(state, used | _said_by(model), characters=config.characters) & set(known.values())
    spare = sorted(set(known.values()) - kept)
    kept |= set(spare[: -len(kept) % config.multiple_of])
    if len(kept) == rows:
        raise CompressionError("every token is used: there is nothing to remove")
    new_state, order = trim(state, kept)
    smaller = rebuilt(tokenizer, new_state)
    _require_same(tokenizer, smaller, texts, order)
    _shrink(model, order)
    vars(tokenizer).update(vars(smaller))
    commit(model)
    return {"kept": len(order), "of": rows, "used": len(used), "texts": len(texts)}


def _rows(model: PreTrainedModel) -> int:
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:
        raise CompressionError(
            f"{type(model).__name__} has no table of tokens that could be trimmed", hint="Leave vocabulary out."
        ) from None
    if not isinstance(table, nn.Embedding) or not table.weight.is_floating_point():
        raise CompressionError(
            f"the model's {type(table).__name__} cannot be trimmed: it must be a float embedding",
            hint="Trim the vocabulary before quantizing.",
        )
    return table.num_embeddings


def _require_same(
    tokenizer: PreTrainedTokenizerBase, smaller: PreTrainedTokenizerBase, texts: Sequence[str], order: Sequence[int]
) -> None:
    for text, old, new in zip(texts, _ids(tokenizer, texts), _ids(smaller, texts), strict=True):
        if old != [order[index] for index in new]:
            raise CompressionError(f"the smaller tokenizer would cut this text otherwise: {text[:80]!r}")


def _token_fields(config: Any) -> Iterator[tuple[str, int | list[int]]]:
    """Yields the config's fields that hold ids of tokens."""
    for name, value in vars(config).items():
        listed = isinstance(value, list) and value and all(type(each) is int for each in value)
        if name.endswith(("_token_id", "_token_ids", "_token_index")) and (type(value) is int or listed):
            yield name, value


# Of these, ids that are no longer there can be left out: what cannot be written need not be forbidden.
_FORBIDDEN = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
# These would have to be written anew, each in its own form.
_UNNUMBERED = ("force_words_ids", "sequence_bias", "forced_decoder_ids", "lang_to_id", "task_to_id")


def _require_numbered(model: PreTrainedModel) -> None:
    """Refuses a model whose generation config holds ids of tokens in fields that are not renumbered."""
    for config in _configs(model):
        held = [name for name in _UNNUMBERED if getattr(config, name, None)]
        if held:
            raise CompressionError(
                f"the generation config's {held[0]} holds ids of tokens, which trimming would change",
                hint=f"Set model.generation_config.{held[0]} to None, or keep the whole vocabulary.",
            )


def _renumber(config: Any, number: dict[int, int]) -> None:
    for name, value in list(_token_fields(config)):
        new = [number.get(each, each) for each in value] if isinstance(value, list) else number.get(value, value)
        setattr(config, name, new)
    for name in _FORBIDDEN:
        value = getattr(config, name, None) or []
        if value and isinstance(value[0], int):
            setattr(config, name, [number[each] for each in value if each in number] or None)
        elif value:
            left = [[number[each] for each in word] for word in value if number.keys() >= set(word)]
            setattr(config, name, left or None)


def _configs(model: PreTrainedModel) -> list[Any]:
    text = model.config.get_text_config()  # of a model that sees too, its own
    every = [model.config, base_model(model).config, text, getattr(model, "generation_config", None)]
    return list({id(config): config for config in every if config is not None}.values())


def _said_by(model: PreTrainedModel) -> set[int]:
    said: set[int] = set()
    for config in _configs(model):
        for _, value in _token_fields(config):
            said |= set(value if isinstance(value, list) else [value])
    return said


@dataclass(frozen=True)
class _Rows:
    """What a model has as many of as tokens.

    Attributes:
        tensors: The dimensions of tensors, by name.
        numbers: Attributes of modules, each with its module.
    """

    tensors: dict[str, tuple[int, ...]]
    numbers: list[tuple[nn.Module, str]]


def _of_tokens(model: PreTrainedModel, rows: int) -> _Rows:
    """Finds everything that has a row for each token, tied or not.

    It is what differs between two stock models, built without memory, one of which knows a token more.

    Raises:
        CompressionError: Something of that is not there as its stock class has it.
    """
    stock, larger = (_stock(model, size) for size in (rows, rows + 1))
    shapes, found, own = dict(named_tensors(larger)), _Rows({}, []), dict(named_tensors(model))
    for name, tensor in named_tensors(stock):
        pairs = enumerate(zip(tensor.shape, shapes[name].shape, strict=True))
        dims = tuple(dim for dim, (before, after) in pairs if before != after)
        held = own.get(name)
        if dims and (held is None or not held.is_floating_point() or any(held.shape[dim] != rows for dim in dims)):
            raise CompressionError(
                f"{name} has no row for each of the {rows} tokens as the stock class has, so it cannot be trimmed",
                hint="Trim the vocabulary before anything else.",
            )
        found.tensors.update({name: dims} if dims else {})
    table: Any = model.get_input_embeddings()
    if not any(own[name] is table.weight for name in found.tensors):
        raise CompressionError(
            f"vocab_size of {type(model).__name__}'s config does not say how many tokens it knows",
            hint="Keep the whole vocabulary.",
        )
    modules, larger_ones = dict(model.named_modules()), dict(larger.named_modules())
    for path, module in stock.named_modules():
        for name, value in vars(module).items():
            counts = type(value) is int and value == rows != vars(larger_ones[path]).get(name)
            if counts and path in modules and vars(modules[path]).get(name) == rows:
                found.numbers.append((modules[path], name))
    return found


def _stock(model: PreTrainedModel, rows: int) -> PreTrainedModel:
    """Builds a stock model that knows so many tokens on `meta`."""
    config = copy.deepcopy(model.config)
    try:
        config.get_text_config().vocab_size = rows
        with torch.device("meta"):
            return type(model)(config)
    except (ValueError, RuntimeError, TypeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        raise CompressionError(
            f"{type(model).__name__} cannot be built with another vocabulary: {error}",
            hint="Keep the whole vocabulary.",
        ) from None


def _shrink(model: PreTrainedModel, order: Sequence[int]) -> None:
    """Keeps the rows `order` of everything that has one for each token."""
    number = {old: index for index, old in enumerate(order)}
    rows = _rows(model)
    found = _of_tokens(model, rows)
    holders = [model.get_submodule(name.rpartition(".")[0]) for name in found.tensors]
    tables = list({id(module): module for module in holders if isinstance(module, nn.Embedding)}.values())
    _require_same_padding(model, tables, number)
    cut_tensors(model, found.tensors, torch.tensor(order))
    for module, name in found.numbers:
        setattr(module, name, len(order))
    for table in tables:
        if table.padding_idx is not None:
            table.padding_idx = number[table.padding_idx]
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and isinstance(pad := getattr(part, "padding_idx", None), int):
            vars(part)["padding_idx"] = number.get(pad, pad)
    configs: list[Any] = [each.config for each in model.modules() if hasattr(each, "config")]
    for config in configs:
        if getattr(config, "vocab_size", None) == rows:
            config.vocab_size = len(order)
    model.config.get_text_config().vocab_size = len(order)
    for config in _configs(model):
        _renumber(config, number)


def _require_same_padding(model: PreTrainedModel, tables: Sequence[nn.Embedding], number: dict[int, int]) -> None:
    """Refuses to renumber padding where positions are counted from its id."""
    for name, module in model.named_modules():
        pad = getattr(module, "padding_idx", None)
        if isinstance(module, (nn.Embedding, PreTrainedModel)):
            continue  # a whole model's says which row of its table is that of padding
        if isinstance(pad, int) and number.get(pad) != pad:
            raise CompressionError(f"{name} counts positions from the id of padding, {pad}, which would change")
    for table in tables:
        if table.padding_idx is not None and table.padding_idx not in number:
            raise CompressionError(f"the tokenizer does not know the model's padding token {table.padding_idx}")


register(
    Method(
        name="vocabulary",
        config=VocabularyConfig,
        summary="Removes tokens that the texts never use, from model and tokenizer.",
        apply=vocabulary,
        renumbers=True,
    )
)
