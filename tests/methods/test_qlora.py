"""Adapters on frozen quantized weights: trained, then kept apart, merged, or merged and quantized again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    TrainerCallback,
    TrainingArguments,
)

from hfcompress import DistillationConfig, LowRankConfig, QLoRAConfig, QuantizationConfig, compress
from hfcompress.errors import CheckpointError, CompressionError, ConfigError, MissingBackendError
from hfcompress.methods.quantization import QLoRAPart
from hfcompress.methods.registry import methods
from hfcompress.methods.trainer import CompressionTrainer
from hfcompress.modeling.adapters import ADAPTERS_FILE, adapted_layers
from hfcompress.modeling.checkpoint import needs_plugin, save
from hfcompress.modeling.layers.bitsandbytes import kind_of
from hfcompress.recipe.schema import Outline, order_problems
from tests.workshop import batches, logits, sentences, tiny_classifier, tiny_tokenizer

DATA = batches(1)[0]


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.step


def rows(count: int = 32) -> list[dict[str, Any]]:
    return [{**tiny_tokenizer()(row["sentence"]), "labels": row["label"]} for row in sentences(count)]


def train(model: Any, folder: Path, config: QLoRAConfig, *, steps: int = 12, stop: int = 99, **own: Any) -> Any:
    values = {"max_steps": steps, "save_steps": 2 if steps < 9 else 99, "learning_rate": 1e-2, "use_cpu": True}
    trainer = CompressionTrainer(
        model,
        TrainingArguments(str(folder), **values, disable_tqdm=True, logging_steps=1, report_to="none"),
        parts=[QLoRAPart(config)],
        train_dataset=rows(),
        data_collator=DataCollatorWithPadding(tiny_tokenizer()),
        callbacks=[StopAt(stop)],
        **own,
    )
    trainer.train(resume_from_checkpoint=True)
    return trainer


@pytest.mark.parametrize("then", ["keep", "merge", "requantize"])
@pytest.mark.parametrize("kind", ["nf4", "packed-4"])
def test_what_was_trained_is_saved_and_loaded(then: str, kind: str, tmp_path: Path) -> None:
    model = compress(tiny_classifier(), [QuantizationConfig(weights=kind, embeddings="int8")])
    before = logits(model, DATA)
    save(model, tmp_path / "base")
    trainer = train(model, tmp_path / "run", QLoRAConfig(rank=4, then=then, dropout=0.0), steps=30)
    said = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(said[-4:]) < 0.9 * sum(said[:4])
    assert trainer.findings[0]["adapters"] == 12 and trainer.findings[0]["then"] == then
    after = logits(model, DATA)
    assert (after - before).abs().max() > 0.05
    save(model, tmp_path / "1")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "1")
    assert torch.equal(logits(again, DATA), after)
    save(again, tmp_path / "2")
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "2"), DATA), after)
    query = again.bert.encoder.layer[0].attention.self.query
    assert (tmp_path / "1" / ADAPTERS_FILE).exists() == (then == "keep") == bool(adapted_layers(again))
    if then == "keep":
        assert kind_of(query.get_base_layer()) == kind
        base, kept = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "1"))
        assert base.keys() == kept.keys() and all(torch.equal(base[name], kept[name]) for name in base)
    else:
        assert kind_of(query) == (kind if then == "requantize" else None)
        assert all(each.requires_grad for name, each in model.named_parameters() if "norm" in name.lower())


def test_what_bitsandbytes_alone_could_read_is_kept_from_losing_its_adapters(tmp_path: Path) -> None:
    model = compress(tiny_classifier(intermediate_size=128), [QuantizationConfig(weights="nf4", embeddings=None)])
    assert not needs_plugin(model)
    train(model, tmp_path / "run", QLoRAConfig(rank=4, then="keep"), steps=2)
    after = logits(model, DATA)
    save(model, tmp_path / "kept")
    assert needs_plugin(model)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "kept")
    assert torch.equal(logits(again, DATA), after) and adapted_layers(again)


def test_adapters_that_cannot_be_read_are_not_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_classifier()
    QLoRAPart(QLoRAConfig(weights="packed-4", rank=2)).prepare(model)
    save(model, tmp_path)
    monkeypatch.setattr("hfcompress.modeling.adapters.find_spec", lambda name: None)
    with pytest.raises(MissingBackendError, match=r"hfcompress\[peft\]"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_a_float_model_is_quantized_first_and_learns_from_a_teacher(tmp_path: Path) -> None:
    model, teacher = tiny_classifier(), tiny_classifier(9)
    config = QLoRAConfig(weights="nf4-double", rank=4, targets=["query", "dense"], then="keep")
    own = {"teacher": teacher, "distillation": DistillationConfig()}
    trainer = train(model, tmp_path / "run", config, steps=2, **own)
    assert any("distil" in key or "soft" in key for entry in trainer.state.log_history for key in entry)
    assert kind_of(model.bert.encoder.layer[0].attention.self.value) == "nf4-double"
    trained = {name for name, each in model.named_parameters() if each.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    assert not any(kind_of(module) for module in teacher.modules())


def test_the_factors_of_a_low_rank_layer_are_adapted(tmp_path: Path) -> None:
    model = compress(tiny_classifier(), [LowRankConfig(targets=["ffn"], rank=16)])
    train(model, tmp_path / "run", QLoRAConfig(weights="int8", rank=2, targets=["ffn_input"]), steps=2)
    after = logits(model, DATA)
    save(model, tmp_path / "1")
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path / "1"), DATA), after)


def test_a_training_that_was_cut_off_ends_the_same(tmp_path: Path) -> None:
    config = QLoRAConfig(weights="nf4", rank=4, then="requantize")
    whole = tiny_classifier()  # seeds what adapters begin with
    train(whole, tmp_path / "whole", config, steps=4)
    cut = tiny_classifier()
    train(cut, tmp_path / "cut", config, steps=4, stop=2)
    with pytest.raises(CheckpointError, match="rank was 4 and is 2"):
        train(tiny_classifier(), tmp_path / "cut", QLoRAConfig(weights="nf4", rank=2), steps=4)
    resumed = tiny_classifier()
    train(resumed, tmp_path / "cut", config, steps=4)
    assert torch.equal(logits(resumed, DATA), logits(whole, DATA))
    assert not torch.equal(logits(cut, DATA), logits(whole, DATA))


def test_the_order_of_steps_lets_it_follow_quantization() -> None:
    known = methods()
    quantized = Outline("q", (known["quantization"],), False)
    assert order_problems([quantized, Outline("r", (known["qlora"], known["distillation"]), True)]) == []
    (problem,) = order_problems([quantized, Outline("r", (known["distillation"],), True)])
    assert "add `qlora` to the step" in problem.message
    (problem,) = order_problems([Outline("r", (known["qlora"],), False)])
    assert "works only in training" in problem.message


def test_what_cannot_be_is_refused_and_the_model_is_as_it_was() -> None:
    model = tiny_classifier()
    with pytest.raises(CompressionError, match="no linear layer's name ends in 'quary'"):
        QLoRAPart(QLoRAConfig(targets=["quary"])).prepare(model)
    with pytest.raises(CompressionError, match="no layer is quantized"):
        QLoRAPart(QLoRAConfig(weights=None)).prepare(model)
    assert not any(kind_of(module) for module in model.modules()) and not adapted_layers(model)
    QLoRAPart(QLoRAConfig()).prepare(model)
    with pytest.raises(CompressionError, match="has adapters already"):
        QLoRAPart(QLoRAConfig()).prepare(model)
    for values in ({"rank": 0}, {"dropout": 1.0}, {"then": "drop"}, {"weights": "int2"}, {"targets": []}):
        with pytest.raises(ConfigError):
            QLoRAConfig(**values)
