from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    TrainerCallback,
    TrainingArguments,
)

from hfcompress import QuantizationAwareConfig, QuantizationConfig, StructuredPruningConfig, compress
from hfcompress.errors import CheckpointError, CompressionError
from hfcompress.methods.quantization_aware import QuantizationAwarePart
from hfcompress.methods.trainer import CompressionTrainer
from hfcompress.modeling.anatomy import linear_layers
from hfcompress.modeling.densify import densify
from hfcompress.modeling.layers.packed_linear import PACKED_KINDS, PackedLinear
from hfcompress.modeling.structure import rebuild
from tests.tiny_models import inputs_for, make, run
from tests.workshop import batches, logits, sentences, tiny_classifier, tiny_tokenizer


def train(model: torch.nn.Module, steps: int = 40) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    data, losses = batches(4), []
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**data[step % len(data)]).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("scales", ["fitted", "learned"])
@pytest.mark.parametrize("kind", PACKED_KINDS)
def test_what_was_trained_is_what_is_packed_and_reloaded(kind: str, scales: str, tmp_path: Path) -> None:
    model = tiny_classifier()
    names = set(model.state_dict())
    part = QuantizationAwarePart(QuantizationAwareConfig(weights=kind, scales=scales, embeddings=None))
    part.before_training(model, None)
    own = set(model.state_dict()) - names
    assert {name.rpartition(".")[2] for name in own} == ({"step", "step_start"} if scales == "learned" else set())
    part.begin(model, 40, torch.device("cpu"))
    losses = train(model)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    data = batches(1)[0]
    under_rounding = logits(model.eval(), data)
    if scales == "learned":
        steps = [value for name, value in model.named_parameters() if name.endswith(".step")]
        assert len(steps) == 13 and all((step != 1).any() for step in steps)
    found = part.end(model)
    assert set(model.state_dict()) & own == set()
    assert found == {"linear_layers": {kind: 13}, "embeddings": None}
    torch.testing.assert_close(logits(model, data), under_rounding, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, data), logits(model, data))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_slice(name) for name in model.state_dict() if "encoder.layer" in name}
        floats = {name: part.get_shape() for name, part in stored.items() if part.get_dtype() != "U8"}
    # Beside biases, norms, scales and the one number that says the dtype, no float is left in the layers.
    assert all(len(shape) == 1 or name.endswith(".scales") for name, shape in floats.items()), floats


@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "mpnet", "vit", "whisper"])
def test_families_reload_what_they_compute(family: str, tmp_path: Path) -> None:
    model = make(family).eval()
    compress(model, [QuantizationAwareConfig(weights="packed-4")])
    packed = sum(isinstance(module, PackedLinear) for module in model.modules())
    assert packed > 0
    wanted = run(model, inputs_for(family))
    model.save_pretrained(tmp_path)
    assert all(
        map(
            torch.equal,
            run(type(model).from_pretrained(tmp_path, attn_implementation="eager").eval(), inputs_for(family)),
            wanted,
        )
    )


def test_transposed_layers_are_trained_too(tmp_path: Path) -> None:
    model = make("gpt2", "LMHeadModel")
    part = QuantizationAwarePart(QuantizationAwareConfig(weights="ternary", embeddings=None))
    part.begin(model, 1, torch.device("cpu"))
    inputs = inputs_for("gpt2", "LMHeadModel")
    under_rounding = run(model.eval(), inputs)
    part.end(model)
    for now, was in zip(run(model, inputs), under_rounding, strict=True):
        torch.testing.assert_close(now, was, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert all(map(torch.equal, run(again, inputs), run(model, inputs)))


def test_it_follows_pruning_and_takes_embeddings_along(tmp_path: Path) -> None:
    model, data = tiny_classifier(), batches(2)
    chain = [
        StructuredPruningConfig(heads=0.4, neurons=0.3),
        QuantizationAwareConfig(attention="packed-8", ffn="binary", weights=None, embeddings="int4"),
    ]
    compress(model, chain, calibration=data)
    model.save_pretrained(tmp_path / "small")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "small")
    assert torch.equal(logits(again, data[0]), logits(model, data[0]))
    densify(tmp_path / "small", tmp_path / "dense")
    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "dense")
    assert not any(isinstance(module, PackedLinear) for module in dense.modules())
    torch.testing.assert_close(logits(dense, data[0]), logits(model, data[0]), rtol=1e-4, atol=1e-5)


def test_what_is_quantized_is_not_quantized_again() -> None:
    model = compress(tiny_classifier(), [QuantizationAwareConfig(weights="ternary")])
    with pytest.raises(CompressionError, match="quantized already"):
        compress(model, [QuantizationAwareConfig(weights="packed-8")])
    with pytest.raises(CompressionError, match="quantized already"):
        compress(model, [QuantizationConfig(weights="int8")])
    with pytest.raises(CompressionError, match="name no layer"):
        compress(tiny_classifier(), [QuantizationAwareConfig(weights=None)])
    with pytest.raises(CompressionError, match="embedding_group_size must divide 64"):
        part = QuantizationAwarePart(QuantizationAwareConfig(embedding_group_size=24))
        part.begin(tiny_classifier(), 1, torch.device("cpu"))


def test_a_kind_that_is_unknown_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"structure\.packed.*'packed-3'; allowed: packed-8"):
        rebuild(tiny_classifier(), {"packed": {"encoder.layer.*.output.dense": "packed-3"}})


def test_head_layers_stay_float() -> None:
    model = compress(tiny_classifier(), [QuantizationAwareConfig(weights="ternary")])
    assert type(model.classifier) is torch.nn.Linear
    assert all(isinstance(module, PackedLinear) for module in linear_layers(model).values())


def test_scales_are_learned_in_training_only() -> None:
    with pytest.raises(CompressionError, match="learned exists only in training"):
        compress(tiny_classifier(), [QuantizationAwareConfig(scales="learned")])


def test_a_resumed_training_with_learned_scales_ends_the_same(tmp_path: Path) -> None:
    rows = [{**tiny_tokenizer()(row["sentence"]), "labels": row["label"]} for row in sentences(16)]

    def run(folder: Path, stop: int) -> dict[str, torch.Tensor]:
        model = tiny_classifier()
        values = {"max_steps": 4, "save_steps": 2, "learning_rate": 1e-3, "use_cpu": True, "report_to": "none"}
        part = QuantizationAwarePart(QuantizationAwareConfig(weights="ternary", scales="learned", embeddings=None))
        trainer = CompressionTrainer(
            model,
            TrainingArguments(str(folder), **values, disable_tqdm=True),
            parts=[part],
            train_dataset=rows,
            data_collator=DataCollatorWithPadding(tiny_tokenizer()),
            callbacks=[StopAt(stop)],
        )
        trainer.train(resume_from_checkpoint=True)
        return model.state_dict()

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 2)
    resumed = run(tmp_path / "cut", 4)
    assert any(name.endswith(".codes") for name in whole)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = state.global_step >= self.step
