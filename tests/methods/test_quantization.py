from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from hfcompress import QuantizationConfig, compress
from hfcompress.errors import CheckpointError, CompressionError, ConfigError
from hfcompress.modeling.checkpoint import commit, needs_plugin
from hfcompress.modeling.layers.bitsandbytes import kind_of, settle_all
from hfcompress.modeling.layers.quantized_embedding import QuantizedEmbedding
from hfcompress.modeling.layers.tied import TiedOutput
from hfcompress.modeling.structure import rebuild
from tests.tiny_models import make
from tests.workshop import batches, logits, tiny_classifier


def test_parts_get_the_precision_they_were_given(tmp_path) -> None:
    data = batches(1)[0]
    config = QuantizationConfig(attention="int8", ffn="nf4-double", weights=None, embeddings="int4")
    model = compress(tiny_classifier(), [config])
    layer = model.bert.encoder.layer[0]
    assert kind_of(layer.attention.self.query) == "int8"
    assert kind_of(layer.intermediate.dense) == "nf4-double"
    assert kind_of(model.bert.pooler.dense) is None and kind_of(model.classifier) is None
    assert isinstance(model.bert.embeddings.word_embeddings, QuantizedEmbedding)
    before = logits(model, data)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(again, data), before)


@pytest.mark.parametrize("kind", ["int8", "nf4", "fp4"])
def test_quantized_outputs_stay_near(kind) -> None:
    data = batches(1)[0]
    whole = logits(tiny_classifier(), data)
    close = compress(tiny_classifier(), [QuantizationConfig(weights=kind)])
    assert (logits(close, data) - whole).abs().max() < (0.02 if kind == "int8" else 0.2)


def test_findings_name_what_stays_in_float() -> None:
    from hfcompress.methods.quantization import quantization
    from hfcompress.methods.registry import Context

    found = quantization(tiny_classifier(), QuantizationConfig(), Context())
    assert found["left_in_float"] == ["classifier"]
    assert found["linear_layers"] == {"int8": 13}


def test_an_output_layer_that_is_tied_reads_the_quantized_table() -> None:
    config = BertConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = compress(BertForMaskedLM(config).eval(), [QuantizationConfig()])
    head = model.get_output_embeddings()
    assert isinstance(head, TiedOutput) and head.table is model.get_input_embeddings()


def test_twice_is_refused() -> None:
    model = compress(tiny_classifier(), [QuantizationConfig()])
    with pytest.raises(CompressionError, match="already"):
        compress(model, [QuantizationConfig()])


@pytest.mark.parametrize(
    "values",
    [
        {"weights": "int2"},
        {"embeddings": 8},
        {"embedding_group_size": 4},
        {"threshold": -1.0},
        {"roles": {"heads": "int8"}},
    ],
)
def test_bad_fields_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError):
        QuantizationConfig(**values)


def test_a_group_must_divide_the_width() -> None:
    with pytest.raises(CompressionError, match="divide 64"):
        compress(tiny_classifier(), [QuantizationConfig(embeddings="int4", embedding_group_size=48)])


def test_roles_go_over_groups_and_null_leaves_in_float(tmp_path) -> None:
    data = batches(1)[0]
    roles = {"attention": "nf4", "value": None, "ffn_output": "packed-4"}
    config = QuantizationConfig(weights="int8", roles=roles, embeddings=None, threshold=6.0, compute_dtype="bfloat16")
    model = compress(tiny_classifier(), [config])
    layer = model.bert.encoder.layer[1]
    kinds = [kind_of(each) for each in (layer.attention.self.query, layer.attention.self.value, layer.output.dense)]
    assert kinds == ["nf4", None, "packed-4"]
    assert kind_of(layer.intermediate.dense) == "int8" and layer.intermediate.dense.state.threshold == 6.0
    assert layer.attention.self.query.compute_dtype == torch.bfloat16
    wanted = logits(model, data)
    model.save_pretrained(tmp_path / "1")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "1")
    assert torch.equal(logits(again, data), wanted)
    again.save_pretrained(tmp_path / "2")
    assert (tmp_path / "1" / "config.json").read_bytes() == (tmp_path / "2" / "config.json").read_bytes()


def test_a_role_without_a_layer_of_its_own_is_refused() -> None:
    with pytest.raises(CompressionError, match="value has no layer of its own in a model of type 'gpt2'"):
        compress(make("gpt2"), [QuantizationConfig(roles={"value": "nf4"}, embeddings=None)])


@pytest.mark.parametrize(("kind", "field"), [("int8", {"threshold": 2.0}), ("nf4", {"compute_dtype": "bfloat16"})])
def test_how_a_layer_computes_is_kept_in_the_stock_record_too(kind, field, tmp_path) -> None:
    data = batches(1)[0]
    config = QuantizationConfig(weights=kind, embeddings=None, **field)
    model = compress(tiny_classifier(intermediate_size=128), [config])
    plain = compress(tiny_classifier(intermediate_size=128), [QuantizationConfig(weights=kind, embeddings=None)])
    assert not torch.equal(logits(plain, data), logits(model, data))  # it matters
    assert not needs_plugin(model)
    model.save_pretrained(tmp_path / "1")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "1")
    commit(again)
    assert torch.equal(logits(again, data), logits(model, data))
    again.save_pretrained(tmp_path / "2")
    third = AutoModelForSequenceClassification.from_pretrained(tmp_path / "2")
    settle_all(third)
    assert torch.equal(logits(third, data), logits(model, data))


@pytest.mark.parametrize(
    "entry", [{"kind": "int8", "compute_dtype": "float32"}, {"kind": "nf4", "threshold": 1.0}, {"kind": "int8", "x": 1}]
)
def test_a_record_with_other_fields_is_refused(entry: dict) -> None:
    with pytest.raises(CheckpointError, match="beside its kind an int8 layer may have a threshold"):
        rebuild(tiny_classifier(), {"linear": {"encoder.layer.*.output.dense": entry}})
