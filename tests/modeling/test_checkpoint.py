from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import (
    BertForSequenceClassification,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

from hfcompress import QuantizationConfig, compress
from hfcompress.modeling.checkpoint import commit, needs_plugin, save
from hfcompress.modeling.integrity import verify_files
from tests import tiny_models
from tests.modeling.compressed import KINDS, LOW_RANK, load, make, outputs
from tests.workshop import batches, tiny_classifier


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make("everything").save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# What is saved is what is loaded


@pytest.mark.parametrize("kind", KINDS)
def test_saves_and_loads_exactly_twice(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    wanted = outputs(model)
    for turn in ("1", "2"):
        model.save_pretrained(tmp_path / turn)
        assert verify_files(tmp_path / turn) == []
        model = load(tmp_path / turn)
        assert torch.equal(outputs(model), wanted)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "2" / file).read_bytes()


def test_copies_and_pickles_save_themselves(tmp_path: Path) -> None:
    model = make("pruned")
    for name, other in (("copy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        with torch.no_grad():
            other.classifier.bias.fill_(7.0)
        other.save_pretrained(tmp_path / name)
        assert torch.equal(load(tmp_path / name).classifier.bias, torch.full((2,), 7.0))
        assert verify_files(tmp_path / name) == []
    assert not torch.equal(model.classifier.bias, torch.full((2,), 7.0))


def test_a_state_dict_that_is_passed_is_what_is_saved_and_sealed(tmp_path: Path) -> None:
    model = make("low-rank")
    state = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=state)
    assert verify_files(tmp_path) == []
    assert torch.equal(load(tmp_path).classifier.bias, model.classifier.bias + 1)


@pytest.mark.parametrize("kind", ["low-rank", "everything"])
def test_sharded(kind: str, tmp_path: Path) -> None:
    model = make(kind)
    model.save_pretrained(tmp_path / "1", max_shard_size="20KB")
    assert len(list((tmp_path / "1").glob("*.safetensors"))) > 2
    assert verify_files(tmp_path / "1") == []
    again = load(tmp_path / "1")
    assert torch.equal(outputs(again), outputs(model))
    save(again, tmp_path / "1")
    assert [file.name for file in (tmp_path / "1").glob("model*")] == ["model.safetensors"]
    assert torch.equal(outputs(load(tmp_path / "1")), outputs(model))


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = tiny_models.make("bert", "MaskedLM")
    compress(model, [LOW_RANK])
    model.save_pretrained(tmp_path)
    assert verify_files(tmp_path) == []
    assert "cls.predictions.decoder.weight" not in load_file(tmp_path / "model.safetensors")
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    inputs = tiny_models.inputs_for("bert", "MaskedLM")
    for one, other in zip(tiny_models.run(model, inputs), tiny_models.run(again, inputs), strict=True):
        assert torch.equal(one, other)


def test_bfloat16_and_mixed_dtypes(tmp_path: Path) -> None:
    model = make("low-rank").to(torch.bfloat16)
    model.classifier.float()
    model.save_pretrained(tmp_path)
    assert verify_files(tmp_path) == []
    stored = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16, torch.float32}
    again = load(tmp_path)
    assert again.dtype == torch.bfloat16
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor.float(), model.state_dict()[name].float().to(tensor.dtype).float()), name
    assert load(tmp_path, dtype=torch.float32).dtype == torch.float32


def test_what_stock_can_say_is_an_ordinary_checkpoint_with_its_stock_save(tmp_path: Path) -> None:
    model = make("low-rank")
    assert "save_pretrained" in vars(model)
    fresh = tiny_classifier()
    commit(fresh)
    assert not needs_plugin(fresh)
    assert "save_pretrained" not in vars(fresh)
    save(fresh, tmp_path / "stock")  # ordinary, but sealed by the save of ours
    assert verify_files(tmp_path / "stock") == []
    assert "quantization_config" not in json.loads((tmp_path / "stock" / "config.json").read_text())


def test_a_reloaded_structural_model_is_an_ordinary_one(saved: Path, tmp_path: Path) -> None:
    make("pruned").save_pretrained(tmp_path / "pruned")
    model = load(tmp_path / "pruned")
    assert not hasattr(model, "hf_quantizer")
    batch = batches(1, 2)[0]
    rows = [{name: tensor[row] for name, tensor in batch.items()} for row in range(2)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "run"), max_steps=1, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train()
    assert verify_files(tmp_path / "run" / "checkpoint-1") == []
    assert model.half().dtype == torch.float16


def test_quantizes_a_loaded_structural_checkpoint_the_documented_way(tmp_path: Path) -> None:
    make("pruned").save_pretrained(tmp_path / "1")
    model = compress(load(tmp_path / "1"), [QuantizationConfig(weights="nf4", embeddings=None)])
    model.save_pretrained(tmp_path / "2")
    assert torch.equal(outputs(load(tmp_path / "2")), outputs(model))


def test_a_second_quantization_config_is_refused(saved: Path) -> None:
    # transformers compares the two before our code sees either; its message names our class and theirs.
    with pytest.raises(ValueError, match="quantized with HFCompressConfig but you are passing a BitsAndBytesConfig"):
        load(saved, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_the_seal_is_beside_the_weights(saved: Path) -> None:
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        seal = json.loads(file.metadata()["hfcompress"])
        assert set(seal["tensors"]) == set(file.keys())
    assert "sha256" not in (saved / "config.json").read_text()
    assert BertForSequenceClassification.from_pretrained(saved).num_labels == 2
    record = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert record["format_version"] == 1 and {"neurons", "low_rank", "linear"} <= set(record["structure"])
