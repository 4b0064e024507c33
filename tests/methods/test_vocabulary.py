from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    CLIPVisionConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hfcompress import QuantizationConfig, StructuredPruningConfig, VocabularyConfig, compress
from hfcompress.errors import CompressionError
from hfcompress.methods.registry import Context
from hfcompress.methods.vocabulary import vocabulary
from hfcompress.modeling.layers.tied import LowRankEmbedding
from hfcompress.modeling.ties import replace_table
from tests.tiny_models import VOCABULARY, make, run
from tests.workshop import batches, tiny_classifier, tiny_tokenizer

LEARNT = [
    "the lowest tower is slower than the newest one",
    "lower towers glow in the widest showers of snow",
    "a new widow throws the oldest yellow flowers below",
    "aaaa aaa aa a banana bandana, naan; aaaaa!",
] * 3
CORPUS = ["the lowest tower", "slower showers below", "aaa banana aaaa aaaaa", "new yellow Ω tower"]
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
SIZES = {"vocab_size": 400, "show_progress": False, "special_tokens": SPECIAL}


def learnt(kind: str) -> PreTrainedTokenizerFast:
    if kind == "WordPiece":
        made = Tokenizer(models.WordPiece(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer: Any = trainers.WordPieceTrainer(**SIZES)
    elif kind == "Unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **SIZES)
    elif kind == "BPE":
        made = Tokenizer(models.BPE(unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(**SIZES)
    else:
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **SIZES)
    made.train_from_iterator(LEARNT, trainer)
    ids = {token: made.token_to_id(token) for token in SPECIAL}
    if kind == "byte-level BPE":
        made.post_processor = processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"]))
    else:
        pairs = [("<s>", ids["<s>"]), ("</s>", ids["</s>"])]
        made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=pairs)
    names = {"bos": "<s>", "cls": "<s>", "pad": "<pad>", "eos": "</s>", "sep": "</s>", "unk": "<unk>", "mask": "<mask>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=30, **{f"{name}_token": token for name, token in names.items()}
    )


def roberta(tokenizer: PreTrainedTokenizerFast) -> RobertaForSequenceClassification:
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = RobertaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=40, pad_token_id=tokenizer.pad_token_id, **small
    )
    return RobertaForSequenceClassification(config).eval()


def outputs(model: Any, tokenizer: Any, texts: list[str] = CORPUS) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits


@pytest.mark.parametrize("characters", [True, False])
@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "BPE", "byte-level BPE"])
def test_texts_and_predictions_are_what_they_were(kind: str, characters: bool, tmp_path: Path) -> None:
    tokenizer = learnt(kind)
    original = copy.deepcopy(tokenizer)
    model = roberta(tokenizer)
    before = outputs(model, tokenizer)
    config = VocabularyConfig(characters=characters)
    compress(model, [config], tokenizer=tokenizer, texts=CORPUS)
    assert len(tokenizer) == model.config.vocab_size == len(model.roberta.embeddings.word_embeddings.weight)
    assert len(tokenizer) < 0.8 * len(original) or (kind == "byte-level BPE" and len(tokenizer) < len(original))
    for text in CORPUS:
        old, new = (each.convert_ids_to_tokens(each(text)["input_ids"]) for each in (original, tokenizer))
        assert old == new
    assert {name: getattr(tokenizer, name) for name in original.special_tokens_map} == original.special_tokens_map
    assert torch.equal(outputs(model, tokenizer), before)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(tmp_path),
        AutoTokenizer.from_pretrained(tmp_path),
    )
    assert torch.equal(outputs(model, tokenizer), before)
    assert model.config.pad_token_id == tokenizer.pad_token_id == 1


def test_new_words_become_characters_and_not_unknown() -> None:
    found = {}
    for characters in (True, False):
        tokenizer = learnt("WordPiece")
        compress(roberta(tokenizer), [VocabularyConfig(characters=characters)], tokenizer=tokenizer, texts=CORPUS[:1])
        found[characters] = tokenizer.tokenize("widow")
    assert "".join(found[True]).replace("##", "") == "widow" and "<unk>" in found[False]


def test_tied_outputs_and_their_bias_follow() -> None:
    tokenizer = learnt("BPE")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer) + 3,  # padded, as many are
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=1,
    )
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    old_ids = tokenizer.get_vocab()
    before = outputs(model, tokenizer)
    compress(model, [VocabularyConfig()], tokenizer=tokenizer, texts=CORPUS)
    order = [old_ids[token] for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    torch.testing.assert_close(outputs(model, tokenizer), before[..., order])
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_an_encoder_and_decoder_keep_their_special_ids() -> None:
    tokenizer = learnt("Unigram")
    original = copy.deepcopy(tokenizer)
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        decoder_start_token_id=original.convert_tokens_to_ids("</s>"),
        forced_eos_token_id=original.convert_tokens_to_ids("<mask>"),
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    model = BartForConditionalGeneration(config).eval()
    with torch.no_grad():
        model.final_logits_bias.normal_()
    before = outputs(model, tokenizer)
    compress(model, [VocabularyConfig()], tokenizer=tokenizer, texts=CORPUS)
    order = original.convert_tokens_to_ids(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    torch.testing.assert_close(outputs(model, tokenizer), before[..., order])
    assert model.config.decoder_start_token_id == tokenizer.convert_tokens_to_ids("</s>")


FEW = ["good film was fine", "bad plot very dull", "a film"]
UNTIED: list[Any] = [
    ("bert", "MaskedLM", {}),
    ("bert", "PreTraining", {}),
    ("bert", "LMHeadModel", {}),
    ("roberta", "MaskedLM", {}),
    ("roberta", "CausalLM", {}),
    ("xlm-roberta", "MaskedLM", {}),
    ("albert", "MaskedLM", {}),
    ("albert", "PreTraining", {}),
    ("mpnet", "MaskedLM", {}),
    ("deberta-v2", "MaskedLM", {}),
    ("deberta-v2", "MaskedLM", {"legacy": False}),
    ("electra", "MaskedLM", {}),
    ("distilbert", "MaskedLM", {}),
    ("bart", "", {}),
    ("bart", "ConditionalGeneration", {}),
    ("pegasus", "ConditionalGeneration", {}),
    ("t5-gated", "ConditionalGeneration", {}),
    ("llama", "CausalLM", {}),
]


def every_output(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    inputs = dict(tokenizer(FEW, padding=True, return_tensors="pt"))
    inputs.pop("token_type_ids", None)
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"].flip(1)
    return run(model, inputs)


@pytest.mark.parametrize(("family", "head", "values"), UNTIED)
def test_what_is_not_tied_is_trimmed_apart(family: str, head: str, values: dict, tmp_path: Path) -> None:
    model, tokenizer = make(family, head, tie_word_embeddings=False, **values), tiny_tokenizer()
    old_ids, rows = tokenizer.get_vocab(), model.config.vocab_size
    before, apart = every_output(model, tokenizer), len({id(each) for each in model.parameters()})
    compress(model, [VocabularyConfig()], tokenizer=tokenizer, texts=FEW)
    order = [old_ids[token] for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    assert len({id(each) for each in model.parameters()}) == apart
    assert not [name for name, value in model.state_dict().items() if rows in value.shape]
    after = every_output(model, tokenizer)
    for got, wanted in zip(after, before, strict=True):
        torch.testing.assert_close(got, wanted[..., order] if wanted.shape[-1] == rows else wanted)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, attn_implementation="eager")
    assert all(torch.equal(*pair) for pair in zip(every_output(again, tokenizer), after, strict=True))


def test_tables_that_stay_apart_are_compressed_on(tmp_path: Path) -> None:
    model, tokenizer = make("bart", "ConditionalGeneration", tie_word_embeddings=False), tiny_tokenizer()
    compress(model, [StructuredPruningConfig(heads=0.3, neurons=0.3)])
    model.save_pretrained(tmp_path / "1")
    model = type(model).from_pretrained(tmp_path / "1", attn_implementation="eager")
    steps = [VocabularyConfig(), QuantizationConfig(weights=None, embeddings="int8")]
    compress(model, steps, tokenizer=tokenizer, texts=FEW)
    model.save_pretrained(tmp_path / "2")
    again = type(model).from_pretrained(tmp_path / "2", attn_implementation="eager")
    pairs = zip(*(every_output(each, tokenizer) for each in (again, model)), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def test_another_table_that_is_compressed_already_is_refused_by_name() -> None:
    model, tokenizer = make("bart", "ConditionalGeneration", tie_word_embeddings=False), tiny_tokenizer()
    table = LowRankEmbedding(VOCABULARY, 32, 4)
    for weight in table.parameters():
        torch.nn.init.normal_(weight)
    replace_table(model, "decoder.embed_tokens", table)
    before, size = {name: value.clone() for name, value in model.state_dict().items()}, len(tokenizer)
    with pytest.raises(CompressionError, match=r"model\.decoder\.embed_tokens\.weight has no row for each"):
        compress(model, [VocabularyConfig()], tokenizer=tokenizer, texts=FEW)
    assert len(tokenizer) == size and model.config.vocab_size == VOCABULARY
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_models_of_sounds_or_of_two_models_are_refused() -> None:
    two = EncoderDecoderModel(encoder=make("bert", ""), decoder=make("bert", "LMHeadModel", add_cross_attention=True))
    for model, problem in ((make("wav2vec2", "CTC"), "no table of tokens"), (two, "does not say how many tokens")):
        with pytest.raises(CompressionError, match=problem):
            compress(model, [VocabularyConfig()], tokenizer=tiny_tokenizer(), texts=FEW)


def test_it_fills_up_to_a_multiple() -> None:
    tokenizer = learnt("WordPiece")
    model = roberta(tokenizer)
    compress(model, [VocabularyConfig(multiple_of=16)], tokenizer=tokenizer, texts=CORPUS[:1])
    assert len(tokenizer) % 16 == 0 and model.config.vocab_size == len(tokenizer)


def test_what_cannot_be_trimmed_is_refused_and_left_alone() -> None:
    tokenizer = learnt("BPE")
    model = roberta(tokenizer)
    before, size = outputs(model, tokenizer), len(tokenizer)
    for context in (Context(texts=CORPUS), Context(tokenizer=tokenizer)):
        with pytest.raises(CompressionError, match="needs"):
            vocabulary(model, VocabularyConfig(), context)
    with pytest.raises(CompressionError, match="only 19"):
        vocabulary(tiny_classifier(), VocabularyConfig(), Context(tokenizer=tokenizer, texts=CORPUS))
    assert len(tokenizer) == size and torch.equal(outputs(model, tokenizer), before)
    compress(model, [QuantizationConfig()])
    with pytest.raises(CompressionError, match="before quantizing"):
        vocabulary(model, VocabularyConfig(), Context(tokenizer=tokenizer, texts=CORPUS))


def test_ids_that_a_generation_config_names_follow_or_are_refused() -> None:
    tokenizer = learnt("BPE")
    small = {"n_embd": 32, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=2, **small)).eval()
    old = tokenizer.get_vocab()
    stays = [old[token] for token in tokenizer.tokenize(CORPUS[0])][:2]
    compress(copy.deepcopy(model), [VocabularyConfig()], tokenizer=(trial := learnt("BPE")), texts=CORPUS[:1])
    goes = next(index for token, index in old.items() if token not in trial.get_vocab())
    model.generation_config.suppress_tokens = [stays[0], goes]
    model.generation_config.bad_words_ids = [stays, [goes, stays[0]]]
    model.generation_config.sequence_bias = [[stays, -1.0]]
    with pytest.raises(CompressionError, match="sequence_bias holds ids"):
        compress(model, [VocabularyConfig()], tokenizer=tokenizer, texts=CORPUS[:1])
    assert tokenizer.get_vocab() == old
    model.generation_config.sequence_bias = None
    names = tokenizer.convert_ids_to_tokens(stays)
    compress(model, [VocabularyConfig()], tokenizer=tokenizer, texts=CORPUS[:1])
    now = tokenizer.convert_tokens_to_ids(names)
    assert now != stays
    assert model.generation_config.suppress_tokens == now[:1]
    assert model.generation_config.bad_words_ids == [now]
    model.generate(**tokenizer(CORPUS[0], return_tensors="pt"), max_new_tokens=2)


def with_padding_last(*tokens: str) -> tuple[PreTrainedTokenizerFast, dict[str, Any]]:
    """Returns a tokenizer whose padding is its last token, after others that were added, and a small config for it."""
    tokenizer = learnt("BPE")
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens, "<end>"]})
    tokenizer.pad_token = "<end>"
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 0, "eos_token_id": tokenizer.pad_token_id}
    return tokenizer, {"vocab_size": len(tokenizer), **small, **ids}


def test_padding_whose_id_changes_follows_where_no_positions_are_counted_from_it(tmp_path: Path) -> None:
    tokenizer, values = with_padding_last()
    model = LlamaForCausalLM(LlamaConfig(**values)).eval()
    tokenizer.name_or_path = "somebody/something"
    compress(model, [VocabularyConfig()], tokenizer=tokenizer, texts=CORPUS)
    assert tokenizer.name_or_path == "somebody/something"
    last = len(tokenizer) - 1
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    for each in (model, loaded):
        assert last == tokenizer.pad_token_id == each.config.pad_token_id == each.generation_config.pad_token_id
        assert last == each.model.padding_idx == each.get_input_embeddings().padding_idx
    assert torch.equal(outputs(loaded, tokenizer), outputs(model, tokenizer))


def test_a_model_that_sees_too_keeps_the_ids_of_its_text_config(tmp_path: Path) -> None:
    tokenizer, values = with_padding_last("<image>")
    sight = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=32, **sight)
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(text_config=LlamaConfig(**values), vision_config=vision, image_token_id=image)
    model = LlavaForConditionalGeneration(config)
    compress(model, [VocabularyConfig()], tokenizer=tokenizer, texts=CORPUS)
    model.save_pretrained(tmp_path)
    loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.image_token_id == tokenizer.convert_tokens_to_ids("<image>")
    assert loaded.config.text_config.pad_token_id == loaded.config.text_config.eos_token_id == tokenizer.pad_token_id


def test_batches_of_old_ids_are_refused_before_anything_is_changed() -> None:
    model, tokenizer = tiny_classifier(), tiny_tokenizer()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    configs = [VocabularyConfig(), StructuredPruningConfig(neurons=0.5)]
    with pytest.raises(CompressionError, match="cannot follow vocabulary with these calibration batches"):
        compress(model, configs, calibration=batches(1), tokenizer=tokenizer, texts=["one"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
