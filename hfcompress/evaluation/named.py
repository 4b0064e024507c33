"""The metrics that `evaluate` knows by name, as modules of it that need no network and run no fetched script.

`load_metric("rouge").compute(predictions=..., references=...)` returns what `evaluate.load("rouge")` would, with its
default options: under the same keys, on the same scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import datasets
import evaluate

from hfcompress.configuration import suggest
from hfcompress.errors import DataError
from hfcompress.evaluation.additive import entities
from hfcompress.evaluation.metrics import METRICS

Form = Literal["labels", "numbers", "scores", "texts", "texts or lists", "tags", "squad"]


@dataclass(frozen=True, kw_only=True)
class NamedMetric:
    """How a metric is asked for and what it returns.

    Attributes:
        form: What predictions and references are.
        values: By `evaluate`'s key our metric and what it is multiplied by. One key "" is a bare number.
        about: One line for people.
    """

    form: Form
    values: Mapping[str, tuple[str, float]]
    about: str


def _one(key: str, own: str, form: Form, about: str, times: float = 1.0) -> NamedMetric:
    return NamedMetric(form=form, values={key: (own, times)}, about=about)


_ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
_OVERALL = ("overall_precision", "overall_recall", "overall_f1", "overall_accuracy")

NAMED: Mapping[str, NamedMetric] = MappingProxyType(
    {
        "accuracy": _one("accuracy", "accuracy", "labels", "the share of right labels"),
        "f1": _one("f1", "f1", "labels", "F1 of class 1"),
        "precision": _one("precision", "precision", "labels", "precision of class 1"),
        "recall": _one("recall", "recall", "labels", "recall of class 1"),
        "matthews_correlation": _one(
            "matthews_correlation", "matthews_correlation", "labels", "Matthews' correlation coefficient"
        ),
        "roc_auc": _one("roc_auc", "roc_auc", "scores", "the area under the ROC curve, of two classes"),
        "pearsonr": _one("pearsonr", "pearson", "numbers", "Pearson's correlation"),
        "spearmanr": _one("spearmanr", "spearmanr", "numbers", "Spearman's rank correlation"),
        "mse": _one("mse", "mean_squared_error", "numbers", "the mean squared error"),
        "mae": _one("mae", "mean_absolute_error", "numbers", "the mean absolute error"),
        "r_squared": _one("", "r_squared", "numbers", "the coefficient of determination, to 3 digits"),
        "exact_match": _one("exact_match", "same_text", "texts", "the share of texts that are right letter by letter"),
        "squad": NamedMetric(
            form="squad",
            values={"exact_match": ("exact_match", 100.0), "f1": ("token_f1", 100.0)},
            about="SQuAD's exact match and F1, in percent",
        ),
        "seqeval": NamedMetric(
            form="tags",
            values={name: (name, 1.0) for name in _OVERALL},
            about="scores of entities, overall and by type",
        ),
        "rouge": NamedMetric(
            form="texts or lists",
            values={name: (name, 1.0) for name in _ROUGE},
            about="ROUGE F1; the mean itself, where evaluate draws samples around it",
        ),
        "bleu": _one("bleu", "bleu", "texts or lists", "BLEU between 0 and 1, without smoothing"),
        "sacrebleu": _one("score", "sacrebleu", "texts or lists", "BLEU between 0 and 100, as sacrebleu"),
        "wer": _one("", "wer", "texts", "the word error rate"),
        "cer": _one("", "cer", "texts", "the character error rate"),
    }
)


class NamedModule(evaluate.Metric):
    """One metric of `NAMED`; `load_metric` makes it."""

    def _info(self) -> evaluate.MetricInfo:
        named = NAMED[str(self.config_name)]
        return evaluate.MetricInfo(
            description=named.about,
            citation="",
            inputs_description=f"{_SAID[named.form]} and references.",
            features=_FEATURES[named.form](),
        )

    def _compute(self, references: Any, predictions: Any = None, prediction_scores: Any = None) -> Any:
        named = NAMED[str(self.config_name)]
        given = predictions if prediction_scores is None else prediction_scores
        if named.form == "squad":
            given, references = _matched(given, references)
        found: dict[str, Any] = {
            key: METRICS[own](given, references) * times for key, (own, times) in named.values.items()
        }
        if named.form == "tags":
            return _by_type(given, references) | found
        if "" not in found:
            return found
        return round(found[""], 3) if self.config_name == "r_squared" else found[""]


def load_metric(name: str) -> evaluate.Metric:
    """Returns the metric that `evaluate` knows by a name.

    Raises:
        DataError: The name is not among `NAMED`.
    """
    if name not in NAMED:
        raise DataError(
            f"metric '{name}' is not known; {suggest(name, NAMED)}",
            hint="In Python `evaluate_quality(extra_metrics=[evaluate.load(...)])` takes any other.",
        )
    module = NamedModule(config_name=name, keep_in_memory=True)
    module.info.module_name = name
    return module


def _matched(predictions: Sequence[Any], references: Sequence[Any]) -> tuple[list[str], list[list[str]]]:
    """Returns SQuAD's answers and right answers in one order; a question without an answer is answered with none."""
    said = {each["id"]: each["prediction_text"] for each in predictions}
    return [said.get(each["id"], "") for each in references], [each["answers"]["text"] for each in references]


def _by_type(predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Returns precision, recall, F1 and number of each type's entities, as seqeval."""
    pairs = [(entities(said), entities(right)) for said, right in zip(predictions, references, strict=True)]
    scores: dict[str, Any] = {}
    for kind in sorted({entity[0] for pair in pairs for each in pair for entity in each}):
        said, there, both = (
            sum(entity[0] == kind for pair in pairs for entity in chosen(pair))
            for chosen in (lambda pair: pair[0], lambda pair: pair[1], lambda pair: pair[0] & pair[1])
        )
        scores[kind] = {
            "precision": both / said if said else 0.0,
            "recall": both / there if there else 0.0,
            "f1": 2 * both / (said + there) if both else 0.0,
            "number": there,
        }
    return scores


def _pairs(value: Any) -> datasets.Features:
    return datasets.Features({"predictions": value, "references": value})


def _texts_or_lists() -> list[datasets.Features]:
    text = datasets.Value("string")
    lists = datasets.Features({"predictions": text, "references": datasets.Sequence(text)})
    return [lists, _pairs(text)]


def _squad() -> datasets.Features:
    text = datasets.Value("string")
    answers = datasets.Sequence({"text": text, "answer_start": datasets.Value("int32")})
    return datasets.Features(
        {
            "predictions": {"id": text, "prediction_text": text},
            "references": {"id": text, "answers": answers},
        }
    )


_FEATURES: Mapping[Form, Callable[[], Any]] = MappingProxyType(
    {
        "labels": lambda: _pairs(datasets.Value("int32")),
        "numbers": lambda: _pairs(datasets.Value("float")),
        "scores": lambda: datasets.Features(
            {"prediction_scores": datasets.Value("float"), "references": datasets.Value("int32")}
        ),
        "texts": lambda: _pairs(datasets.Value("string")),
        "texts or lists": _texts_or_lists,
        "tags": lambda: _pairs(datasets.Sequence(datasets.Value("string"))),
        "squad": _squad,
    }
)
_SAID: Mapping[Form, str] = MappingProxyType(
    {
        "labels": "Class ids: predictions",
        "numbers": "Numbers: predictions",
        "scores": "Scores of class 1 (`prediction_scores`)",
        "texts": "Texts: predictions",
        "texts or lists": "Texts (of references one or a list each): predictions",
        "tags": "Lists of tags such as B-person: predictions",
        "squad": "SQuAD's records: predictions",
    }
)
