"""Removes the tokens that a corpus never uses, from the tokenizer and from the model's embeddings alike.

On every text whose tokens all stay, the model computes exactly what it did. The result is a stock checkpoint with a
smaller vocabulary; the tokenizer that belongs to it must be saved with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    table = model.get_input_embeddings()
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
    every = [model.config, base_model(model).config, getattr(model, "generation_config", None)]
    return list({id(config): config for config in every if config is not None}.values())


def _said_by(model: PreTrainedModel) -> set[int]:
    said: set[int] = set()
    for config in _configs(model):
        for _, value in _token_fields(config):
            said |= set(value if isinstance(value, list) else [value])
    return said


def _shrink(model: PreTrainedModel, order: Sequence[int]) -> None:
    """Keeps the rows `order` of everything that has one for each token."""
    number = {old: index for index, old in enumerate(order)}
    table: Any = model.get_input_embeddings()
    before, index = table.num_embeddings, torch.tensor(order)
    pad = table.padding_idx
    _require_same_padding(model, table, number)
    head: Any = model.get_output_embeddings()
    tensors = {id(table.weight): table.weight}
    for tensor in (getattr(head, "weight", None), getattr(head, "bias", None)):
        if tensor is not None:
            tensors[id(tensor)] = tensor
    final = getattr(model, "final_logits_bias", None)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor[: len(order)] = tensor[index.to(tensor.device)]
        if final is not None:
            final[:, : len(order)] = final[:, index.to(final.device)]
    if pad is not None:
        table.padding_idx = number[pad]
    model.resize_token_embeddings(len(order), mean_resizing=False)
    assert model.get_input_embeddings().num_embeddings == len(order) < before  # type: ignore[union-attr]
    for config in _configs(model):
        _renumber(config, number)


def _require_same_padding(model: PreTrainedModel, table: nn.Embedding, number: dict[int, int]) -> None:
    """Refuses to renumber padding where positions are counted from its id."""
    for name, module in model.named_modules():
        pad = getattr(module, "padding_idx", None)
        if isinstance(pad, int) and not isinstance(module, nn.Embedding) and number.get(pad) != pad:
            raise CompressionError(f"{name} counts positions from the id of padding, {pad}, which would change")
    if table.padding_idx is not None and table.padding_idx not in number:
        raise CompressionError(f"the tokenizer does not know the model's padding token {table.padding_idx}")


register(
    Method(
        name="vocabulary",
        config=VocabularyConfig,
        summary="Removes tokens that the texts never use, from model and tokenizer.",
        apply=vocabulary,
    )
)
