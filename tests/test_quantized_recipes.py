"""Recipes that go on after quantization, from the first step to the published folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hfcompress import pipeline
from hfcompress.modeling.adapters import ADAPTERS_FILE
from hfcompress.recipe import load_recipe
from tests.workshop import batches, logits, save_data, save_model

RECIPE = """
name: tiny
model: {model}
task: sst2
data: {data}
max_length: 16
evaluation: {{batch_size: 16, speed_batch_size: 2, speed_sequence_length: 8, speed_repeats: 3, grid_batch_sizes: []}}
steps:
  - quantization: {{weights: mixed, embeddings: mixed, budget: 0.3, candidates: [nf4, packed-4], sensitivity: role}}
    calibration: 16
  - name: recover
    qlora: {{rank: 4, then: {then}}}
    distillation: {{}}
    training: {{epochs: 1, learning_rate: 1e-2, batch_size: 16, precision: fp32, save_steps: 4}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("then", ["keep", "requantize"])
def test_adapters_recover_a_mixed_model(then: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model", hidden_dropout_prob=0.1)
    save_data(tmp_path / "data")
    text = RECIPE.format(model=tmp_path / "model", data=tmp_path / "data", then=then)
    (tmp_path / "tiny.yaml").write_text(text)
    report = pipeline.run(load_recipe(tmp_path / "tiny.yaml", ()), tmp_path / "out", quiet=True)
    mixed, recovered = report.rows[1:]
    found = mixed.findings["quantization"]
    assert found["mixed"]["share_of_bytes"] <= 0.3 and "query" in found["sensitivity"]
    assert recovered.findings["qlora"]["adapters"] == 12
    assert recovered.bytes > mixed.bytes if then == "keep" else recovered.bytes < 1.05 * mixed.bytes
    assert (tmp_path / "out" / ADAPTERS_FILE).exists() == (then == "keep")
    assert "What each part loses" in (tmp_path / "out" / "report.html").read_text()
    # The folder may be moved: nothing in it says where it was.
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    before = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out.work" / "2-recover" / "checkpoint")
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "elsewhere")
    data = batches(1)[0]
    assert torch.equal(logits(after, data), logits(before, data))
    assert str(tmp_path) not in "".join(each.read_text() for each in (tmp_path / "elsewhere").glob("*.json"))
