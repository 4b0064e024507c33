"""Metrics of texts that a model writes, as sums over examples: ROUGE, BLEU, word and character error rates."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    References = str | Sequence[str]

_ORDERS = 4  # BLEU counts runs of one to four words
_NOT_A_WORD = re.compile(r"[^a-z0-9]+")


def _list(references: References) -> Sequence[str]:
    """Returns all right texts: an example may have one or several."""
    return [references] if isinstance(references, str) else references


def same_text(prediction: str, references: References) -> tuple[float, ...]:
    """Returns whether a text is a right one, letter by letter."""
    return float(prediction in _list(references)), 1.0


# ROUGE (Lin 2004), as Google's rouge_score computes it without a stemmer


def rouge_n(order: int) -> Callable[[str, References], tuple[float, ...]]:
    """Returns what finds the F1 of runs of `order` words, with the best of the right texts."""

    def of_example(prediction: str, references: References) -> tuple[float, ...]:
        said = _runs(_words(prediction), order)
        return max(_f1_of_runs(said, _runs(_words(each), order)) for each in _list(references)), 1.0

    return of_example


def rouge_l(prediction: str, references: References) -> tuple[float, ...]:
    """Returns the F1 of the longest common subsequence of words."""
    said = _words(prediction)
    return max(_f1_of_subsequence(said, _words(each)) for each in _list(references)), 1.0


def rouge_l_sum(prediction: str, references: References) -> tuple[float, ...]:
    """Returns the F1 of the common subsequences of every two sentences, which are lines."""
    said = _sentences(prediction)
    return max(_f1_of_sentences(said, _sentences(each)) for each in _list(references)), 1.0


def _words(text: str) -> list[str]:
    return _NOT_A_WORD.sub(" ", text.lower()).split()


def _sentences(text: str) -> list[list[str]]:
    return [_words(line) for line in text.split("\n") if line]


def _runs(words: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[place : place + order]) for place in range(len(words) - order + 1))


def _f1(both: float, said: int, there: int) -> float:
    return 2 * both / (said + there) if both else 0.0


def _f1_of_runs(said: Counter[tuple[str, ...]], there: Counter[tuple[str, ...]]) -> float:
    return _f1((said & there).total(), said.total(), there.total())


def _f1_of_subsequence(said: Sequence[str], there: Sequence[str]) -> float:
    return _f1(_subsequences(there, said)[-1][-1], len(said), len(there))


def _f1_of_sentences(said: Sequence[Sequence[str]], there: Sequence[Sequence[str]]) -> float:
    """Counts each word of a right sentence once if it is in a subsequence common with any sentence said."""
    left, open_places = Counter(word for words in said for word in words), Counter(w for words in there for w in words)
    hits = 0
    for right in there:
        for place in sorted(set().union(*(_common_places(right, words) for words in said))):
            word = right[place]
            if left[word] > 0 and open_places[word] > 0:
                left[word] -= 1
                open_places[word] -= 1
                hits += 1
    return _f1(hits, sum(map(len, said)), sum(map(len, there)))


def _subsequences(one: Sequence[str], other: Sequence[str]) -> list[list[int]]:
    """Returns the lengths of the longest common subsequences of all beginnings."""
    lengths = [[0] * (len(other) + 1)]
    for word in one:
        above, row = lengths[-1], [0]
        for place, against in enumerate(other):
            row.append(above[place] + 1 if word == against else max(row[-1], above[place + 1]))
        lengths.append(row)
    return lengths


def _common_places(right: Sequence[str], said: Sequence[str]) -> set[int]:
    """Returns where in `right` the words of one longest common subsequence stand."""
    lengths, found = _subsequences(right, said), set()
    down, across = len(right), len(said)
    while down and across:
        if right[down - 1] == said[across - 1]:
            down, across = down - 1, across - 1
            found.add(down)
        elif lengths[down][across - 1] > lengths[down - 1][across]:
            across -= 1
        else:
            down -= 1
    return found


# Error rates of what was heard: edits / right words, or characters


def word_edits(prediction: str, references: References) -> tuple[float, ...]:
    """Returns edits and right words."""
    (right,) = (each.split() for each in _list(references))
    return edits(prediction.split(), right), len(right)


def character_edits(prediction: str, references: References) -> tuple[float, ...]:
    """Returns edits and right characters; blanks count, those at the ends do not."""
    (right,) = (each.strip() for each in _list(references))
    return edits(prediction.strip(), right), len(right)


def edits(said: Sequence[Hashable], right: Sequence[Hashable]) -> int:
    """Returns the fewest words to put in, take out or exchange (Levenshtein)."""
    start = 0
    while start < min(len(said), len(right)) and said[start] == right[start]:
        start += 1
    said, right = said[start:], right[start:]  # most answers are mostly right
    row = list(range(len(right) + 1))
    for count, word in enumerate(said, start=1):
        before, row[0] = row[0], count
        for place, against in enumerate(right, start=1):
            best = min(row[place] + 1, row[place - 1] + 1, before + (word != against))
            before, row[place] = row[place], best
    return row[-1]


# BLEU (Papineni et al. 2002) over the whole data set, words cut as WMT's mteval-v13a does


def bleu_counts(shortest: bool) -> Callable[[str, References], tuple[float, ...]]:
    """Returns what counts right runs of 1 to 4 words, runs, words said, and words there.

    Args:
        shortest: Of several right texts, whether the shortest gives the length, and not the nearest in length.
    """

    def of_example(prediction: str, references: References) -> tuple[float, ...]:
        said, rights = cut_13a(prediction), [cut_13a(each) for each in _list(references)]
        lengths = [len(each) for each in rights]
        there = min(lengths) if shortest else min(lengths, key=lambda each: (abs(each - len(said)), each))
        counts: list[float] = []
        for order in range(1, _ORDERS + 1):
            runs, known = _runs(said, order), Counter()
            for each in rights:
                known |= _runs(each, order)
            counts += [(runs & known).total(), runs.total()]
        return *counts, len(said), there

    return of_example


def bleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """Returns BLEU between 0 and 1, without smoothing: 0 where no run of four words is right."""
    return _bleu(sums, smooth=False)


def sacrebleu_of_sums(sums: np.ndarray) -> np.ndarray:
    """Returns BLEU between 0 and 100, each order without a right run given half of the one before (`exp`)."""
    return 100 * _bleu(sums, smooth=True)


def _bleu(sums: np.ndarray, *, smooth: bool) -> np.ndarray:
    import numpy as np

    right, all_runs = sums[..., 0 : 2 * _ORDERS : 2], sums[..., 1 : 2 * _ORDERS : 2]
    said, there = sums[..., -2], sums[..., -1]
    if smooth:
        # The first order without a right run counts as 1/2 of one, the next as 1/4, ...
        missing = (right == 0) & (all_runs > 0)
        right = np.where(missing, 0.5 ** np.cumsum(missing, axis=-1), right)
    with np.errstate(divide="ignore", invalid="ignore"):
        precisions = np.where(all_runs > 0, right / np.maximum(all_runs, 1), 0.0)
        mean = np.exp(np.log(precisions).mean(-1))
        short = np.where(said < there, np.exp(1 - there / np.maximum(said, 1)), 1.0)
    return np.where(said > 0, mean * short, 0.0)


_CUTS = (
    (re.compile(r"([\{-\~\[-\` -\&\(-\+\:-\@\/])"), r" \1 "),  # punctuation and marks
    (re.compile(r"([^0-9])([\.,])"), r"\1 \2 "),  # a full stop or comma after what is no digit,
    (re.compile(r"([\.,])([^0-9])"), r" \1 \2"),  # or before it
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),  # a dash after a digit
)
_ENTITIES = (("<skipped>", ""), ("-\n", ""), ("\n", " "), ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))


def cut_13a(text: str) -> list[str]:
    """Cuts a text into words and marks by the rules of mteval-v13a, which scores are comparable by."""
    for entity, plain in _ENTITIES:
        text = text.replace(entity, plain)
    text = f" {text} "
    for pattern, parts in _CUTS:
        text = pattern.sub(parts, text)
    return text.split()
