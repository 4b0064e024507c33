from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfcompress.errors import CheckpointError
from hfcompress.publishing.contents import _OVERLAP, _SECRETS, collect, find_secret, read

# Built here, so that this file itself holds nothing that looks like a secret.
SECRETS = {
    "a Hugging Face token": "hf_" + "aB3" * 11,
    "an API key (sk-...)": "sk-" + "proj-" + "x9" * 12,
    "a GitHub token": "ghp_" + "Z1" * 18,
    "a GitLab token": "glpat-" + "q-_7" * 5,
    "a Slack token": "xoxb-" + "12345-" * 4,
    "an AWS access key": "AKIA" + "Q2W3" * 4,
    "a Google API key": "AIza" + "Sy_-4" * 7,
    "a private key": "-----BEGIN " + "RSA PRIVATE KEY-----",
}


def names(directory: Path) -> set[str]:
    return {content.name for content in collect(directory)}


def test_a_checkpoint_goes_whole_and_alone(checkpoint: Path) -> None:
    wanted = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    extra = {
        ".eval_results/sst2.yaml",
        "report.json",
        "report.html",
        "predictions.json",
        "pictures/speed.svg",
        "curve.png",
        "LICENSE",
    }
    for name in extra:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("{}", encoding="utf-8")
    litter = (
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "pytorch_model.bin",
        "cache.pkl",
        ".env",
        ".tmp123.safetensors",
        "model.safetensors.tmp",
        "model.safetensors.index.json~",
        "optimizer.safetensors",
        "checkpoint-500/model.safetensors",
        ".git/config.json",
        ".eval_results/.netrc",
        "notes.txt",
        "pictures/.hidden.png",
    )
    for name in litter:
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_text("{}", encoding="utf-8")
    assert names(checkpoint) == wanted | extra


def test_digests_are_those_of_sha256_and_git(checkpoint: Path) -> None:
    for content in collect(checkpoint):
        data = content.path.read_bytes()
        assert content.size == len(data)
        assert content.sha256 == hashlib.sha256(data).hexdigest()
        assert content.git == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.mark.parametrize("missing", ["config.json", "README.md", "model.safetensors"])
def test_what_is_missing_is_named(checkpoint: Path, missing: str) -> None:
    (checkpoint / missing).unlink()
    with pytest.raises(CheckpointError, match=missing.replace(".", r"\.")) as caught:
        collect(checkpoint)
    assert caught.value.hint


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no folder"):
        collect(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{", "[]", '"x"', "[" * 100_000])
def test_a_broken_config_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        collect(checkpoint)


def test_a_card_that_is_no_text_is_refused(checkpoint: Path) -> None:
    (checkpoint / "README.md").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(CheckpointError, match="UTF-8"):
        collect(checkpoint)


def test_an_index_must_find_its_shards(checkpoint: Path) -> None:
    shard = "model-00001-of-00001.safetensors"
    (checkpoint / "model.safetensors").rename(checkpoint / shard)
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}), encoding="utf-8")
    assert {shard, index.name} <= names(checkpoint)
    for bad in (
        {"weight_map": {"a": "../" + shard}},
        {"weight_map": {"a": shard, "b": 3}},
        {"weight_map": [shard]},
    ):
        index.write_text(json.dumps(bad), encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"index\.json"):
            collect(checkpoint)


def test_links_may_not_leave_the_folder(checkpoint: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text("{}", encoding="utf-8")
    (checkpoint / "report.json").symlink_to(outside)
    with pytest.raises(CheckpointError, match=r"report\.json is a link that leaves"):
        collect(checkpoint)
    (checkpoint / "report.json").unlink()
    (checkpoint / "report.json").symlink_to(checkpoint / "config.json")
    assert "report.json" in names(checkpoint)


def test_a_linked_folder_may_not_leave_either(checkpoint: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    (outside / "secret.png").write_bytes(b"x")
    (checkpoint / "pictures").symlink_to(outside)
    with pytest.raises(CheckpointError, match="leaves"):
        collect(checkpoint)


def test_the_links_of_the_hub_cache_are_followed(checkpoint: Path, tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a--b/snapshots/123", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in checkpoint.iterdir():
        path.rename(blobs / f"blob-of-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob-of-{path.name}")
    assert "model.safetensors" in names(snapshot)


def test_a_pipe_is_not_waited_for(checkpoint: Path) -> None:
    os.mkfifo(checkpoint / "report.json")
    with pytest.raises(CheckpointError, match=r"report\.json is no regular file"):
        collect(checkpoint)


@pytest.mark.parametrize("kind", SECRETS)
@pytest.mark.parametrize("name", ["report.json", "README.md", "model.safetensors"])
def test_secrets_are_refused_and_not_repeated(checkpoint: Path, kind: str, name: str) -> None:
    with (checkpoint / name).open("ab") as file:
        file.write(f"\nlogin={SECRETS[kind]}\n".encode())
    with pytest.raises(CheckpointError) as caught:
        collect(checkpoint)
    assert name in str(caught.value)
    assert kind in str(caught.value)
    assert SECRETS[kind] not in str(caught.value)
    assert SECRETS[kind][4:] not in str(caught.value)


def test_every_form_is_tried() -> None:
    assert {kind for kind, *_ in _SECRETS} == set(SECRETS)
    assert max(len(secret) for secret in SECRETS.values()) < _OVERLAP


@given(before=st.binary(max_size=700), kind=st.sampled_from(sorted(SECRETS)), chunk=st.integers(1, 600))
def test_a_secret_across_chunks_is_found(
    tmp_path_factory: pytest.TempPathFactory, before: bytes, kind: str, chunk: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "across.bin"
    path.write_bytes(before + b" " + SECRETS[kind].encode())
    with pytest.raises(CheckpointError):
        read("across.bin", path, chunk=chunk)


@given(data=st.binary(max_size=2000), chunk=st.integers(1, 900))
def test_chunks_find_no_more_than_the_whole(tmp_path_factory: pytest.TempPathFactory, data: bytes, chunk: int) -> None:
    path = tmp_path_factory.getbasetemp() / "plain.bin"
    path.write_bytes(data)
    assert find_secret(data) is None
    read("plain.bin", path, chunk=chunk)


@pytest.mark.parametrize(
    "text", ["ri" + "sk-" + "a" * 30, "hf_model_of_a_very_long_name_indeed_it_is", "sk-learn", "AKIA"]
)
@pytest.mark.parametrize("chunk", [1, 2, 3, 1 << 20])
def test_words_are_no_secrets(tmp_path: Path, text: str, chunk: int) -> None:
    path = tmp_path / "words.txt"
    path.write_text(f"{'x' * 400} {text} {'y ' * 400} {text}", encoding="utf-8")
    assert read("words.txt", path, chunk=chunk).size > 400


def test_a_folder_without_a_card_says_how_to_come_by_one(checkpoint: Path) -> None:
    (checkpoint / "README.md").unlink()
    with pytest.raises(CheckpointError, match="from the measurements of `hfcompress run` only"):
        collect(checkpoint)
    (checkpoint / "report.json").write_text("{}")
    with pytest.raises(CheckpointError, match="write one with `hfcompress card`"):
        collect(checkpoint)


def test_this_repository_holds_none() -> None:
    here = Path(__file__).parents[2]
    folders = ("hfcompress", "tests", "recipes", "scripts", "model_cards")
    files = [path for folder in folders for path in (here / folder).rglob("*") if path.is_file()]
    assert Path(__file__) in files
    for path in files:
        if "__pycache__" not in path.parts:
            read(str(path.relative_to(here)), path)
