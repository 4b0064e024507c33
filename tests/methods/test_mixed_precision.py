"""What each part loses, and which bits it gets for that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

from hfcompress import QuantizationConfig, compress
from hfcompress.errors import CompressionError, ConfigError
from hfcompress.methods.quantization import quantization
from hfcompress.methods.quantization.choosing import Cost, after, moves, within
from hfcompress.methods.registry import Context
from hfcompress.modeling.layers.bitsandbytes import kind_of
from hfcompress.modeling.measure import weight_bytes
from tests.tiny_models import inputs_for, make
from tests.workshop import batches, logits, tiny_classifier

MIXED = {"weights": "mixed", "embeddings": "mixed"}


def sharp() -> torch.nn.Module:
    """A model that answers as if it knew: random ones hardly tell their inputs apart."""
    model = tiny_classifier()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4 if "classifier" in name else 3)
    return model


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# Plain numbers


def test_the_cheapest_bytes_go_first() -> None:
    costs = {
        "a": {"8": Cost(25, 1.0), "4": Cost(12, 3.0)},
        "b": {"8": Cost(50, 0.1), "4": Cost(25, 100.0)},
    }
    path = moves(costs, {"a": 100, "b": 200})
    assert [(move.part, move.kind) for move in path] == [("b", "8"), ("a", "8"), ("a", "4"), ("b", "4")]
    assert sum(move.loss for move in path) == pytest.approx(103)
    assert sum(move.saved for move in path) == 300 - 37
    assert [within(path, 300, most) for most in (300, 299, 150, 75, 74, 37, 36)] == [0, 1, 1, 2, 3, 4, None]
    assert after(path[:3]) == {"a": "4", "b": "8"}


def test_what_is_larger_and_worse_is_never_chosen() -> None:
    costs = {"a": {"8": Cost(50, 0.5), "4": Cost(25, 0.4), "fat": Cost(120, 0.0)}}
    assert [move.kind for move in moves(costs, {"a": 100})] == ["4"]


@given(
    st.lists(st.lists(st.tuples(st.integers(1, 99), st.floats(0, 10)), min_size=1, max_size=3), min_size=1, max_size=4)
)
@settings(deadline=None, max_examples=60)
def test_every_beginning_of_the_path_is_the_best_of_its_bytes(parts: list[list[tuple[int, float]]]) -> None:
    costs = {str(n): {str(k): Cost(*cost) for k, cost in enumerate(kinds)} for n, kinds in enumerate(parts)}
    path = moves(costs, dict.fromkeys(costs, 100))
    choices = [[(100, 0.0), *kinds] for kinds in parts]
    every = [(0, 0.0)]
    for kinds in choices:
        every = [(size + more, loss + worse) for size, loss in every for more, worse in kinds]
    for count in range(len(path) + 1):
        size = 100 * len(parts) - sum(move.saved for move in path[:count])
        loss = sum(move.loss for move in path[:count])
        assert min(worse for other, worse in every if other <= size) >= loss - 1e-6


# On a model


@pytest.mark.parametrize("by", ["layer", "block", "role"])
def test_what_each_part_loses_is_measured_and_the_model_is_as_it_was(by: str, tmp_path: Path) -> None:
    model, data = sharp(), batches(1)
    before, wanted = state(model), logits(model, data[0])
    config = QuantizationConfig(weights="nf4", sensitivity=by, candidates=["nf4", "packed-2"])
    broken = {"embedding_group_size": 48, "embeddings": "int4"}
    with pytest.raises(CompressionError, match="divide 64"):
        quantization(model, QuantizationConfig(**broken), Context(calibration=data))
    assert torch.equal(logits(model, data[0]), wanted)
    found = quantization(model, config, Context(calibration=data, cache_dir=tmp_path))["sensitivity"]
    names = set(found)
    if by == "block":
        assert {"encoder.layer.0.attention", "encoder.layer.1.ffn", "pooler.dense"} <= names
    assert ("query" in names) == (by == "role") and ("encoder.layer.0.output.dense" in names) == (by == "layer")
    tables = {name for name in names if "embeddings" in name}
    assert len(tables) == 3 and set(found["embeddings.word_embeddings"]) == {"int8", "int4"}
    linear = [found[name] for name in names - tables]
    assert sum(each["packed-2"] for each in linear) > 2 * sum(each["nf4"] for each in linear) > 0
    # All of it is there already: nothing is measured again, and floats are asked for first.
    again = sharp()
    assert state(again).keys() == before.keys()
    file = next(tmp_path.rglob("sensitivity-*.json"))
    stored = json.loads(file.read_text())
    raised = {part: {kind: cost | {"loss": 7.0} for kind, cost in kinds.items()} for part, kinds in stored.items()}
    file.write_text(json.dumps(raised))
    kept = quantization(again, config, Context(calibration=data, cache_dir=tmp_path))["sensitivity"]
    assert kept.keys() == found.keys() and all(loss == 7 for kinds in kept.values() for loss in kinds.values())


def test_running_from_the_middle_measures_the_same() -> None:
    from hfcompress.methods.probing import Probe
    from hfcompress.methods.quantization.sensitivity import Bench, measure, parts_of
    from hfcompress.modeling.anatomy import linear_layers
    from hfcompress.modeling.layers.bitsandbytes import Numerics

    model, data = sharp(), batches(2)
    # In whatever order parts are asked for: a layer is not run again once those before the next are finished.
    backwards = list(linear_layers(model))[::-1]
    bench = Bench(model, parts_of(model, backwards, "layer"), Numerics(), None)
    costs = measure(bench, ["packed-2"], data, None, "layer")
    probe = Probe(model, data, "outputs")
    for name, kinds in costs.items():
        with bench.standing_in({name: "packed-2"}):
            assert kinds["packed-2"].loss == pytest.approx(probe.rise(), rel=1e-3, abs=1e-7), name


@pytest.mark.parametrize("family", ["t5", "llama", "gpt2", "vit"])
def test_other_families_are_measured_too(family: str) -> None:
    heads = {"t5": "ConditionalGeneration", "llama": "CausalLM", "gpt2": "LMHeadModel", "vit": "ImageClassification"}
    model, inputs = make(family, heads[family]).eval(), inputs_for(family, heads[family])
    before = state(model)
    config = QuantizationConfig(weights="mixed", embeddings=None, budget=0.05, candidates=["packed-4"])
    with pytest.raises(CompressionError, match="cannot be had; the least is"):
        quantization(model, config, Context(calibration=[inputs]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def test_a_budget_is_kept_in_bytes_on_disk(tmp_path: Path) -> None:
    data = batches(1)
    sharp().save_pretrained(tmp_path / "whole")
    whole, diverged = weight_bytes(tmp_path / "whole"), []
    for budget in (0.3, 0.16):
        model = sharp()
        config = QuantizationConfig(budget=budget, **MIXED)
        found = quantization(model, config, Context(calibration=data, cache_dir=tmp_path / "cache"))
        model.save_pretrained(tmp_path / str(budget))
        # The rest is the file's header, which names every tensor.
        assert found["mixed"]["share_of_bytes"] <= budget
        stored = weight_bytes(tmp_path / str(budget))
        assert found["mixed"]["bytes"] <= stored <= budget * whole + 40_000
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / str(budget))
        assert torch.equal(logits(again, data[0]), logits(model, data[0]))
        diverged.append(found["mixed"]["divergence"])
        assert set(found["bits"]) == set(found["sensitivity"])
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1
    assert diverged[0] < diverged[-1]


def test_a_divergence_is_kept_by_the_whole_model() -> None:
    from hfcompress.methods.probing import Probe

    data, sizes = batches(2), []
    for most in (1e-4, 3e-3):
        model = sharp()
        probe = Probe(model, data, "outputs")
        config = QuantizationConfig(max_divergence=most, sensitivity="layer", **MIXED)
        found = quantization(model, config, Context(calibration=data))
        assert probe.rise() <= most * 1.01
        sizes.append(found["mixed"]["bytes"])
    assert sizes[1] < sizes[0]


def test_what_is_given_stays_and_counts() -> None:
    data = batches(2)
    roles = {"attention": "int8", "ffn": "mixed"}
    config = QuantizationConfig(weights=None, roles=roles, embeddings="int4", budget=0.7, candidates=["packed-4"])
    model = sharp()
    found = quantization(model, config, Context(calibration=data))
    assert found["linear_layers"]["int8"] == 8 and found["embeddings"] == "int4"
    assert set(found["sensitivity"]) == {"encoder.layer.0.ffn", "encoder.layer.1.ffn"}
    assert kind_of(model.bert.pooler.dense) is None
    with pytest.raises(CompressionError, match="what is not mixed alone makes"):
        worse = QuantizationConfig(roles={"attention": "binary"}, max_divergence=1e-6, **MIXED)
        quantization(sharp(), worse, Context(calibration=data))


def test_what_makes_no_sense_is_refused() -> None:
    for values, said in (
        (MIXED, "exactly one of budget and max_divergence, not neither"),
        (MIXED | {"budget": 0.2, "max_divergence": 0.1}, "not budget and max_divergence"),
        ({"budget": 0.2}, "nothing is mixed"),
        (MIXED | {"budget": 1.5}, "less than 1"),
        (MIXED | {"budget": 0.2, "candidates": []}, "at least 1"),
    ):
        with pytest.raises(ConfigError, match=said):
            QuantizationConfig(**values)
    with pytest.raises(CompressionError, match="need calibration data, and there is none"):
        compress(tiny_classifier(), [QuantizationConfig(budget=0.2, **MIXED)])
    with pytest.raises(CompressionError, match="batches hold pixels; the model reads input_ids"):
        images = [{"pixels": torch.zeros(1)}]
        compress(tiny_classifier(), [QuantizationConfig(budget=0.2, **MIXED)], calibration=images)
