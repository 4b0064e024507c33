from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import hfcompress
from hfcompress import LowRankConfig, QuantizationConfig, compress, lora_targets
from hfcompress.errors import CompressionError
from hfcompress.modeling.layers.low_rank import LowRankLinear
from hfcompress.modeling.surgery import defactorize
from tests.tiny_models import class_of, inputs_for, make, run

# peft 0.21 reads a name that transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

# Family, head, PEFT's task, and the names of PEFT's defaults for the family.
CASES = [
    ("bert", "SequenceClassification", "SEQ_CLS", {"query", "value"}),
    ("llama", "CausalLM", "CAUSAL_LM", {"q_proj", "v_proj"}),
    ("gpt2", "LMHeadModel", "CAUSAL_LM", {"c_attn"}),
    ("t5", "ConditionalGeneration", "SEQ_2_SEQ_LM", {"q", "v"}),
]


def adapted_layers(model: nn.Module) -> set[str]:
    from peft.tuners.lora import LoraLayer

    prefix = "base_model.model."
    return {name.removeprefix(prefix) for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def with_lora(model: Any, names: Any = None, task: str | None = None) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(task_type=task, r=2, target_modules=lora_targets(model, names)))


@pytest.mark.parametrize(("family", "head", "task", "names"), CASES, ids=[case[0] for case in CASES])
def test_the_defaults_of_peft_reach_the_factors(family: str, head: str, task: str, names: set[str]) -> None:
    model = make(family, head)
    whole = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    meant = {name for name in whole if name.rpartition(".")[2] in names}
    assert set(lora_targets(model)) == names  # an uncompressed model is left to PEFT's own names
    compress(model, [LowRankConfig(rank=4, method="svd")])
    assert all(isinstance(model.get_submodule(name), LowRankLinear) for name in meant)
    before = run(model, inputs_for(family, head))
    adapted = with_lora(model, task=task)
    assert adapted_layers(adapted) == {f"{name}.{half}" for name in meant for half in ("down", "up")}
    for one, other in zip(run(adapted, inputs_for(family, head)), before, strict=True):
        torch.testing.assert_close(one, other)  # LoRA begins at nothing


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "distilbert", "vit", "whisper"])
def test_roles_are_names_in_every_family(family: str) -> None:
    model = make(family)
    compress(model, [LowRankConfig(rank=4, method="svd", targets=("query",))])
    factors = {name for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    wanted = {f"{name}.{half}" for name in factors for half in ("down", "up")}
    assert adapted_layers(with_lora(model, ["query"])) == wanted


def test_layers_left_whole_are_meant_as_they_are() -> None:
    model = make("bert")
    compress(model, [LowRankConfig(rank=4, method="svd", targets=("query",))])
    layers = {name.rpartition(".")[0] for name, each in model.named_modules() if isinstance(each, LowRankLinear)}
    adapted = adapted_layers(with_lora(model, ["query", "value"]))
    assert adapted == {f"{layer}.{name}" for layer in layers for name in ("query.down", "query.up", "value")}


def test_one_whole_layer_among_factors_does_not_drag_their_layers_in() -> None:
    model = make("bert")
    compress(model, [LowRankConfig(rank=4, method="svd", targets=("query",))])
    name = "bert.encoder.layer.1.attention.self.query"
    defactorize(model, name.removeprefix("bert."))
    adapted = adapted_layers(with_lora(model, ["query"]))
    assert adapted == {name} | {
        f"bert.encoder.layer.{number}.attention.self.query.{half}" for number in (0, 2) for half in ("down", "up")
    }


def test_a_regular_expression_is_one_for_whole_names() -> None:
    adapted = adapted_layers(with_lora(make("bert"), r".*layer\.0.*\.(query|value)"))
    assert adapted == {f"bert.encoder.layer.0.attention.self.{each}" for each in ("query", "value")}


def test_adapters_train_merge_and_come_back(tmp_path: Path) -> None:
    from peft import PeftModel

    cls, inputs = class_of("bert", "SequenceClassification"), inputs_for("bert")
    model = make("bert", "SequenceClassification")
    compress(model, [LowRankConfig(rank=4, method="svd")]).save_pretrained(tmp_path / "base")
    adapted = with_lora(cls.from_pretrained(tmp_path / "base"), task="SEQ_CLS")
    optimizer = torch.optim.SGD([each for each in adapted.parameters() if each.requires_grad], lr=1.0)
    for _ in range(3):
        adapted(**inputs, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval().save_pretrained(tmp_path / "adapter")
    wanted = run(adapted, inputs)[0]
    again = PeftModel.from_pretrained(cls.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(run(again, inputs)[0], wanted)
    assert not torch.allclose(run(cls.from_pretrained(tmp_path / "base"), inputs)[0], wanted)
    merged = again.merge_and_unload()
    torch.testing.assert_close(run(merged, inputs)[0], wanted)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(run(cls.from_pretrained(tmp_path / "merged"), inputs)[0], run(merged, inputs)[0])


def test_quantized_factors_are_adapted() -> None:
    model = make("bert", "SequenceClassification")
    compress(model, [LowRankConfig(rank=8, method="svd"), QuantizationConfig(weights="nf4", embeddings=None)])
    adapted = adapted_layers(with_lora(model, task="SEQ_CLS"))
    assert adapted and all(name.endswith((".down", ".up")) for name in adapted)


def test_names_of_nothing_are_refused_with_those_that_are() -> None:
    model = make("llama", "CausalLM")
    with pytest.raises(CompressionError, match=r"ends in 'q_prj'\ndid you mean 'q_proj'\? allowed: .*lm_head"):
        hfcompress.lora_targets(model, ["q_prj"])
    with pytest.raises(CompressionError, match="no linear layer's whole name matches"):
        hfcompress.lora_targets(model, "q_proj")
    with pytest.raises(CompressionError, match="no regular expression"):
        hfcompress.lora_targets(model, "(")
