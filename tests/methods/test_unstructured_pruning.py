from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hfcompress import LowRankConfig, QuantizationConfig, UnstructuredPruningConfig, compress
from hfcompress.errors import CompressionError, ConfigError
from hfcompress.methods.registry import Context
from hfcompress.methods.unstructured_pruning import (
    UnstructuredPruningPart,
    keep_part_of_pattern,
    keep_pattern,
    keep_share,
    unstructured_pruning,
)
from hfcompress.modeling.anatomy import modules_of
from hfcompress.modeling.checkpoint import needs_plugin
from tests.tiny_models import inputs_for, make
from tests.workshop import batches, logits, tiny_classifier


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 0.99), st.booleans(), st.integers(0, 999))
def test_the_share_goes_and_it_is_the_least(rows: int, width: int, share: float, by_output: bool, seed: int) -> None:
    scores = torch.rand(rows, width, generator=torch.Generator().manual_seed(seed))
    kept = keep_share(scores, share, by_output=by_output)
    for row, mask in zip(scores, kept, strict=True) if by_output else [(scores, kept)]:
        assert int((~mask).sum()) == min(round(row.numel() * share), row.numel() - 1)
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


def train_by_hand(model, part: UnstructuredPruningPart, batch: dict, steps: int, first: int = 1) -> list[float]:
    """Does the steps `first` to `steps`; returns the share of zeros of one layer after each."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shares = []
    for step in range(first, steps + 1):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        part.before_optimizer_step(step - 1)
        optimizer.step()
        part.after_step(step)
        shares.append((model.bert.encoder.layer[0].intermediate.dense.weight == 0).float().mean().item())
    return shares


@pytest.mark.parametrize("values", [{"sparsity": 0.8}, {"sparsity": 0.8, "importance": "movement"}, {"pattern": "2:4"}])
def test_zeros_only_ever_grow_to_the_target_and_survive_a_resume(values: dict) -> None:
    config = UnstructuredPruningConfig(begin=0.1, end=0.7, interval=2, **values)
    model, batch = tiny_classifier(), batches(1)[0]
    part = UnstructuredPruningPart(config)
    part.begin(model, 20, torch.device("cpu"))
    shares = train_by_hand(model, part, batch, 10)
    other_model, other = tiny_classifier(), UnstructuredPruningPart(config)
    other_model.load_state_dict(model.state_dict())
    other.begin(other_model, 20, torch.device("cpu"))
    other.load_state(part.state())
    shares += train_by_hand(other_model, other, batch, 20, first=11)
    assert all(before <= after for before, after in pairwise(shares))
    wanted = values.get("sparsity", 0.5)
    assert shares[0] == 0.0 and 0 < shares[5] < wanted and shares[13] == pytest.approx(wanted, abs=1e-3)
    assert shares[13:] == [shares[13]] * 7
    assert other.settled(14) and not other.settled(13)
    findings = other.end(other_model)
    assert findings["sparsity"] == pytest.approx(wanted, abs=1e-3) and "neither faster" in findings["speed"]


def test_movement_keeps_what_moves_away_from_zero() -> None:
    model, batch = tiny_classifier(), batches(1)[0]
    config = UnstructuredPruningConfig(importance="movement", targets=("ffn_input",), begin=0.0, end=0.1, interval=1)
    part = UnstructuredPruningPart(config)
    part.begin(model, 10, torch.device("cpu"))
    weight = model.bert.encoder.layer[0].intermediate.dense.weight
    model(**batch).loss.backward()
    moving = -(weight * weight.grad).detach()
    part.before_optimizer_step(0)
    part.after_step(1)
    gone = weight == 0
    assert moving[gone].max() <= moving[~gone].min()


def test_a_part_of_the_groups_that_lose_least_gets_the_pattern() -> None:
    scores = torch.tensor([[9.0, 8.0, 7.0, 6.0, 4.0, 3.0, 0.1, 0.2]])
    kept = keep_part_of_pattern(scores, 2, 4, 0.5)
    assert kept.tolist() == [[True] * 4 + [True, True, False, False]]
    assert torch.equal(keep_part_of_pattern(scores, 2, 4, 1.0), keep_pattern(scores, 2, 4))
    assert keep_part_of_pattern(scores, 2, 4, 0.0).all()


def test_what_exists_only_at_once_or_in_training_is_refused_in_the_other() -> None:
    with pytest.raises(CompressionError, match="only without training"):
        UnstructuredPruningPart(UnstructuredPruningConfig(importance="wanda"))
    with pytest.raises(CompressionError, match="only in training"):
        compress(tiny_classifier(), [UnstructuredPruningConfig(importance="movement")])
    with pytest.raises(ConfigError, match="before end"):
        UnstructuredPruningConfig(begin=0.7, end=0.2)


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
