"""What users do with any transformers checkpoint, done with a compressed one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

from hfcompress import LowRankConfig, QuantizationConfig, StructuredPruningConfig, compress
from hfcompress.modeling.checkpoint import needs_plugin
from hfcompress.modeling.layers.bitsandbytes import settle_all
from tests.workshop import batches, logits, tiny_classifier, tiny_tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    configs = [StructuredPruningConfig(heads=0.4, neurons=0.3), LowRankConfig(keep=0.6)]
    compress(tiny_classifier(), configs, calibration=batches(2)).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_pipeline_answers_as_the_model_does(folder: Path) -> None:
    classify = pipeline("text-classification", model=str(folder))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    scores = logits(model, dict(tiny_tokenizer()("the film was good", return_tensors="pt"))).softmax(-1)[0]
    (answer,) = classify("the film was good")
    assert answer["label"] == model.config.id2label[int(scores.argmax())]
    assert answer["score"] == pytest.approx(float(scores.max()), rel=1e-5)


@pytest.mark.parametrize(
    "arguments", [{"device_map": "cpu"}, {"attn_implementation": "eager"}, {"low_cpu_mem_usage": True}]
)
def test_stock_arguments_load_the_same_model(folder: Path, arguments: dict) -> None:
    wanted = logits(AutoModelForSequenceClassification.from_pretrained(folder), batches(1)[0])
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, **arguments)
    torch.testing.assert_close(logits(loaded, batches(1)[0]), wanted, rtol=1e-5, atol=1e-6)


# peft 0.21 reads a name that transformers 5.23 has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("quantized", [False, True])
def test_lora_trains_on_the_factors(folder: Path, quantized: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = AutoModelForSequenceClassification.from_pretrained(folder)
    if quantized:
        compress(model, [QuantizationConfig(weights="nf4")])
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["down", "up"], task_type="SEQ_CLS"))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    batch = batches(1)[0]
    losses = []
    for _ in range(8):
        loss = adapted.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_half_precision_and_back(folder: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(logits(model.float(), batches(1)[0])).all()


@pytest.mark.parametrize("weights", ["int8", "nf4"])
@pytest.mark.parametrize("auto", [AutoModel, AutoModelForTokenClassification, AutoModelForQuestionAnswering])
def test_another_head_goes_on_an_ordinary_bitsandbytes_file(auto: type, weights: str, tmp_path: Path) -> None:
    batch = {name: tensor for name, tensor in batches(1)[0].items() if name != "labels"}
    model = compress(tiny_classifier(intermediate_size=128), [QuantizationConfig(weights=weights, embeddings=None)])
    model.save_pretrained(tmp_path)
    assert not needs_plugin(model)  # its file is one of bitsandbytes, and no code of ours sees it load
    loaded = auto.from_pretrained(tmp_path).eval()
    settle_all(loaded)
    with torch.no_grad():
        assert loaded(**batch)[0].isfinite().all()
        wanted, found = (getattr(each, "bert", each)(**batch)[0] for each in (model, loaded))
    assert torch.equal(wanted, found)
