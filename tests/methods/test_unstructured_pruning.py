from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfcompress import LowRankConfig, QuantizationConfig, UnstructuredPruningConfig, compress
from hfcompress.errors import CompressionError, ConfigError
from hfcompress.methods.registry import Context
from hfcompress.methods.unstructured_pruning import keep_pattern, keep_share, unstructured_pruning
from hfcompress.modeling.anatomy import modules_of
from hfcompress.modeling.checkpoint import needs_plugin
from tests.tiny_models import inputs_for, make
from tests.workshop import batches, logits, tiny_classifier


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 0.99), st.booleans(), st.integers(0, 999))
def test_the_share_goes_and_it_is_the_least(rows: int, width: int, share: float, by_output: bool, seed: int) -> None:
    scores = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))
    kept = keep_share(scores, share, by_output=by_output)
    for row, mask in zip(scores, kept, strict=True) if by_output else [(scores, kept)]:
        assert int((~mask).sum()) == round(row.numel() * share)
        assert not mask.any() or mask.all() or row[mask].min() >= row[~mask].max()


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([(1, 2), (2, 4), (4, 8)]), st.integers(0, 999))
def test_a_pattern_keeps_the_best_n_of_every_m(rows: int, groups: int, pattern: tuple[int, int], seed: int) -> None:
    n, m = pattern
    scores = torch.rand(rows, groups * m, generator=torch.Generator().manual_seed(seed))
    kept = keep_pattern(scores, n, m)
    for row, mask in zip(scores.view(-1, m), kept.view(-1, m), strict=True):
        assert int(mask.sum()) == n and row[mask].min() >= row[~mask].max()


def test_wanda_weighs_a_weight_by_its_input() -> None:
    model = tiny_classifier()
    layer = model.bert.encoder.layer[0].intermediate.dense
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.weight[:, :32] *= 1.1
        norm = model.bert.encoder.layer[0].attention.output.LayerNorm
        norm.weight[:32] = 0.01  # these inputs hardly ever say anything
        norm.bias.zero_()
    config = UnstructuredPruningConfig(targets=("ffn_input",), importance="wanda")
    compress(model, [config], calibration=batches(2))
    assert (layer.weight[:, :32] == 0).all() and (layer.weight[:, 32:] == 1).all()


@pytest.mark.parametrize("family", ["bert", "gpt2"])  # gpt2 keeps its weights transposed
@pytest.mark.parametrize("calibrated", [True, False])
def test_zeros_are_where_they_should_be_and_the_report_says_what_for(family: str, calibrated: bool) -> None:
    model = make(family)
    calibration = [inputs_for(family)] if calibrated else []
    findings = unstructured_pruning(model, UnstructuredPruningConfig(pattern="2:4"), Context(calibration=calibration))
    assert findings["sparsity"] == 0.5 and findings["importance"] == ("wanda" if calibrated else "magnitude")
    assert "neither faster nor smaller" in findings["speed"]
    for path in modules_of(model, ["attention", "ffn"]):
        weight = model.base_model.get_submodule(path).weight
        zeros = (weight.T if family == "gpt2" else weight).unflatten(1, (-1, 4)) == 0
        assert (zeros.sum(-1) == 2).all()


def test_the_result_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model, data = tiny_classifier(), batches(2)
    compress(model, [UnstructuredPruningConfig(sparsity=0.3)], calibration=data)
    assert not needs_plugin(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), data[0]), logits(model, data[0]))


def test_both_factors_of_a_low_rank_layer_are_pruned() -> None:
    model = compress(tiny_classifier(), [LowRankConfig(keep=0.6)])
    findings = unstructured_pruning(model, UnstructuredPruningConfig(), Context())
    names = [path.rpartition(".")[2] for path in findings["layers"]]
    assert {"down", "up"} <= set(names) and all(abs(share - 0.5) < 0.02 for share in findings["layers"].values())


def test_what_cannot_be_pruned_is_refused() -> None:
    with pytest.raises(CompressionError, match="quantized"):
        compress(compress(tiny_classifier(), [QuantizationConfig()]), [UnstructuredPruningConfig()])
    with pytest.raises(CompressionError, match="multiple of 7"):
        compress(tiny_classifier(), [UnstructuredPruningConfig(pattern="3:7")])
    with pytest.raises(CompressionError, match="calibration"):
        compress(tiny_classifier(), [UnstructuredPruningConfig(importance="wanda")])
    broken = tiny_classifier()
    with torch.no_grad():
        broken.bert.encoder.layer[1].output.dense.weight[0, 0] = float("inf")
    with pytest.raises(CompressionError, match=r"layer\.1\.output\.dense.*not finite"):
        compress(broken, [UnstructuredPruningConfig()])


@pytest.mark.parametrize(
    "values",
    [{"sparsity": 1.0}, {"pattern": "4:2"}, {"pattern": "half"}, {"pattern": "2:4", "sparsity": 0.3}, {"targets": ()}],
)
def test_bad_fields_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError):
        UnstructuredPruningConfig(**values)
