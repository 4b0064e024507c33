from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertModel

from hfcompress import LowRankConfig, StructuredPruningConfig, WidthPruningConfig, compress
from hfcompress.errors import CompressionError, ConfigError
from hfcompress.methods.registry import Context
from hfcompress.methods.width_pruning import magnitude, taylor, width_pruning
from hfcompress.modeling.anatomy import attention_blocks, base_model
from hfcompress.modeling.checkpoint import needs_plugin
from hfcompress.modeling.width import cut_width, residual_tensors
from tests.modeling.test_cross_attention import DECODERS, decoder, decoder_inputs
from tests.tiny_models import HEADS, LAYERS, WIDTH, inputs_for, make, run
from tests.workshop import batches, tiny_classifier

CASES = [
    ("bert", "SequenceClassification"),
    ("bert", "MaskedLM"),
    ("distilbert", "SequenceClassification"),
    ("deberta-v2", "SequenceClassification"),
    ("albert", "SequenceClassification"),
    ("modernbert", "SequenceClassification"),
    ("gpt2", "LMHeadModel"),
    ("llama", "CausalLM"),
    ("qwen3", "CausalLM"),
    ("bart", "ConditionalGeneration"),
    ("vit", "ImageClassification"),
    ("mpnet", "SequenceClassification"),
    ("mpnet", "MaskedLM"),
    ("t5", "ConditionalGeneration"),
]


@pytest.mark.parametrize(("family", "head"), CASES)
def test_what_is_narrower_is_stock_and_reloads(family: str, head: str, tmp_path: Path) -> None:
    model, inputs = make(family, head), inputs_for(family, head)
    found = width_pruning(model, WidthPruningConfig(remove=0.5), Context())
    assert found["width"] == {"kept": WIDTH // 2, "of": WIDTH} and model.config.hidden_size == WIDTH // 2
    assert not needs_plugin(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    for got, wanted in zip(run(again, inputs), run(model, inputs), strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)
    assert not [name for name, tensor in again.named_parameters() if tensor.shape != model.get_parameter(name).shape]


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("electra", "SequenceClassification"),
        ("electra", "MaskedLM"),
        ("electra", "PreTraining"),
        ("deberta-v2", "SequenceClassification"),
        ("deberta-v2", "MaskedLM"),
    ],
)
def test_embeddings_as_wide_as_the_stream_are_cut_with_it(family: str, head: str, tmp_path: Path) -> None:
    model, inputs = make(family, head, embedding_size=WIDTH), inputs_for(family, head)
    width_pruning(model, WidthPruningConfig(remove=0.25), Context())
    assert model.config.embedding_size == model.config.hidden_size == model.get_input_embeddings().embedding_dim == 24
    model.save_pretrained(tmp_path)
    again, found = type(model).from_pretrained(tmp_path, output_loading_info=True, attn_implementation="eager")
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert all(torch.equal(*pair) for pair in zip(run(again, inputs), run(model, inputs), strict=True))


def test_embeddings_that_a_layer_of_their_own_widens_stay_whatever_their_width() -> None:
    model = make("albert", "SequenceClassification", embedding_size=WIDTH)
    table = model.get_input_embeddings().weight.clone()
    width_pruning(model, WidthPruningConfig(remove=0.25), Context())
    assert (model.config.embedding_size, model.config.hidden_size) == (WIDTH, 24)
    assert torch.equal(model.get_input_embeddings().weight, table)
    run(model, inputs_for("albert", "SequenceClassification"))


def test_a_width_at_which_the_stock_model_has_other_layers_is_refused() -> None:
    model, inputs = make("electra", embedding_size=24), inputs_for("electra")
    before = run(model, inputs)
    with pytest.raises(CompressionError, match=r"24 wide has no electra\.embeddings_project\.bias"):
        width_pruning(model, WidthPruningConfig(width=24), Context())
    assert torch.equal(run(model, inputs)[0], before[0])
    width_pruning(model, WidthPruningConfig(width=16), Context())
    assert model.electra.embeddings_project.weight.shape == (16, 24)


def test_a_model_without_its_pooler_is_cut_too() -> None:
    config = make("bert", "").config
    model = BertModel(config, add_pooling_layer=False).eval()
    width_pruning(model, WidthPruningConfig(width=24), Context())
    assert run(model, inputs_for("bert", ""))[0].shape[-1] == 24


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_cross_attention_keeps_whole_heads(family: str, labelled: bool, tmp_path: Path) -> None:
    model = decoder(family)
    old = {name: value.clone() for name, value in base_model(model).state_dict().items()}
    batch = decoder_inputs(family, WIDTH)
    batch |= {"labels": batch["input_ids"]} if labelled else {}
    width_pruning(model, WidthPruningConfig(width=24), Context(calibration=[batch]))
    blocks = [each for each in attention_blocks(model) if "crossattention" in each.name]
    assert len(blocks) == LAYERS
    for block in blocks:
        heads = old[f"{block.name}.value.bias"].view(HEADS, -1)
        stay = [
            number for number, head in enumerate(heads) if set(head.tolist()) & set(block.module.value.bias.tolist())
        ]
        assert len(stay) == block.heads == block.module.num_attention_heads == 3
        for projection in ("query", "key", "value"):
            rows = old[f"{block.name}.{projection}.bias"].view(HEADS, -1)[stay].flatten()
            assert torch.equal(getattr(block.module, projection).bias, rows)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    inputs = decoder_inputs(family, 24)
    assert torch.equal(run(again, inputs)[0], run(model, inputs)[0])


def test_tied_tables_stay_tied() -> None:
    model = make("gpt2", "LMHeadModel")
    width_pruning(model, WidthPruningConfig(remove=0.25), Context())
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.shape[1] == model.config.n_embd


def test_dimensions_that_hold_nothing_go_first() -> None:
    # Half of a model made twice as wide by zeros: what goes is the zeros, in every tensor alike.
    model = make("llama", "CausalLM")
    dead = torch.arange(1, WIDTH, 2)
    tensors = dict(model.named_parameters())
    with torch.no_grad():
        for name, dims in residual_tensors(model).items():
            for dim in dims:
                tensors[name].index_fill_(dim, dead, 0.0)
    inputs = inputs_for("llama", "CausalLM")
    labelled = dict(inputs, labels=inputs["input_ids"])
    for context in (Context(), Context(calibration=[labelled])):
        again = make("llama", "CausalLM")
        again.load_state_dict(model.state_dict())
        found = width_pruning(again, WidthPruningConfig(width=WIDTH // 2), context)
        assert found["importance"] == ("taylor" if context.calibration else "magnitude")
        kept = model.model.embed_tokens.weight[:, ::2]
        assert torch.equal(again.model.embed_tokens.weight, kept)


def test_scores_are_the_effect_of_a_factor_on_a_dimension() -> None:
    model, data = tiny_classifier(), batches(1)
    dimensions = residual_tensors(model)
    score = taylor(model, dimensions, data)
    dim, step = 5, 1e-3
    tensors = dict(model.named_parameters())

    def loss(factor: float) -> float:
        other = tiny_classifier()
        own = dict(other.named_parameters())
        with torch.no_grad():
            for name, dims in dimensions.items():
                for each in dims:
                    own[name].select(each, dim).mul_(factor)
        other.double()
        with torch.no_grad():
            return other(**data[0]).loss.item()

    assert score[dim].item() == pytest.approx(abs(loss(1 + step) - loss(1 - step)) / (2 * step), rel=0.02, abs=1e-5)
    assert magnitude([(tensors[name], dims) for name, dims in dimensions.items()]).shape == score.shape


def test_heads_follow_the_width_where_they_fill_it() -> None:
    model = tiny_classifier()  # 4 heads of 16
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.output.dense.weight[:, 16:32] = 0.0
    kept = model.bert.encoder.layer[0].attention.self.query.bias.clone()[[*range(16), *range(32, 64)]]
    width_pruning(model, WidthPruningConfig(remove=0.25), Context())
    assert [block.heads for block in attention_blocks(model)] == [3, 3]
    assert model.config.num_attention_heads == 3
    assert torch.equal(model.bert.encoder.layer[0].attention.self.query.bias, kept)


@pytest.mark.parametrize("labelled", [True, False])
def test_the_same_heads_go_where_all_layers_share_their_bias(labelled: bool) -> None:
    model, inputs = make("mpnet", "SequenceClassification"), inputs_for("mpnet", "SequenceClassification")
    blocks = attention_blocks(model)
    with torch.no_grad():
        for block, dead in zip(blocks, (1, 1, 2), strict=True):  # head 1 matters least in most layers
            block.at(block.spec.output).weight[:, dead * block.head_dim : (dead + 1) * block.head_dim] *= 1e-3
    kept = [0, 2, 3]
    bias, queries = (
        model.mpnet.encoder.relative_attention_bias.weight[:, kept].clone(),
        blocks[2].module.q.bias.unflatten(0, (4, -1))[kept].flatten().clone(),  # type: ignore[union-attr]
    )
    batch = dict(inputs, labels=torch.tensor([0, 1]))
    width_pruning(model, WidthPruningConfig(width=24), Context(calibration=[batch] if labelled else []))
    assert torch.equal(model.mpnet.encoder.relative_attention_bias.weight, bias)
    assert torch.equal(blocks[2].module.q.bias, queries)  # type: ignore[union-attr]
    assert model.config.num_attention_heads == model.mpnet.encoder.n_heads == 3
    different = {block.name: [0] if number else [1] for number, block in enumerate(blocks)}
    with pytest.raises(CompressionError, match="must be the same"):
        cut_width(model, torch.arange(8), different)


def test_a_narrower_model_is_compressed_further(tmp_path: Path) -> None:
    model, data = tiny_classifier(), batches(2)
    steps = [WidthPruningConfig(remove=0.25), StructuredPruningConfig(heads=0.3, neurons=0.3), LowRankConfig(keep=0.6)]
    compress(model, steps, calibration=data)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    plain = {name: value for name, value in data[0].items() if name != "labels"}
    with torch.no_grad():
        assert torch.allclose(again(**plain).logits, model(**plain).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "values", "problem"),
    [
        ("wav2vec2", {}, "this family's width cannot be cut"),
        ("bert", {"width": 30}, "reachable: multiples of 8 below 32"),
        ("bert", {"width": WIDTH}, "reachable: multiples of 8 below 32"),
        ("bert", {"importance": "taylor"}, "needs calibration batches with labels"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_changed(family: str, values: dict, problem: str) -> None:
    model = make(family, "SequenceClassification")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CompressionError, match=problem):
        width_pruning(model, WidthPruningConfig(**values), Context())
    assert model.config.hidden_size == WIDTH
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_the_stock_config_cannot_say_is_refused() -> None:
    model = compress(make("bert", "SequenceClassification"), [StructuredPruningConfig(heads=0.3)])
    with pytest.raises(CompressionError, match=r"compressed otherwise \(heads\)"):
        cut_width(model, torch.arange(16))


def test_two_targets_are_refused() -> None:
    with pytest.raises(ConfigError, match="leave remove out"):
        WidthPruningConfig(width=16, remove=0.5)
