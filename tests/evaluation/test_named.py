"""Metrics by the names of `evaluate`, beside the libraries that its own scripts call."""

from __future__ import annotations

import random
import re
import warnings
from typing import Any

import jiwer
import pytest
import sacrebleu
from scipy import stats
from seqeval.metrics import classification_report
from sklearn import metrics as sklearn

from hfcompress.errors import DataError
from hfcompress.evaluation.named import NAMED, load_metric
from hfcompress.evaluation.resampling import drawn_differences

SENTENCES = 'the a cat sat on mat, it is 3,000 well-known U.S. rose -5 (then) "said" fell. \n was & 12-13 x'
WORDS = re.split(" ", SENTENCES)
GENERATOR = random.Random(0)


def text(least: int = 1, most: int = 30) -> str:
    return " ".join(GENERATOR.choice(WORDS) for _ in range(GENERATOR.randint(least, most)))


REFERENCES = [text() for _ in range(60)]
PREDICTIONS = [
    " ".join(word for word in each.split(" ") if GENERATOR.random() < 0.8) if place % 3 else text(0)
    for place, each in enumerate(REFERENCES)
]
CLASSES = [GENERATOR.randint(0, 1) for _ in range(80)]
SAID = [each if GENERATOR.random() < 0.7 else 1 - each for each in CLASSES]
NUMBERS = [GENERATOR.random() for _ in range(80)]
NEAR = [each + 0.3 * GENERATOR.random() for each in NUMBERS]


def computed(name: str, predictions: Any, references: Any) -> Any:
    key = "prediction_scores" if name == "roc_auc" else "predictions"
    return load_metric(name).compute(references=references, **{key: predictions})


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("accuracy", sklearn.accuracy_score(CLASSES, SAID)),
        ("f1", sklearn.f1_score(CLASSES, SAID)),
        ("precision", sklearn.precision_score(CLASSES, SAID)),
        ("recall", sklearn.recall_score(CLASSES, SAID)),
        ("matthews_correlation", sklearn.matthews_corrcoef(CLASSES, SAID)),
    ],
)
def test_labels(name: str, expected: float) -> None:
    assert computed(name, SAID, CLASSES) == {name: pytest.approx(float(expected))}


def test_numbers_and_scores() -> None:
    assert computed("pearsonr", NEAR, NUMBERS)["pearsonr"] == pytest.approx(stats.pearsonr(NEAR, NUMBERS)[0], rel=1e-5)
    assert computed("spearmanr", NEAR, NUMBERS)["spearmanr"] == pytest.approx(stats.spearmanr(NEAR, NUMBERS)[0])
    assert computed("mse", NEAR, NUMBERS)["mse"] == pytest.approx(sklearn.mean_squared_error(NUMBERS, NEAR), rel=1e-5)
    assert computed("mae", NEAR, NUMBERS)["mae"] == pytest.approx(sklearn.mean_absolute_error(NUMBERS, NEAR), rel=1e-5)
    assert computed("r_squared", NEAR, NUMBERS) == round(sklearn.r2_score(NUMBERS, NEAR), 3)
    expected = sklearn.roc_auc_score(CLASSES, NUMBERS)
    assert computed("roc_auc", NUMBERS, CLASSES)["roc_auc"] == pytest.approx(expected)


def test_rouge_is_that_of_rouge_score() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rouge2", "rougeL", "rougeLsum"])
    found = computed("rouge", PREDICTIONS, REFERENCES)
    each = [scorer.score(right, said) for right, said in zip(REFERENCES, PREDICTIONS, strict=True)]
    assert found == {
        name: pytest.approx(sum(scores[name].fmeasure for scores in each) / len(each)) for name in scorer.rouge_types
    }
    several = [[right, text()] for right in REFERENCES]
    best = [
        scorer.score_multi(rights, said)["rougeL"].fmeasure for rights, said in zip(several, PREDICTIONS, strict=True)
    ]
    assert computed("rouge", PREDICTIONS, several)["rougeL"] == pytest.approx(sum(best) / len(best))


def test_error_rates_are_those_of_jiwer() -> None:
    assert computed("wer", PREDICTIONS, REFERENCES) == pytest.approx(jiwer.wer(REFERENCES, PREDICTIONS))
    assert computed("cer", PREDICTIONS, REFERENCES) == pytest.approx(jiwer.cer(REFERENCES, PREDICTIONS))


@pytest.mark.parametrize("smoothed", [False, True])
def test_bleu_is_that_of_sacrebleu(smoothed: bool) -> None:
    said, right = (["a b c d e"] * 3, ["a x c y e z"] * 3) if smoothed else (PREDICTIONS, REFERENCES)
    expected = sacrebleu.corpus_bleu(said, [right]).score
    assert computed("sacrebleu", said, right)["score"] == pytest.approx(expected)
    assert expected > 0
    plain = computed("bleu", said, right)["bleu"]
    assert plain == (0 if smoothed else pytest.approx(expected / 100))
    several = [[each, text()] for each in right]
    streams = [list(each) for each in zip(*several, strict=True)]
    assert computed("sacrebleu", said, several)["score"] == pytest.approx(sacrebleu.corpus_bleu(said, streams).score)


def test_entities_are_scored_as_seqeval_scores_them() -> None:
    tags = ["O", "B-a", "I-a", "B-b", "I-b"]
    right = [[GENERATOR.choice(tags) for _ in range(8)] for _ in range(20)]
    said = [[tag if GENERATOR.random() < 0.7 else GENERATOR.choice(tags) for tag in row] for row in right]
    report = classification_report(right, said, output_dict=True)
    found = computed("seqeval", said, right)
    assert found["overall_f1"] == pytest.approx(report["micro avg"]["f1-score"])
    for kind in ("a", "b"):
        assert found[kind] == {
            "precision": pytest.approx(report[kind]["precision"]),
            "recall": pytest.approx(report[kind]["recall"]),
            "f1": pytest.approx(report[kind]["f1-score"]),
            "number": report[kind]["support"],
        }


def test_squad_and_exact_match() -> None:
    said = [{"id": "1", "prediction_text": "the red Cat!"}, {"id": "2", "prediction_text": "no"}]
    right = [
        {"id": "2", "answers": {"text": ["yes"], "answer_start": [0]}},
        {"id": "1", "answers": {"text": ["red cat", "cat"], "answer_start": [0, 4]}},
    ]
    assert computed("squad", said, right) == {"exact_match": 50.0, "f1": 50.0}
    assert computed("exact_match", ["a", "B", "c"], ["a", "b", "c"]) == {"exact_match": pytest.approx(2 / 3)}


def test_an_unknown_name_says_which_there_are_and_how_python_takes_any() -> None:
    with pytest.raises(DataError, match="did you mean 'rouge'") as caught:
        load_metric("rogue")
    assert "extra_metrics" in str(caught.value) and "seqeval" in str(caught.value)
    assert set(NAMED) >= {"accuracy", "f1", "rouge", "wer", "cer", "bleu", "sacrebleu", "squad", "seqeval"}


@pytest.mark.parametrize("metric", ["precision", "recall", "f1_macro", "roc_auc", "r_squared"])
def test_draws_are_scored_as_the_metric_scores(metric: str) -> None:
    from hfcompress.evaluation.metrics import METRICS

    right = NUMBERS if metric == "r_squared" else CLASSES
    answers = NEAR if metric in ("roc_auc", "r_squared") else SAID
    draws = drawn_differences(metric, right, right, answers)
    # The middle of the draws is the difference itself, up to what 80 examples leave open.
    value = METRICS[metric](answers, right) - METRICS[metric](right, right)
    assert abs(draws.mean() - value) < 0.05
    same = drawn_differences(metric, right, answers, answers)
    assert abs(same).max() == 0
