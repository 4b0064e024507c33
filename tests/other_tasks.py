"""Tiny real models, processors and data for every kind of task that is not sentence classification."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from tests.workshop import NEVER_SAID, SPECIAL, WORDS, sentences, tiny_tokenizer

VOCABULARY = SPECIAL + WORDS + NEVER_SAID
BERT: dict[str, Any] = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
SAMPLING_RATE = 1600
ENTITIES = ("O", "B-thing", "I-thing", "B-verdict", "I-verdict")


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """One that adds no special tokens and has nothing to pad with, as language models' often are."""
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=32)


def texts(count: int, seed: int) -> list[str]:
    """Sentences in which a word often follows from the one before."""
    generator = np.random.default_rng(seed)
    said = []
    for _ in range(count):
        word, words = int(generator.integers(len(WORDS))), []
        for _ in range(int(generator.integers(4, 12))):
            words.append(WORDS[word])
            word = (word + 1) % len(WORDS) if generator.random() < 0.8 else int(generator.integers(len(WORDS)))
        said.append(" ".join(words))
    return said


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


# Data: one function a kind; each writes a split of a task


def running_text(path: Path, count: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".txt").write_text("".join(f"{text}\n" for text in texts(count, seed)))


def tagged_words(path: Path, count: int, seed: int) -> None:
    kinds = {"film": 1, "plot": 1, "good": 3, "bad": 3, "fine": 3, "dull": 3}
    sentences, tags = [text.split() for text in texts(count, seed)], []
    for words in sentences:
        own = [kinds.get(word, 0) for word in words]
        tags.append([tag + 1 if tag and at and own[at - 1] == tag else tag for at, tag in enumerate(own)])
    write_parquet(path, {"tokens": sentences, "ner_tags": tags})


def questions(path: Path, count: int, seed: int) -> None:
    contexts, asked, answers = [], [], []
    for text in texts(count, seed):
        words = text.split()
        place = len(words) // 2
        asked.append(words[place - 1])
        contexts.append(text)
        answers.append({"text": [words[place]], "answer_start": [len(" ".join([*words[:place], ""]))]})
    write_parquet(path, {"question": asked, "context": contexts, "answers": answers})


def pictures(path: Path, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    images, labels = [], []
    for _ in range(count):
        label = int(generator.integers(2))
        pixels = (generator.integers(0, 90, (12, 12)) + 150 * label).astype("uint8")
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        images.append({"bytes": file.getvalue(), "path": None})
        labels.append(label)
    write_parquet(path, {"image": images, "label": labels})


def summaries(path: Path, count: int, seed: int) -> None:
    rows = sentences(count, seed)
    write_parquet(
        path,
        {
            "document": [row["sentence"] for row in rows],
            "summary": [f"the film was {'good' if row['label'] else 'bad'}" for row in rows],
        },
    )


def recordings(path: Path, count: int, seed: int) -> None:
    """Each letter is a tone of its own, for 0.1 seconds, with a little noise."""
    generator = np.random.default_rng(seed)
    audio, said = [], []
    for _ in range(count):
        letters = generator.integers(0, 3, int(generator.integers(2, 5)))
        moments = np.arange(SAMPLING_RATE // 10) / SAMPLING_RATE
        tones = np.concatenate([np.sin(2 * np.pi * (60 + 120 * letter) * moments) for letter in letters])
        noisy = tones + 0.01 * generator.standard_normal(len(tones))
        audio.append({"array": noisy.tolist(), "sampling_rate": SAMPLING_RATE})
        said.append(" ".join("ABC"[letter] for letter in letters))
    write_parquet(path, {"audio": audio, "text": said})


# Models with their processors


def language_model(folder: Path) -> None:
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    plain_tokenizer().save_pretrained(folder)


def filler(folder: Path) -> None:
    BertForMaskedLM(BertConfig(**BERT)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def tagger(folder: Path) -> None:
    # Its labels stand in another order than the task's.
    names = dict(enumerate(reversed(ENTITIES)))
    config = BertConfig(**BERT, id2label=names, label2id={name: at for at, name in names.items()})
    BertForTokenClassification(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def reader(folder: Path) -> None:
    BertForQuestionAnswering(BertConfig(**BERT)).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def seer(folder: Path) -> None:
    config = ViTConfig(
        image_size=12,
        patch_size=6,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        id2label={0: "dark", 1: "light"},
        label2id={"dark": 0, "light": 1},
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(folder)


def writer(folder: Path) -> None:
    config = T5Config(
        vocab_size=len(VOCABULARY),
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=VOCABULARY.index("[SEP]"),
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def listener(folder: Path) -> None:
    vocabulary = {name: at for at, name in enumerate(("<pad>", "<s>", "</s>", "<unk>", "|", "A", "B", "C"))}
    config = Wav2Vec2Config(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        apply_spec_augment=False,
        layerdrop=0.0,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
        pad_token_id=0,
    )
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    (folder / "letters.json").write_text(json.dumps(vocabulary))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "letters.json"))
    (folder / "letters.json").unlink()
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=SAMPLING_RATE, return_attention_mask=True)
    Wav2Vec2Processor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)


def scribe(folder: Path) -> None:
    tokens = ("<pad>", "<start>", "<end>", "<unk>", "A", "B", "C")
    vocabulary = {name: at for at, name in enumerate(tokens)}
    config = WhisperConfig(
        vocab_size=len(vocabulary),
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=16,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        decoder_start_token_id=1,
        eos_token_id=2,
    )
    model = WhisperForConditionalGeneration(config)
    model.generation_config.update(suppress_tokens=None, begin_suppress_tokens=None)
    model.save_pretrained(folder)
    letters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Whitespace()
    letters.post_processor = processors.TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", vocabulary["<end>"])]
    )
    names = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, model_max_length=16, **names)
    # 40 frames of a window are half of them once they are heard: `max_source_positions`.
    extractor = WhisperFeatureExtractor(feature_size=8, sampling_rate=16_000, hop_length=400, chunk_length=1, n_fft=800)
    WhisperProcessor(feature_extractor=extractor, tokenizer=tokenizer).save_pretrained(folder)


Maker = Callable[[Path], None]
Writer = Callable[[Path, int, int], None]

# Each kind: what a recipe says of it, its data, its model.
KINDS: dict[str, tuple[dict[str, Any], Writer, Maker]] = {
    "causal_lm": ({}, running_text, language_model),
    "masked_lm": ({}, running_text, filler),
    "token_classification": ({"labels": list(ENTITIES)}, tagged_words, tagger),
    "question_answering": ({}, questions, reader),
    "image_classification": ({"labels": ["dark", "light"], "metrics": ["accuracy", "f1"]}, pictures, seer),
    "summarization": ({"answer_tokens": 8}, summaries, writer),
    "speech_recognition": ({}, recordings, listener),
    "speech_to_text": ({"answer_tokens": 8}, recordings, scribe),
}


def save_task(folder: Path, kind: str, train: int = 96, validation: int = 48) -> dict[str, Any]:
    """Writes a kind's model and data into a folder and returns what a recipe says: `model` and `task`."""
    said, write, make = KINDS[kind]
    torch.manual_seed(0)
    make(folder / "model")
    write(folder / "data" / "train.parquet", train, 1)
    write(folder / "data" / "validation.parquet", validation, 2)
    return {"model": str(folder / "model"), "task": {"kind": kind, "data": str(folder / "data"), **said}}


def recipe_text(said: dict[str, Any], steps: list[dict[str, Any]], **more: Any) -> str:
    """Returns a recipe; JSON is YAML."""
    asked = {"batch_size": 16, "speed_batch_size": 2, "speed_sequence_length": 8, "speed_repeats": 3}
    whole = {"name": "tiny", **said, "max_length": 16, "evaluation": asked, "steps": steps, **more}
    return json.dumps(whole)
