"""Texts made out of training texts."""

from __future__ import annotations

import random

import pytest
from datasets import Dataset

from hfcompress.errors import ConfigError
from hfcompress.tasks import augmentation
from hfcompress.tasks.augmentation import AugmentationConfig, augmented, similar, with_words_changed

TEXTS = [
    "the cat sat on the mat",
    "a cat sat on a red mat",
    "shares of the bank fell",
    "the bank said its shares fell",
    "rain is expected tomorrow",
    "tomorrow rain and wind are expected",
]
PAIRS = Dataset.from_dict({"one": TEXTS[::2], "other": TEXTS[1::2], "label": [1, 1, 0]})
SINGLE = Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 3})


def test_similar_texts_share_words() -> None:
    assert [each[0] for each in similar(TEXTS, 2)] == [1, 0, 3, 2, 5, 4]
    assert all(place not in near and len(near) == 2 for place, near in enumerate(similar(TEXTS, 2)))
    assert similar(["alone"], 3) == [[]]
    assert [len(near) for near in similar(TEXTS, 100)] == [5] * 6


def test_as_many_words_change_as_are_asked_for() -> None:
    text = " ".join(["old"] * 4000)
    words = with_words_changed(text, ["new"], 0.3, random.Random(0)).split()
    assert len(words) / 4000 == pytest.approx(0.85, abs=0.02)
    assert words.count("new") / 4000 == pytest.approx(0.15, abs=0.02)
    # Half of the time the only word would go: then the text stays as it is.
    assert {with_words_changed("one", ["new"], 0.999999, random.Random(seed)) for seed in range(20)} == {"one", "new"}


@pytest.mark.parametrize(("rows", "columns"), [(PAIRS, ("one", "other")), (SINGLE, ("text",))])
def test_made_rows_are_new_and_as_many_as_asked_for(rows: Dataset, columns: tuple[str, ...]) -> None:
    made = augmented(rows, columns, AugmentationConfig(share=2.0))
    assert made.column_names == list(columns) and len(made) == 2 * len(rows)
    given = {tuple(row[name] for name in columns) for row in rows}
    found = [tuple(row[name] for name in columns) for row in made]
    assert len(set(found)) == len(found) and not given & set(found)
    assert found == [tuple(row.values()) for row in augmented(rows, columns, AugmentationConfig(share=2.0))]
    assert found != [tuple(row.values()) for row in augmented(rows, columns, AugmentationConfig(share=2.0), seed=1)]


def test_combined_pairs_are_of_texts_that_are_there_and_others_keep_one_of_theirs() -> None:
    both = [tuple(row.values()) for row in augmented(PAIRS, ("one", "other"), AugmentationConfig(combined=1.0))]
    assert {text for row in both for text in row} <= set(TEXTS)
    changed = augmented(PAIRS, ("one", "other"), AugmentationConfig(combined=0.0))
    known = {(row["one"], row["other"]) for row in PAIRS}
    assert all(any((row["one"] == one) != (row["other"] == other) for one, other in known) for row in changed)
    joined = augmented(SINGLE, ("text",), AugmentationConfig(combined=1.0))
    assert all(
        any(row["text"].startswith(a) and row["text"].endswith(b) for a in TEXTS for b in TEXTS) for row in joined
    )


def test_of_many_texts_some_are_looked_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(augmentation, "_POOL", 3)
    made = augmented(PAIRS, ("one", "other"), AugmentationConfig(combined=1.0))
    assert len(made) > 0 and len({text for row in made for text in row.values()}) <= 3


def test_data_with_few_pairs_give_fewer_rows() -> None:
    two = Dataset.from_dict({"one": ["a"], "other": ["b"]})
    made = augmented(two, ("one", "other"), AugmentationConfig(share=100.0, combined=1.0))
    assert [tuple(row.values()) for row in made] == [("b", "a")]
    empty = Dataset.from_dict({"text": [""]})
    assert len(augmented(empty, ("text",), AugmentationConfig())) == 0


def test_shares_outside_their_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="share"):
        AugmentationConfig(share=0.0)
    with pytest.raises(ConfigError, match=r"words.*\n?.*combined"):
        AugmentationConfig(words=1.0, combined=2.0)
