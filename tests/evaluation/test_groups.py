from __future__ import annotations

import pytest
from datasets import ClassLabel, Dataset

from hfcompress.errors import DataError
from hfcompress.evaluation.comparison import Answers, compare
from hfcompress.evaluation.groups import group_changes, group_labels, worst_group
from hfcompress.tasks import get_task


def test_few_values_are_groups_and_many_are_cut_in_quarters() -> None:
    rows = Dataset.from_dict(
        {
            "genre": ["news", "talk"] * 50,
            "number": list(range(100)),
            "text": [" ".join(["word"] * (1 + place % 40)) + f" {place}" for place in range(100)],
            "label": [0, 1] * 50,
        }
    ).cast_column("label", ClassLabel(names=["no", "yes"]))
    found = group_labels(rows, ["genre", "number", "text", "label"])
    assert found["genre"] == ["news", "talk"] * 50 and found["label"][:2] == ["no", "yes"]
    assert found["number"][:26] == ["to 24"] * 25 + ["over 24 to 49"] and found["number"][-1] == "over 74"
    assert {found["number"].count(name) for name in set(found["number"])} == {25}
    assert all(name.endswith(" words") for name in found["text"]) and len(set(found["text"])) == 4


def test_a_value_that_is_missing_is_a_group() -> None:
    rows = Dataset.from_dict({"some": [None, "a", "a"], "many": [None, *range(40)][:3], "x": [1, 2, 3]})
    assert group_labels(rows, ["some"])["some"] == ["None", "a", "a"]
    numbers = Dataset.from_dict({"many": [None, *map(float, range(40))]})
    assert group_labels(numbers, ["many"])["many"][0] == "none"


def test_columns_that_make_no_groups() -> None:
    rows = Dataset.from_dict({"genre": ["a"], "tags": [["x"]]})
    with pytest.raises(DataError, match=r"no column 'genr'; did you mean 'genre'"):
        group_labels(rows, ["genr"])
    with pytest.raises(DataError, match="'tags' holds neither numbers nor text"):
        group_labels(rows, ["tags"])


def test_changes_by_group() -> None:
    labels = ["a"] * 20 + ["b"] * 20 + ["c"] * 3
    right = [(True, True)] * 20 + [(True, False)] * 5 + [(True, True)] * 15 + [(True, False)] * 3
    changes = group_changes({"genre": labels}, right)
    assert [(each.group, each.examples, each.before, each.after) for each in changes] == [
        ("a", 20, 1.0, 1.0),
        ("b", 20, 1.0, 0.75),
        ("c", 3, 1.0, 0.0),
    ]
    worst = worst_group(changes)
    assert worst is not None and worst.group == "b", "three examples are too few to tell"
    assert worst_group(changes[:1]) is None
    with pytest.raises(DataError, match="has 43 values for 1 examples"):
        group_changes({"genre": labels}, right[:1])


def test_ranges_come_in_order() -> None:
    labels = ["over 74", "to 24", "over 24 to 49", "over 49 to 74"]
    found = group_changes({"n": labels}, [(True, True)] * 4)
    assert [each.group for each in found] == ["to 24", "over 24 to 49", "over 49 to 74", "over 74"]


def test_a_comparison_knows_its_groups() -> None:
    references, groups = [0, 1] * 30, {"side": ["left"] * 30 + ["right"] * 30}
    answers = Answers(predictions=references, references=references, confidences=[0.9] * 60, groups=groups)
    worse = Answers(predictions=[1 - each for each in references[:30]] + references[30:], references=references,
                    confidences=[0.9] * 60)  # fmt: skip
    found = compare(answers, worse, get_task("sst2"))
    assert [(each.group, each.after) for each in found.groups] == [("left", 0.0), ("right", 1.0)]
    assert found.worst_group is not None and found.worst_group.group == "left"
    assert compare(worse, answers, get_task("sst2")).groups == ()
