"""Metrics that are made of sums over examples: of losses, of entities, of overlapping words.

Each says what it counts in one example and what it makes of the sums, so that the same definition gives the metric,
and its value on any draw of the examples.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfcompress.evaluation import generated

if TYPE_CHECKING:
    import numpy as np

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, kw_only=True)
class Additive:
    """A metric that is a function of sums over examples.

    Attributes:
        name: Its name.
        of_example: From one prediction and its reference to numbers.
        of_sums: From sums of these, `(..., numbers)`, to the metric, `(...)`; NaN where it is undefined.
        less_is_better: Whether a smaller value is the better one.
    """

    name: str
    of_example: Callable[[Any, Any], tuple[float, ...]]
    of_sums: Callable[[np.ndarray], np.ndarray]
    less_is_better: bool = False

    def counts(self, predictions: Sequence[Any], references: Sequence[Any]) -> np.ndarray:
        """Returns the numbers of every example: (examples, numbers), float64."""
        import numpy as np

        return np.array([self.of_example(*pair) for pair in zip(predictions, references, strict=True)], dtype=float)

    def __call__(self, predictions: Sequence[Any], references: Sequence[Any]) -> float:
        """Returns the metric of all examples."""
        # math.fsum: the sum of many losses must not depend on how a machine adds them up.
        columns = zip(*self.counts(predictions, references).tolist(), strict=True)
        return float(self.of_sums(_array([math.fsum(column) for column in columns])))


# What is made of sums


def _share(sums: np.ndarray) -> np.ndarray:
    return _divided(sums[..., 0], sums[..., 1])


def _mean_exponential(sums: np.ndarray) -> np.ndarray:
    import numpy as np

    with np.errstate(over="ignore"):
        return np.exp(_share(sums))


def _bits(sums: np.ndarray) -> np.ndarray:
    return _share(sums) / math.log(2)


def _f1(sums: np.ndarray) -> np.ndarray:
    """From (right, said, there): twice the right ones / (said + there), which is the harmonic mean."""
    return _divided(2 * sums[..., 0], sums[..., 1] + sums[..., 2])


def _precision(sums: np.ndarray) -> np.ndarray:
    return _divided(sums[..., 0], sums[..., 1])


def _recall(sums: np.ndarray) -> np.ndarray:
    return _divided(sums[..., 0], sums[..., 2])


def _divided(value: np.ndarray, by: np.ndarray) -> np.ndarray:
    import numpy as np

    return np.divide(value, by, out=np.full(np.shape(value), np.nan), where=by > 0)


def _array(values: Sequence[float]) -> np.ndarray:
    import numpy as np

    return np.array(values, dtype=float)


# Entities (CoNLL-2000's conlleval, as seqeval computes it)


def entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Returns the entities of a sentence: type, first word, last word.

    One begins at every `B-`, and at an `I-` that continues none of its type; it ends before the next `O`, `B-` or
    other type.
    """
    found, kind, start = set(), "", 0
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, own = tag.partition("-") if tag != "O" else ("", "", "")
        goes_on = bool(kind) and prefix == "I" and own == kind
        if kind and not goes_on:
            found.add((kind, start, place - 1))
            kind = ""
        if prefix and not goes_on:
            kind, start = own, place
    return found


def _entity_counts(predictions: Sequence[str], references: Sequence[str]) -> tuple[float, ...]:
    said, there = entities(predictions), entities(references)
    return len(said & there), len(said), len(there)


def _word_counts(predictions: Sequence[str], references: Sequence[str]) -> tuple[float, ...]:
    return sum(one == other for one, other in zip(predictions, references, strict=True)), len(references)


# Answers as texts (SQuAD's official script, Rajpurkar et al. 2016)


def normalized(text: str) -> str:
    """Returns a text in lower case without punctuation, English articles and extra blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _exact_match(prediction: str, references: Sequence[str]) -> tuple[float, ...]:
    return float(any(normalized(prediction) == normalized(right) for right in references)), 1.0


def _token_f1(prediction: str, references: Sequence[str]) -> tuple[float, ...]:
    return max(_overlap(prediction, right) for right in references), 1.0


def _overlap(prediction: str, right: str) -> float:
    said, there = normalized(prediction).split(), normalized(right).split()
    if not said or not there:
        return float(said == there)
    both = sum((Counter(said) & Counter(there)).values())
    return 2 * both / (len(said) + len(there))


# Language models: a prediction is a block's negative log-likelihood, its reference [tokens, bytes]


def _by_token(loss: float, reference: Sequence[int]) -> tuple[float, ...]:
    return loss, reference[0]


def _by_byte(loss: float, reference: Sequence[int]) -> tuple[float, ...]:
    return loss, reference[1]


# Masked ones: a prediction is [negative log-likelihood, right answers], its reference [masks]


def _masked_loss(prediction: Sequence[float], reference: Sequence[int]) -> tuple[float, ...]:
    return prediction[0], reference[0]


def _masked_hits(prediction: Sequence[float], reference: Sequence[int]) -> tuple[float, ...]:
    return prediction[1], reference[0]


ADDITIVE = (
    Additive(name="perplexity", of_example=_by_token, of_sums=_mean_exponential, less_is_better=True),
    Additive(name="bits_per_byte", of_example=_by_byte, of_sums=_bits, less_is_better=True),
    Additive(name="masked_perplexity", of_example=_masked_loss, of_sums=_mean_exponential, less_is_better=True),
    Additive(name="masked_accuracy", of_example=_masked_hits, of_sums=_share),
    Additive(name="overall_f1", of_example=_entity_counts, of_sums=_f1),
    Additive(name="overall_precision", of_example=_entity_counts, of_sums=_precision),
    Additive(name="overall_recall", of_example=_entity_counts, of_sums=_recall),
    Additive(name="overall_accuracy", of_example=_word_counts, of_sums=_share),
    Additive(name="exact_match", of_example=_exact_match, of_sums=_share),
    Additive(name="token_f1", of_example=_token_f1, of_sums=_share),
    Additive(name="same_text", of_example=generated.same_text, of_sums=_share),
    Additive(name="rouge1", of_example=generated.rouge_n(1), of_sums=_share),
    Additive(name="rouge2", of_example=generated.rouge_n(2), of_sums=_share),
    Additive(name="rougeL", of_example=generated.rouge_l, of_sums=_share),
    Additive(name="rougeLsum", of_example=generated.rouge_l_sum, of_sums=_share),
    Additive(name="bleu", of_example=generated.bleu_counts(shortest=True), of_sums=generated.bleu_of_sums),
    Additive(name="sacrebleu", of_example=generated.bleu_counts(shortest=False), of_sums=generated.sacrebleu_of_sums),
    Additive(name="wer", of_example=generated.word_edits, of_sums=_share, less_is_better=True),
    Additive(name="cer", of_example=generated.character_edits, of_sums=_share, less_is_better=True),
)
