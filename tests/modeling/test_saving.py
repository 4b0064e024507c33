from __future__ import annotations

import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hfcompress.errors import CheckpointError
from hfcompress.modeling.checkpoint import replace_directory, save
from hfcompress.modeling.integrity import verify_files
from tests.forking import fork
from tests.modeling.compressed import load, make, outputs
from tests.workshop import tiny_tokenizer


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
        process = fork(save_for_ever)
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

    assert os.waitpid(fork(fail), 0)[1] == 0
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
