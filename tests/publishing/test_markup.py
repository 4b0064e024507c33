from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfcompress.publishing.markup import escape, fenced, number, plain, ratio, size, table

HOSTILE = "a|b<script>alert(1)</script>`x`\n# [y](https://z) *b* @all \\| &lt; www.q"


def test_nothing_hostile_is_left() -> None:
    text = escape(HOSTILE)
    assert text == (
        "a&#124;b&lt;script&gt;alert(1)&lt;/script&gt;\\`x\\` \\# \\[y\\](https&#58;//z) \\*b\\* "
        "&#64;all \\\\&#124; &amp;lt; www&#46;q"
    )


@given(st.text(max_size=80))
def test_a_cell_stays_one_cell(value: str) -> None:
    text = escape(value)
    assert len(text.splitlines()) <= 1
    marks = re.sub(r"&#?\w+;|\\.", "", text)
    assert not re.search(r"[|<>@`*_\[\]~$#]", marks)


@pytest.mark.parametrize("value", ["- a", "1. a", "12) a", "+ a", "=== ", "--- x"])
def test_the_start_makes_no_block(value: str) -> None:
    assert "\\" in escape(value)


def test_plain_keeps_words() -> None:
    assert plain("  a\x00b\r\nc\u2028d\u202ee ") == "a b c d e"


@pytest.mark.parametrize("text", ["x", "```", "a\n````\nb", "` ``"])
def test_a_fence_is_longer_than_what_it_holds(text: str) -> None:
    block = fenced(text, "yaml")
    fence = re.match("`+", block)
    assert fence is not None
    assert block.startswith(f"{fence[0]}yaml\n") and block.endswith(f"\n{fence[0]}")
    assert fence[0] not in text


def test_a_table() -> None:
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_figures() -> None:
    assert [number(0.91234), number(0.5, ".1%"), number(float("nan")), number(float("inf"))] == [
        "0.9123",
        "50.0%",
        "n/a",
        "n/a",
    ]
    assert [size(999), size(52_000_000)] == ["1.0 kB", "52.0 MB"]
    assert [ratio(10, 4), ratio(10, 0)] == ["2.50x", "n/a"]
