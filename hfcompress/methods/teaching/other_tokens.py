"""A teacher that has a tokenizer of its own: what it reads, and which of its tokens stand for the student's.

Outputs about an example need no more than the example's text. What is said about tokens is brought to the student's:
each takes what the teacher says at the token that holds its last character. Special tokens have no characters, and
are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hfcompress.errors import CompressionError
from hfcompress.methods.teaching.signals import Signals, is_token_level
from hfcompress.methods.training import Rows

# What a row was made of: a text, a pair of texts, or a list of words.
Text = str | tuple[str, str] | list[str]


class Span(NamedTuple):
    """Where a token comes from.

    Attributes:
        segment: The text of a pair, or None for a special token.
        word: The word, where a row is a list of words.
        start: Its first character, in the text or in the word.
        end: One past its last.
    """

    segment: int | None
    word: int | None
    start: int
    end: int


def align(ours: Sequence[Span], theirs: Sequence[Span]) -> list[int]:
    """Finds for each token another tokenizer's token of the same place.

    Args:
        ours: Where each of the student's tokens comes from.
        theirs: The same of the teacher's.

    Returns:
        For each of ours the number of the one that holds its last character, or -1 where none does.
    """
    holders: dict[tuple[int | None, int | None, int], int] = {}
    for number, span in enumerate(theirs):
        if span.segment is not None:
            holders |= {(span.segment, span.word, place): number for place in range(span.start, span.end)}
    # A token without characters ends before it starts, where another token may be.
    ends = [(span.segment, span.word, span.end - 1 if span.end > span.start else -1) for span in ours]
    return [holders.get(end, -1) for end in ends]


class OtherTokens:
    """What a teacher reads where its tokenizer is not the student's.

    Args:
        texts: What each training row was made of, in the rows' order: a text, a pair of texts, or a list of words.
        student: The student's tokenizer.
        teacher: The teacher's tokenizer.
        max_length: Tokens after which both cut.

    Raises:
        CompressionError: A tokenizer is one of the slow ones, which do not know where tokens come from; or the
            teacher's has no token to pad with.
    """

    def __init__(
        self,
        texts: Sequence[Text],
        student: PreTrainedTokenizerBase,
        teacher: PreTrainedTokenizerBase,
        max_length: int = 128,
    ) -> None:
        for name, tokenizer in (("student", student), ("teacher", teacher)):
            if not tokenizer.is_fast:
                raise CompressionError(
                    f"the {name}'s tokenizer ({type(tokenizer).__name__}) does not say where its tokens come from",
                    hint="Load it by AutoTokenizer, which takes the fast one where there is one.",
                )
        if teacher.pad_token is None:
            raise CompressionError(
                f"the teacher's tokenizer ({type(teacher).__name__}) has no token to pad texts of other lengths with",
                hint="Give it one that the teacher's attention leaves out: tokenizer.pad_token = tokenizer.eos_token.",
            )
        self.texts, self._student, self._teacher, self._max_length = texts, student, teacher, max_length

    def require_room(self, teacher: PreTrainedModel) -> None:
        """Refuses texts that are longer than a teacher has positions for.

        Raises:
            CompressionError: One is.
        """
        room = _positions(teacher)
        if room is None or self._max_length <= room:
            return
        for start in range(0, len(self.texts), 1000):
            read = self._encode(self.texts[start : start + 1000])["input_ids"]
            longest = max(map(len, read))
            if longest > room:
                raise CompressionError(
                    f"a text has {longest} of the teacher's tokens, and {type(teacher).__name__} has {room} positions",
                    hint=f"Make the rows and OtherTokens with max_length={room} or less.",
                )

    def rows(self, like: Rows) -> Rows:
        """Returns the training rows as the teacher reads them, batched as the student's are."""
        return replace(like, dataset=_TeacherRows(self._encode, self.texts), collate=self._collate)

    def _encode(self, texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase | None = None) -> Any:
        words = bool(texts) and isinstance(texts[0], list)
        asked = {"truncation": True, "max_length": self._max_length, "is_split_into_words": words}
        return (tokenizer or self._teacher)(list(texts), **asked)  # type: ignore[arg-type]

    def _collate(self, rows: list[Mapping[str, Any]]) -> Mapping[str, Any]:
        return self._teacher.pad(rows, return_tensors="pt")  # type: ignore[arg-type]

    def alignment(self, numbers: Sequence[int], ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        """Returns which of the teacher's tokens each of the student's takes.

        Args:
            numbers: The rows' numbers.
            ours: The student's real tokens, bool `(batch, tokens)`.
            theirs: The teacher's real tokens, bool `(batch, teacher's tokens)`.

        Returns:
            int64 `(batch, tokens)`; -1 where there is none.

        Raises:
            CompressionError: The rows were not made of these texts, by this tokenizer or to this length.
        """
        texts = [self.texts[number] for number in numbers]
        both = [_spans(self._encode(texts, each), texts) for each in (self._student, self._teacher)]
        index = torch.full(ours.shape, -1)
        for row, (own, other) in enumerate(zip(*both, strict=True)):
            places, others = ours[row].nonzero().flatten().cpu(), theirs[row].nonzero().flatten().cpu()
            if len(own) != len(places) or len(other) != len(others):
                raise CompressionError(
                    f"training row {numbers[row]} has {len(places)} tokens, and its text gives {len(own)}",
                    hint="The texts, the student's tokenizer and max_length must be those the rows were made with.",
                )
            found = torch.tensor(align(own, other))
            index[row, places] = torch.where(found >= 0, others[found.clamp(min=0)], -1)
        return index.to(ours.device)


def _positions(model: PreTrainedModel) -> int | None:
    """Returns how many tokens a model has learnt positions for; None where it counts without end."""
    for name, table in model.named_modules():
        if name.rpartition(".")[2] in ("position_embeddings", "wpe") and isinstance(table, nn.Embedding):
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return None


class _TeacherRows:
    """Rows that are tokenized when they are asked for."""

    def __init__(self, encode: Any, texts: Sequence[Text]) -> None:
        self._encode, self._texts = encode, texts

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        if number >= len(self._texts):
            raise IndexError(number)  # ends an iteration
        return {name: values[0] for name, values in self._encode([self._texts[number]]).items()}


def _spans(encoded: Any, texts: Sequence[Text]) -> list[list[Span]]:
    split = bool(texts) and isinstance(texts[0], list)
    found = []
    for encoding in encoded.encodings:
        words = encoding.word_ids if split else [None] * len(encoding.offsets)
        parts = zip(encoding.sequence_ids, words, encoding.offsets, strict=True)
        found.append([Span(segment, word, *offsets) for segment, word, offsets in parts])
    return found


class Source(Protocol):
    """A teacher that runs, or its cache."""

    def signals(  # noqa: D102
        self, inputs: Mapping[str, torch.Tensor], counted: torch.Tensor | None, ids: torch.Tensor
    ) -> Signals: ...
    def close(self) -> None: ...  # noqa: D102


class TranslatedTeacher:
    """A teacher of other tokens, as one of the student's.

    Args:
        source: The teacher, or its cache.
        tokens: What it reads.
        rows: The training rows as it reads them.
        teacher: The model; not kept.
    """

    def __init__(self, source: Source, tokens: OtherTokens, rows: Rows, teacher: PreTrainedModel) -> None:
        self._source, self._tokens, self._rows = source, tokens, rows
        self._by_token = is_token_level(teacher)

    def signals(self, inputs: Mapping[str, torch.Tensor], counted: torch.Tensor | None, ids: torch.Tensor) -> Signals:
        """Returns what the teacher says, at the student's tokens; see `Signals.aligned`.

        Args:
            inputs: The student's batch.
            counted: The student's outputs that count, as `positions` returns it.
            ids: The rows' numbers, `(batch,)`.
        """
        numbers = ids.tolist()
        batch = self._rows.batch(numbers)
        theirs = batch["attention_mask"].bool()
        said = self._source.signals(batch, theirs if self._by_token else None, ids)
        if not (self._by_token or said.hidden or said.relations):
            return said
        index = self._tokens.alignment(numbers, inputs["attention_mask"].bool(), theirs)
        aligned, logits = index >= 0, said.logits
        if self._by_token and logits is not None:
            assert counted is not None
            whole = logits.new_zeros(*theirs.shape, logits.shape[-1])
            whole[theirs] = logits
            logits = _take(whole, index)[counted & aligned]
        return Signals(
            logits=logits,
            hidden={place: _take(states, index) for place, states in said.hidden.items()},
            relations=tuple(_take(states, index) for states in said.relations),
            aligned=aligned,
        )

    def close(self) -> None:
        """Lets go of the source."""
        self._source.close()


def _take(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Returns `(batch, tokens, width)` of `(batch, teacher's tokens, width)`; anything where the index is -1."""
    return states.gather(1, index.clamp(min=0).unsqueeze(-1).expand(-1, -1, states.shape[-1]))


def refuse_what_tokens_cannot_say(
    student: PreTrainedModel, teacher: PreTrainedModel, *, outputs: bool, attention: bool
) -> None:
    """Refuses what cannot be compared between models that read different tokens.

    Raises:
        CompressionError: Vocabularies, decoders or attention maps would be compared.
    """
    who = f"{type(teacher).__name__} and {type(student).__name__} have different tokenizers"
    if student.config.is_encoder_decoder or teacher.config.is_encoder_decoder:
        raise CompressionError(f"{who}, and a decoder's steps are its tokens: they cannot be compared")
    if outputs and (student.get_output_embeddings() is not None or teacher.get_output_embeddings() is not None):
        raise CompressionError(
            f"{who}, and their outputs are over different vocabularies",
            hint="Set soft: 0 and learn from hidden states or relations, or take a teacher with the same tokenizer.",
        )
    if outputs and "ForQuestionAnswering" in (student.loss_type, teacher.loss_type):
        raise CompressionError(
            f"{who}, and an answer begins and ends at a token, of which each has others",
            hint="Set soft: 0 and learn from hidden states or relations, or take a teacher with the same tokenizer.",
        )
    if attention:
        raise CompressionError(
            f"{who}, and an attention map says how tokens share out their attention, which other tokens do otherwise",
            hint="Use relations instead of attention.",
        )
