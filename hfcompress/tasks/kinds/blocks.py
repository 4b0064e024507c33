"""Running text cut into blocks of tokens, each token with the bytes of text that it stands for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from hfcompress.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    Tokens = list[tuple[int, int]]  # (token id, bytes)

_AT_ONCE = 1000  # texts


def blocks(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[Tokens]:
    """Joins the texts as they are and cuts their tokens into blocks; a last one of one token is left out.

    The bytes of a text's tokens add up to those of the text: bytes between tokens count for the token after them.

    Args:
        texts: In their order.
        tokenizer: A fast one, which knows where its tokens are. No special tokens are added.
        size: Tokens of a block.

    Raises:
        DataError: The tokenizer does not know where its tokens are.
    """
    require_fast(tokenizer)
    block: Tokens = []
    for token in chain.from_iterable(_tokens(list(texts), tokenizer)):
        block.append(token)
        if len(block) == size:
            yield block
            block = []
    if len(block) > 1:
        yield block


def require_fast(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer that does not know where its tokens are in the text.

    Raises:
        DataError: It does not.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"{type(tokenizer).__name__} does not tell where its tokens are in the text",
            hint="Use a checkpoint with a tokenizer.json.",
        )


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Returns the tokens that the tokenizer puts before and after a text."""
    whole = tokenizer("", add_special_tokens=True)["input_ids"]
    if len(whole) < 2:
        begins = bool(whole) and whole[0] == tokenizer.bos_token_id
        return (list(whole), []) if begins else ([], list(whole))
    return list(whole[:1]), list(whole[1:])


def _tokens(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    for start in range(0, len(texts), _AT_ONCE):
        part = texts[start : start + _AT_ONCE]
        # verbose: a text longer than the model is no mistake here, where it is cut afterwards.
        encoded = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for text, ids, offsets in zip(part, encoded["input_ids"], encoded["offset_mapping"], strict=True):
            yield list(zip(ids, _bytes(text, [end for _, end in offsets]), strict=True))


def _bytes(text: str, ends: list[int]) -> list[int]:
    """Returns the bytes of text up to each token's end that no token before has."""
    counts, reached = [], 0
    for end in ends:
        end = max(end, reached)  # several tokens may share one character
        counts.append(len(text[reached:end].encode()))
        reached = end
    if counts:
        counts[-1] += len(text[reached:].encode())
    return counts
