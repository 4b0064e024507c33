"""Tiny random models of every family and head, with inputs: the matrix that the tests walk through."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

WIDTH, HEADS, NEURONS, LAYERS, VOCABULARY, LABELS = 32, 4, 24, 3, 61, 2  # questions are answered by 2 labels
TEXT = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
ENCODER = ("", *TEXT, "MaskedLM", "MultipleChoice")
DECODER = ("", "CausalLM", *TEXT)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family in small.

    Attributes:
        config: The config's class and values.
        heads: What comes after `For` in the class names of its heads; "" is the base model.
        prefix: What comes before, where it is not the config's name.
        inputs: Makes model inputs for a head.
        sdpa: Whether it has that attention.
        generates: The heads that generate.
        pre_norm: Whether a layer whose outputs are 0 passes on what it gets.
        head_values: Config values over `values` that a head needs.
    """

    config: type
    values: Mapping[str, Any]
    heads: tuple[str, ...]
    prefix: str
    inputs: Callable[[str], dict[str, torch.Tensor]]
    sdpa: bool = True
    generates: tuple[str, ...] = ()
    pre_norm: bool = False
    head_values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _ids(rows: int = 2, length: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, VOCABULARY, (rows, length), generator=generator)


def _text(head: str) -> dict[str, torch.Tensor]:
    mask = torch.ones(2, 7, dtype=torch.long)
    if head in ("LMHeadModel", "CausalLM"):
        return {"input_ids": _ids(), "attention_mask": mask}
    if head == "MultipleChoice":
        return {"input_ids": _ids(rows=6).view(2, 3, 7), "attention_mask": mask[:, None].repeat(1, 3, 1)}
    mask[1, 5:] = 0
    return {"input_ids": _ids(), "attention_mask": mask}


def _causal(head: str) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": _ids(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    # The head with two outputs reads several choices a row.
    return {name: value.unsqueeze(0) for name, value in inputs.items()} if head == "DoubleHeadsModel" else inputs


def _text_to_text(head: str) -> dict[str, torch.Tensor]:
    if head == "CausalLM":
        return _causal(head)
    inputs = _text(head)
    if head in ("", "ConditionalGeneration"):
        inputs["decoder_input_ids"] = _ids(length=5, seed=1)
    if head == "SequenceClassification":  # reads the last separator, the same number of which is in each row
        inputs["input_ids"][:, -1] = 2
        inputs["attention_mask"][:] = 1
    return inputs


def _image(head: str) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))}


def _sound(head: str) -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(0))}


def _spectrogram(head: str) -> dict[str, torch.Tensor]:
    features = {"input_features": torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(0))}
    if head == "CausalLM":
        return {"input_ids": _ids(length=5)}
    if head in ("", "ConditionalGeneration"):
        features["decoder_input_ids"] = _ids(length=5, seed=1)
    return features


_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": NEURONS,
    "max_position_embeddings": 40,
    "num_labels": LABELS,
    "pad_token_id": 1,
}
_LLAMA = _BERT | {
    "num_attention_heads": 2 * HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": NEURONS,
    "decoder_ffn_dim": NEURONS + 8,
    "max_position_embeddings": 40,
    "num_labels": LABELS + 2,  # a number of 2 the config does not write
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
_WHISPER = _BART | {
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 40,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "use_weighted_layer_sum": True,
    "classifier_proj_size": 16,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "d_kv": 8,
    "d_ff": NEURONS,
    "num_layers": LAYERS,
    "num_decoder_layers": LAYERS,
    "num_heads": HEADS,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "num_labels": LABELS,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    # Random biases of a size that matters, so that a wrong head shows.
    "initializer_factor": 1.0,
}
_LAYER_TYPES = ["full_attention", "sliding_attention", "full_attention"]


def _family(name: str, heads: tuple[str, ...], values: Mapping[str, Any], **others: Any) -> Family:
    others.setdefault("inputs", _text)
    others.setdefault("prefix", name)
    return Family(config=getattr(transformers, f"{name}Config"), values=values, heads=heads, **others)


def _decodes(head: str) -> dict[str, Any]:
    """An encoder with a causal head is told to look back only."""
    return {"generates": (head,), "head_values": {head: {"is_decoder": True}}}


_GENERATES = {"generates": ("CausalLM",), "inputs": _causal, "pre_norm": True}
FAMILIES: dict[str, Family] = {
    "bert": _family(
        "Bert", (*ENCODER, "PreTraining", "NextSentencePrediction", "LMHeadModel"), _BERT, **_decodes("LMHeadModel")
    ),
    "roberta": _family("Roberta", (*ENCODER, "CausalLM"), _BERT, **_decodes("CausalLM")),
    "xlm-roberta": _family("XLMRoberta", (*ENCODER, "CausalLM"), _BERT, **_decodes("CausalLM")),
    "electra": _family(
        "Electra", (*ENCODER, "PreTraining", "CausalLM"), _BERT | {"embedding_size": 16}, **_decodes("CausalLM")
    ),
    "mpnet": _family("MPNet", ENCODER, _BERT, sdpa=False),
    "albert": _family("Albert", (*ENCODER, "PreTraining"), _BERT | {"embedding_size": 16}),
    "deberta-v2": _family(
        "DebertaV2",
        ENCODER,
        _BERT
        | {
            "relative_attention": True,
            "position_buckets": 4,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "pad_token_id": 0,
        },
        sdpa=False,
    ),
    "deberta-v2-own": _family(
        "DebertaV2",
        ("SequenceClassification",),
        _BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "conv_kernel_size": 3, "pad_token_id": 0},
        sdpa=False,
    ),
    "distilbert": _family(
        "DistilBert",
        ENCODER,
        {
            "vocab_size": VOCABULARY,
            "dim": WIDTH,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": NEURONS,
            "max_position_embeddings": 40,
            "num_labels": LABELS,
        },
    ),
    "modernbert": _family(
        "ModernBert",
        ENCODER,
        _BERT
        | {"layer_types": _LAYER_TYPES, "local_attention": 4}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 3, "sep_token_id": 4},
        pre_norm=True,
    ),
    "gpt2": _family(
        "GPT2",
        ("", "LMHeadModel", *TEXT, "DoubleHeadsModel"),
        {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "n_positions": 40,
            "num_labels": LABELS,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        inputs=_causal,
        generates=("LMHeadModel",),
        pre_norm=True,
    ),
    "llama": _family("Llama", DECODER, _LLAMA, **_GENERATES),
    "mistral": _family("Mistral", DECODER, _LLAMA | {"sliding_window": 4}, **_GENERATES),
    "qwen2": _family(
        "Qwen2",
        DECODER,
        _LLAMA | {"layer_types": _LAYER_TYPES, "sliding_window": 4, "use_sliding_window": True},
        **_GENERATES,
    ),
    "qwen3": _family("Qwen3", DECODER, _LLAMA | {"head_dim": 12, "tie_word_embeddings": True}, **_GENERATES),
    "t5": _family(
        "T5",
        ("", "ConditionalGeneration", *TEXT, "EncoderModel"),
        _T5,
        inputs=_text_to_text,
        generates=("ConditionalGeneration",),
        pre_norm=True,
    ),
    "t5-gated": _family(
        "T5",
        ("ConditionalGeneration",),
        _T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "num_decoder_layers": 2},
        inputs=_text_to_text,
        generates=("ConditionalGeneration",),
        pre_norm=True,
    ),
    "bart": _family(
        "Bart",
        ("", "ConditionalGeneration", "CausalLM", "SequenceClassification", "QuestionAnswering"),
        _BART,
        inputs=_text_to_text,
        generates=("ConditionalGeneration", "CausalLM"),
    ),
    "pegasus": _family(
        "Pegasus",
        ("", "ConditionalGeneration", "CausalLM"),
        _BART,
        inputs=_text_to_text,
        generates=("ConditionalGeneration", "CausalLM"),
        pre_norm=True,
    ),
    "whisper": _family(
        "Whisper",
        ("", "ConditionalGeneration", "CausalLM", "AudioClassification"),
        _WHISPER,
        inputs=_spectrogram,
        generates=("ConditionalGeneration",),
        pre_norm=True,
    ),
    "vit": _family(
        "ViT",
        ("", "ImageClassification", "MaskedImageModeling"),
        {
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": NEURONS,
            "image_size": 8,
            "patch_size": 4,
            "encoder_stride": 4,
            "num_labels": LABELS,
        },
        inputs=_image,
        pre_norm=True,
    ),
    "wav2vec2": _family(
        "Wav2Vec2",
        ("", "CTC", "SequenceClassification", "AudioFrameClassification", "XVector", "PreTraining"),
        {
            "vocab_size": VOCABULARY,
            "hidden_size": WIDTH,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "intermediate_size": NEURONS,
            "conv_dim": [8, 8],
            "conv_stride": [5, 4],
            "conv_kernel": [10, 8],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "classifier_proj_size": 16,
            "tdnn_dim": [16, 16],
            "tdnn_kernel": [3, 1],
            "tdnn_dilation": [1, 1],
            "xvector_output_dim": 16,
            "num_codevectors_per_group": 8,
            "codevector_dim": 16,
            "proj_codevector_dim": 16,
            "use_weighted_layer_sum": True,
            "num_labels": LABELS,
            "layerdrop": 0.0,
            "mask_time_prob": 0.0,
        },
        inputs=_sound,
    ),
}


def class_of(family: str, head: str) -> type[PreTrainedModel]:
    """Returns the model class of a head; "" is the base model."""
    prefix = FAMILIES[family].prefix
    name = f"{prefix}{head}" if head.endswith("Model") else f"{prefix}For{head}" if head else f"{prefix}Model"
    return getattr(transformers, name)


def make(family: str, head: str | None = None, *, attention: str = "eager", seed: int = 0, **values: Any) -> Any:
    """Makes a tiny random model in evaluation mode.

    Args:
        family: A key of `FAMILIES`.
        head: One of the family's; its first after the base model by default.
        attention: `eager` or `sdpa`.
        seed: Of the weights.
        values: Config values over the family's.
    """
    made = FAMILIES[family]
    head = made.heads[min(1, len(made.heads) - 1)] if head is None else head
    torch.manual_seed(seed)
    config = made.config(**(dict(made.values) | dict(made.head_values.get(head, {})) | values))
    config._attn_implementation = attention
    model = class_of(family, head)(config).eval()
    with torch.no_grad():  # stock initialisation leaves biases at 0 and weights so small that little shows
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 and "norm" not in name.lower() and "parametrizations" not in name:
                parameter.normal_(std=0.1)
            elif parameter.dim() == 2 and "parametrizations" not in name:
                parameter.mul_(min(8.0, 0.3 / max(parameter.std().item(), 1e-6)))
    return model


def inputs_for(family: str, head: str | None = None) -> dict[str, torch.Tensor]:
    """Returns the model inputs of a head."""
    made = FAMILIES[family]
    return made.inputs(made.heads[min(1, len(made.heads) - 1)] if head is None else head)


def run(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Returns every float tensor of the model's outputs, caches left out."""
    with torch.no_grad():
        outputs = model(**inputs)
    found = [value for key, value in outputs.items() if isinstance(value, torch.Tensor) and "past" not in key]
    assert found
    return found


CELLS = [(family, head) for family, made in FAMILIES.items() for head in made.heads]
