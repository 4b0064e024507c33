from __future__ import annotations

import copy
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForSequenceClassification,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
)

from hfcompress import QuantizationConfig, compress
from hfcompress.errors import CheckpointError
from hfcompress.modeling.checkpoint import commit, needs_plugin, replace_directory, save
from hfcompress.modeling.integrity import verify_files
from tests import tiny_models
from tests.modeling.compressed import KINDS, LOW_RANK, edit_config, edit_record, load, make, outputs
from tests.workshop import batches, tiny_classifier, tiny_tokenizer


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


# Never silently wrong


def test_without_hfcompress_nothing_loads(tmp_path: Path) -> None:
    for kind in KINDS:
        make(kind).save_pretrained(tmp_path / kind)
    code = """
import sys
from transformers import AutoModel, AutoModelForSequenceClassification
for folder in sys.argv[1:]:
    for cls in (AutoModel, AutoModelForSequenceClassification):
        try:
            cls.from_pretrained(folder)
        except Exception as error:
            print("refused", type(error).__name__)
        else:
            print("loaded", folder)
assert not any(name.split(".")[0] == "hfcompress" for name in sys.modules)
"""
    folders = [str(tmp_path / kind) for kind in KINDS]
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["refused", "RuntimeError"] * (2 * len(KINDS))


@pytest.mark.parametrize("kind", ["pruned", "low-rank", "everything"])
def test_ignoring_mismatched_sizes_makes_nothing_random(kind: str, tmp_path: Path) -> None:
    make(kind).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layer.1" in name and tensors[name].dim() == 2)
    save_file(tensors | {name: tensors[name][:-1].clone()}, file, metadata={"format": "pt"})  # no seal: shapes alone
    with pytest.raises(CheckpointError, match=r"do not fit the structure"):
        load(tmp_path, ignore_mismatched_sizes=True)


@pytest.mark.parametrize("change", ["missing", "unexpected"])
def test_missing_and_unexpected_weights_are_errors(change: str, tmp_path: Path) -> None:
    make("low-rank").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    if change == "missing":
        del tensors["bert.encoder.layer.0.attention.self.query.down.weight"]
    else:
        tensors["bert.encoder.layer.0.attention.self.query.more"] = torch.zeros(2)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 {change}"):
        load(tmp_path)


def test_heads_follow_stock_behaviour(saved: Path) -> None:
    assert AutoModel.from_pretrained(saved).config.hidden_size == 64
    assert AutoModelForTokenClassification.from_pretrained(saved).classifier.out_features == 2
    three = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=3, ignore_mismatched_sizes=True)
    assert three.classifier.out_features == 3
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForSequenceClassification.from_pretrained(saved, num_labels=3)


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"format_version": 2}, "reads up to 1\npip install --upgrade hfcompress"),
        ({"format_version": 0}, "positive integer"),
        ({"format_version": True}, "positive integer"),
        ({"more": 1}, "unknown keys: more"),
        ({"structure": [1]}, "mapping"),
        ({"structure": {"heads": 3}}, "mapping"),
        ({"structure": {"heads": {str(n): 1 for n in range(30_000)}}}, "more than 20000"),
    ],
)
def test_records_of_another_form_are_refused(record: dict[str, Any], said: str, saved: Path) -> None:
    edit_record(saved, **record)
    with pytest.raises(CheckpointError, match=said):
        load(saved)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_hidden_layers", 10**7),
        ("num_hidden_layers", 3),
        ("num_hidden_layers", 0),
        ("num_attention_heads", -4),
        ("num_attention_heads", 0),
        ("num_attention_heads", 8),
        ("num_attention_heads", 2),
        ("hidden_size", 2**40),
        ("hidden_size", -1),
        ("vocab_size", 2**40),
        ("vocab_size", 16),
        ("intermediate_size", 10**12),
        ("max_position_embeddings", 2**30),
        ("layer_norm_eps", 0.1),
        ("hidden_act", "relu"),
        ("hidden_act", "os.system"),
        ("model_type", "electra"),
        ("dtype", ...),
    ],
)
def test_stock_numbers_are_bounded(field: str, value: Any, saved: Path) -> None:
    edit_config(saved, **{field: value})
    began = time.monotonic()
    with pytest.raises((CheckpointError, ValueError)) as caught:
        load(saved)
    assert isinstance(caught.value, CheckpointError) or "divi" in str(caught.value) or field == "dtype"
    assert time.monotonic() - began < 5


def test_what_a_caller_may_choose_is_still_free(saved: Path) -> None:
    model = load(saved, hidden_dropout_prob=0.3, attn_implementation="eager", output_hidden_states=True)
    assert model.config.hidden_dropout_prob == 0.3
    assert model.config._attn_implementation == "eager"


# Files


def test_a_snapshot_of_the_hub_loads(saved: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--someone--something"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(saved.iterdir())):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert torch.equal(outputs(load(snapshot)), outputs(load(saved)))
    assert verify_files(snapshot) == []
    (tmp_path / "link").symlink_to(saved)
    assert verify_files(tmp_path / "link") == []
    load(tmp_path / "link")


@pytest.mark.parametrize("way", ["..", "absolute", "symlink", "hard link", "missing", "subfolder", "swapped"])
def test_shards_elsewhere_are_refused(way: str, tmp_path: Path) -> None:
    place, outside = tmp_path / "saved", tmp_path / "outside"
    make("low-rank").save_pretrained(place, max_shard_size="60KB")
    outside.mkdir()
    index = json.loads((place / "model.safetensors.index.json").read_text())
    name = sorted(set(index["weight_map"].values()))[0]
    new = name
    if way == "swapped":
        other = sorted(set(index["weight_map"].values()))[1]
        (place / name).rename(place / "x")
        (place / other).rename(place / name)
        (place / "x").rename(place / other)
    elif way == "hard link":
        os.link(place / name, outside / name)
    elif way == "missing":
        (place / name).unlink()
    else:
        target = place / "sub" / name if way == "subfolder" else outside / name
        target.parent.mkdir(exist_ok=True)
        (place / name).rename(target)
        new = {"..": f"../outside/{name}", "absolute": str(target), "subfolder": f"sub/{name}"}.get(way, name)
        if way == "symlink":
            (place / name).symlink_to(f"../outside/{name}")
    index["weight_map"] = {key: new if file == name else file for key, file in index["weight_map"].items()}
    (place / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        load(place)
    assert len(verify_files(place)) == 1


@pytest.mark.parametrize("held", [None, 3, ["a"], {"a": 1}, ""])
def test_an_index_of_wrong_types_is_named(held: Any, tmp_path: Path) -> None:
    make("low-rank").save_pretrained(tmp_path, max_shard_size="60KB")
    file = tmp_path / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["classifier.bias"] = held
    file.write_text(json.dumps(index))
    with pytest.raises((TypeError, OSError, ValueError)):  # transformers reads it before we do
        load(tmp_path)
    assert "weight_map must say" in str(verify_files(tmp_path)[0])


def test_a_text_never_chooses_code(saved: Path) -> None:
    for key in ("auto_map", "transformers_weights", "attn_implementation", "_attn_implementation_internal"):
        before = (saved / "config.json").read_text()
        value = {"AutoModel": "x.y"} if key == "auto_map" else "model.safetensors"
        edit_config(saved, **{key: value})
        with pytest.raises(CheckpointError, match=key):
            AutoModelForTokenClassification.from_pretrained(saved)
        assert key in str(verify_files(saved)[0])
        (saved / "config.json").write_text(before)
    with pytest.raises(CheckpointError, match="set_attn_implementation"):
        load(saved, attn_implementation="kernels-community/flash-attn2")


def test_only_safetensors_are_read(saved: Path) -> None:
    torch.save(load_file(saved / "model.safetensors"), saved / "pytorch_model.bin")
    (saved / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no safetensors file"):
        load(saved)


# Whole or not at all


def _child(work: Any) -> int:
    """Runs `work` in a forked process; returns the process's id."""
    process = os.fork()
    if process:
        return process
    try:
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    place = tmp_path / "place"
    versions = [make("low-rank", seed=seed, vocab_size=4000) for seed in (0, 1)]
    biases = [model.classifier.weight.clone() for model in versions]
    save(versions[0], place)

    def save_for_ever() -> None:
        while True:
            for model in reversed(versions):
                save(model, place)

    generator = torch.Generator().manual_seed(0)
    for _ in range(25):
        process = _child(save_for_ever)
        time.sleep(0.01 + 0.08 * torch.rand(1, generator=generator).item())
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        assert verify_files(place) == []
        found = load_file(place / "model.safetensors")["classifier.weight"]
        assert any(torch.equal(found, bias) for bias in biases)
    save(versions[0], place)
    assert torch.equal(load(place).classifier.weight, biases[0])
    assert os.listdir(tmp_path) == ["place"]
    assert not list(place.glob(".tmp*"))


def test_a_replacement_that_was_killed_midway_is_ended(tmp_path: Path) -> None:
    # Where the system cannot exchange two folders, this is what a kill between the two renames leaves.
    (tmp_path / ".place.old").mkdir()
    (tmp_path / ".place.old" / "file").write_text("old")
    (tmp_path / "new").mkdir()
    replace_directory(tmp_path / "new", tmp_path / "place")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert not (tmp_path / "place" / "file").exists()


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    place = tmp_path / "place"
    small, large = make("low-rank"), make("low-rank", vocab_size=4000)
    save(small, place)

    def fail() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        try:
            save(large, place)
        except CheckpointError as error:
            assert "What was there before is untouched" in str(error)
            return
        raise AssertionError("saved more than there is room for")

    assert os.waitpid(_child(fail), 0)[1] == 0
    assert verify_files(place) == []
    assert torch.equal(outputs(load(place)), outputs(small))
    assert os.listdir(tmp_path) == ["place"]


def test_a_full_file_system_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=700k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mounting, capture_output=True).returncode != 0:
        pytest.skip("this process may not mount a small file system")
    try:
        small, large = make("low-rank"), make("low-rank", vocab_size=4000)
        save(small, disk / "place")
        with pytest.raises(CheckpointError, match="could not be written"):
            save(large, disk / "place")
        assert verify_files(disk / "place") == []
        assert os.listdir(disk) == ["place"]
        save(small, disk / "place")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_modes_follow_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save(make("low-rank"), tmp_path / "place", tokenizer=tiny_tokenizer())
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "place").iterdir()} == {mode}


def test_the_seal_is_beside_the_weights(saved: Path) -> None:
    with safe_open(saved / "model.safetensors", framework="pt") as file:
        seal = json.loads(file.metadata()["hfcompress"])
        assert set(seal["tensors"]) == set(file.keys())
    assert "sha256" not in (saved / "config.json").read_text()
    assert BertForSequenceClassification.from_pretrained(saved).num_labels == 2
    record = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert record["format_version"] == 1 and {"neurons", "low_rank", "linear"} <= set(record["structure"])
