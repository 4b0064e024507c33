from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from hfcompress import LayerDroppingConfig, LowRankConfig, QuantizationConfig, StructuredPruningConfig, compress
from hfcompress.errors import CheckpointError, CompressionError, ConfigError
from hfcompress.methods.layer_dropping import _Layers, _skip, layer_dropping, least_important
from hfcompress.methods.registry import Context
from hfcompress.modeling.anatomy import architecture_of, attention_blocks, base_model, feed_forward_blocks
from hfcompress.modeling.checkpoint import needs_plugin
from hfcompress.modeling.densify import stock_twin
from hfcompress.modeling.depth import evenly
from hfcompress.modeling.structure import rebuild
from hfcompress.modeling.surgery import remove_block
from tests.tiny_models import FAMILIES, inputs_for, make, run
from tests.workshop import batches, logits, tiny_classifier


@given(st.integers(2, 40), st.data())
def test_what_is_spread_starts_at_the_first_and_has_even_gaps(depth: int, data: st.DataObject) -> None:
    drop = data.draw(st.integers(1, depth - 1))
    kept = evenly(depth, depth - drop)
    assert len(kept) == depth - drop and kept[0] == 0 and kept[-1] < depth
    gaps = {later - earlier for earlier, later in pairwise(kept)}
    assert not gaps or (max(gaps) - min(gaps) <= 1 and min(gaps) >= 1)


def test_layers_are_chosen_one_beside_the_other() -> None:
    # Alone 0 and 1 cost least, but once one of them is gone the other is needed.
    def cost(gone: tuple[int, ...]) -> dict[int, float]:
        alone = {0: 1.0, 1: 2.0, 2: 3.0}
        return {n: value + (9 if {0, 1} <= {*gone, n} else 0) for n, value in alone.items() if n not in gone}

    assert least_important(3, 2, cost) == [1]


@pytest.mark.parametrize(("which", "kept"), [("first", [2, 3]), ("last", [0, 1]), ("spread", [0, 2])])
def test_the_layers_named_stay_and_the_result_is_stock(which: str, kept: list[int], tmp_path: Path) -> None:
    model, data = tiny_classifier(num_hidden_layers=4), batches(1)[0]
    layers = list(model.bert.encoder.layer)
    compress(model, [LayerDroppingConfig(drop=2, which=which)])
    assert list(model.bert.encoder.layer) == [layers[index] for index in kept]
    assert model.config.num_hidden_layers == 2 and not needs_plugin(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, data), logits(model, data))


@pytest.mark.parametrize("labels", [True, False])
def test_a_layer_that_does_nothing_goes_first(labels: bool) -> None:
    model = make("llama", "SequenceClassification", num_hidden_layers=4)
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    inputs = inputs_for("llama", "SequenceClassification")
    before, whole = run(model, inputs)[0], copy.deepcopy(model)
    batch = dict(inputs, labels=torch.tensor([0, 1])) if labels else inputs
    findings = layer_dropping(model, LayerDroppingConfig(), Context(calibration=[batch]))
    assert findings["measure"] == ("loss" if labels else "divergence")
    costs = findings["costs"][0]
    if labels:
        # By the loss another layer may even do harm; without this one it is what it was.
        assert findings["kept"] == [index for index in range(4) if index != min(costs, key=costs.__getitem__)]
        with torch.no_grad():
            assert costs[1] == pytest.approx(whole(**batch).loss.item(), abs=1e-6)
    else:
        assert costs[1] == pytest.approx(0, abs=1e-6)
        assert findings["kept"] == [0, 2, 3]
        torch.testing.assert_close(run(model, inputs)[0], before)


def test_what_is_measured_is_what_dropping_does() -> None:
    model, data = tiny_classifier(num_hidden_layers=3), batches(2)
    findings = layer_dropping(model, LayerDroppingConfig(drop=2), Context(calibration=data))
    with torch.no_grad():
        loss = sum(model(**batch).loss.item() for batch in data) / len(data)
    assert loss == pytest.approx(min(findings["costs"][-1].values()), rel=1e-4)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_trials_are_what_skipping_does_and_run_no_layer_before(family: str) -> None:
    model, inputs = make(family), inputs_for(family)
    ran: list[int] = []
    for stack in (each for each in architecture_of(model).stacks if not each.shared):
        layers: Any = base_model(model).get_submodule(stack.layers)
        parts = _Layers(layers)
        sets: Any = ((), (0,), (len(layers) - 1,))
        for gone, number in ((gone, number) for number in range(stack.first_stays, len(layers)) for gone in sets):
            if number in gone or (0 in gone and stack.first_stays):
                continue
            with torch.no_grad():
                parts.see(model, inputs, gone)
            inner = [next(layer.children()) for layer in layers]
            watch = [each.register_forward_pre_hook(lambda *_, at=at: ran.append(at)) for at, each in enumerate(inner)]
            ran.clear()
            with parts.without(gone, number):
                found = run(model, inputs)
            assert not {at for at in ran if at <= number}
            hooks = [layers[each].register_forward_hook(_skip, with_kwargs=True) for each in (*gone, number)]
            wanted = run(model, inputs)
            assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
            for handle in (*watch, *hooks):
                handle.remove()
        assert not any("forward" in vars(layer) for layer in layers)


def test_pruned_and_quantized_models_lose_layers_too(tmp_path: Path) -> None:
    data = batches(2)
    chain = [StructuredPruningConfig(heads=0.4), QuantizationConfig(), LayerDroppingConfig()]
    model = compress(tiny_classifier(num_hidden_layers=3), chain, calibration=data)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, data[0]), logits(model, data[0]))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LayerDroppingConfig(drop=2), "reachable: up to 1"),
        (LayerDroppingConfig(stack="encoder.layers"), "encoder.layer"),
        (LayerDroppingConfig(which="importance"), "calibration"),
    ],
)
def test_what_cannot_be_done_is_refused(config: LayerDroppingConfig, message: str) -> None:
    model = tiny_classifier()
    with pytest.raises(CompressionError, match=message):
        compress(model, [config])
    assert model.config.num_hidden_layers == 2


def test_several_stacks_must_be_told_apart() -> None:
    with pytest.raises(CompressionError, match="name one"):
        compress(make("t5"), [LayerDroppingConfig()])


@pytest.mark.parametrize("stack", [None, "encoder.albert_layer_groups.*.albert_layers"])
@pytest.mark.parametrize("which", ["auto", "first", "last", "spread"])
def test_a_layer_that_is_run_over_and_over_runs_less_often(which: str, stack: str | None, tmp_path: Path) -> None:
    model, inputs = make("albert", "SequenceClassification"), inputs_for("albert", "SequenceClassification")
    shallow = make("albert", "SequenceClassification", num_hidden_layers=1)
    shallow.load_state_dict(model.state_dict())
    config = LayerDroppingConfig(drop=2, which=which, stack=stack)
    found = layer_dropping(model, config, Context(calibration=[inputs]))
    assert (found["which"], found["of"], len(found["kept"])) == ("last" if which == "auto" else which, 3, 1)
    assert model.config.num_hidden_layers == 1 and not needs_plugin(model)
    assert torch.equal(run(model, inputs)[0], run(shallow, inputs)[0])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert torch.equal(run(again, inputs)[0], run(model, inputs)[0])


@pytest.mark.parametrize(
    ("values", "which", "problem"),
    [({}, "importance", "one and the same"), ({"num_hidden_groups": 3}, "last", "only where all are one group")],
)
def test_runs_of_one_layer_that_cannot_go_are_refused(values: dict, which: str, problem: str) -> None:
    model = make("albert", "SequenceClassification", **values)
    with pytest.raises(CompressionError, match=problem):
        compress(model, [LayerDroppingConfig(which=which)])
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize("values", [{"drop": 0}, {"drop": True}, {"which": "middle"}])
def test_bad_fields_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError):
        LayerDroppingConfig(**values)


@pytest.mark.parametrize("part", ["attention", "ffn"])
@pytest.mark.parametrize("family", ["bert", "mpnet", "distilbert"])
def test_a_removed_block_leaves_its_mean_and_reloads(family: str, part: str, tmp_path: Path) -> None:
    model = make(family, "SequenceClassification")
    inputs = inputs_for(family, "SequenceClassification")
    block = (attention_blocks if part == "attention" else feed_forward_blocks)(model)[-1]
    given: list[torch.Tensor] = []
    handle = block.at(block.spec.output).register_forward_hook(lambda module, arguments, output: given.append(output))
    run(model, inputs)
    handle.remove()
    config = LayerDroppingConfig(part=part, which="last")
    found = layer_dropping(model, config, Context(calibration=[inputs]))
    assert found["removed"] == [block.name] and found["which"] == "last"
    mean = given[0][inputs["attention_mask"].bool()].mean(0)
    assert torch.allclose(block.at(block.spec.output).bias, mean, atol=1e-5)
    assert block.name not in [each.name for each in (*attention_blocks(model), *feed_forward_blocks(model))]
    model.save_pretrained(tmp_path / "1")
    again = type(model).from_pretrained(tmp_path / "1")
    assert torch.allclose(run(again, inputs)[0], run(model, inputs)[0], atol=1e-5)
    further = [StructuredPruningConfig(heads=0.3, neurons=0.3), LowRankConfig(keep=0.6), LayerDroppingConfig(part=part)]
    compress(again, further, calibration=[inputs])
    again.save_pretrained(tmp_path / "2")
    assert torch.allclose(run(type(model).from_pretrained(tmp_path / "2"), inputs)[0], run(again, inputs)[0], atol=1e-5)


def test_the_block_that_does_nothing_goes_first() -> None:
    model = make("llama", "SequenceClassification", num_hidden_layers=4)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
    inputs = inputs_for("llama", "SequenceClassification")
    before = run(model, inputs)[0]
    found = layer_dropping(model, LayerDroppingConfig(part="ffn"), Context(calibration=[inputs]))
    assert found["removed"] == ["layers.2.mlp.gate_proj"] and found["which"] == "importance"
    assert torch.allclose(run(model, inputs)[0], before, atol=1e-6)


def test_where_no_constant_can_stay_a_block_is_judged_without_it() -> None:
    model = make("llama", "SequenceClassification", num_hidden_layers=4, pad_token_id=0)
    inputs = inputs_for("llama", "SequenceClassification")
    inputs["labels"] = torch.arange(len(inputs["input_ids"])) % 2
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.mul_(20)
    found = layer_dropping(model, LayerDroppingConfig(part="ffn"), Context(calibration=[inputs]))
    with torch.no_grad():
        loss = model(**inputs).loss.item()
    assert loss == pytest.approx(min(found["costs"][-1].values()), rel=1e-5)


@pytest.mark.parametrize(
    ("family", "part", "drop", "problem"),
    [
        ("llama", "attention", 1, "cannot be taken out in this family"),
        ("albert", "ffn", 0, "run over and over"),
        ("bert", "attention", 3, "reachable: up to 2"),
    ],
)
def test_blocks_that_cannot_go_are_refused(family: str, part: str, drop: int, problem: str) -> None:
    model = make(family, "SequenceClassification")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CompressionError, match=problem):
        if drop:
            layer_dropping(model, LayerDroppingConfig(part=part, drop=drop), Context())
        else:
            remove_block(feed_forward_blocks(model)[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_blocks_that_were_removed_come_back_in_stock_shapes(tmp_path: Path) -> None:
    model = make("mpnet", "SequenceClassification")
    inputs = inputs_for("mpnet", "SequenceClassification")
    parts = [LayerDroppingConfig(part="attention"), LayerDroppingConfig(part="ffn", which="first")]
    compress(model, parts, calibration=[inputs])
    stock_twin(model).save_pretrained(tmp_path)
    twin = type(model).from_pretrained(tmp_path)
    assert not needs_plugin(twin)
    assert torch.allclose(run(twin, inputs)[0], run(model, inputs)[0], atol=1e-5)


def test_a_record_that_removes_what_cannot_go_is_refused() -> None:
    model = make("llama", "SequenceClassification")
    with pytest.raises(CheckpointError, match=r"structure\.removed"):
        rebuild(model, {"removed": {"layers.0.self_attn": True}})
    with pytest.raises(CheckpointError, match="must be true"):
        rebuild(model, {"removed": {"layers.0.mlp.gate_proj": 1}})
