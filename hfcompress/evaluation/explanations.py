"""Does a compressed model answer for the same reasons? Shares of the words in an answer, by captum or by shap.

Both give every word a number: how much it speaks for the answer that the original gave. captum integrates gradients
along the way from a text of mask tokens to the text (Sundararajan, Taly and Yan 2017, "Axiomatic Attribution for Deep
Networks"). shap takes words away in many orders (Shapley values by permutations; Lundberg and Lee 2017, "A Unified
Approach to Interpreting Model Predictions"), and so needs no gradient. How two such lists agree is told by their rank
correlation and by the strongest words that they share (Krishna et al. 2022, "The Disagreement Problem in Explainable
Machine Learning").
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

from hfcompress.errors import CompressionError, DataError, MissingBackendError
from hfcompress.evaluation.inference import evaluating
from hfcompress.evaluation.records import STRICT, Count, Figure
from hfcompress.tasks import Task, align_labels

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel

    Inputs = Mapping[str, torch.Tensor]

Library = Literal["captum", "shap"]
KIND = "classification"

_STEPS = 32  # of an integral
_ORDERS = 4  # in which words are taken away, and put back
_STRONGEST = 0.25  # of a row's words
_FEWEST_WORDS = 3  # two words have but one order or the other
_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Explained:
    """What every word of every chosen row counts for, kept with a run's answers.

    Attributes:
        original: Of each row its words' shares in the original's answer, signed, in nats of its log probability.
        compressed: Of the same rows their shares in that same answer, as the result sees it.
    """

    __pydantic_config__ = STRICT

    original: list[list[float]]
    compressed: list[list[float]]


@dataclass(frozen=True, kw_only=True)
class Explanations:
    """How far the result's reasons are the original's.

    Attributes:
        library: What explained, `captum` or `shap`.
        examples: Rows that were compared; those of fewer than three words, or whose words all count alike, are not.
        rank_correlation: Spearman's, of the words of a row; the mean over rows.
        rank_low: The lower end of its 95% interval over draws of rows.
        rank_high: Its upper end.
        strongest_shared: Which share of a row's strongest quarter of words, signs aside, both have in common; the mean.
        same_strongest: The share of rows whose one strongest word is the same.
    """

    __pydantic_config__ = STRICT

    library: str
    examples: Count
    rank_correlation: Figure
    rank_low: Figure
    rank_high: Figure
    strongest_shared: Figure
    same_strongest: Figure


def require_explainer(library: Library) -> None:
    """Refuses a library that is not installed, without importing it, which takes seconds.

    Raises:
        MissingBackendError: It is not.
    """
    if find_spec(library) is None:
        raise MissingBackendError(
            f"evaluation.explanations: {library} is not installed",
            hint="pip install 'hfcompress[explain]', or leave `explanations` out.",
        )


def spread_rows(count: int, total: int) -> list[int]:
    """Returns row numbers from all over a split: data are often sorted."""
    count = min(count, total)
    return [place * total // count for place in range(count)]


def agreement(library: str, kept: Explained) -> Explanations:
    """Sums up how two models' explanations of the same rows agree.

    Args:
        library: What explained.
        kept: The shares of words; where one model read fewer words of a row, only those that both read are compared.
    """
    from scipy.stats import spearmanr

    ranks, shared, first = [], [], []
    for before, after in zip(kept.original, kept.compressed, strict=True):
        words = min(len(before), len(after))
        before, after = before[:words], after[:words]
        if words < _FEWEST_WORDS or len(set(before)) == 1 or len(set(after)) == 1:
            continue
        ranks.append(float(spearmanr(before, after)[0]))  # pyright: ignore[reportArgumentType]
        count = math.ceil(_STRONGEST * words)
        shared.append(len(set(_strongest(before, count)) & set(_strongest(after, count))) / count)
        first.append(float(_strongest(before, 1) == _strongest(after, 1)))
    low, high = _interval(ranks)
    return Explanations(
        library=library,
        examples=len(ranks),
        rank_correlation=_mean(ranks),
        rank_low=low,
        rank_high=high,
        strongest_shared=_mean(shared),
        same_strongest=_mean(first),
    )


def explain(
    model: PreTrainedModel,
    rows: Dataset,
    task: Task,
    tokenizer: Any,
    library: Library,
    answers: Sequence[int],
    *,
    max_length: int,
    batch_size: int = 32,
) -> list[list[float]]:
    """Returns what each word of some texts counts for.

    Args:
        model: A model with the task's head; it is put in evaluation mode while it is asked, and then back.
        rows: Some rows of a split, as `load_data` returns it.
        task: The task, of kind `KIND`.
        tokenizer: The model's, one that knows which characters its tokens stand for.
        library: What explains.
        answers: For each row the label id of the task that is to be explained.
        max_length: Tokens after which a text is cut.
        batch_size: Rows of a forward pass.

    Returns:
        For each row a number for each word (what white space parts, of all columns) that is not cut off: its share in
        the log probability of the answer, in nats.

    Raises:
        MissingBackendError: The library is not installed.
        DataError: The tokenizer does not know the characters of its tokens.
        CompressionError: No gradient passes through the model, and captum is to explain.
    """
    require_explainer(library)
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(f"evaluation.explanations: {type(tokenizer).__name__} does not tell where its tokens stand")
    ids = align_labels(task, cast("Mapping[str, int]", model.config.label2id))
    shares_of = _LIBRARIES[library](model, _nothing(tokenizer), batch_size)
    found = []
    with evaluating(model):
        for row, answer in zip(rows, answers, strict=True):
            texts = [str(cast("Mapping[str, Any]", row)[column]) for column in task.columns]
            inputs, words = _read(texts, tokenizer, max_length)
            values = shares_of({key: value.to(model.device) for key, value in inputs.items()}, words, ids[answer])
            found.append([float(f"{value:.{_DIGITS}g}") for value in values])
    return found


def _read(texts: Sequence[str], tokenizer: Any, max_length: int) -> tuple[Inputs, np.ndarray]:
    """Returns a model's inputs, and for each token the number of its word, -1 for tokens of no word."""
    import numpy as np

    encoded = tokenizer(
        *texts, truncation=True, max_length=max_length, return_offsets_mapping=True, return_tensors="pt"
    )
    offsets = encoded.pop("offset_mapping")[0].tolist()
    places = [{at: word for word, span in enumerate(_words(text)) for at in range(*span)} for text in texts]
    seen: dict[tuple[int, int], int] = {}
    words = np.full(len(offsets), -1)
    for token, ((start, end), text) in enumerate(zip(offsets, encoded.sequence_ids(0), strict=True)):
        # The last character: some tokens begin with the space before their word.
        if text is not None and end > start and (word := places[text].get(end - 1)) is not None:
            words[token] = seen.setdefault((text, word), len(seen))
    return dict(encoded), words


def _words(text: str) -> list[tuple[int, int]]:
    return [match.span() for match in re.finditer(r"\S+", text)]


def _nothing(tokenizer: Any) -> int:
    """Returns the token that stands where a word was taken away."""
    known = (tokenizer.mask_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((each for each in known if each is not None), 0)


def _by_captum(
    model: PreTrainedModel, nothing: int, batch_size: int
) -> Callable[[Inputs, np.ndarray, int], Sequence[float]]:
    import numpy as np
    import torch
    from captum.attr import LayerIntegratedGradients

    def log_probability(ids: torch.Tensor, others: Inputs, answer: int) -> torch.Tensor:
        inputs = {name: value.expand(len(ids), *value.shape[1:]) for name, value in others.items()}
        return model(input_ids=ids, **inputs).logits.float().log_softmax(-1)[:, answer]

    gradients = LayerIntegratedGradients(log_probability, model.get_input_embeddings())

    def shares(inputs: Inputs, words: np.ndarray, answer: int) -> Sequence[float]:
        ids = inputs["input_ids"]
        others = {name: value for name, value in inputs.items() if name != "input_ids"}
        empty = torch.where(torch.as_tensor(words >= 0, device=ids.device), torch.full_like(ids, nothing), ids)
        try:
            with torch.enable_grad():
                found = gradients.attribute(
                    ids, empty, additional_forward_args=(others, answer), n_steps=_STEPS, internal_batch_size=batch_size
                )
        except RuntimeError as error:
            raise CompressionError(
                f"evaluation.explanations: no gradient passes through the model, which captum needs ({error})",
                hint="Explain by shap, which needs none.",
            ) from error
        tokens = cast("torch.Tensor", found)[0].sum(-1).double().cpu().numpy()
        return np.bincount(words[words >= 0], tokens[words >= 0], minlength=_count(words)).tolist()

    return shares


def _by_shap(
    model: PreTrainedModel, nothing: int, batch_size: int
) -> Callable[[Inputs, np.ndarray, int], Sequence[float]]:
    import numpy as np
    import shap
    import torch

    def log_probabilities(there: np.ndarray, inputs: Inputs, words: np.ndarray, answer: int) -> np.ndarray:
        """Answers to texts some of whose words are taken away: (texts, words) of 0 and 1 to (texts,)."""
        ids, known = inputs["input_ids"], words >= 0
        kept = np.ones((len(there), len(words)), dtype=bool)
        kept[:, known] = there[:, words[known]] > 0
        said = []
        for start in range(0, len(kept), batch_size):
            keep = torch.as_tensor(kept[start : start + batch_size], device=ids.device)
            batch = {name: value.expand(len(keep), *value.shape[1:]) for name, value in inputs.items()}
            batch["input_ids"] = torch.where(keep, ids, torch.full_like(ids, nothing))
            with torch.inference_mode():
                said.append(model(**batch).logits.float().log_softmax(-1)[:, answer].double().cpu().numpy())
        return np.concatenate(said)

    def shares(inputs: Inputs, words: np.ndarray, answer: int) -> Sequence[float]:
        count = _count(words)
        if count < _FEWEST_WORDS:
            return [0.0] * count
        ask = partial(log_probabilities, inputs=inputs, words=words, answer=answer)
        # The same orders for both models: what chance there is in them is in both.
        explainer = shap.PermutationExplainer(ask, np.zeros((1, count)), seed=0)
        return explainer(np.ones((1, count)), max_evals=_ORDERS * (2 * count + 1), silent=True).values[0].tolist()

    return shares


_LIBRARIES: Mapping[str, Callable[..., Callable[[Inputs, np.ndarray, int], Sequence[float]]]] = MappingProxyType(
    {"captum": _by_captum, "shap": _by_shap}
)


def _count(words: np.ndarray) -> int:
    return int(words.max(initial=-1)) + 1


def _strongest(shares: Sequence[float], count: int) -> list[int]:
    return sorted(range(len(shares)), key=lambda word: -abs(shares[word]))[:count]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Returns the 95% interval of a mean over draws of its values."""
    import numpy as np

    from hfcompress.evaluation.resampling import DRAWS, interval

    if not values:
        return math.nan, math.nan
    drawn = np.random.default_rng(0).integers(len(values), size=(DRAWS, len(values)))
    return interval(np.asarray(values)[drawn].mean(1), _mean(values))
