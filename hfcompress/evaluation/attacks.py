"""Is a compressed model easier to fool? Slips that are searched for, by TextAttack's recipes.

Of TextAttack (Morris et al. 2020) those recipes are offered that change letters and ask the model alone: the others
judge every change by sentence encoders and word vectors from hosts that are not the Hub. `deepwordbug` changes letters
of the words that matter most (Gao et al. 2018, "Black-box Generation of Adversarial Text Sequences to Evade Deep
Learning Classifiers"); `pruthi` looks for the one word whose slip does most (Pruthi, Dhingra and Lipton 2019,
"Combating Adversarial Misspellings with Robust Word Recognition").
"""

from __future__ import annotations

import logging
import math
import random
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, cast

from hfcompress.errors import MissingBackendError
from hfcompress.evaluation.inference import inferring
from hfcompress.evaluation.records import STRICT, Count, Figure
from hfcompress.tasks import Task, align_labels

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel

AttackName = Literal["deepwordbug", "pruthi"]
KIND = "classification"
QUERIES = 500  # texts that an attack may ask a model about, for one row
_RECIPES: Mapping[str, str] = MappingProxyType({"deepwordbug": "DeepWordBugGao2018", "pruthi": "Pruthi2019"})
_EXTRA = "hfcompress[attack]"


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """What an attack on one row came to.

    Attributes:
        outcome: `wrong` where the answer was wrong before it; `withstood`, or `fooled`.
        queries: How many texts the model was asked about.
        changed: The share of the row's words that were changed to fool it; 0 where it was not.
    """

    __pydantic_config__ = STRICT

    outcome: Literal["wrong", "withstood", "fooled"]
    queries: Count
    changed: Figure


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """What an attack on every chosen row came to, kept with a run's answers.

    Attributes:
        original: Against the original.
        compressed: Against the result, on the same rows.
    """

    __pydantic_config__ = STRICT

    original: list[Attempt]
    compressed: list[Attempt]


@dataclass(frozen=True, kw_only=True)
class Withstood:
    """How one model withstood an attack.

    Attributes:
        accuracy: The share of the rows that it had right before.
        under_attack: The share that it still has right.
        queries: How many texts it was asked about for a row that it had right; the mean.
        changed: The share of words that had to be changed to fool it; the mean over rows where it was.
    """

    __pydantic_config__ = STRICT

    accuracy: Figure
    under_attack: Figure
    queries: Figure
    changed: Figure


@dataclass(frozen=True, kw_only=True)
class Attack:
    """How the original and the result withstood an attack.

    Attributes:
        name: The attack.
        examples: The rows of the split that were attacked.
        original: The original, attacked by itself.
        compressed: The result, attacked by itself.
    """

    __pydantic_config__ = STRICT

    name: str
    examples: Count
    original: Withstood
    compressed: Withstood


def require_attacks() -> Any:
    """Imports TextAttack, lazily: it takes seconds.

    Raises:
        MissingBackendError: It is not installed, or cannot be imported with what else is.
    """
    if find_spec("textattack") is None:
        raise MissingBackendError(
            "evaluation.attack: textattack is not installed",
            hint=f"pip install '{_EXTRA}', or leave `attack` out.",
        )
    try:
        with _loggers_as_they_are():
            import textattack
    except (ImportError, LookupError, OSError) as error:
        said = next((line.strip() for line in str(error).splitlines() if line.strip(" *")), type(error).__name__)
        raise MissingBackendError(
            f"evaluation.attack: textattack is installed but cannot be imported: {said}",
            hint="It needs NLTK's stopwords, and flair 0.11.3 beside transformers 5; `bash scripts/beside.sh attack` "
            "brings what fits together.",
        ) from error
    textattack.shared.logger.setLevel(logging.WARNING)
    return textattack


def attack_model(
    model: PreTrainedModel,
    rows: Dataset,
    task: Task,
    tokenizer: Any,
    name: AttackName,
    *,
    max_length: int,
    batch_size: int = 32,
) -> list[Attempt]:
    """Attacks a model on some rows; the same slips are drawn every time.

    Args:
        model: A model with the task's head; it is left in the mode it was in.
        rows: Some rows of a split, as `load_data` returns it.
        task: The task, of kind `KIND`.
        tokenizer: The model's.
        name: The attack.
        max_length: Tokens after which a text is cut.
        batch_size: Texts of a forward pass.

    Returns:
        One for each row.

    Raises:
        MissingBackendError: TextAttack is not there.
    """
    textattack = require_attacks()
    ids = align_labels(task, cast("Mapping[str, int]", model.config.label2id))

    class Asked(textattack.models.wrappers.ModelWrapper):
        """How TextAttack asks a model: a list of texts, or of tuples of them, to logits."""

        def __init__(self) -> None:
            self.model = model

        def __call__(self, texts: Sequence[Any]) -> torch.Tensor:
            columns = list(zip(*texts, strict=True)) if task.pair else [texts]
            read = tokenizer(
                *map(list, columns), truncation=True, max_length=max_length, padding=True, return_tensors="pt"
            )
            return model(**read.to(model.device)).logits.float().cpu()

    search = getattr(textattack.attack_recipes, _RECIPES[name]).build(Asked())
    search.goal_function.query_budget, search.goal_function.batch_size = QUERIES, batch_size
    attempts = []
    with inferring(model), _random_as_it_is():
        for place, row in enumerate(rows):
            values = cast("Mapping[str, Any]", row)
            _seed(place)
            texts = OrderedDict((column, str(values[column])) for column in task.columns)
            example = texts if task.pair else texts[task.columns[0]]
            attempts.append(_attempt(textattack, search.attack(example, ids[values[task.label]])))
            search.clear_cache()
    return attempts


def withstood(name: str, kept: Attempts) -> Attack:
    """Sums up what an attack on both models came to."""
    return Attack(
        name=name,
        examples=len(kept.original),
        original=_withstood(kept.original),
        compressed=_withstood(kept.compressed),
    )


def _withstood(attempts: Sequence[Attempt]) -> Withstood:
    right = [each for each in attempts if each.outcome != "wrong"]
    fooled = [each for each in right if each.outcome == "fooled"]
    return Withstood(
        accuracy=_share(len(right), len(attempts)),
        under_attack=_share(len(right) - len(fooled), len(attempts)),
        queries=_share(sum(each.queries for each in right), len(right)),
        changed=_share(math.fsum(each.changed for each in fooled), len(fooled)),
    )


def _attempt(textattack: Any, result: Any) -> Attempt:
    results, found = textattack.attack_results, result.perturbed_result
    if isinstance(result, results.SkippedAttackResult):
        return Attempt(outcome="wrong", queries=0, changed=0.0)
    if not isinstance(result, results.SuccessfulAttackResult):
        return Attempt(outcome="withstood", queries=found.num_queries, changed=0.0)
    changed = len(found.attacked_text.attack_attrs["modified_indices"])
    share = _share(changed, result.original_result.attacked_text.num_words)
    return Attempt(outcome="fooled", queries=found.num_queries, changed=share)


def _share(part: float, whole: int) -> float:
    return part / whole if whole else math.nan


def _seed(seed: int) -> None:
    import numpy as np

    random.seed(seed)
    np.random.seed(seed)


@contextmanager
def _random_as_it_is() -> Iterator[None]:
    """Puts the random numbers that TextAttack draws from back to where they were."""
    import numpy as np

    plain, arrays = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(plain)
        np.random.set_state(arrays)


@contextmanager
def _loggers_as_they_are() -> Iterator[None]:
    """Keeps on whoever logs now: what is imported here turns all others off."""
    known = {
        each: each.disabled for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)
    }
    try:
        yield
    finally:
        for logger, disabled in known.items():
            logger.disabled = disabled
