"""Errors weighed by what the predictions say of each direction of a layer's outputs."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hfcompress import LowRankConfig, compress
from hfcompress.errors import CompressionError, ConfigError
from hfcompress.methods.low_rank import low_rank
from hfcompress.methods.low_rank.curvature import output_curvature, temperature_of
from hfcompress.methods.low_rank.fitting import Group, Knowledge, fit, matrix_of
from hfcompress.methods.low_rank.maths import Pulled, energies, pull, truncate
from hfcompress.methods.low_rank.method import learn
from hfcompress.methods.low_rank.ranks import Curve, allocate, size_of
from hfcompress.methods.probing import Probe
from hfcompress.methods.registry import Context
from hfcompress.methods.statistics import InputStatistics, input_statistics
from hfcompress.modeling.anatomy import base_model, modules_of
from tests.tiny_models import FAMILIES, inputs_for, make
from tests.workshop import batches, logits, tiny_classifier


def sample(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def curved(rows: int = 60, outputs: int = 14) -> torch.Tensor:
    slopes = sample(2, rows, outputs)
    return slopes.T @ slopes / rows


def weighed_error(change: torch.Tensor, moment: torch.Tensor, curvature: torch.Tensor) -> float:
    return torch.trace(curvature @ change @ moment @ change.T).item()


def test_the_weighed_error_is_the_discarded_tail_and_nothing_beats_it() -> None:
    weight, inputs, slopes = sample(0, 14, 10), sample(1, 50, 10), sample(2, 60, 14)
    moment, curvature = inputs.T @ inputs / 50, slopes.T @ slopes / 60
    curvature += 0.01 * curvature.diagonal().mean() * torch.eye(14)  # what truncate adds, seen as part of it
    root = torch.linalg.cholesky(curvature + 0.01 * curvature.diagonal().mean() * torch.eye(14), upper=True)
    regular = root.T @ root
    up, down = truncate(weight, 4, moment, curvature)
    error = weighed_error(weight - up.double() @ down.double(), moment, regular)
    assert energies(weight, moment, curvature)[4:].sum().item() == pytest.approx(error, rel=1e-4)
    for other in (truncate(weight, 4), truncate(weight, 4, moment), truncate(weight, 4, None, curvature)):
        assert error < weighed_error(weight - other[0].double() @ other[1].double(), moment, regular)


def test_a_curvature_of_zero_costs_nothing_and_breaks_nothing() -> None:
    weight, nothing = sample(0, 6, 5), torch.zeros(6, 6)
    assert not energies(weight, None, nothing).any()
    plain, weighed = truncate(weight, 2), truncate(weight, 2, None, nothing)
    torch.testing.assert_close(weighed[0] @ weighed[1], plain[0] @ plain[1])
    with pytest.raises(CompressionError, match="the curvature holds values that are not finite"):
        truncate(weight, 2, None, torch.full((6, 6), float("nan")))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_it_foretells_how_far_the_predictions_move(family: str) -> None:
    """Within what the independence of inputs and gradients, which it takes for granted, allows."""
    head = FAMILIES[family].heads[1]
    model = make(family, head)
    generator = torch.Generator().manual_seed(0)
    data = []
    for _ in range(8):
        batch = inputs_for(family, head)
        ids = torch.randint(5, model.config.vocab_size - 1, batch["input_ids"].shape, generator=generator)
        data.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    with torch.no_grad():
        if family == "bert":
            model.classifier.weight.mul_(0.1)  # not so sure that it is asked at another temperature
        else:
            model.lm_head.weight.mul_(5)
    path = modules_of(model, ("ffn_output",))[-1]
    moment = input_statistics(model, [path], data)[path].second_moment.double()
    curvature = output_curvature(model, [path], data * 4)[path].double()
    layer: Any = base_model(model).get_submodule(path)
    probe = Probe(model, data, "outputs")
    told = found = 0.0
    for seed in range(8):
        change = 0.02 * layer.weight.std().item() * sample(seed, *layer.weight.shape)
        with torch.no_grad():
            layer.weight += change
            found += probe.rise()
            layer.weight -= change
        told += weighed_error(change, moment, curvature) / 2
    assert 0.5 < told / found < 2


def test_a_sure_model_is_asked_at_the_temperature_at_which_it_is_less_so() -> None:
    model, data = tiny_classifier(), batches(2)
    with torch.no_grad():
        model.classifier.weight.mul_(200)
        model.classifier.bias.mul_(200)
        logits_of_first = model(**data[0]).logits
    heat = temperature_of(logits_of_first)
    assert heat > 2
    assert (logits_of_first / heat).softmax(-1).amax(-1).mean().item() == pytest.approx(0.6, abs=1e-3)
    assert temperature_of(logits_of_first / heat) == 1.0
    paths = modules_of(model, ("ffn_output",))
    sure = output_curvature(model, paths, data)
    with torch.no_grad():
        model.classifier.weight.div_(heat)
        model.classifier.bias.div_(heat)
    for path, found in output_curvature(model, paths, data).items():
        torch.testing.assert_close(sure[path], found, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", "Model"),
        ("bert", "QuestionAnswering"),
        ("albert", "TokenClassification"),
        ("vit", "ImageClassification"),
    ],
)
def test_every_head_has_a_curvature(family: str, head: str) -> None:
    model = make(family, head)
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    paths = modules_of(model, ("linear",))
    found = output_curvature(model, paths, [inputs_for(family, head)])
    assert set(found) == set(paths)
    assert any(each.any() for each in found.values())
    assert {name for name, each in model.named_parameters() if each.requires_grad} == trained
    assert all(each.grad is None for each in model.parameters())


def test_a_budget_by_curvature_is_kept_without_labels_and_goes_where_it_is_heard() -> None:
    data, model = batches(4, labels=False), tiny_classifier()
    model.bert.encoder.layer[1].output.dense.weight.data.mul_(1e-4)  # what the last block says is hardly heard
    config = LowRankConfig(targets=("ffn",), budget=0.6, pivoted=True, multiple_of=4)
    found = low_rank(model, config, Context(calibration=data))
    ranks = found["ranks"] | dict.fromkeys(found["left_whole"], 64)
    last, first = "encoder.layer.1.output.dense", "encoder.layer.0.output.dense"
    assert ranks[last] < ranks[first]
    kept = sum(size_of(64, 96, rank, pivoted=True) if rank < 64 else 64 * 96 for rank in ranks.values())
    assert 0.55 < kept / (4 * 64 * 96) <= 0.6
    rises = found["sensitivity"]
    assert max(rises[last].values()) < min(rises[first].values())


def test_curves_of_curvature_need_no_measurement() -> None:
    curve = Curve(8, 8, torch.tensor([4.0, 2.0, 1.0, 1.0, 0, 0, 0, 0], dtype=torch.float64), pivoted=True)
    assert [curve.loss(rank) for rank in (1, 2, 3, 4)] == pytest.approx([2.0, 1.0, 0.5, 0.0])
    assert curve.options(1)[-1] == (64, 0.0, None)
    assert allocate({"a": curve}, 0.8, 1) == {"a": 4}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"method": "svd", "weigh_outputs": True}, "weigh_outputs goes with the method whitened, not svd"),
        (
            {"budget": 0.5, "sensitivity": "curvature", "weigh_outputs": False},
            "sensitivity curvature needs the method whitened",
        ),
        ({"keep": 0.5, "budget_of": "flops"}, "budget_of flops needs a budget"),
    ],
)
def test_what_does_not_go_together_is_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LowRankConfig(**values)


def test_sequential_weighed_and_pivoted_beats_what_it_is_made_of() -> None:
    data, errors = batches(4), []
    whole = tiny_classifier()
    with torch.no_grad():
        for module in whole.modules():
            if isinstance(module, nn.Linear):
                module.weight *= 3 * torch.logspace(0.5, -1, module.in_features)
    state = whole.state_dict()
    for form in ({"weigh_outputs": False}, {}, {"pivoted": True}):
        model = tiny_classifier()
        model.load_state_dict(state)
        compress(model, [LowRankConfig(keep=0.6, sequential=True, **form)], calibration=data)
        errors.append(sum((logits(model, batch) - logits(whole, batch)).square().sum().item() for batch in data))
    assert errors[2] < errors[1] < errors[0]


def test_long_batches_are_cut_and_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a number the gradient is noise times what the model does, drawn row by row in the same order."""
    model, data = tiny_classifier(id2label={0: "score"}, label2id={"score": 0}), batches(1, labels=False)
    paths = modules_of(model, ("ffn",))
    whole = output_curvature(model, paths, data)
    monkeypatch.setattr("hfcompress.methods.low_rank.curvature._TOKENS", data[0]["input_ids"].shape[1])
    cut = output_curvature(model, paths, data)
    for path in paths:
        torch.testing.assert_close(cut[path], whole[path], atol=1e-6, rtol=1e-3)


# By the inputs alone


@pytest.mark.parametrize("rows", [60, 5])
@pytest.mark.parametrize("shape", [(14, 10), (10, 10), (6, 10)])
@pytest.mark.parametrize("whitened", [True, False])
def test_what_a_curvature_is_to_the_inputs_says_as_much(rows: int, shape: tuple[int, int], whitened: bool) -> None:
    weight, inputs, curvature = sample(0, *shape), sample(1, 50, 10), curved(rows, shape[0])
    moment = inputs.T @ inputs / 50 if whitened else None
    pulled = Pulled(weight.T @ curvature @ weight, curvature.trace().item())
    torch.testing.assert_close(energies(weight, moment, pulled), energies(weight, moment, curvature))
    up, down = truncate(weight, 4, moment, curvature)
    one, other = truncate(weight, 4, moment, pulled)
    torch.testing.assert_close(one @ other, up @ down, atol=1e-5, rtol=1e-5)


def test_directions_that_no_input_has_are_answered_by_those_that_are_kept() -> None:
    weight, inputs, curvature = sample(0, 14, 10), sample(1, 4, 10), curved()
    moment = inputs.T @ inputs / 4
    for rank in (3, 10):
        up, down = truncate(weight, rank, moment, pull(weight, curvature))
        assert torch.isfinite(up).all() and torch.isfinite(down).all()
        change = weight - up.double() @ down.double()
        error = weighed_error(change, moment, curvature + 0.01 * curvature.diagonal().mean() * torch.eye(14))
        tail = energies(weight, moment, pull(weight, curvature))[rank:].sum().item()
        assert error == pytest.approx(tail, rel=1e-4, abs=1e-10)


def test_nothing_heard_is_as_if_nothing_were_said() -> None:
    weight, nothing = sample(0, 6, 5), Pulled(torch.zeros(5, 5), 0.0)
    assert not energies(weight, None, nothing).any()
    plain, weighed = truncate(weight, 2), truncate(weight, 2, None, nothing)
    torch.testing.assert_close(weighed[0] @ weighed[1], plain[0] @ plain[1])
    with pytest.raises(CompressionError, match="the curvature holds values that are not finite"):
        truncate(weight, 2, None, Pulled(torch.full((5, 5), float("inf")), 1.0))


@given(
    matrix=arrays.arrays(
        np.float64,
        arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
        elements=st.sampled_from([0.0, 1.0, -1.0, 1e-12, 1e12, 3e-30, -7.5]) | st.floats(-1e6, 1e6, width=32),
    ),
    rank=st.integers(1, 12),
    half=st.booleans(),
)
@settings(max_examples=500, deadline=None)
def test_hostile_matrices_come_out_finite(matrix: np.ndarray, rank: int, half: bool) -> None:
    weight = torch.from_numpy(matrix).to(torch.bfloat16 if half else torch.float32)
    rows = weight.float() / max(1.0, weight.abs().max().item())
    known = Pulled(rows.T @ rows, rows.square().sum().item())
    up, down = truncate(weight, rank, rows.T @ rows, known)
    assert torch.isfinite(up).all() and torch.isfinite(down).all()
    assert up.shape == (len(weight), min(rank, *weight.shape))
    assert torch.isfinite(energies(weight, rows.T @ rows, known)).all()


@pytest.mark.parametrize(("family", "head"), [("bert", 1), ("gpt2", 1), ("llama", 1)])
def test_gradients_at_the_inputs_are_the_curvature_by_the_outputs(family: str, head: int) -> None:
    model, data = make(family, FAMILIES[family].heads[head]), [inputs_for(family, FAMILIES[family].heads[head])] * 2
    paths = modules_of(model, ("linear",))
    whole, pulled = output_curvature(model, paths, data), output_curvature(model, paths, data, pulled=paths)
    for path in paths:
        curvature, found = whole[path], pulled[path]
        assert isinstance(curvature, torch.Tensor) and isinstance(found, Pulled)
        wanted = pull(matrix_of(model, path), curvature)
        torch.testing.assert_close(found.moment, wanted.moment, rtol=1e-3, atol=1e-6 * wanted.moment.abs().max().item())
        assert found.trace == pytest.approx(wanted.trace, rel=1e-4)


def test_one_pass_tells_of_inputs_and_curvature() -> None:
    model, data = tiny_classifier(), batches(3)
    paths = modules_of(model, ("attention", "ffn"))
    known = learn(model, paths, LowRankConfig(), "whitened", data)
    apart = learn(model, paths, LowRankConfig(weigh_outputs=False), "whitened", data)
    assert set(known.inputs) == set(apart.inputs) and set(known.outputs) == set(apart.outputs)
    for path, wanted in apart.inputs.items():
        torch.testing.assert_close(known.inputs[path].second_moment, wanted.second_moment)
    for path, wanted in apart.outputs.items():
        torch.testing.assert_close(known.outputs[path], wanted)
    tall = {path for path, found in known.curvature.items() if isinstance(found, Pulled)}
    assert tall == set(modules_of(model, ("ffn_input",)))


def test_layers_together_are_weighed_whatever_is_known_of_each() -> None:
    model, data = tiny_classifier(), batches(2)
    paths = [f"encoder.layer.0.attention.self.{name}" for name in ("query", "key")]
    group = Group(tuple(paths), (64, 64), 64)
    whole = output_curvature(model, paths, data)
    mixed = whole | output_curvature(model, paths, data, pulled=paths[:1])
    moment = input_statistics(model, paths, data)[paths[0]].second_moment
    products = []
    for curvature in (whole, mixed):
        known = Knowledge(method="whitened", curvature=curvature).curvature_of(group, model)
        up, down = truncate(group.matrix(model), 8, moment, known)
        products.append(up @ down)
    torch.testing.assert_close(products[0], products[1], atol=1e-4, rtol=1e-3)


def test_other_inputs_need_the_curvature_itself() -> None:
    weight, known = (
        sample(0, 14, 10),
        InputStatistics(
            mean=torch.zeros(10),
            second_moment=torch.eye(10),
            reference_mean=torch.zeros(10),
            cross_moment=torch.eye(10),
        ),
    )
    with pytest.raises(ValueError, match="of its outputs the curvature is not known"):
        fit(weight, 2, "whitened", inputs=known, curvature=pull(weight, curved()))
