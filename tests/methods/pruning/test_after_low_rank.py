"""Pruning of layers that were factorized before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hfcompress import LowRankConfig, StructuredPruningConfig, compress
from hfcompress.methods.pruning.units import head_units, neuron_units, total_cost
from hfcompress.modeling.anatomy import base_model
from hfcompress.modeling.layers.low_rank import PivotedLinear
from tests.tiny_models import class_of, inputs_for, make, run
from tests.workshop import batches, logits, tiny_classifier


def test_a_pivoted_layer_with_fewer_inputs_than_its_rank_reloads(tmp_path: Path) -> None:
    model = compress(tiny_classifier(), [LowRankConfig(keep=0.9, pivoted=True)])
    config = StructuredPruningConfig(heads=0.74, neurons=0.9, multiple_of=1, importance="magnitude")
    compress(model, [config]).save_pretrained(tmp_path)
    outputs = [each for each in model.modules() if isinstance(each, PivotedLinear)]
    assert any(each.in_features < each.rank for each in outputs)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    (batch,) = batches(1, labels=False)
    assert torch.equal(logits(loaded, batch), logits(model, batch))


@pytest.mark.parametrize(
    ("family", "head"),
    [("bert", "SequenceClassification"), ("llama", "CausalLM"), ("modernbert", "SequenceClassification")],
)
def test_pivoted_layers_that_no_longer_need_factors_are_mended_too(family: str, head: str, tmp_path: Path) -> None:
    model, inputs = make(family, head), inputs_for(family, head)
    compress(model, [LowRankConfig(keep=0.8, pivoted=True)])
    before = sum(isinstance(each, PivotedLinear) for each in model.modules())
    compress(model, [StructuredPruningConfig(heads=0.5, neurons=0.6, multiple_of=1)], calibration=[inputs])
    assert sum(isinstance(each, PivotedLinear) for each in model.modules()) < before
    model.save_pretrained(tmp_path)
    loaded = class_of(family, head).from_pretrained(tmp_path).eval()
    for one, other in zip(run(model, inputs), run(loaded, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", [{}, {"pivoted": True}, {"per_head": True}])
@pytest.mark.parametrize(
    ("family", "head"), [("gpt2", "LMHeadModel"), ("modernbert", "SequenceClassification"), ("llama", "CausalLM")]
)
def test_the_factors_of_a_fused_layer_are_counted_once(family: str, head: str, form: dict[str, Any]) -> None:
    model, inputs = make(family, head), inputs_for(family, head)
    compress(model, [LowRankConfig(keep=0.7, **form)], calibration=[inputs])
    units = head_units(model) + neuron_units(model)
    layers = {each.block.layer for each in units}
    counted = sum(
        parameter.numel()
        for layer in layers
        for name, parameter in base_model(model).get_submodule(layer).named_parameters()
        if "norm" not in name and "ln_" not in name
    )
    assert total_cost(units, "parameters") == counted
