"""Factors that say some outputs by others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfcompress import LowRankConfig, QuantizationConfig, compress
from hfcompress.errors import CheckpointError
from hfcompress.methods.low_rank.maths import truncate
from hfcompress.methods.low_rank.ranks import is_smaller, rank_for, size_of
from hfcompress.modeling import surgery
from hfcompress.modeling.anatomy import attention_blocks, base_model, feed_forward_blocks, modules_of
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.densify import densify
from hfcompress.modeling.layers.low_rank import PivotedLinear, pivot
from hfcompress.modeling.structure import rebuild
from tests.tiny_models import FAMILIES, class_of, inputs_for, make, run
from tests.workshop import batches, logits, tiny_classifier

SHAPES = ["bert", "gpt2", "llama", "whisper"]
PIVOTED = LowRankConfig(keep=0.7, method="svd", pivoted=True, multiple_of=2)


def sample(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pivoted_layers(model: Any) -> dict[str, PivotedLinear]:
    return {name: each for name, each in base_model(model).named_modules() if isinstance(each, PivotedLinear)}


def same(left: list[torch.Tensor], right: list[torch.Tensor], **tolerance: float) -> None:
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


# The form


@pytest.mark.parametrize("kind", ["random", "zero", "rank one", "scaled"])
def test_a_pivoted_product_is_the_same_product(kind: str) -> None:
    up, down = sample(0, 12, 5), sample(1, 5, 9)
    if kind == "zero":
        up = torch.zeros_like(up)
    elif kind == "rank one":
        up = up[:, :1] * torch.tensor([1.0, 2.0, 0.0, -1.0, 1e-9], dtype=torch.float64)
    elif kind == "scaled":
        up = up * torch.logspace(-6, 6, 12, dtype=torch.float64).unsqueeze(1)
    rest, rows, places = pivot(up, down)
    assert rest.shape == (7, 5)
    assert sorted(places.tolist()) == list(range(12))
    made = torch.cat((rows, rest @ rows))[places]
    torch.testing.assert_close(made, up @ down, atol=1e-9, rtol=1e-9)


@given(
    matrix=arrays.arrays(
        np.float64,
        arrays.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=12),
        elements=st.sampled_from([0.0, 1.0, -1.0, 1e-12, 1e12, 3e-30]) | st.floats(-1e6, 1e6, width=32),
    ),
    rank=st.integers(1, 12),
)
@settings(max_examples=500, deadline=None)
def test_hostile_matrices_are_pivoted(matrix: np.ndarray, rank: int) -> None:
    weight = torch.from_numpy(matrix)
    up, down = truncate(weight, min(rank, len(weight) - 1))
    rest, rows, places = pivot(up, down)
    made, wanted = torch.cat((rows, rest @ rows))[places], up.double() @ down.double()
    assert torch.isfinite(made).all()
    assert (made - wanted).abs().max() <= 1e-6 * max(1e-30, float(wanted.abs().max()))


def test_it_is_smaller_at_any_rank_below_full() -> None:
    assert all(is_smaller(16, 12, rank, pivoted=True) for rank in range(1, 12))
    assert not is_smaller(16, 12, 12, pivoted=True)
    assert not is_smaller(16, 12, 7)
    layer = PivotedLinear(12, 16, 7, bias=True)
    assert sum(each.numel() for each in layer.parameters()) == size_of(16, 12, 7, pivoted=True) + 16


@given(st.integers(2, 64), st.integers(2, 64), st.floats(0.05, 0.99), st.integers(1, 16))
def test_the_rank_keeps_no_more_than_asked(out: int, inputs: int, keep: float, multiple: int) -> None:
    rank = rank_for(out, inputs, keep, multiple, pivoted=True)
    assert rank == 1 or size_of(out, inputs, rank, pivoted=True) <= keep * out * inputs
    more = rank + multiple
    assert more >= min(out, inputs) or size_of(out, inputs, more, pivoted=True) > keep * out * inputs


@pytest.mark.parametrize("family", SHAPES)
def test_it_computes_what_two_factors_do_and_comes_back_exactly(family: str, tmp_path: Path) -> None:
    head = FAMILIES[family].heads[1]
    inputs = inputs_for(family, head)
    model, thin = make(family, head), make(family, head)
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for path in modules_of(model, ("attention", "ffn")):
        weight = thin.base_model.get_submodule(path).weight.detach()
        factors[path] = truncate(weight.T if family == "gpt2" else weight, 5)
        for each, form in ((model, True), (thin, False)):
            surgery.factorize(each, path, 5, factors[path], pivoted=form)
    commit(model)
    assert set(pivoted_layers(model)) == set(factors)
    same(run(model, inputs), run(thin, inputs), atol=2e-5, rtol=1e-4)
    model.save_pretrained(tmp_path / "saved")
    again = class_of(family, head).from_pretrained(tmp_path / "saved")
    tensors = model.state_dict()
    assert tensors.keys() == again.state_dict().keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.state_dict().items())
    same(run(again, inputs), run(model, inputs), atol=1e-5, rtol=1e-5)
    densify(tmp_path / "saved", tmp_path / "dense")
    dense = class_of(family, head).from_pretrained(tmp_path / "dense")
    assert getattr(dense.config, "quantization_config", None) is None
    same(run(dense, inputs), run(model, inputs), atol=2e-5, rtol=1e-4)
    for path in factors:
        surgery.defactorize(again, path)
    same(run(again, inputs), run(model, inputs), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kept", [60, 20], ids=["above the rank", "below it"])
def test_neurons_and_heads_are_pruned_afterwards(kept: int) -> None:
    model, whole = (compress(tiny_classifier(), [PIVOTED]) for _ in range(2))
    for path in pivoted_layers(whole):
        surgery.defactorize(whole, path)
    for each in (model, whole):
        for block in feed_forward_blocks(each):
            surgery.shrink_feed_forward(block, range(3, 3 + kept))
        for attention in attention_blocks(each):
            surgery.shrink_attention(attention, [1, 2, 3] if kept == 60 else [2])
    commit(model)
    batch = batches(1)[0]
    torch.testing.assert_close(logits(model, batch), logits(whole, batch), atol=1e-4, rtol=1e-4)
    inner = [base_model(model).get_submodule(block.name) for block in feed_forward_blocks(model)]
    left = [isinstance(each, PivotedLinear) for each in inner]
    assert left == [kept == 60] * 2


def test_pruned_then_pivoted_then_quantized_comes_back_exactly(tmp_path: Path) -> None:
    model = tiny_classifier()
    for block in feed_forward_blocks(model):
        surgery.shrink_feed_forward(block, range(64))
    compress(model, [PIVOTED, QuantizationConfig(weights="int8", embeddings=None)])
    assert pivoted_layers(model)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    batch = batches(1)[0]
    assert torch.equal(logits(again, batch), logits(model, batch))
    densify(tmp_path / "saved", tmp_path / "dense")
    dense = type(model).from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(dense, batch), logits(model, batch), atol=0.05, rtol=0.05)


def test_a_rank_that_no_layer_can_have_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"structure\.pivoted: .* from 1 to 63, not 64"):
        rebuild(tiny_classifier(), {"pivoted": {"encoder.layer.*.output.dense": 64}})


def test_it_learns() -> None:
    model = compress(tiny_classifier(), [PIVOTED]).train()
    model(**batches(1)[0]).loss.backward()
    layers = pivoted_layers(model).values()
    assert all(each.up.weight.grad.any() and each.down.weight.grad.any() for each in layers)
    assert all(each.own_bias is not None and each.own_bias.grad is not None for each in layers)


def test_a_bias_takes_over_the_mean_error() -> None:
    data = batches(2)
    plain = compress(tiny_classifier(), [PIVOTED])
    shifted = compress(tiny_classifier(), [PIVOTED.model_copy(update={"correct_bias": True})], calibration=data)
    whole, path = tiny_classifier(), "encoder.layer.0.intermediate.dense"
    means = []
    for model in (whole, plain, shifted):
        seen: list[torch.Tensor] = []
        handle = model.bert.get_submodule(path).register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
        for batch in data:
            logits(model, batch)
        handle.remove()
        means.append(torch.cat([out[b["attention_mask"].bool()] for out, b in zip(seen, data, strict=True)]).mean(0))
    torch.testing.assert_close(means[2], means[0], atol=1e-4, rtol=1e-4)
    assert (means[1] - means[0]).norm() > 100 * (means[2] - means[0]).norm()


def test_what_they_give_under_autocast_has_the_dtype_of_any_layer() -> None:
    model, inputs = make("deberta-v2", "SequenceClassification"), inputs_for("deberta-v2", "SequenceClassification")
    compress(model, [PIVOTED])
    layer, whole = next(iter(pivoted_layers(model).values())), torch.nn.Linear(32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(2, 32)).dtype == whole(torch.ones(2, 32)).dtype == torch.bfloat16
        run(model, inputs)  # the family asks for the dtype of its queries
