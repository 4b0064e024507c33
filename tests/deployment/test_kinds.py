"""Every kind of head: exported, run as transformers' pipelines run it, and calibrated on its task's data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForCTC,
    AutoModelForQuestionAnswering,
    AutoProcessor,
    AutoTokenizer,
)
from transformers import pipeline as stock_pipeline

from hfcompress.deployment import ExportConfig, Pipeline, export
from hfcompress.deployment.calibration import calibration_data
from hfcompress.evaluation.metrics import answered, score
from hfcompress.tasks import Task, TaskConfig
from tests.deployment.engines import ENGINE_WARNINGS, EVERY_ENGINE, near
from tests.other_tasks import save_task, texts
from tests.processors import processor_of
from tests.tiny_models import make
from tests.workshop import tiny_tokenizer

pytestmark = ENGINE_WARNINGS
CALIBRATED = (
    "causal_lm",
    "masked_lm",
    "token_classification",
    "question_answering",
    "image_classification",
    "summarization",
    "speech_recognition",
)


def exported(folder: Path, engine: str, kind: str, **how: Any) -> tuple[Path, Pipeline]:
    """Makes a kind's tiny model, with weights of a size that shows, and exports it."""
    save_task(folder, kind, train=4, validation=4)
    source = folder / "model"
    made = export(source, folder / "out", ExportConfig(format=engine, **how))  # type: ignore[arg-type]
    assert made.difference < 1e-5
    return source, Pipeline.from_pretrained(folder / "out", threads=1)


@EVERY_ENGINE
def test_masks_are_filled_in_as_by_transformers(engine: str, tmp_path: Path) -> None:
    source, ours = exported(tmp_path, engine, "masked_lm")
    stock = stock_pipeline("fill-mask", str(source))
    asked = ["a [MASK] film", "the plot was [MASK] and very [MASK]"]
    assert near(ours(asked, batch_size=2), stock(asked))
    assert near(ours(asked[0], top_k=2), stock(asked[0], top_k=2))
    with pytest.raises(ValueError, match="no mask"):
        ours("a film")


@EVERY_ENGINE
def test_texts_go_on_as_by_transformers(engine: str, tmp_path: Path) -> None:
    source, ours = exported(tmp_path, engine, "causal_lm")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    asked = ["a very good film", "the plot"]  # of two lengths, in one batch
    wanted = []
    for text in asked:
        ids = tokenizer(text, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=2)
        said = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        wanted.append([{"generated_text": text + said}])
    assert ours(asked, max_new_tokens=6) == wanted
    assert ours(asked[1], max_new_tokens=6) == wanted[1]
    with pytest.raises(ValueError, match="no tokens to go on from"):
        ours("")


@EVERY_ENGINE
def test_images_are_classified_as_by_transformers(engine: str, tmp_path: Path) -> None:
    source, ours = exported(tmp_path, engine, "image_classification")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 30, 17, 3)).astype("uint8")
    images = [Image.fromarray(each) for each in pixels]
    wanted = stock_pipeline("image-classification", str(source))(images)
    assert near(ours(images, batch_size=2), wanted)
    found = ours([np.array(image) for image in images])  # resized without Pillow
    assert [[each["label"] for each in row] for row in found] == [[each["label"] for each in row] for row in wanted]
    assert all(abs(one[0]["score"] - two[0]["score"]) < 0.01 for one, two in zip(found, wanted, strict=True))
    images[0].save(tmp_path / "one.png")
    assert near(ours(str(tmp_path / "one.png")), wanted[0])
    assert near(ours(images[0], top_k=1), wanted[0][:1])


@EVERY_ENGINE
@pytest.mark.parametrize(("family", "seed"), [("bart", 2), ("t5", 0)])
def test_texts_are_written_as_by_transformers(engine: str, family: str, seed: int, tmp_path: Path) -> None:
    model, tokenizer = make(family, "ConditionalGeneration"), tiny_tokenizer()
    torch.manual_seed(seed)
    for each in model.parameters():  # else every text is the same
        each.data += 0.3 * torch.randn_like(each)
    model.generation_config.forced_eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", ExportConfig(format=engine))  # type: ignore[arg-type]
    ours = Pipeline.from_pretrained(tmp_path / "out", threads=1)
    asked = ["a very good film", "the plot", "the plot was very bad and dull"]
    wanted = []
    for text in asked:
        ids = tokenizer(text, return_tensors="pt").input_ids
        made = model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=1)
        wanted.append({"generated_text": tokenizer.decode(made[0], skip_special_tokens=True)})
    assert ours(asked, max_new_tokens=6, batch_size=2) == wanted
    assert ours(asked[1], max_new_tokens=6) == wanted[1]
    assert len({each["generated_text"] for each in wanted}) == len(wanted)


def sounds(count: int) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.normal(size=700 + 90 * each).astype(np.float32) for each in range(count)]


@EVERY_ENGINE
def test_speech_is_spelled_as_by_transformers(engine: str, tmp_path: Path) -> None:
    source, ours = exported(tmp_path, engine, "speech_recognition")
    processor, model = AutoProcessor.from_pretrained(source), AutoModelForCTC.from_pretrained(source).eval()
    asked, rate, wanted = sounds(3), processor.feature_extractor.sampling_rate, []
    for sound in asked:
        heard = processor(sound, sampling_rate=rate, return_tensors="pt").input_values
        with torch.no_grad():
            said = model(heard).logits.argmax(-1)[0]
        wanted.append({"text": processor.tokenizer.decode(said).strip()})
    assert ours(asked) == wanted and all(each["text"] for each in wanted)
    assert ours({"raw": asked[0], "sampling_rate": rate}) == wanted[0]
    with pytest.raises(ValueError, match=f"the model hears {rate}"):
        ours({"raw": asked[0], "sampling_rate": rate + 1})


@EVERY_ENGINE
def test_speech_is_written_as_by_transformers(engine: str, tmp_path: Path) -> None:
    model = make("whisper", "ConditionalGeneration")
    torch.manual_seed(1)
    for each in model.parameters():
        each.data += 0.5 * torch.randn_like(each)
    assert model.generation_config is not None
    model.generation_config.update(suppress_tokens=[7], begin_suppress_tokens=[2], max_length=20)
    model.save_pretrained(tmp_path / "model")
    processor = processor_of("whisper", "ConditionalGeneration")
    processor.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", ExportConfig(format=engine))  # type: ignore[arg-type]
    asked, wanted = sounds(2), []
    for sound in asked:
        heard = processor(sound, sampling_rate=16_000, return_tensors="pt").input_features
        made = model.generate(heard, max_new_tokens=6)  # type: ignore[operator]
        wanted.append({"text": processor.tokenizer.decode(made[0], skip_special_tokens=True)})
    assert Pipeline.from_pretrained(tmp_path / "out")(asked, max_new_tokens=6) == wanted
    assert all(each["text"] for each in wanted)


@EVERY_ENGINE
@pytest.mark.parametrize("family", ["wav2vec2", "whisper"])
def test_sounds_are_classified_as_by_transformers(engine: str, family: str, tmp_path: Path) -> None:
    head = {"wav2vec2": "SequenceClassification", "whisper": "AudioClassification"}[family]
    make(family, head).save_pretrained(tmp_path / "model")
    processor_of(family, head).save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", ExportConfig(format=engine))  # type: ignore[arg-type]
    asked = sounds(2)
    wanted = stock_pipeline("audio-classification", str(tmp_path / "model"))(asked)
    assert near(Pipeline.from_pretrained(tmp_path / "out")(asked), wanted)


def best_span(source: Path, question: str, context: str) -> tuple[int, int]:
    """Searches all spans of up to 15 tokens for the one with the largest sum of logits."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    inputs = tokenizer(question, context, return_tensors="pt", return_offsets_mapping=True)
    offsets = inputs.pop("offset_mapping")[0].tolist()
    model = AutoModelForQuestionAnswering.from_pretrained(source)
    with torch.no_grad():
        made = model(**inputs)
    inside = [place for place, part in enumerate(inputs.sequence_ids(0)) if part == 1]
    pairs = [(first, last) for first in inside for last in inside if first <= last < first + 15]
    first, last = max(pairs, key=lambda pair: float(made.start_logits[0, pair[0]] + made.end_logits[0, pair[1]]))
    return offsets[first][0], offsets[last][1]


@EVERY_ENGINE
def test_questions_are_answered_with_a_piece_of_the_context(engine: str, tmp_path: Path) -> None:
    source, ours = exported(tmp_path, engine, "question_answering")
    asked = [{"question": "good film", "context": text} for text in texts(6, seed=3)]
    for row, found in zip(asked, ours(asked), strict=True):
        start, end = best_span(source, row["question"], row["context"])
        assert (found["start"], found["end"]) == (start, end)
        assert found["answer"] == row["context"][start:end] and 0 < found["score"] <= 1
    assert ours(**asked[0]) == ours(asked[0]) == ours(asked)[0]
    several = ours(asked[0], top_k=3)
    assert len(several) == 3 and several[0] == ours(asked[0])
    assert several[0]["score"] >= several[1]["score"] >= several[2]["score"]


@EVERY_ENGINE
def test_a_long_context_is_read_in_windows(engine: str, tmp_path: Path) -> None:
    _, ours = exported(tmp_path, engine, "question_answering")
    context = " ".join(texts(9, seed=4))  # some 70 tokens, of which 32 are read at once
    asked = {"question": "good film", "context": context}
    found = ours(asked, top_k=200)
    assert all(each["answer"] == context[each["start"] : each["end"]] for each in found)
    third = len(context) / 3
    assert min(each["start"] for each in found) < third and max(each["end"] for each in found) > 2 * third
    assert ours(asked, batch_size=1) == pytest.approx(ours(asked))
    with pytest.raises(ValueError, match="no more than 32 are read at once"):
        ours({"question": "good " * 28, "context": context})


@EVERY_ENGINE
def test_features_are_those_of_the_model(engine: str, tmp_path: Path) -> None:
    make("bert", "").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "out", ExportConfig(format=engine))  # type: ignore[arg-type]
    ours = Pipeline.from_pretrained(tmp_path / "out")
    stock = stock_pipeline("feature-extraction", str(tmp_path / "model"))
    asked = ["a good film", "the plot was very bad and dull"]
    assert near(ours(asked[0]), stock(asked[0]))
    assert near(ours(asked), [stock(each) for each in asked])


def described(folder: Path, kind: str) -> tuple[Path, Task, str]:
    said = save_task(folder, kind, train=60, validation=4)
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in said["task"].items()}
    return Path(said["model"]), TaskConfig(**values).task(), said["task"]["data"]


@EVERY_ENGINE
@pytest.mark.parametrize("kind", CALIBRATED)
def test_every_kind_is_calibrated_on_its_own_data(engine: str, kind: str, tmp_path: Path) -> None:
    source, task, data = described(tmp_path, kind)
    calibrated, judge = calibration_data(
        source,
        task,
        data,
        examples=20,
        max_length=24,
        measure=lambda name, given: score([name], answered(name, given), given.references)[name],
        progress=False,
    )
    config = ExportConfig(format=engine, int8="static", floor=0.01)  # type: ignore[arg-type]
    made = export(source, tmp_path / "out", config, calibration=calibrated, score=judge)
    assert made.score is not None and made.float_score is not None
    assert made.score >= 0.01 * made.float_score
    if kind == "causal_lm":  # seven products in each of two layers; the output layer is tied to no table
        assert made.quantized == 15 and made.in_float == ()
    else:
        assert made.quantized >= 12
    again = judge(Pipeline.from_pretrained(tmp_path / "out"))
    assert again == pytest.approx(made.score, rel=1e-4)
