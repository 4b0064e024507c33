"""What prepares texts, images and sounds for the tiny models of every family."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from string import ascii_letters
from typing import Any

from transformers import (
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
    WhisperFeatureExtractor,
    WhisperProcessor,
    WhisperTokenizer,
)

from tests.other_tasks import SAMPLING_RATE, ViTImageProcessorPil
from tests.workshop import tiny_tokenizer


def processor_of(family: str, head: str) -> Any:
    """Returns what a checkpoint of a family with a head has beside its weights."""
    if family == "vit":
        return ViTImageProcessorPil(size={"height": 8, "width": 8})
    if family == "whisper":
        return whisper_processor() if head == "ConditionalGeneration" else hearing()
    if family == "wav2vec2":
        extractor = Wav2Vec2FeatureExtractor(sampling_rate=SAMPLING_RATE)
        return Wav2Vec2Processor(feature_extractor=extractor, tokenizer=letters()) if head == "CTC" else extractor
    return tiny_tokenizer()


def hearing() -> WhisperFeatureExtractor:
    """Spectrograms of a second, as the tiny Whisper reads them."""
    return WhisperFeatureExtractor(feature_size=8, hop_length=800, chunk_length=1)


def whisper_processor() -> WhisperProcessor:
    """Those, and letters."""
    named = ["<pad>", "<s>", "<|endoftext|>", *ascii_letters]
    tokenizer = WhisperTokenizer(vocab={letter: at for at, letter in enumerate(named)}, merges=[])
    return WhisperProcessor(feature_extractor=hearing(), tokenizer=tokenizer)


def letters() -> Wav2Vec2CTCTokenizer:
    """One for each output of the tiny Wav2Vec2."""
    named = ["<pad>", "<s>", "</s>", "<unk>", "|", *ascii_letters, *"0123"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "letters.json"
        file.write_text(json.dumps({letter: at for at, letter in enumerate(named)}))
        return Wav2Vec2CTCTokenizer(str(file))
