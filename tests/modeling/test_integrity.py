from __future__ import annotations

import hashlib
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from hfcompress.errors import CheckpointError
from hfcompress.modeling.checkpoint import save as save_checkpoint
from hfcompress.modeling.headers import read_header
from hfcompress.modeling.integrity import digest_tensor, stock_numbers, verify_files
from tests import tiny_models
from tests.modeling.compressed import edit_config, edit_record, load, make
from tests.workshop import tiny_tokenizer


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "saved"
    save_checkpoint(make("everything"), folder, tokenizer=tiny_tokenizer())
    return folder


@pytest.fixture
def saved(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "saved"))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 5),
        torch.randn(3, 5).T,
        torch.randn(4).to(torch.bfloat16),
        torch.tensor(2.5),
        torch.zeros(0, 3),
        torch.randn(2, 2).to(torch.float8_e4m3fn),
        torch.tensor([True, False]),
        torch.arange(5),
    ],
)
def test_digests_are_of_the_bytes_in_the_file(tensor: torch.Tensor) -> None:
    raw = save({"x": tensor.contiguous()})
    (length,) = struct.unpack("<Q", raw[:8])
    assert digest_tensor(tensor) == hashlib.sha256(raw[8 + length :]).hexdigest()


def test_every_flipped_byte_names_its_tensor(saved: Path) -> None:
    file = saved / "model.safetensors"
    whole = bytearray(file.read_bytes())
    for name, entry in read_header(file).tensors.items():
        position = (entry.start + entry.end) // 2
        whole[position] ^= 0x10
        file.write_bytes(whole)
        findings = verify_files(saved)
        assert [(finding.tensor, finding.message) for finding in findings] == [(name, "is not what was saved")]
        whole[position] ^= 0x10
    file.write_bytes(whole)
    assert verify_files(saved) == []


def test_two_tensors_that_change_places_are_both_named(saved: Path) -> None:
    file = saved / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    stored = load_file(file)
    one = "bert.encoder.layer.0.attention.self.query.down.weight"
    other = next(
        name
        for name, tensor in stored.items()
        if (tensor.dtype, tensor.shape) == (stored[one].dtype, stored[one].shape) and not tensor.equal(stored[one])
    )
    header[one], header[other] = header[other], header[one]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    file.write_bytes(raw[:8] + text + raw[8 + length :])
    assert {finding.tensor for finding in verify_files(saved)} == {one, other}
    load(saved)  # nothing but the digests can tell


def test_tensors_that_went_came_or_changed_their_dtype_are_named(saved: Path) -> None:
    file = saved / "model.safetensors"
    metadata = dict(read_header(file).metadata)
    tensors = load_file(file)
    bias = tensors.pop("classifier.bias")
    tensors["classifier.bia5"] = bias
    tensors["classifier.weight"] = tensors["classifier.weight"].to(torch.float64)
    save_file(tensors, file, metadata=metadata)
    found = {finding.tensor: finding.message for finding in verify_files(saved)}
    assert found["classifier.bias"] == "is missing"
    assert found["classifier.bia5"] == "is not one of the tensors that were saved"
    assert found["classifier.weight"].startswith("is F64 [2, 64], was saved as F32 [2, 64]")
    with pytest.raises(CheckpointError, match="classifier"):
        load(saved)


def test_an_edited_config_is_named(saved: Path) -> None:
    edit_config(saved, num_attention_heads=8)
    assert str(verify_files(saved)[0]) == "config.json: num_attention_heads is 8, the weights were saved with 4"
    edit_config(saved, num_attention_heads=4)
    edit_record(saved, structure={})
    assert "structure" in str(verify_files(saved)[0])


def test_a_card_and_labels_may_change(saved: Path) -> None:
    (saved / "README.md").write_text("# A card\n")
    edit_config(saved, id2label={"0": "no", "1": "yes"}, label2id={"no": 0, "yes": 1}, hidden_dropout_prob=0.5)
    assert verify_files(saved) == []
    load(saved)


def test_files_of_others_cannot_be_compared_and_that_is_said(tmp_path: Path) -> None:
    tiny_models.make("bert").save_pretrained(tmp_path)
    (finding,) = verify_files(tmp_path)
    assert "no digests" in finding.message
    with pytest.raises(CheckpointError, match="no folder"):
        verify_files(tmp_path / "nothing")
    (tmp_path / "model.safetensors").unlink()
    assert "neither" in verify_files(tmp_path)[0].message


def test_a_damaged_config_is_a_finding(saved: Path) -> None:
    (saved / "config.json").write_text('{"model_type": "bert", "hidden_size": "x"}')
    assert "config.json" in str(verify_files(saved)[0])
    (saved / "config.json").write_text("[" * 100_000)
    assert "config.json cannot be read" in str(verify_files(saved)[0])


@pytest.mark.parametrize(
    ("seal", "said"),
    [
        ("{", "damaged"),
        (None, "damaged"),
        ('{"version":1,"config":{},"tensors":{"x":["F32",[1]]}}', "damaged"),
        ('{"version":2,"config":{},"tensors":{}}', "reads up to 1"),
    ],
)
def test_a_damaged_seal_is_an_error(seal: str | None, said: str, saved: Path) -> None:
    file = saved / "model.safetensors"
    metadata = dict(read_header(file).metadata)
    if seal is None:  # one number of the whole seal changed
        metadata["hfcompress"] = metadata["hfcompress"].replace("1", "2", 1)
    else:
        metadata |= {"hfcompress": seal, "hfcompress.sha256": hashlib.sha256(seal.encode()).hexdigest()}
    save_file(load_file(file), file, metadata=metadata)
    assert said in verify_files(saved)[0].message
    with pytest.raises(CheckpointError, match=said):
        load(saved)


def test_shards_of_two_saves_are_not_mixed(tmp_path: Path) -> None:
    make("low-rank", seed=0).save_pretrained(tmp_path / "0", max_shard_size="60KB")
    make("low-rank", seed=1).save_pretrained(tmp_path / "1", max_shard_size="60KB")
    name = sorted((tmp_path / "0").glob("*.safetensors"))[0].name
    shutil.copy(tmp_path / "1" / name, tmp_path / "0" / name)
    with pytest.raises(CheckpointError, match="not saved together"):
        load(tmp_path / "0")


def _file(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "cut short"),
        (b"abc", "cut short"),
        (_file(b"{}", length=2**60), "cut short"),
        (_file(b"[]"), "no JSON object"),
        (_file(b"{}\t"), "no JSON object"),
        (_file(b'{"a":1}'), "must hold dtype"),
        (_file(b'{"a":{},"a":{}}'), "occurs twice"),
        (_file(b'{"__metadata__":{"x":1}}'), "must hold texts"),
        (_file(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"12345"), "accounts for"),
        (_file(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', b"1234"), "has 4 bytes"),
        (_file(b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}', b"1234"), "no sizes"),
        (_file(b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}', b"1234"), "no sizes"),
        (_file(b'{"a":{"dtype":"F33","shape":[1],"data_offsets":[0,4]}}', b"1234"), "unknown dtype"),
        (
            _file(
                b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
                b'"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
                b"123",
            ),
            "does not begin",
        ),
        (_file(b"[" * 50_000 + b"}"), "damaged"),
        (_file(b'{"\xff":1}'), "damaged"),
    ],
)
def test_headers_that_lie_are_refused(raw: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=said):
        read_header(tmp_path / "x.safetensors")


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_what_the_weights_depend_on_survives_the_config_file(family: str, tmp_path: Path) -> None:
    config = tiny_models.make(family).config
    config.save_pretrained(tmp_path)
    again = stock_numbers(type(config).from_pretrained(tmp_path))
    numbers = stock_numbers(config)
    assert {name: again[name] for name in numbers if name in again} == numbers
    assert numbers["model_type"] == config.model_type
    assert any("hidden_size" in name or "d_model" in name or "dim" in name or "n_embd" in name for name in numbers)
