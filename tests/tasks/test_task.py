"""The task record."""

from __future__ import annotations

import pytest

from hfcompress.tasks import get_task


@pytest.mark.parametrize(("name", "pair"), [("sst2", False), ("mrpc", True), ("demo/movie-reviews", False)])
def test_pair_tells_whether_two_texts_are_read(name: str, pair: bool) -> None:
    assert get_task(name).pair is pair
