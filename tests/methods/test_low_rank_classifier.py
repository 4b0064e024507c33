"""The layer of a head that scores the classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling

from hfcompress import LowRankConfig, compress
from hfcompress.errors import CheckpointError, CompressionError
from hfcompress.methods.low_rank import low_rank
from hfcompress.methods.low_rank.streaming import stream_factorize
from hfcompress.methods.registry import Context
from hfcompress.modeling import surgery
from hfcompress.modeling.anatomy import classifier_layers, module_at
from hfcompress.modeling.densify import densify
from hfcompress.modeling.layers.low_rank import LowRankLinear, PivotedLinear
from hfcompress.modeling.structure import describe, rebuild
from tests.tiny_models import inputs_for, make, run

CLASSES, PATH = 40, "../classifier"
CLASSIFIER = LowRankConfig(targets=("classifier",), keep=0.6, method="svd", multiple_of=1)


def vision(**config: Any) -> Any:
    torch.manual_seed(0)
    return make("vit", "ImageClassification", num_labels=CLASSES, attention="sdpa", **config).eval()


def images(count: int = 4) -> dict[str, torch.Tensor]:
    pixels = inputs_for("vit", "ImageClassification")["pixel_values"]
    return {"pixel_values": torch.randn(count, *pixels.shape[1:], generator=torch.Generator().manual_seed(count))}


@pytest.mark.parametrize("pivoted", [False, True])
def test_it_is_factorized_and_comes_back(pivoted: bool, tmp_path: Path) -> None:
    model, data = vision(), images()
    weight = model.classifier.weight.detach().clone()
    found = low_rank(model, CLASSIFIER.model_copy(update={"pivoted": pivoted}), Context())
    assert found["ranks"] == {PATH: model.classifier.rank} and type(model.classifier) in (LowRankLinear, PivotedLinear)
    assert sum(each.numel() for each in model.classifier.parameters() if each.dim() == 2) <= 0.6 * weight.numel()
    outputs = run(model, data)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert type(again.classifier) is type(model.classifier)
    assert all(torch.equal(*each) for each in zip(run(again, data), outputs, strict=True))
    densify(tmp_path / "saved", tmp_path / "dense")
    dense = AutoModelForImageClassification.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(run(dense, data)[0], outputs[0], atol=1e-5, rtol=1e-4)
    surgery.defactorize(again, PATH)
    assert describe(again) == {} and type(again.classifier) is torch.nn.Linear
    torch.testing.assert_close(run(again, data)[0], outputs[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "values",
    [
        {"keep": 0.5},
        {"budget": 0.6},
        {"energy": 0.9},
        {"keep": 0.5, "correct_bias": True},
        {"budget": 0.6, "pivoted": True},
    ],
    ids=lambda values: " ".join(values),
)
def test_it_is_fitted_with_the_others(values: dict[str, Any], tmp_path: Path) -> None:
    model, whole, data = vision(), vision(), [images(4), images(5)]
    config = LowRankConfig(targets=("attention", "ffn", "classifier"), multiple_of=1, **values)
    found = low_rank(model, config, Context(calibration=data))
    assert PATH in found["ranks"] or PATH in found["left_whole"]
    assert (run(model, data[0])[0] - run(whole, data[0])[0]).norm() < run(whole, data[0])[0].norm()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert all(torch.equal(*each) for each in zip(run(again, data[0]), run(model, data[0]), strict=True))


def test_other_heads_and_none_are_loaded_from_it(tmp_path: Path) -> None:
    model = compress(vision(), [LowRankConfig(targets=("ffn", "classifier"), keep=0.6, method="svd", multiple_of=1)])
    model.save_pretrained(tmp_path)
    bare = AutoModel.from_pretrained(tmp_path, add_pooling_layer=False)
    hidden = bare(**images()).last_hidden_state
    wanted = model(**images(), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(hidden, model.vit.layernorm(wanted), atol=1e-5, rtol=1e-5)
    assert set(describe(bare)) == {"low_rank"} and PATH not in describe(bare)["low_rank"]
    assert AutoModelForMaskedImageModeling.from_pretrained(tmp_path).vit is not None


def test_a_checkpoint_is_streamed_into_the_same(tmp_path: Path) -> None:
    whole, data = make("bert", "SequenceClassification", num_labels=CLASSES, attention="sdpa"), inputs_for("bert")
    whole.save_pretrained(tmp_path / "whole")
    stream_factorize(tmp_path / "whole", tmp_path / "streamed", CLASSIFIER, progress=False)
    streamed = type(whole).from_pretrained(tmp_path / "streamed")
    assert torch.equal(run(streamed, data)[0], run(compress(whole, [CLASSIFIER]), data)[0])


@pytest.mark.parametrize(
    ("family", "head", "paths"),
    [
        ("bert", "SequenceClassification", [PATH]),
        ("bert", "TokenClassification", [PATH]),
        ("bert", "Model", []),
        ("bert", "MaskedLM", []),
        ("vit", "ImageClassification", [PATH]),
    ],
)
def test_it_is_what_scores_the_classes(family: str, head: str, paths: list[str]) -> None:
    model = make(family, head)
    assert list(classifier_layers(model)) == paths
    assert all(module_at(model, path) is model.classifier for path in paths)


def test_a_model_without_one_says_so() -> None:
    with pytest.raises(CompressionError, match="LlamaForCausalLM has no classifier"):
        compress(make("llama", "CausalLM"), [CLASSIFIER])


def test_a_rank_that_it_cannot_have_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"structure\.low_rank: '../classifier' must be an integer from 1 to"):
        rebuild(vision(), {"low_rank": {PATH: 10**6}})
