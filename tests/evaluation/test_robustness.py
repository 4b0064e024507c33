from __future__ import annotations

import difflib

from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from hfcompress.evaluation.quality import evaluate_quality
from hfcompress.evaluation.robustness import CHANGES, capitals, evaluate_changed, typos
from hfcompress.tasks import get_task, preprocess
from tests.workshop import sentences, tiny_classifier, tiny_tokenizer

TEXT = "The performances were remarkably delicate although nothing about this picture surprised anybody " * 10


def test_slips_are_few_the_same_every_time_and_real() -> None:
    changed = typos(TEXT)
    assert changed == typos(TEXT) != TEXT
    pairs = list(zip(TEXT.split(), changed.split(), strict=True))
    slipped = [(before, after) for before, after in pairs if before != after]
    assert 0.05 < len(slipped) / len(pairs) < 0.25
    for before, after in slipped:
        assert before[0] == after[0] and abs(len(before) - len(after)) <= 1 and len(before) >= 4
        assert difflib.SequenceMatcher(None, before, after).ratio() > 0.7
    assert {len(after) - len(before) for before, after in slipped} == {-1, 0, 1}


@given(st.text())
def test_any_text_can_be_changed(text: str) -> None:
    assert typos(text) == typos(text) and len(typos(text).split()) == len(text.split())
    assert capitals(text) == text.upper()


def test_a_model_is_measured_on_the_changed_texts() -> None:
    task, tokenizer, model = get_task("sst2"), tiny_tokenizer(), tiny_classifier(initializer_range=0.3)
    rows = Dataset.from_list(sentences(40))
    for change in CHANGES:
        by_hand = rows.map(lambda row, how=CHANGES[change]: {"sentence": how(row["sentence"])}, keep_in_memory=True)
        encoded = preprocess(by_hand, task, tokenizer, max_length=16, label2id=None)
        expected = evaluate_quality(model, encoded, task, tokenizer, progress=False)
        found = evaluate_changed(model, rows, task, tokenizer, change, max_length=16, batch_size=8)
        assert found.predictions == expected.predictions and found.metrics == expected.metrics
    # The tokenizer knows no capitals: every word is the unknown one.
    assert len(set(evaluate_changed(model, rows, task, tokenizer, "case", max_length=4, batch_size=8).predictions)) == 1
