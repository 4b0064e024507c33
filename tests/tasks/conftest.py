"""A tiny real tokenizer and small folders of data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Rows = dict[str, list[Any]]


@pytest.fixture
def write_split(tmp_path: Path) -> Callable[..., Path]:
    """Returns a function that writes one split of a task and returns the data folder."""
    import pyarrow
    import pyarrow.parquet

    def write(config: str, file: str, rows: Rows) -> Path:
        folder = tmp_path / "glue" / config
        folder.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table(rows), folder / f"{file}.parquet")
        return tmp_path / "glue"

    return write


@pytest.fixture(autouse=True)
def _own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setenv("HFCOMPRESS_CACHE", str(tmp_path / "cache"))
