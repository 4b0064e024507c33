"""The report: its file, its strictness and its table."""

from __future__ import annotations

import io
import json
import math
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from hfcompress.errors import CheckpointError
from hfcompress.evaluation import Report, Row, Speed, describe_environment, retention

SPEED = Speed(
    ratio=1.52,
    low=1.48,
    high=1.561,
    original_seconds=0.061,
    compressed_seconds=0.04,
    batch_size=8,
    sequence_length=128,
    threads=2,
    repeats=20,
)
ORIGINAL = Row(
    name="original",
    methods=(),
    metrics={"accuracy": 0.8712, "f1": 0.8694},
    retention=1.0,
    parameters=22_713_986,
    bytes=90_868_376,
    speed=None,
    seconds=81.5,
    findings={},
)
PRUNED = replace(
    ORIGINAL,
    name="structured_pruning+distillation",
    methods=("structured_pruning", "distillation"),
    metrics={"accuracy": 0.8532, "f1": math.nan},
    retention=0.9793,
    parameters=15_200_000,
    bytes=18_173_675,
    speed=SPEED,
    findings={"structured_pruning": {"heads": [[0, 1], [2]], "loss": 0.3}},
)
REPORT = Report(
    name="quickstart",
    base_model="demo/minilm-l6",
    task="demo/movie-reviews",
    recipe={"name": "quickstart", "steps": [{"low_rank": {"keep": 0.6}}]},
    environment={"python": "3.11.2"},
    split="validation",
    examples=1459,
    metric="accuracy",
    seed=42,
    rows=(ORIGINAL, PRUNED),
)


def test_json_round_trip() -> None:
    text = REPORT.to_json()
    again = Report.from_json(text)
    assert again.to_json() == text
    assert again.rows[0] == ORIGINAL
    assert again.rows[1].speed == SPEED
    assert again.rows[1].methods == ("structured_pruning", "distillation")
    assert replace(again, rows=()) == replace(REPORT, rows=())


def test_what_is_undefined_is_null_in_the_file_and_nan_in_the_record() -> None:
    assert json.loads(REPORT.to_json())["rows"][1]["metrics"]["f1"] is None
    assert math.isnan(Report.from_json(REPORT.to_json()).rows[1].metrics["f1"])


@settings(max_examples=50, deadline=None)
@given(
    metrics=st.dictionaries(st.text(), st.floats()),
    findings=st.dictionaries(st.text(), st.recursive(st.none() | st.floats() | st.text(), st.lists)),
    size=st.integers(min_value=0),
)
def test_any_figures_survive(metrics: dict[str, float], findings: dict[str, Any], size: int) -> None:
    report = replace(REPORT, rows=(replace(ORIGINAL, metrics=metrics, findings=findings, bytes=size),))
    again = Report.from_json(report.to_json())
    assert again.to_json() == report.to_json()
    assert again.rows[0].bytes == size
    finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
    assert {name: again.rows[0].metrics[name] for name in finite} == finite


def edited(**changes: Any) -> str:
    return json.dumps({**json.loads(REPORT.to_json()), **changes})


def edited_row(**changes: Any) -> str:
    return edited(rows=[{**json.loads(REPORT.to_json())["rows"][0], **changes}])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "the report is not valid"),
        ("[" * 100_000, "not valid JSON"),
        (REPORT.to_json().replace("0.8712", "NaN"), "NaN is no JSON number"),
        (edited(format=2), "format: "),
        (edited(extra=1), "extra: "),
        (edited(rows=[]), "rows: "),
        (edited(seed="42"), "seed: "),
        (edited(seed=None), "seed: "),
        (edited(environment={"threads": 2}), "environment.threads: "),
        (edited_row(bytes=-1), "rows.0.bytes: "),
        (edited_row(bytes=1.5), "rows.0.bytes: "),
        (edited_row(parameters=True), "rows.0.parameters: "),
        (edited_row(retention="1"), "rows.0.retention: "),
        (edited_row(speed={"ratio": 1.0}), "rows.0.speed.low: "),
        (edited_row(surprise=1), "rows.0.surprise: "),
        (json.dumps({"name": "x"}), "base_model: "),
    ],
)
def test_a_file_that_is_no_report_is_refused(text: str, said: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        Report.from_json(text)
    assert said in str(caught.value)


def test_saving_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old" * 10_000)
    REPORT.save(path)
    assert path.read_text(encoding="utf-8") == REPORT.to_json()
    assert list(tmp_path.iterdir()) == [path]
    neighbour = tmp_path / "neighbour"
    neighbour.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(neighbour.stat().st_mode)


def test_a_save_that_fails_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    REPORT.save(path)
    unwritable = replace(REPORT, recipe={"model": object()})
    with pytest.raises(TypeError):
        unwritable.save(path)
    assert path.read_text(encoding="utf-8") == REPORT.to_json()
    assert list(tmp_path.iterdir()) == [path]


def test_compression_is_of_bytes() -> None:
    assert REPORT.compression == pytest.approx(5.0, abs=1e-4)
    assert math.isnan(replace(REPORT, rows=(ORIGINAL, replace(PRUNED, bytes=0))).compression)


@pytest.mark.parametrize(("value", "original", "share"), [(0.8, 1.0, 0.8), (0.0, 0.5, 0.0)])
def test_retention(value: float, original: float, share: float) -> None:
    assert retention(value, original) == share


@pytest.mark.parametrize(("value", "original"), [(0.5, 0.0), (0.5, math.nan), (math.nan, 0.5), (0.1, -0.2)])
def test_retention_of_nothing_is_undefined(value: float, original: float) -> None:
    assert math.isnan(retention(value, original))


def test_the_table_is_readable_at_100_columns() -> None:
    screen = io.StringIO()
    Console(file=screen, width=100).print(REPORT.table())
    lines = screen.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 100
    (pruned,) = (line for line in lines if "0.8532" in line)
    for cell in ("n/a", "97.9%", "15.20 M", "18.2 MB", "5.00x", "1.52x (1.48-1.56)"):
        assert cell in pruned
    (original,) = (line for line in lines if "0.8712" in line)
    for cell in ("original", "0.8694", "100.0%", "22.71 M", "90.9 MB", "1.00x"):
        assert cell in original


def test_the_environment_names_versions_and_hardware() -> None:
    found = describe_environment()
    assert set(found) == {"python", "torch", "transformers", "hfcompress", "cpu", "threads", "platform"}
    assert all(found.values())
