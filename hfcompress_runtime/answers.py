"""What outputs mean: labels, entities, spans of a context, fillings of a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

_MOST = 15  # tokens of an answer, as transformers' pipeline had it


def softmax(logits: np.ndarray) -> np.ndarray:
    """Returns the shares along the last axis."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def scores(logits: np.ndarray, how: str) -> np.ndarray:
    """Turns logits into scores: `softmax`, `sigmoid`, or `none`."""
    if how == "softmax":
        return softmax(logits)
    return 1 / (1 + np.exp(-logits)) if how == "sigmoid" else logits


def best_labels(logits: np.ndarray, names: Sequence[str], how: str, top_k: int | None) -> list[dict[str, Any]]:
    """Returns the best labels of logits `(labels,)`; all of them where `top_k` is None."""
    found = scores(logits, how)
    order = np.argsort(-found, kind="stable")[:top_k]
    return [{"label": names[index], "score": float(found[index])} for index in order]


def entities(
    text: str, encoding: Any, logits: np.ndarray, names: Sequence[str], unknown: str | None
) -> list[dict[str, Any]]:
    """Returns every token of a text with its best label; logits are `(tokens, labels)`."""
    shares = softmax(logits)
    found = []
    for index, special in enumerate(encoding.special_tokens_mask):
        if special or not encoding.attention_mask[index]:
            continue
        best = int(shares[index].argmax())
        start, end = encoding.offsets[index]
        token = encoding.tokens[index]
        found.append(
            {
                "entity": names[best],
                "score": float(shares[index, best]),
                "index": index,
                "word": text[start:end] if token == unknown else token,
                "start": start,
                "end": end,
            }
        )
    return found


def joined(found: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """Joins neighbours whose tags are of one kind; `B-` begins anew."""
    groups: list[list[Mapping[str, Any]]] = []
    for entity in found:
        kind = _kind(entity["entity"])
        if groups and kind == _kind(groups[-1][-1]["entity"]) and not entity["entity"].startswith("B-"):
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return [
        {
            "entity_group": _kind(group[0]["entity"]),
            "score": float(np.mean([each["score"] for each in group])),
            "word": text[group[0]["start"] : group[-1]["end"]],
            "start": group[0]["start"],
            "end": group[-1]["end"],
        }
        for group in groups
    ]


def _kind(tag: str) -> str:
    return tag[2:] if tag[:2] in ("B-", "I-") else tag


def spans(
    context: str, encodings: Sequence[Any], starts: Sequence[np.ndarray], ends: Sequence[np.ndarray], top_k: int
) -> list[dict[str, Any]]:
    """Returns the best pieces of a context, over all windows in which it was read.

    Args:
        context: The text that the answer is a piece of.
        encodings: One a window, of the question and a part of the context.
        starts: Logits `(tokens,)` of each.
        ends: Likewise.
        top_k: How many pieces.
    """
    found: dict[tuple[int, int], float] = {}
    for encoding, start_logits, end_logits in zip(encodings, starts, ends, strict=True):
        inside = np.array([part == 1 for part in encoding.sequence_ids])
        # The first token stands for "no answer": it takes its share, as in training.
        shared = inside.copy()
        shared[0] = True
        begin, finish = (softmax(np.where(shared, logits, -1e4)) for logits in (start_logits, end_logits))
        begin, finish = begin * inside, finish * inside
        pairs = np.triu(np.outer(begin, finish)) - np.triu(np.outer(begin, finish), _MOST)
        for place in np.argsort(-pairs, axis=None, kind="stable")[:top_k]:
            first, last = np.unravel_index(place, pairs.shape)
            span = (encoding.offsets[first][0], encoding.offsets[last][1])
            if pairs[first, last] > 0:
                found[span] = max(found.get(span, 0.0), float(pairs[first, last]))
    best = sorted(found.items(), key=lambda item: -item[1])[:top_k]
    return [{"score": score, "start": start, "end": end, "answer": context[start:end]} for (start, end), score in best]


def fillings(
    tokenizer: Any, ids: Sequence[int], logits: np.ndarray, mask_id: int, pad_id: int, top_k: int | None
) -> list[Any]:
    """Returns what stands best for the masks of a text; logits are `(tokens, vocabulary)`."""
    places = [place for place, token in enumerate(ids) if token == mask_id]
    if not places:
        raise ValueError("the text holds no mask to fill in")
    made = []
    for place in places:
        shares = softmax(logits[place])
        row = []
        for token in np.argsort(-shares, kind="stable")[:top_k].tolist():
            filled = [token if at == place else each for at, each in enumerate(ids)]
            filled = [each for each in filled if each != pad_id]
            row.append(
                {
                    "score": float(shares[token]),
                    "token": token,
                    "token_str": tokenizer.decode([token], skip_special_tokens=False),
                    "sequence": tokenizer.decode(filled, skip_special_tokens=len(places) == 1),
                }
            )
        made.append(row)
    return made[0] if len(places) == 1 else made
