from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from hfcompress import LowRankConfig, QuantizationConfig, compress
from hfcompress.errors import CompressionError, ConfigError
from hfcompress.methods.low_rank import low_rank
from hfcompress.methods.low_rank.fitting import Fitted, Group, fit, matrix_of
from hfcompress.methods.low_rank.maths import truncate
from hfcompress.methods.low_rank.method import learn
from hfcompress.methods.low_rank.sensitivity import Probe, divergence, measure
from hfcompress.methods.registry import Context
from hfcompress.methods.statistics import InputStatistics, input_statistics
from hfcompress.modeling import surgery
from hfcompress.modeling.anatomy import base_model, modules_of
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.layers.low_rank import LowRankLinear
from tests.tiny_models import FAMILIES, class_of, inputs_for, make
from tests.workshop import batches, logits, tiny_classifier

FFN = ("ffn",)
FIRST = "encoder.layer.0.intermediate.dense"


def correlated_classifier(**changes: Any) -> torch.nn.Module:
    """Activations of a random model are nearly white, and all methods alike on them."""
    model = tiny_classifier(**changes)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight *= torch.logspace(0.5, -1, module.in_features)
                module.weight *= 3
                module.bias += 0.2 * torch.randn(module.bias.shape, generator=torch.Generator().manual_seed(3))
    return model


def error(config: LowRankConfig, data: list, **changes: Any) -> float:
    """How far the outputs are from the original's, on the calibration data itself."""
    whole = correlated_classifier(**changes)
    model = compress(correlated_classifier(**changes), [config], calibration=data)
    return sum((logits(model, batch) - logits(whole, batch)).square().sum().item() for batch in data)


def made(model: Any) -> dict[str, int]:
    return {name: module.rank for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["svd", "nmf", "whitened", "fisher"])
def test_values_that_are_not_finite_are_refused_with_the_layers_name(bad: float, method: Any) -> None:
    model = tiny_classifier()
    model.bert.encoder.layer[1].output.dense.weight.data[0, 0] = bad
    with pytest.raises(CompressionError, match=r"encoder\.layer\.1\.output\.dense: the weight"):
        compress(model, [LowRankConfig(targets=FFN, method=method)], calibration=batches(1))
    assert not made(model)


def test_calibrated_factors_are_closer_on_the_data_than_plain_ones() -> None:
    data = batches(4)
    errors = {method: error(LowRankConfig(method=method), data) for method in ("svd", "whitened", "fisher", "nmf")}
    assert errors["whitened"] < min(errors["svd"], errors["fisher"], errors["nmf"])


@pytest.mark.parametrize(("family", "neurons"), [("bert", "intermediate_size"), ("gpt2", "n_inner")])
def test_a_narrow_layer_is_known_by_its_outputs_where_they_are_enough(family: str, neurons: str) -> None:
    head, config = FAMILIES[family].heads[1], LowRankConfig(method="whitened")
    model, data = make(family, head, **{neurons: 80}), [inputs_for(family, head)]
    paths = modules_of(model, ("attention", "ffn"))
    known = learn(model, paths, config, "whitened", data)
    assert set(known.outputs) | set(known.inputs) == set(paths) and not set(known.outputs) & set(known.inputs)
    for path, gram in known.outputs.items():
        group = Group((path,), (len(gram),), matrix_of(model, path).shape[1])
        moment = input_statistics(model, [path], data)[path].second_moment
        product = matrix_of(model, path) @ moment @ matrix_of(model, path).T
        torch.testing.assert_close(known.gram_of(group), product, atol=1e-4, rtol=1e-3)
        assert known.weighting(group) is None
    assert set(known.outputs) == set(modules_of(model, ("ffn_output",)))
    assert not learn(model, paths, config.model_copy(update={"refit": True}), "whitened", data).outputs


def test_a_bias_and_a_target_beat_the_factors_alone_on_changed_inputs() -> None:
    generator = torch.Generator().manual_seed(0)
    old = torch.randn(200, 24, generator=generator) @ torch.randn(24, 24, generator=generator) + 2
    new = old + torch.randn(200, 24, generator=generator) + 0.5
    weight = torch.randn(16, 24, generator=generator)
    alone = InputStatistics(mean=new.mean(0), second_moment=new.T @ new / 200)
    paired = replace(alone, reference_mean=old.mean(0), cross_moment=old.T @ new / 200)

    def distance(fitted: Fitted) -> float:
        up, down = fitted.factors
        shift = torch.zeros(16) if fitted.shift is None else fitted.shift
        return (old @ weight.T - new @ (up @ down).T - shift).square().sum().item()

    plain, aimed = (distance(fit(weight, 6, "whitened", inputs=known)) for known in (alone, paired))
    assert distance(fit(weight, 6, "whitened", inputs=paired, shift=True)) < aimed < plain


@pytest.mark.parametrize("method", ["svd", "fisher", "nmf"])
def test_a_refit_lowers_the_error_on_the_data(method: Any) -> None:
    data = batches(4)
    one: Any = {"targets": ("ffn_output",), "method": method, "keep": 0.4}
    assert error(LowRankConfig(**one, refit=True, correct_bias=True), data) < error(LowRankConfig(**one), data)


def test_a_bias_takes_over_the_mean_error_of_its_layer() -> None:
    data, path = batches(2), "encoder.layer.0.intermediate.dense"
    whole, model = correlated_classifier(), correlated_classifier()
    compress(model, [LowRankConfig(targets=("ffn_input",), method="svd", correct_bias=True)], calibration=data)
    outputs: dict[str, list] = {"whole": [], "model": []}
    for name, each in (("whole", whole), ("model", model)):
        keep = outputs[name]
        each.bert.get_submodule(path).register_forward_hook(lambda module, seen, output, keep=keep: keep.append(output))
        for batch in data:
            logits(each, batch)
    real = [batch["attention_mask"].bool() for batch in data]
    means = {name: torch.cat([o[m] for o, m in zip(seen, real, strict=True)]).mean(0) for name, seen in outputs.items()}
    torch.testing.assert_close(means["model"], means["whole"], atol=1e-4, rtol=1e-4)


def test_a_sequential_update_fits_each_layer_to_what_the_ones_before_it_produce() -> None:
    """On the last layer of all it is the least squares answer to the changed inputs, which nothing beats."""
    data, path = batches(4), "encoder.layer.1.output.dense"
    model, whole = correlated_classifier(), correlated_classifier()
    compress(model, [LowRankConfig(targets=FFN, sequential=True, keep=0.4)], calibration=data)
    seen: dict[str, list] = {"model": [], "whole": []}
    for name, each in (("model", model), ("whole", whole)):
        hook = lambda module, arguments, name=name: seen[name].append(arguments[0].detach())  # noqa: E731
        each.bert.get_submodule(path).register_forward_pre_hook(hook)
        for batch in data:
            logits(each, batch)
    real = [batch["attention_mask"].bool() for batch in data]
    new, old = (
        torch.cat([x[m] for x, m in zip(seen[name], real, strict=True)]).double() for name in ("model", "whole")
    )
    weight = whole.bert.get_submodule(path).weight.detach().double()
    factors: Any = model.bert.get_submodule(path)

    def distance(product: torch.Tensor) -> float:
        return (old @ weight.T - new @ product.T).square().sum().item()

    ours = distance((factors.up.weight @ factors.down.weight).detach().double())
    up, down = truncate(weight.float(), factors.rank, (new.T @ new / len(new)).float())
    assert ours < distance((up @ down).double())


@pytest.mark.parametrize("family", ["bert", "albert", "t5", "gpt2", "llama", "mpnet", "deberta-v2", "whisper"])
def test_replaying_finished_layers_changes_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head = FAMILIES[family].heads[1]
    data = [inputs_for(family, head)]
    config = LowRankConfig(sequential=True, keep=0.6, multiple_of=2)
    results = []
    for replays in (True, False):
        model = make(family, head)
        if not replays:
            monkeypatch.setattr("hfcompress.methods.replay.Replay.layer_of", lambda self, path: None)
        low_rank(model, config, Context(calibration=data))
        assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
        with torch.no_grad():
            results.append(model(**data[0])[0])
    assert torch.equal(*results)


# Ranks


@pytest.mark.parametrize(
    "values",
    [
        {"keep": 0.0},
        {"keep": 1.0},
        {"targets": ()},
        {"targets": ("fnn",)},
        {"rank": 0},
        {"energy": 1.0},
        {"budget": 0.0},
        {"method": "qr"},
    ],
)
def test_bad_fields_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        LowRankConfig(**values)


def test_exactly_one_size_is_given() -> None:
    assert LowRankConfig().keep == 0.5
    assert (LowRankConfig(rank=8).keep, LowRankConfig(rank=8).rank) == (None, 8)
    assert LowRankConfig(**LowRankConfig(energy=0.9).model_dump()) == LowRankConfig(energy=0.9)
    with pytest.raises(ConfigError, match="exactly one of keep, rank, energy, budget must be given, not keep and rank"):
        LowRankConfig(keep=0.5, rank=8)
    with pytest.raises(ConfigError, match="not none"):
        LowRankConfig(keep=None)


def test_sequential_goes_with_whitening_only() -> None:
    with pytest.raises(ConfigError, match="sequential goes with the method whitened, not svd"):
        LowRankConfig(method="svd", sequential=True)


def test_a_fixed_rank_is_the_rank_of_every_layer_that_gets_smaller() -> None:
    model = compress(tiny_classifier(), [LowRankConfig(rank=35, method="svd")])
    # 35 * (64 + 64) is more than 64 * 64, and 35 * (64 + 96) less than 64 * 96.
    assert set(made(model).values()) == {35}
    assert all("intermediate" in name or "output.dense" in name for name in made(model))
    assert len(made(model)) == 4


def test_energy_gives_simpler_layers_lower_ranks() -> None:
    model = tiny_classifier()
    simple: Any = model.bert.encoder.layer[0].intermediate.dense
    simple.weight.data = torch.randn(96, 5) @ torch.randn(5, 64)
    compress(model, [LowRankConfig(targets=FFN, energy=0.99, method="svd", multiple_of=1)])
    assert made(model) == {"bert.encoder.layer.0.intermediate.dense": 5}  # the others would not get smaller


@pytest.mark.parametrize("sensitivity", ["loss", "outputs"])
def test_a_budget_is_kept_and_goes_where_the_loss_is(sensitivity: Any) -> None:
    data, model = batches(2), correlated_classifier()
    # What the last block says is hardly heard.
    model.bert.encoder.layer[1].output.dense.weight.data.mul_(1e-4)
    model.classifier.weight.data.mul_(10)
    for batch in data:  # a model that is right: all that changes it makes it worse
        batch["labels"] = logits(model, batch).argmax(-1)
    config = LowRankConfig(targets=FFN, budget=0.5, weigh_outputs=False, sensitivity=sensitivity, multiple_of=4)
    found = low_rank(model, config, Context(calibration=data))
    ranks = found["ranks"] | dict.fromkeys(found["left_whole"], 60)
    last = "encoder.layer.1.intermediate.dense", "encoder.layer.1.output.dense"
    first = "encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense"
    assert max(ranks[path] for path in last) < min(ranks[path] for path in first)
    kept = sum(min(rank * 160, 64 * 96) for rank in ranks.values())
    assert 0.45 < kept / (4 * 64 * 96) <= 0.5
    assert set(found["sensitivity"]) == {*first, *last}


def test_where_answers_start_is_a_label_too() -> None:
    model, places = make("bert", "QuestionAnswering"), torch.tensor([1, 2])
    batch = {**inputs_for("bert", "QuestionAnswering"), "start_positions": places, "end_positions": places + 1}
    config = LowRankConfig(budget=0.8, sensitivity="loss", weigh_outputs=False, multiple_of=1)
    found = low_rank(model, config, Context(calibration=[batch]))
    assert found["sensitivity"]


def test_one_row_of_positions_serves_all_examples_of_a_batch() -> None:
    model, (whole,) = tiny_classifier(), batches(1, 4)
    parts = [{name: value[rows] for name, value in whole.items()} for rows in (slice(3), slice(3, 4))]
    first = {"position_ids": torch.arange(whole["input_ids"].shape[1]).unsqueeze(0)} | parts[0]
    score = Probe(model, [first, parts[1]], "loss")._start
    assert score == pytest.approx(Probe(model, [whole], "loss")._start, rel=1e-5)


def test_measuring_leaves_the_model_as_it_was() -> None:
    data, model = batches(1), tiny_classifier()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    probe = Probe(model, data, "outputs")
    rises = measure(model, {FIRST: lambda: {4: torch.zeros(96, 64), 8: model.bert.get_submodule(FIRST).weight}}, probe)
    assert rises[FIRST][4] > 0 == rises[FIRST][8]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_divergence_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    before, after = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    wanted = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=before), torch.distributions.Categorical(logits=after)
    )
    assert divergence(before, after) == pytest.approx(wanted.mean().item(), rel=1e-5)
    assert divergence(before[:, :1], after[:, :1]) == pytest.approx((before - after)[:, 0].square().mean().item())


def test_a_model_without_a_head_is_scored_by_its_hidden_states() -> None:
    model = tiny_classifier().bert
    probe = Probe(model, batches(1, labels=False), "outputs")
    assert probe.rise() == 0
    model.encoder.layer[0].output.dense.weight.data.zero_()
    assert probe.rise() > 0


# Of the model


def test_what_would_not_get_smaller_is_left_whole() -> None:
    model = compress(tiny_classifier(), [LowRankConfig(targets=FFN, keep=0.5, method="svd")])
    before = made(model)
    assert len(before) == 4
    again = compress(model, [LowRankConfig(targets=FFN, keep=0.5, method="svd")])
    assert made(again) == before


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LowRankConfig(method="whitened"), "calibration data"),
        (LowRankConfig(method="fisher"), "calibration data"),
        (LowRankConfig(sequential=True), "calibration data"),
        (LowRankConfig(budget=0.5), "calibration data"),
        (LowRankConfig(method="svd", refit=True), "calibration data"),
    ],
)
def test_what_needs_data_says_what_to_pass(config: LowRankConfig, said: str) -> None:
    with pytest.raises(CompressionError, match=rf"{said}[\s\S]*calibration=\["):
        compress(tiny_classifier(), [config])


@pytest.mark.parametrize(
    "config", [LowRankConfig(method="fisher"), LowRankConfig(budget=0.5, sensitivity="loss")], ids=["fisher", "budget"]
)
def test_what_needs_labels_says_so(config: LowRankConfig) -> None:
    with pytest.raises(CompressionError, match="labels"):
        compress(tiny_classifier(), [config], calibration=batches(1, labels=False))


@pytest.mark.parametrize(
    "config",
    [
        LowRankConfig(method="fisher"),
        LowRankConfig(method="nmf", refit=True),
        LowRankConfig(sequential=True, correct_bias=True),
        LowRankConfig(budget=0.5),
    ],
    ids=["fisher", "nmf", "sequential", "budget"],
)
def test_what_is_saved_is_what_is_loaded(config: LowRankConfig, tmp_path: Path) -> None:
    data = batches(2)
    model = compress(correlated_classifier(), [config], calibration=data)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, data[0]), logits(model, data[0]))


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_factors_are_merged_back_into_the_stock_model(family: str, tmp_path: Path) -> None:
    head = FAMILIES[family].heads[1]
    model, batch = make(family, head), inputs_for(family, head)
    stock = type(model).__name__, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    compress(model, [LowRankConfig(keep=0.6, method="svd", multiple_of=2)])
    with torch.no_grad():
        wanted = model(**batch)[0]
    paths = [path for path in modules_of(model, ("attention", "ffn"))]
    factorized = [path for path in paths if isinstance(base_model(model).get_submodule(path), LowRankLinear)]
    assert factorized
    for path in factorized:
        surgery.defactorize(model, path)
    commit(model)
    assert (type(model).__name__, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}) == stock
    model.save_pretrained(tmp_path)
    again = class_of(family, head).from_pretrained(tmp_path)
    assert getattr(again.config, "quantization_config", None) is None
    with torch.no_grad():
        torch.testing.assert_close(again(**batch)[0], wanted, atol=1e-5, rtol=1e-4)


def test_merging_refuses_what_is_not_low_rank_or_quantized() -> None:
    model = tiny_classifier()
    path = "encoder.layer.0.intermediate.dense"
    with pytest.raises(CompressionError, match=f"{path} is a Linear"):
        surgery.defactorize(model, path)
    compress(model, [LowRankConfig(method="svd"), QuantizationConfig(embeddings=None)])
    with pytest.raises(CompressionError, match="cannot be cut"):
        surgery.defactorize(model, path)


def test_a_sequential_update_leaves_gradients_on() -> None:
    model = compress(tiny_classifier(), [LowRankConfig(keep=0.5, sequential=True)], calibration=batches(2))
    assert torch.is_grad_enabled()
    model(**batches(1)[0]).loss.backward()


def test_what_is_known_of_a_model_serves_several_made_of_it() -> None:
    data, config = batches(), LowRankConfig(keep=0.5, multiple_of=1)
    first = tiny_classifier(0)
    known = learn(first, modules_of(first, config.targets), config, "whitened", data)
    low_rank(first, config, Context(calibration=data))
    again = tiny_classifier(0)
    low_rank(again, config, Context(calibration=data), knowledge=known)
    assert torch.equal(logits(first, data[0]), logits(again, data[0]))
    plain = config.model_copy(update={"method": "svd"})
    with pytest.raises(ValueError, match="knowledge is that of whitened, and the config asks for svd"):
        low_rank(tiny_classifier(0), plain, Context(calibration=data), knowledge=known)


def test_what_one_budget_has_measured_serves_another(monkeypatch: pytest.MonkeyPatch) -> None:
    data, config = batches(2), LowRankConfig(targets=FFN, budget=0.5, weigh_outputs=False, multiple_of=4)
    knowledge = learn(model := tiny_classifier(), modules_of(model, FFN), config, "whitened", data)
    first = low_rank(model, config, Context(calibration=data), knowledge=knowledge)["sensitivity"]
    wider = config.model_copy(update={"budget": 0.6})
    measured = low_rank(tiny_classifier(), wider, Context(calibration=data))
    monkeypatch.setattr("hfcompress.methods.low_rank.method.measure", None)
    known = low_rank(tiny_classifier(), wider, Context(calibration=data), knowledge=replace(knowledge, measured=first))
    assert known == measured


@pytest.mark.parametrize(
    ("values", "data", "expected"),
    [
        ({}, True, ("whitened", True, "curvature")),
        ({}, False, ("svd", False, "outputs")),
        ({"weigh_outputs": False}, True, ("whitened", False, "outputs")),
        ({"sensitivity": "loss"}, True, ("whitened", True, "loss")),
        ({"method": "fisher"}, True, ("fisher", False, "outputs")),
    ],
)
def test_what_is_not_said_is_what_the_data_allow(
    values: dict[str, Any], data: bool, expected: tuple[str, bool, str]
) -> None:
    config = LowRankConfig(**values)
    method = config.method_with(data)
    assert (method, config.weighs_outputs_with(method), config.sensitivity_with(method)) == expected


def test_outputs_are_weighed_where_nothing_else_is_said() -> None:
    def factorised(**values: Any) -> torch.Tensor:
        model = correlated_classifier()
        low_rank(model, LowRankConfig(targets=FFN, keep=0.5, **values), Context(calibration=batches(2)))
        return logits(model, batches(1)[0])

    assert torch.equal(factorised(), factorised(weigh_outputs=True))
    assert not torch.allclose(factorised(), factorised(weigh_outputs=False))
