from __future__ import annotations

import pytest

from hfcompress.errors import CompressionError
from hfcompress.methods.teaching.layers import depths, map_layers
from tests.tiny_models import make


@pytest.mark.parametrize(
    ("how", "student", "teacher", "wanted"),
    [
        ("uniform", 3, 6, ((1, 2), (2, 4), (3, 6))),
        ("uniform", 4, 6, ((1, 1), (2, 3), (3, 4), (4, 6))),
        ("last", 2, 6, ((1, 5), (2, 6))),
        ("skip", 3, 6, ((1, 2), (2, 4))),
        (((0, 0), (3, 5)), 3, 6, ((0, 0), (3, 5))),
    ],
)
def test_layers_are_paired_by_rule_or_by_hand(how, student: int, teacher: int, wanted: tuple) -> None:
    assert map_layers(how, student, teacher) == wanted


@pytest.mark.parametrize(
    ("how", "student", "says"),
    [(((1, 7),), 3, "0 to 6"), (((4, 1),), 3, "0 to 3"), ("uniform", 8, "8 layers"), ("skip", 1, "no other")],
)
def test_layers_that_cannot_be_paired_are_refused(how, student: int, says: str) -> None:
    with pytest.raises(CompressionError, match=says):
        map_layers(how, student, 6)


@pytest.mark.parametrize(("family", "prefixes"), [("bert", [""]), ("t5", ["encoder_", "decoder_"]), ("albert", [""])])
def test_depths_are_those_of_the_outputs(family: str, prefixes: list[str]) -> None:
    from tests.tiny_models import FAMILIES, inputs_for

    head = "ConditionalGeneration" if family == "t5" else FAMILIES[family].heads[1]
    model = make(family, head)
    found = depths(model)
    assert list(found) == prefixes
    outputs = model(**inputs_for(family, head), output_hidden_states=True)
    assert all(len(outputs[f"{prefix}hidden_states"]) == depth + 1 for prefix, depth in found.items())
