from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForMaskedLM

from hfcompress import QuantizationConfig, compress
from hfcompress.errors import CompressionError, ConfigError
from hfcompress.modeling.layers.bitsandbytes import kind_of
from hfcompress.modeling.layers.quantized_embedding import QuantizedEmbedding
from hfcompress.modeling.layers.tied import TiedOutput
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


@pytest.mark.parametrize("values", [{"weights": "int2"}, {"embeddings": 8}, {"embedding_group_size": 4}])
def test_bad_fields_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError):
        QuantizationConfig(**values)


def test_a_group_must_divide_the_width() -> None:
    with pytest.raises(CompressionError, match="divide 64"):
        compress(tiny_classifier(), [QuantizationConfig(embeddings="int4", embedding_group_size=48)])
