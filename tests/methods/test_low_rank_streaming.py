from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hfcompress import LowRankConfig, compress
from hfcompress.errors import CheckpointError, CompressionError, RunFolderError
from hfcompress.methods.low_rank.streaming import stream_factorize, stream_step
from hfcompress.modeling.checkpoint import save
from hfcompress.modeling.integrity import verify_files
from hfcompress_cli import app
from tests.tiny_models import FAMILIES, class_of, inputs_for, make

SHARDS = "20KB"
SIZES = [{"keep": 0.6}, {"rank": 3}, {"energy": 0.8}, {"share": True}, {"per_head": True}]


def stock(family: str, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    make(family).to(dtype).save_pretrained(folder, max_shard_size=SHARDS)
    return folder


def head_of(family: str) -> str:
    return FAMILIES[family].heads[1]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    shards = sorted(folder.glob("*.safetensors"))
    assert shards
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3", "t5"])
def test_it_writes_what_memory_would(family: str, size: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    source = stock(family, tmp_path / "source", dtype)
    config = LowRankConfig(**size, method="svd", multiple_of=2)
    assert len(list(source.glob("*.safetensors"))) > 2
    before = files(source)
    found = stream_factorize(source, tmp_path / "streamed", config, max_shard_size=SHARDS, progress=False)
    model = compress(class_of(family, head_of(family)).from_pretrained(source), [config])
    save(model, tmp_path / "memory", max_shard_size=SHARDS)
    assert found["ranks"]
    streamed, wanted = tensors(tmp_path / "streamed"), tensors(tmp_path / "memory")
    assert streamed.keys() == wanted.keys()
    assert all(torch.equal(streamed[name], wanted[name]) for name in wanted)
    assert (tmp_path / "streamed/config.json").read_bytes() == (tmp_path / "memory/config.json").read_bytes()
    assert files(source) == before
    assert verify_files(tmp_path / "streamed") == []
    again = class_of(family, head_of(family)).from_pretrained(tmp_path / "streamed")
    with torch.no_grad():
        assert torch.equal(again(**inputs_for(family))[0], model(**inputs_for(family))[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "source", "streamed"]


@pytest.mark.parametrize("family", ["bert", "gpt2", "qwen3", "t5"])
def test_files_of_one_shard_are_equal_byte_for_byte(family: str, tmp_path: Path) -> None:
    source, config = stock(family, tmp_path / "source"), LowRankConfig(method="svd", multiple_of=2)
    stream_factorize(source, tmp_path / "streamed", config, progress=False)
    save(compress(class_of(family, head_of(family)).from_pretrained(source), [config]), tmp_path / "memory")
    assert files(tmp_path / "streamed") == files(tmp_path / "memory")


def test_a_folder_that_holds_something_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(RunFolderError, match="not empty"):
        stream_factorize(stock("bert", tmp_path / "source"), tmp_path / "out", LowRankConfig(method="svd"))
    assert files(tmp_path / "out") == {"mine": b"mine"}


@pytest.mark.parametrize("values", [{"method": "whitened"}, {"method": "fisher"}, {"budget": 0.5}, {"refit": True}])
def test_what_needs_data_is_refused(values: dict, tmp_path: Path) -> None:
    with pytest.raises(CompressionError, match="needs calibration data"):
        stream_factorize(stock("bert", tmp_path / "source"), tmp_path / "out", LowRankConfig(**values))
    assert not (tmp_path / "out").exists()


def change(folder: Path, name: str, value: torch.Tensor | None) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            if value is None:
                del tensors[name]
                tensors["another.name"] = torch.zeros(1)
            else:
                tensors[name] = value
            save_file(tensors, file, metadata={"format": "pt"})
            return
    raise AssertionError(name)


def test_a_matrix_that_is_not_finite_is_named_and_nothing_is_left_behind(tmp_path: Path) -> None:
    source = stock("bert", tmp_path / "source")
    change(source, "bert.encoder.layer.1.output.dense.weight", torch.full((32, 24), float("nan")))
    with pytest.raises(CompressionError, match=r"encoder\.layer\.1\.output\.dense: the weight"):
        stream_factorize(source, tmp_path / "out", LowRankConfig(method="svd", multiple_of=2), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_other_tensors_than_the_models_are_refused(tmp_path: Path) -> None:
    source = stock("bert", tmp_path / "source")
    change(source, "bert.encoder.layer.1.output.dense.weight", None)
    with pytest.raises(CheckpointError, match=r"another\.name"):
        stream_factorize(source, tmp_path / "out", LowRankConfig(method="svd"), progress=False)


def test_a_compressed_checkpoint_is_refused(tmp_path: Path) -> None:
    source = stock("bert", tmp_path / "source")
    config = LowRankConfig(method="svd", multiple_of=2)
    stream_factorize(source, tmp_path / "once", config, progress=False)
    with pytest.raises(CheckpointError, match="compressed already"):
        stream_factorize(tmp_path / "once", tmp_path / "twice", config, progress=False)


def test_a_step_is_done_on_disk_only_where_it_can_be(tmp_path: Path) -> None:
    source, plain = stock("bert", tmp_path / "source"), LowRankConfig(method="svd", multiple_of=2)
    for config in (LowRankConfig(), LowRankConfig(method="whitened"), LowRankConfig(method="svd", refit=True)):
        assert stream_step(source, tmp_path / "out", config, False) is None  # each wants data, which a step has
    assert not (tmp_path / "out").exists()
    found = stream_step(source, tmp_path / "once", plain, False)
    assert found is not None and found["ranks"]
    assert stream_step(tmp_path / "once", tmp_path / "twice", plain, False) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["once", "source"]


PEAK = """
import sys, threading, time
from pathlib import Path
from hfcompress import LowRankConfig
from hfcompress.methods.low_rank.streaming import stream_factorize

def anonymous():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

start, peak = anonymous(), [0.0]
def watch():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
config = LowRankConfig(keep=0.5, method="svd")
stream_factorize(sys.argv[1], sys.argv[2], config, max_shard_size="100MB", progress=False)
print(peak[0] - start)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="anonymous memory is read from /proc")
def test_memory_stays_below_the_checkpoint(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8000, hidden_size=512, intermediate_size=1408, num_hidden_layers=24, num_attention_heads=8
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source", max_shard_size="100MB")
    total = sum(path.stat().st_size for path in (tmp_path / "source").glob("*.safetensors")) / 2**20
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "source"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )
    assert total > 300
    assert float(done.stdout) < total / 2


def test_one_command_streams_and_takes_the_tokenizer_along(tmp_path: Path) -> None:
    source = stock("bert", tmp_path / "source")
    (source / "vocab.txt").write_text("a\nb\n")
    command = ["factorize", str(source), str(tmp_path / "out"), "--keep", "0.6", "--target", "ffn", "--pivoted"]
    done = CliRunner().invoke(app, [*command, "--shard-size", SHARDS, "--quiet"])
    assert (done.exit_code, done.stdout) == (0, f"{tmp_path / 'out'}\n"), done.stderr
    assert (tmp_path / "out/vocab.txt").read_text() == "a\nb\n"
    assert verify_files(tmp_path / "out") == []
    again = class_of("bert", head_of("bert")).from_pretrained(tmp_path / "out")
    config = LowRankConfig(targets=("ffn",), keep=0.6, method="svd", pivoted=True)
    model = compress(class_of("bert", head_of("bert")).from_pretrained(source), [config])
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs_for("bert"))[0], model(**inputs_for("bert"))[0])
    wrong = CliRunner().invoke(app, [*command, "--rank", "3"])
    assert wrong.exit_code == 2
    assert "exactly one of" in wrong.stderr and "Traceback" not in wrong.stderr
