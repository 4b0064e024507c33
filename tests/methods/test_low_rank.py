from __future__ import annotations

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress import LowRankConfig, compress
from hfcompress.errors import CompressionError, ConfigError
from hfcompress.methods.calibration import input_second_moments
from hfcompress.methods.low_rank import rank_for, truncate
from hfcompress.modeling.layers.low_rank import LowRankLinear
from tests.workshop import batches, logits, tiny_classifier


def whitened_error(weight: torch.Tensor, product: torch.Tensor, moment: torch.Tensor) -> float:
    difference = (weight - product).double()
    return torch.trace(difference @ moment.double() @ difference.T).item()


def test_plain_truncation_discards_the_smallest_singular_values() -> None:
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    up, down = truncate(weight, 7)
    tail = torch.linalg.svdvals(weight)[7:].square().sum()
    assert torch.isclose((weight - up @ down).square().sum(), tail, rtol=1e-4)


@pytest.mark.parametrize("rows", [200, 12])  # 12 rows leave the moments of 30 inputs rank-deficient
def test_whitened_error_is_the_discarded_tail_of_the_whitened_matrix(rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(rows, 30, generator=generator) @ torch.randn(30, 30, generator=generator)
    weight = torch.randn(20, 30, generator=generator)
    moment = inputs.T @ inputs / rows
    up, down = truncate(weight, 7, moment)
    tail = torch.linalg.svdvals(weight.double() @ inputs.double().T / rows**0.5)[7:].square().sum().item()
    assert whitened_error(weight, up @ down, moment) == pytest.approx(tail, rel=1e-4)


def test_no_random_or_plain_product_beats_the_whitened_one_on_its_inputs() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(100, 16, generator=generator) * torch.logspace(0, 3, 16)
    weight = torch.randn(12, 16, generator=generator)
    moment = inputs.T @ inputs / 100
    up, down = truncate(weight, 4, moment)
    best = whitened_error(weight, up @ down, moment)
    plain_up, plain_down = truncate(weight, 4)
    assert best < whitened_error(weight, plain_up @ plain_down, moment)
    for _ in range(50):
        nudged = (up + 0.01 * torch.randn(up.shape, generator=generator)) @ down
        assert best <= whitened_error(weight, nudged, moment)


hostile = arrays.arrays(
    np.float64,
    arrays.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.sampled_from([0.0, 1.0, -1.0, 1e-12, 1e12, 3e-30, -7.5]) | st.floats(-1e6, 1e6, width=32),
)


@given(matrix=hostile, rank=st.integers(1, 12), whiten=st.booleans(), half=st.booleans())
@settings(max_examples=500, deadline=None)
def test_hostile_matrices_come_out_finite(matrix: np.ndarray, rank: int, whiten: bool, half: bool) -> None:
    weight = torch.from_numpy(matrix).to(torch.bfloat16 if half else torch.float32)
    moment = None
    if whiten:
        rows = torch.from_numpy(matrix).float() / max(1.0, float(np.abs(matrix).max()))
        moment = rows.T @ rows
    up, down = truncate(weight, rank, moment)
    assert torch.isfinite(up).all() and torch.isfinite(down).all()
    assert up.shape[1] == down.shape[0] == min(rank, *weight.shape)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_with_the_layers_name(bad: float) -> None:
    model = tiny_classifier()
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = bad
    with pytest.raises(CompressionError, match=r"encoder\.layer\.1\.output\.dense: the weight"):
        compress(model, [LowRankConfig(targets=("ffn",), method="svd")])


@given(st.integers(1, 64), st.integers(1, 64), st.floats(0.01, 0.99), st.integers(1, 16))
def test_the_rank_keeps_no_more_than_asked(out: int, inputs: int, keep: float, multiple: int) -> None:
    rank = rank_for(out, inputs, keep, multiple)
    assert rank >= 1
    assert rank == 1 or rank * (out + inputs) <= keep * out * inputs


def test_calibrated_factors_are_closer_on_the_data_than_plain_ones() -> None:
    data = batches(4)
    whole = logits(tiny_classifier(), data[0])
    errors = {}
    for method in ("svd", "whitened"):
        model = compress(tiny_classifier(), [LowRankConfig(keep=0.5, method=method)], calibration=data)
        errors[method] = (logits(model, data[0]) - whole).norm().item()
    assert errors["whitened"] < errors["svd"]


def test_layers_of_one_input_share_its_moments() -> None:
    model, data = tiny_classifier(), batches(1)
    place = "encoder.layer.0.attention.self"
    paths = [f"{place}.query", f"{place}.key", "encoder.layer.0.intermediate.dense"]
    moments = input_second_moments(model, paths, data)
    assert moments[paths[0]] is moments[paths[1]]
    assert moments[paths[0]] is not moments[paths[2]]
    with torch.no_grad():
        hidden = model.bert.embeddings(input_ids=data[0]["input_ids"]).flatten(0, 1)
    torch.testing.assert_close(moments[paths[0]], hidden.T @ hidden / len(hidden))


def test_what_would_not_get_smaller_is_left_whole() -> None:
    model = compress(tiny_classifier(), [LowRankConfig(targets=("ffn",), keep=0.5, method="svd")])
    made = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    assert len(made) == 4
    again = compress(model, [LowRankConfig(targets=("ffn",), keep=0.5, method="svd")])
    assert [name for name, module in again.named_modules() if isinstance(module, LowRankLinear)] == made


def test_whitened_without_data_says_what_to_pass() -> None:
    with pytest.raises(CompressionError, match="calibration"):
        compress(tiny_classifier(), [LowRankConfig(method="whitened")])


@pytest.mark.parametrize("values", [{"keep": 0.0}, {"keep": 1.0}, {"targets": ()}, {"targets": ("fnn",)}, {"rank": 3}])
def test_bad_fields_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError):
        LowRankConfig(**values)
