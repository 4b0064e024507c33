"""Texts that models write, and speech that they write down."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from datasets import Dataset

from hfcompress.errors import CompressionError, ConfigError, DataError
from hfcompress.tasks import Task, TaskConfig, kind_of, load_data, preprocess
from hfcompress.tasks.kinds.speech_recognition import sound
from tests.other_tasks import SAMPLING_RATE, save_task, write_parquet
from tests.workshop import tiny_classifier


def made(folder: Path, name: str) -> tuple[Any, Task, Any, Any, Dataset]:
    said = save_task(folder, name, train=2, validation=6)["task"]
    task = TaskConfig(**said).task()
    kind = kind_of(task)
    model, processor = kind.load(folder / "model"), kind.load_processor(folder / "model")
    rows = load_data(task, str(folder / "data"))["validation"]
    return kind, task, model, processor, preprocess(rows, task, processor, max_length=16, label2id=None)


def test_a_summary_is_what_generate_writes_greedily(tmp_path: Path) -> None:
    kind, task, model, processor, rows = made(tmp_path, "summarization")
    assert task.generation is not None and (task.generation.tokens, task.generation.beams) == (8, 1)
    with torch.no_grad():
        model.shared.weight.mul_(5)
    batch = kind.collator(processor)([rows[0], rows[1]])
    assert batch["labels"].shape[0] == 2 and "right" not in batch
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    # What a checkpoint says of sampling does not make texts differ.
    model.generation_config.do_sample = True
    model.generation_config.temperature = 5.0
    said = kind.ask(model, inputs, processor, task)
    plain = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert said == [text.strip() for text in processor.batch_decode(plain, skip_special_tokens=True)]
    assert kind.told(task) == "Texts are written greedily, of at most 8 tokens, and nothing is sampled."
    with torch.no_grad():
        model.shared.weight.fill_(torch.nan)
    with pytest.raises(CompressionError, match="not finite"):
        kind.ask(model, inputs, processor, task)


def test_labels_of_a_summary_are_cut_and_its_reference_is_not(tmp_path: Path) -> None:
    *_, rows = made(tmp_path, "summarization")
    assert set(rows.column_names) == {"input_ids", "attention_mask", "labels", "right"}
    assert rows[0]["right"].split()[:3] == ["the", "film", "was"] and max(map(len, rows["labels"])) <= 8


def test_only_texts_that_are_written_have_a_length() -> None:
    with pytest.raises(ConfigError, match="writes no texts"):
        TaskConfig(kind="regression", data="org/name", answer_tokens=8)
    task = TaskConfig(kind="summarization", data="org/name", beams=4).task()
    assert task.generation is not None and (task.generation.tokens, task.generation.beams) == (64, 4)
    assert kind_of(task).told(task) == "Texts are written with 4 beams, of at most 64 tokens, and nothing is sampled."


def test_speech_is_what_plain_transformers_decodes(tmp_path: Path) -> None:
    kind, task, model, processor, rows = made(tmp_path, "speech_recognition")
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    model.eval()
    batch = kind.collator(processor)([rows[place] for place in range(6)])
    assert set(batch) == {"input_values", "attention_mask", "labels"} and (batch["labels"] == -100).any()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        said = kind.read(kind.ask(model, inputs, processor, task), inputs)
    values = load_data(task, str(tmp_path / "data"))["validation"]["audio"]
    for value, text in zip(values, said, strict=False):
        alone = processor(value["array"], sampling_rate=SAMPLING_RATE, return_tensors="pt")
        with torch.no_grad():
            assert processor.batch_decode(model(**alone).logits.argmax(-1)) == [text]
    assert kind.batch_size(processor, 8) == 8
    processor.feature_extractor.return_attention_mask = False
    assert kind.batch_size(processor, 8) == 1, "padding would be heard"


def test_whisper_writes_what_plain_transformers_writes(tmp_path: Path) -> None:
    kind, task, model, processor, rows = made(tmp_path, "speech_to_text")
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight.mul_(20)
    # What a checkpoint says of tokens stays: this one writes letters alone.
    model.generation_config.suppress_tokens = [0, 1, 2, 3]
    batch = kind.collator(processor)([rows[place] for place in range(4)])
    assert set(batch) == {"input_features", "labels"} and batch["input_features"].shape == (4, 8, 40)
    end = processor.tokenizer.eos_token_id
    assert all(row[row >= 0][-1] == end and (row[row >= 0][:-1] > 3).all() for row in batch["labels"])
    inputs = {"input_features": batch["input_features"]}
    said = kind.read(kind.ask(model.eval(), inputs, processor, task), inputs)
    values = load_data(task, str(tmp_path / "data"))["validation"]["audio"]
    for value, text in zip(values, said, strict=False):
        heard = sound(value, 16_000, "x")
        alone = processor.feature_extractor(heard, sampling_rate=16_000, return_tensors="pt")
        tokens = model.generate(alone["input_features"], max_new_tokens=8, do_sample=False)
        assert processor.tokenizer.batch_decode(tokens, skip_special_tokens=True) == [text]
    assert all(len(text.split()) == 8 for text in said)
    inputs = kind.speed_inputs(model.config, 3)
    assert inputs is not None and model(**inputs).logits.shape == (3, 16, 7)
    with pytest.raises(DataError, match="hears no windows of mel bands"):
        kind.require_head(task, tiny_classifier())


def test_sounds_are_brought_to_the_rate_that_the_model_hears() -> None:
    moments = np.arange(8000) / 8000
    tone = np.sin(2 * np.pi * 100 * moments).astype(np.float32)
    assert (sound({"array": tone.tolist(), "sampling_rate": 8000}, 8000, "x") == tone).all()
    file = io.BytesIO()
    soundfile.write(file, np.stack([tone, np.zeros_like(tone)], axis=1), 8000, format="FLAC")
    heard = sound({"bytes": file.getvalue()}, 4000, "x")
    expected = 0.5 * np.sin(2 * np.pi * 100 * np.arange(4000) / 4000)
    assert heard.dtype == np.float32 and heard.shape == (4000,)
    assert np.abs(heard - expected)[100:-100].max() < 0.01
    with pytest.raises(DataError, match="row 3 is no sound file"):
        sound({"bytes": b"RIFF"}, 4000, "row 3")


@pytest.mark.parametrize(
    "audio", [[{"path": "/etc/passwd"}], [{"array": [], "sampling_rate": 16}], [{"array": [0.1], "sampling_rate": 0}]]
)
def test_what_is_no_recording_is_refused(tmp_path: Path, audio: list[Any]) -> None:
    for split in ("train", "validation"):
        write_parquet(tmp_path / f"{split}.parquet", {"audio": audio, "text": ["a"]})
    with pytest.raises(DataError, match="row 0 must be a recording"):
        load_data(TaskConfig(kind="speech_recognition", data=str(tmp_path)).task(), str(tmp_path))
