"""GPTQ through optimum and gptqmodel; the parts that need them run in `scripts/environment_gptq.sh`."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hfcompress import LowRankConfig, StructuredPruningConfig, compress
from hfcompress.errors import CompressionError, ConfigError, MissingBackendError
from hfcompress.methods.gptq import GPTQMethodConfig
from hfcompress.modeling.measure import count_parameters

HAS_GPTQ = importlib.util.find_spec("gptqmodel") is not None
needs_gptq = pytest.mark.skipif(not HAS_GPTQ, reason="needs .venv-gptq: bash scripts/environment_gptq.sh")
# gptqmodel's and triton's own, on a machine without a GPU.
pytestmark = pytest.mark.filterwarnings("ignore::Warning")


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=120,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def texts(rows: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 120, (rows, 32), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**texts(2, seed=1)).logits


@needs_gptq
@pytest.mark.slow
def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    model = tiny_llama()
    whole, parameters = logits(model), count_parameters(model)
    compress(model, [GPTQMethodConfig(group_size=32)], calibration=[texts()])
    wanted = logits(model)
    assert 0 < (wanted - whole).abs().max() < 0.2
    assert count_parameters(model) == parameters  # of fewer bits each
    model.save_pretrained(tmp_path / "1")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "1")
    assert torch.equal(logits(again), wanted)
    again.save_pretrained(tmp_path / "2")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "2")), wanted)
    with pytest.raises(CompressionError, match="quantized already"):
        compress(again, [GPTQMethodConfig(group_size=32)], calibration=[texts()])


@needs_gptq
@pytest.mark.slow
def test_a_model_that_is_pruned_alike_in_every_layer_is_quantized_too(tmp_path: Path) -> None:
    model = compress(tiny_llama(), [StructuredPruningConfig(heads=0.0, neurons=0.5)])
    compress(model, [GPTQMethodConfig(bits=8, group_size=32)], calibration=[texts()])
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config.intermediate_size == 64 and torch.equal(logits(again), wanted)


@needs_gptq
def test_what_cannot_be_is_refused_before_work() -> None:
    with pytest.raises(CompressionError, match="needs calibration data"):
        compress(tiny_llama(), [GPTQMethodConfig(group_size=32)])
    with pytest.raises(CompressionError, match=r"group_size must divide 64, the width of layers\.0\.self_attn\.q_proj"):
        compress(tiny_llama(), [GPTQMethodConfig(group_size=48)], calibration=[texts()])
    thin = compress(tiny_llama(), [LowRankConfig(targets=["ffn"], rank=8)])
    with pytest.raises(CompressionError, match=r"is compressed \(low_rank\)"):
        compress(thin, [GPTQMethodConfig(group_size=32)], calibration=[texts()])
    narrow = compress(tiny_llama(), [StructuredPruningConfig(heads=0.5, neurons=0.0)])
    with pytest.raises(CompressionError, match=r"k_proj has 16 outputs; gptq packs multiples of 32"):
        compress(narrow, [GPTQMethodConfig(group_size=32)], calibration=[texts()])
    with pytest.raises(CompressionError, match="batches hold pixels; the model reads input_ids"):
        compress(tiny_llama(), [GPTQMethodConfig(group_size=32)], calibration=[{"pixels": torch.zeros(1)}])


@pytest.mark.skipif(HAS_GPTQ, reason="gptqmodel is installed")
def test_what_is_not_installed_is_named() -> None:
    with pytest.raises(MissingBackendError, match="optimum and gptqmodel") as caught:
        compress(tiny_llama(), [GPTQMethodConfig()], calibration=[texts()])
    assert "hfcompress[gptq]" in str(caught.value)


@pytest.mark.parametrize("values", [{"bits": 5}, {"group_size": 8}, {"damping": 1.0}])
def test_bad_fields_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError):
        GPTQMethodConfig(**values)
