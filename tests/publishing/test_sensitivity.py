"""What each part loses, as it stands on the page."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hfcompress.evaluation.report import Report
from hfcompress.publishing.drawing import sensitivities
from hfcompress.publishing.page import page_of_report

FOUND = {
    "sensitivity": {
        "embeddings.<b>": {"int8": 1e-6, "int4": 1e-4},
        "encoder.layer.0.ffn": {"nf4": 1e-4, "packed-2": 1e-2, "int8": 0.0},
    }
}


def test_losses_are_shaded_by_their_logarithms(report: Report) -> None:
    row = replace(report.rows[-1], findings={"quantization": FOUND, "distillation": {"sensitivity": {}}})
    (drawn,) = sensitivities(row)
    assert drawn.columns == ("int8", "int4", "nf4", "packed-2")
    (table, table_cells), (block, block_cells) = drawn.rows
    assert (table, block) == ("embeddings.<b>", "encoder.layer.0.ffn")
    assert table_cells[:2] == (("1e-06", 0.0), ("0.0001", pytest.approx(0.5))) and table_cells[2:] == (None, None)
    assert block_cells == (("0", 0.0), None, ("0.0001", pytest.approx(0.5)), ("0.01", pytest.approx(1.0)))
    page = page_of_report(replace(report, rows=(*report.rows[:-1], row)))
    assert "What each part loses" in page and "embeddings.&lt;b&gt;" in page and "embeddings.<b>" not in page
    assert "What each part loses" not in page_of_report(report)


def test_ranks_stand_in_order_and_are_read_back_as_they_were(report: Report) -> None:
    found = {"sensitivity": {"layer.0": {32: 1e-2, 112: 1e-6, 72: 1e-4}, "layer.1": {8: 1e-3, 104: 1e-5}}}
    row = replace(report.rows[-1], findings={"low_rank": found})
    (drawn,) = sensitivities(row)
    assert drawn.columns == ("largest rank", "smaller", "smallest")
    cells = [[cell and cell[0] for cell in cells] for _, cells in drawn.rows]
    assert cells == [["112: 1e-06", "72: 0.0001", "32: 0.01"], ["104: 1e-05", "8: 0.001", None]]
    whole = replace(report, rows=(*report.rows[:-1], row))
    assert page_of_report(Report.from_json(whole.to_json())) == page_of_report(whole)
