"""Further texts made out of training texts, which a teacher answers and nobody has to label.

A teacher knows its training texts by heart: what it says of them is little more than their labels. What it says of
texts near them is new to the student. Pairs are made as in Augmented SBERT (Thakur et al. 2021, arXiv 2010.08240):
a text beside one that shares rare words with it. Words are left out and exchanged as in EDA (Wei and Zou 2019, arXiv
1901.11196).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from hfcompress.configuration import Config

if TYPE_CHECKING:
    from datasets import Dataset

_NEIGHBOURS = 8
_POOL = 20_000  # texts among which neighbours are sought: each is compared with all, 15 seconds of a core
_TRIES = 20  # for each row, before it is given up: small data have few pairs
_BETWEEN = (",", ".", "and", "but")


class AugmentationConfig(Config):
    """How many texts are made, and how far they are from those they are made of.

    Attributes:
        share: Rows that are made, as a share of the training rows.
        words: Share of a text's words that are left out or exchanged for another of the training texts' words, half of
            them each.
        combined: Share of the rows that are made of two texts: a single text of two that follow one another, a pair of
            two that have rare words in common. The words of the others are changed.
    """

    share: float = Field(1.0, gt=0, le=100)
    words: float = Field(0.3, gt=0, lt=1)
    combined: float = Field(0.5, ge=0, le=1)


def augmented(rows: Dataset, columns: Sequence[str], config: AugmentationConfig, *, seed: int = 0) -> Dataset:
    """Makes texts out of a task's training texts; the same ones for the same rows and seed.

    Args:
        rows: Training rows.
        columns: The column of the text, or the two columns of a pair of texts.
        config: How.
        seed: Of the choices.

    Returns:
        New rows with these columns alone, none of them twice and none that is in `rows`; fewer than were asked for
        where the texts do not have so many in them.
    """
    from datasets import Dataset

    known = list(zip(*(rows[name] for name in columns), strict=True))
    made = _Maker(known, config, random.Random(seed)).make(round(config.share * len(known)))
    return Dataset.from_dict({name: [row[place] for row in made] for place, name in enumerate(columns)})


def similar(texts: Sequence[str], count: int) -> list[list[int]]:
    """Finds for each text the others that share the most and the rarest words with it (cosine of TF-IDF).

    Args:
        texts: Different texts.
        count: How many to find.

    Returns:
        For each text the places of others, the nearest first.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.neighbors import NearestNeighbors

    wanted = min(count + 1, len(texts))
    if wanted < 2:
        return [[] for _ in texts]
    vectors = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\S+").fit_transform(texts)
    search = NearestNeighbors(n_neighbors=wanted, metric="cosine", algorithm="brute").fit(vectors)
    found = search.kneighbors(vectors, return_distance=False)
    return [[int(near) for near in places if near != place][:count] for place, places in enumerate(found)]


def with_words_changed(text: str, words: Sequence[str], share: float, generator: random.Random) -> str:
    """Leaves words of a text out, and exchanges others.

    Args:
        text: The text.
        words: What is put in.
        share: Of the words that change, on average; half of them go, half are exchanged.
        generator: Chooses.

    Returns:
        The changed text, or the text itself where no word would be left.
    """
    kept: list[str] = []
    for word in text.split():
        chance = generator.random()
        if chance >= share / 2:
            kept.append(generator.choice(words) if chance < share else word)
    return " ".join(kept) or text


class _Maker:
    def __init__(self, known: Sequence[tuple[str, ...]], config: AugmentationConfig, generator: random.Random) -> None:
        self.known, self.config, self.generator = known, config, generator
        self.texts = list(dict.fromkeys(text for row in known for text in row))
        self.words = [word for text in self.texts for word in text.split()]
        self.pairs = bool(known) and len(known[0]) == 2
        self.near: dict[str, list[str]] = {}
        if self.pairs and config.combined:
            pool = self.texts if len(self.texts) <= _POOL else generator.sample(self.texts, _POOL)
            found = similar(pool, _NEIGHBOURS)
            self.near = {text: [pool[each] for each in near] for text, near in zip(pool, found, strict=True)}
        self.pool = list(self.near)

    def make(self, count: int) -> list[tuple[str, ...]]:
        seen, made = set(self.known), []
        for _ in range(_TRIES * count if self.words else 0):
            if len(made) == count:
                break
            row = self._row()
            if row not in seen and (not self.pairs or row[0] != row[1]):
                seen.add(row)
                made.append(row)
        return made

    def _row(self) -> tuple[str, ...]:
        row = list(self.generator.choice(self.known))
        place = self.generator.randrange(len(row))
        combined = self.generator.random() < self.config.combined
        if combined and not self.pairs:
            return (f"{row[0].strip()} {self.generator.choice(_BETWEEN)} {self.generator.choice(self.texts)}",)
        if combined:
            text = row[place] if row[place] in self.near else self.generator.choice(self.pool)
            if near := self.near[text]:
                return text, self.generator.choice(near)
        row[place] = with_words_changed(row[place], self.words, self.config.words, self.generator)
        return tuple(row)
