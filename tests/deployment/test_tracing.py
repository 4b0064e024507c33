from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hfcompress import LowRankConfig, QuantizationConfig, compress
from hfcompress.deployment.preparing import Lookup, prepare
from hfcompress.deployment.tracing import (
    Source,
    example,
    load,
    module_path,
    reference,
    round_to_bytes,
    rounding_noise,
    trace,
)
from hfcompress.errors import CheckpointError, UnsupportedModelError
from hfcompress.modeling.layers.quantized_embedding import QuantizedEmbedding
from tests.tiny_models import make
from tests.workshop import save_model, tiny_classifier, tiny_tokenizer


@pytest.mark.parametrize(("bits", "group"), [(8, 64), (8, 16), (4, 32), (4, 64)])
def test_a_lookup_returns_what_the_quantized_embedding_does(bits: int, group: int) -> None:
    table = nn.Embedding(11, 64)
    quantized = QuantizedEmbedding.from_float(table, bits=bits, group_size=group)  # type: ignore[arg-type]
    lookup = Lookup(quantized.codes, quantized.scales, bits)  # type: ignore[arg-type]
    ids = torch.tensor([[0, 3, 10], [1, 1, 2]])
    assert torch.equal(lookup(ids), quantized(ids))


@pytest.mark.parametrize("kind", ["int8", "nf4-double"])
def test_what_bitsandbytes_holds_becomes_the_float_values_it_stands_for(kind: str, tmp_path: Path) -> None:
    model = compress(tiny_classifier(), [QuantizationConfig(weights=kind, embeddings="int4")])  # type: ignore[arg-type]
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    source = load(tmp_path)
    before = reference(source, example(source, 3, 8))[0]
    found = prepare(source.model, "float")
    assert len(found["dequantized"]) == 13 and len(found["quantized_embeddings"]) == 3
    # 8 bit rounds inputs too, which is not exported.
    assert torch.allclose(reference(source, example(source, 3, 8))[0], before, atol=1e-5 if "nf4" in kind else 2e-2)


def test_float_tables_are_quantized_when_asked(tmp_path: Path) -> None:
    source = load(save_model(tmp_path))
    before = reference(source, example(source, 3, 8))[0]
    assert len(prepare(source.model, "int8")["quantized_embeddings"]) == 3
    after = reference(source, example(source, 3, 8))[0]
    assert 0 < float((after - before).abs().max()) < 0.05


def test_a_trace_takes_any_shape(tmp_path: Path) -> None:
    source = load(save_model(tmp_path))
    program = trace(source)
    for rows, tokens in ((1, 1), (5, 32), (2, 3)):
        inputs = example(source, rows, tokens)
        assert torch.allclose(program.module()(*inputs.values()), reference(source, inputs)[0], atol=1e-6)


def test_dropout_is_not_traced(tmp_path: Path) -> None:
    source = load(save_model(tmp_path, hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5))
    inputs = example(source, 2, 6)
    module = trace(source).module()
    assert torch.equal(module(*inputs.values()), module(*inputs.values()))
    assert torch.allclose(module(*inputs.values()), reference(source, inputs)[0], atol=1e-6)


class Fickle(nn.Module):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values + 1 if float(values.sum()) > 0 else values


def test_code_that_depends_on_values_is_refused(tmp_path: Path) -> None:
    source = load(save_model(tmp_path))
    source.model.classifier = nn.Sequential(Fickle(), source.model.classifier)
    with pytest.raises(UnsupportedModelError, match="BertForSequenceClassification cannot be traced"):
        trace(source)


@pytest.mark.parametrize(
    ("family", "head", "said"),
    [
        ("bert", "MultipleChoice", "heads that can: ForSequenceClassification, "),
        ("gpt2", "DoubleHeadsModel", "heads that can: "),
        ("vit", "", "heads that can: "),
        ("wav2vec2", "XVector", "heads that can: "),
        ("wav2vec2", "PreTraining", "heads that can: "),
        ("whisper", "CausalLM", "heads that can: "),
        ("bart", "", "reads one text and writes another"),
    ],
)
def test_a_head_without_an_export_is_refused(family: str, head: str, said: str, tmp_path: Path) -> None:
    make(family, head).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=said):
        load(tmp_path)


@pytest.mark.parametrize("named", ["os.path", "AutoConfig", "BertConfigModel", "PreTrainedModel", "LlamaModel"])
def test_a_config_chooses_no_class_but_its_familys(named: str, tmp_path: Path) -> None:
    save_model(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": [named]}))
    with pytest.raises(UnsupportedModelError, match=f"{named} cannot be exported"):
        load(tmp_path)


@pytest.mark.parametrize("form", ["float", "int8", "low_rank"])
def test_an_output_layer_that_is_tied_to_a_table_computes_the_same(form: str, tmp_path: Path) -> None:
    model = make("qwen3", "CausalLM")
    steps: dict[str, list[Any]] = {
        "float": [],
        "int8": [QuantizationConfig(weights=None, embeddings="int8")],
        "low_rank": [LowRankConfig(targets=(), embeddings=0.5, method="svd", multiple_of=2)],
    }
    if steps[form]:
        compress(model, steps[form])
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    for apart in (False, True):
        source = load(tmp_path)
        inputs = example(source, 2, 6)
        (before,) = reference(source, inputs)
        prepare(source.model, "float", outputs_apart=apart)
        assert torch.allclose(reference(source, inputs)[0], before, atol=1e-5)
        assert torch.allclose(trace(source).module()(*inputs.values()), before, atol=1e-5)
        source = load(tmp_path)
        prepare(source.model, "int8", outputs_apart=apart)
        (after,) = reference(source, inputs)
        assert float((after - before).abs().max()) < 0.05 * float(before.abs().max())


def test_a_transposed_layer_becomes_a_linear_one(tmp_path: Path) -> None:
    make("gpt2", "LMHeadModel").save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    source = load(tmp_path)
    inputs = example(source, 2, 6)
    (before,) = reference(source, inputs)
    prepare(source.model, "float")
    assert not any("Conv1D" in type(module).__name__ for module in source.model.modules())
    assert torch.allclose(reference(source, inputs)[0], before, atol=1e-5)


def test_a_model_that_another_engine_quantized_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path)
    file = tmp_path / "config.json"
    said = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    file.write_text(json.dumps(json.loads(file.read_text()) | said))
    with pytest.raises(UnsupportedModelError, match="is quantized by gptq, whose layers cannot be exported"):
        load(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny_classifier().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="tokenizer"):
        load(tmp_path)


def test_positions_after_the_paddings_bound_the_length(tmp_path: Path) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=17,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=22,
        pad_token_id=1,
    )
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    source = load(tmp_path)
    assert source.max_length == 20
    assert reference(source, example(source, 1, 20))[0].shape == (1, 2)


def test_a_traced_path_is_the_modules_own() -> None:
    assert module_path("model.model.layers.slice(None, 3, None).2.mlp.up_proj") == "model.layers.2.mlp.up_proj"
    assert module_path("model.bert.encoder.layer.0.output.dense") == "bert.encoder.layer.0.output.dense"


def test_bytes_are_evenly_spaced_and_keep_zero() -> None:
    values = torch.linspace(-1, 3, 1001)
    rounded = round_to_bytes(values)
    assert rounded.unique().numel() <= 256
    assert float((rounded - values).abs().max()) <= 4 / 255 / 2 + 1e-6
    assert torch.equal(round_to_bytes(torch.zeros(4)), torch.zeros(4))


def test_noise_names_the_layer_that_8_bit_hurts(tmp_path: Path) -> None:
    source: Source = load(save_model(tmp_path))
    hurt = source.model.bert.encoder.layer[1].intermediate.dense
    with torch.no_grad():
        hurt.weight[:, 0] = 50.0  # a column of large values takes the others' steps away ...
        source.model.bert.encoder.layer[0].output.LayerNorm.weight[0] = 0.0  # ... where the input has nothing
        source.model.bert.encoder.layer[0].output.LayerNorm.bias[0] = 0.0
        source.model.bert.encoder.layer[1].attention.output.LayerNorm.weight[0] = 0.0
        source.model.bert.encoder.layer[1].attention.output.LayerNorm.bias[0] = 0.0
    noise = rounding_noise(source, [example(source, 4, 8)])
    assert max(noise, key=lambda path: noise[path]) == "bert.encoder.layer.1.intermediate.dense"
    assert all(value > 0 for value in noise.values())
