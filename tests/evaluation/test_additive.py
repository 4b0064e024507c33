"""Metrics of language models, entities and spans, held against their definitions."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress.evaluation import resampling
from hfcompress.evaluation.additive import ADDITIVE, entities, normalized
from hfcompress.evaluation.comparison import Answers, compare
from hfcompress.evaluation.metrics import METRICS, less_is_better, score
from hfcompress.evaluation.report import retention
from hfcompress.tasks import get_task

TAGS = ("O", "B-person", "I-person", "B-place", "I-place")
OVERALL = ("overall_precision", "overall_recall", "overall_f1", "overall_accuracy")
sentences = st.lists(
    st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1, max_size=8), min_size=1, max_size=6
)


@settings(max_examples=150, deadline=None)
@given(sentences)
def test_entities_are_scored_as_seqeval_scores_them(pairs: list[list[tuple[str, str]]]) -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    right = [[pair[0] for pair in row] for row in pairs]
    said = [[pair[1] for pair in row] for row in pairs]
    ours = score(OVERALL, said, right)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = {
            "overall_precision": seqeval.precision_score(right, said),
            "overall_recall": seqeval.recall_score(right, said),
            "overall_f1": seqeval.f1_score(right, said),
            "overall_accuracy": seqeval.accuracy_score(right, said),
        }
    for name, value in ours.items():
        # What seqeval calls 0 where nothing is said or nothing is there is not defined.
        assert float(theirs[name]) == pytest.approx(0 if math.isnan(value) else value), name


def test_entities_by_hand() -> None:
    assert entities(["B-person", "I-person", "O", "I-place", "B-place", "I-person"]) == {
        ("person", 0, 1),
        ("place", 3, 3),
        ("place", 4, 4),
        ("person", 5, 5),
    }
    right = [["B-person", "I-person", "O"], ["B-place", "O"]]
    said = [["B-person", "O", "O"], ["B-place", "B-place"]]  # half a name is no name
    found = score(OVERALL, said, right)
    assert found == {
        "overall_precision": pytest.approx(1 / 3),
        "overall_recall": pytest.approx(1 / 2),
        "overall_f1": pytest.approx(2 / 5),
        "overall_accuracy": pytest.approx(3 / 5),
    }
    nothing = score(OVERALL, [["O"]], [["O"]])
    assert math.isnan(nothing["overall_f1"]) and nothing["overall_accuracy"] == 1


def test_texts_are_normalized_as_in_squad() -> None:
    assert normalized("The  Quick, (brown) Fox's an apple.") == "quick brown foxs apple"


@pytest.mark.parametrize(
    ("said", "right", "exact", "f1"),
    [
        ("the Eiffel Tower", ["Eiffel Tower"], 1, 1),
        ("Eiffel Tower in Paris", ["Eiffel Tower", "Paris"], 0, 4 / 6),
        ("London", ["Paris"], 0, 0),
        ("", [""], 1, 1),
        ("Paris", [""], 0, 0),
        ("to be to", ["to be"], 0, 4 / 5),
    ],
)
def test_answers_by_hand(said: str, right: list[str], exact: float, f1: float) -> None:
    assert score(("exact_match", "token_f1"), [said], [right]) == {"exact_match": exact, "token_f1": pytest.approx(f1)}


def test_perplexity_and_bits_per_byte_are_of_all_tokens_together() -> None:
    logits, targets = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)), torch.arange(15).view(3, 5) % 7
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 5)
    blocks, references = [float(row.sum()) for row in losses], [[5, 21]] * 3
    found = score(("perplexity", "bits_per_byte"), blocks, references)
    assert found["perplexity"] == pytest.approx(math.exp(float(losses.mean())))
    assert found["bits_per_byte"] == pytest.approx(float(losses.sum()) / math.log(2) / 63)
    # A block of one token counts for one token, not for a block.
    uneven = score(("perplexity",), [10.0, 1.0], [[9, 9], [1, 1]])
    assert uneven["perplexity"] == pytest.approx(math.exp(1.1))


def test_a_uniform_guess_has_the_perplexity_of_its_choices() -> None:
    assert METRICS["perplexity"]([8 * math.log(50)], [[8, 8]]) == pytest.approx(50)
    assert METRICS["masked_perplexity"]([[3 * math.log(20), 1.0]], [[3]]) == pytest.approx(20)
    assert METRICS["masked_accuracy"]([[1.0, 1.0], [1.0, 2.0]], [[3], [2]]) == pytest.approx(3 / 5)


def test_what_is_drawn_is_what_examples_taken_again_would_score() -> None:
    generator = np.random.default_rng(0)
    right = [[int(each), int(each) * 4] for each in generator.integers(3, 9, 40)]
    before = [float(tokens * share) for (tokens, _), share in zip(right, generator.random(40), strict=True)]
    after = [loss * 1.1 for loss in before]
    drawn = resampling.drawn_differences("perplexity", right, before, after)
    again = np.random.default_rng(1)
    by_hand = []
    for _ in range(500):
        taken = again.integers(40, size=40)
        values = [
            METRICS["perplexity"]([said[i] for i in taken], [right[i] for i in taken]) for said in (before, after)
        ]
        by_hand.append(values[1] - values[0])
    assert drawn.shape == (resampling.DRAWS,)
    assert drawn.mean() == pytest.approx(np.mean(by_hand), rel=0.05)
    assert drawn.std() == pytest.approx(np.std(by_hand), rel=0.2)
    assert (drawn > 0).all()  # every block is worse, so every draw is


def test_less_is_better_where_it_is() -> None:
    assert {metric.name for metric in ADDITIVE if less_is_better(metric.name)} == {
        "perplexity",
        "bits_per_byte",
        "masked_perplexity",
        "wer",
        "cer",
    }
    assert retention(40.0, 30.0, "perplexity") == pytest.approx(0.75)
    assert retention(0.3, 0.4, "overall_f1") == pytest.approx(0.75)


def test_language_models_are_compared_by_blocks() -> None:
    right = [[10, 40]] * 50
    before = np.random.default_rng(0).normal(30, 3, 50)
    found = compare(
        Answers(predictions=before.tolist(), references=right, confidences=[]),
        Answers(predictions=(before + 1).tolist(), references=right, confidences=[]),
        get_task("wikitext-2"),
    )
    change = found.differences["perplexity"]
    assert 0 < change.low < change.value < change.high
    assert found.flips is None and found.classes == ()


def test_entities_flip_by_sentence_and_change_by_type() -> None:
    right = [["B-person", "I-person"], ["O", "B-group"], ["O"]]
    before = [["B-person", "I-person"], ["O", "O"], ["O"]]
    after = [["B-person", "O"], ["O", "B-group"], ["O"]]
    found = compare(
        Answers(predictions=before, references=right, confidences=[]),
        Answers(predictions=after, references=right, confidences=[]),
        get_task("wnut17"),
    )
    assert (found.flips, found.flips_were_right, found.flips_are_right) == (2, 1, 1)
    changes = {each.label: (each.examples, each.before, each.after) for each in found.classes if each.examples}
    assert changes == {"person": (1, 1.0, 0.0), "group": (1, 0.0, 1.0)}
    assert found.worst_class is not None and found.worst_class.label == "person"


def test_answers_in_words_flip_and_are_right_as_texts() -> None:
    right = [["Paris"], ["the Seine"], ["blue"]]
    found = compare(
        Answers(predictions=["paris", "Seine", "red"], references=right, confidences=[]),
        Answers(predictions=["Paris", "Rhine", "blue"], references=right, confidences=[]),
        get_task("squad"),
    )
    assert (found.flips, found.flips_were_right, found.flips_are_right) == (3, 2, 2)
