"""Rewrites a fast tokenizer for the tokens that are kept, so that they are cut from text as before.

Works on the `tokenizer.json` that every fast tokenizer is; the functions here are pure over its values.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from hfcompress.errors import CompressionError

KINDS = ("WordPiece", "Unigram", "BPE", "WordLevel")


def vocabulary_of(state: Mapping[str, Any]) -> dict[str, int]:
    """Returns the id of every token, added ones included.

    Raises:
        CompressionError: The tokenizer is of a kind that is not known.
    """
    model = state["model"]
    if model.get("type") not in KINDS:
        raise CompressionError(f"tokenizers of type {model.get('type')} cannot be trimmed; allowed: {', '.join(KINDS)}")
    if model["type"] == "Unigram":
        ids = {piece: index for index, (piece, _) in enumerate(model["vocab"])}
    else:
        ids = dict(model["vocab"])
    return ids | {added["content"]: added["id"] for added in state["added_tokens"]}


def needed(state: Mapping[str, Any], used: Collection[int], *, characters: bool) -> set[int]:
    """Returns the tokens that must stay so that text made of the used ones is cut as before.

    - WordPiece takes the longest token that fits, so others may go.
    - Unigram takes the likeliest path, and what is left of the paths keeps its order; the least likely token
      stays too, since it says what an unknown character costs.
    - BPE builds a token from merges, so the parts of each kept token stay, and theirs.

    Args:
        state: The tokenizer.
        used: Ids that the corpus uses.
        characters: Whether single characters stay, so that a new word becomes pieces and not unknown.

    Returns:
        Ids: those used, added tokens, and what these need.
    """
    model, ids = state["model"], vocabulary_of(state)
    kept = set(used) | {added["id"] for added in state["added_tokens"]}
    if model.get("unk_token") in ids:
        kept.add(ids[model["unk_token"]])
    prefix = model.get("continuing_subword_prefix") or ""
    for token, index in ids.items():
        bare = token.removeprefix(prefix) if prefix else token
        if (characters and len(bare) == 1) or (token.startswith("<0x") and len(token) == 6):
            kept.add(index)
    if model["type"] == "Unigram":
        if model.get("unk_id") is not None:
            kept.add(model["unk_id"])
        kept.add(min(range(len(model["vocab"])), key=lambda index: model["vocab"][index][1]))
    if model["type"] == "BPE":
        kept |= _parts(model, ids, kept)
    return kept


def _merge(pair: Any) -> tuple[str, str]:
    left, right = pair.split(" ") if isinstance(pair, str) else pair
    return left, right


def _product(left: str, right: str, prefix: str) -> str:
    return left + (right.removeprefix(prefix) if prefix else right)


def _parts(model: Mapping[str, Any], ids: Mapping[str, int], kept: Collection[int]) -> set[int]:
    made_of: dict[int, list[int]] = {}
    prefix = model.get("continuing_subword_prefix") or ""
    for left, right in map(_merge, model["merges"]):
        made_of.setdefault(ids[_product(left, right, prefix)], []).extend((ids[left], ids[right]))
    found: set[int] = {index for token, index in ids.items() if len(token) == 1}  # bytes, in a byte-level one
    waiting = list(kept)
    while waiting:
        for part in made_of.get(waiting.pop(), ()):
            if part not in found:
                found.add(part)
                waiting.append(part)
    return found


def trim(state: Mapping[str, Any], kept: Collection[int]) -> tuple[dict[str, Any], list[int]]:
    """Rewrites a tokenizer for some of its tokens, numbered anew in their old order.

    Args:
        state: The tokenizer, as the values of its `tokenizer.json`.
        kept: Ids of the tokens that stay, closed under `needed`.

    Returns:
        The new values, and for each new id the old one, ascending.
    """
    new = copy.deepcopy(dict(state))
    ids = vocabulary_of(state)
    order = sorted(set(ids.values()) & set(kept))
    number = {old: index for index, old in enumerate(order)}
    model = new["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [piece for index, piece in enumerate(model["vocab"]) if index in number]
        if model.get("unk_id") is not None:
            model["unk_id"] = number[model["unk_id"]]
    else:
        model["vocab"] = {token: number[index] for token, index in model["vocab"].items() if index in number}
    if model["type"] == "BPE":
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            pair
            for pair, (left, right) in zip(model["merges"], map(_merge, model["merges"]), strict=True)
            if {left, right, _product(left, right, prefix)} <= model["vocab"].keys()
        ]
    for added in new["added_tokens"]:
        added["id"] = number[added["id"]]
    if new.get("padding"):
        new["padding"]["pad_id"] = number[new["padding"]["pad_id"]]
    _renumber(new.get("post_processor"), number)
    return new, order


def _renumber(processor: Any, number: Mapping[int, int]) -> None:
    """Puts new ids into a post-processor, in place."""
    if not processor:
        return
    for inner in processor.get("processors", ()):
        _renumber(inner, number)
    for name in ("sep", "cls"):
        if name in processor:
            processor[name] = [processor[name][0], number[processor[name][1]]]
    if processor.get("type") == "TemplateProcessing":
        for special in processor["special_tokens"].values():
            special["ids"] = [number[index] for index in special["ids"]]


def state_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns the values of a fast tokenizer's `tokenizer.json`.

    Raises:
        CompressionError: It is not a fast tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CompressionError(
            f"{type(tokenizer).__name__} is not a fast tokenizer", hint="Load it with AutoTokenizer.from_pretrained."
        )
    return json.loads(backend.to_str())


def rebuilt(tokenizer: PreTrainedTokenizerBase, state: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Returns a tokenizer like `tokenizer` as it will be loaded from disk with other `tokenizer.json` values."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        for stale in ("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model"):
            (Path(folder) / stale).unlink(missing_ok=True)
        said = Path(folder) / "tokenizer_config.json"
        config = json.loads(said.read_text(encoding="utf-8"))
        config.pop("added_tokens_decoder", None)  # the same is in tokenizer.json
        said.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        loaded = type(tokenizer).from_pretrained(folder)
    loaded.name_or_path = tokenizer.name_or_path  # the folder is gone
    return loaded
