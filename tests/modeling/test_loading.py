from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hfcompress.errors import CheckpointError
from hfcompress.modeling.integrity import verify_files
from tests.modeling.compressed import KINDS, edit_config, edit_record, load, make, outputs


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make("everything").save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


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
@pytest.mark.timeout(60)
def test_stock_numbers_are_bounded(field: str, value: Any, saved: Path) -> None:
    edit_config(saved, **{field: value})
    with pytest.raises((CheckpointError, ValueError)) as caught:
        load(saved)
    assert isinstance(caught.value, CheckpointError) or "divi" in str(caught.value) or field == "dtype"


def test_a_dtype_may_be_named(saved: Path) -> None:
    named, given = (
        {name: tensor.dtype for name, tensor in load(saved, dtype=dtype).state_dict().items()}
        for dtype in ("bfloat16", torch.bfloat16)
    )
    assert named == given and torch.bfloat16 in named.values()


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
