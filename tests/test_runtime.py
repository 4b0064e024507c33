"""The runtime's own checks, which need no engine."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import hfcompress_runtime
from hfcompress_runtime import MANIFEST, Manifest, Pipeline, RuntimeFolderError
from hfcompress_runtime.answers import spans
from hfcompress_runtime.engines import require_products
from hfcompress_runtime.images import pixel_values, resized
from hfcompress_runtime.sounds import heard, spelled

WHOLE: dict[str, Any] = {
    "format": 1,
    "engine": "onnx",
    "file": "model.onnx",
    "task": "text-classification",
    "inputs": ["input_ids", "attention_mask"],
    "labels": ["negative", "positive"],
    "scores": "softmax",
    "max_length": 32,
    "padding": {"id": 0, "type_id": 0, "token": "[PAD]", "side": "right"},
    "truncation_side": "right",
    "precision": None,
}
HEARD = {"rate": 16000, "normalize": True, "pitches": None}


def write(folder: Path, **changes: Any) -> Path:
    (folder / MANIFEST).write_text(json.dumps(WHOLE | changes))
    return folder


def test_a_whole_manifest_is_read(tmp_path: Path) -> None:
    read = Manifest.read(write(tmp_path))
    assert (read.labels, read.inputs, read.max_length) == (
        ("negative", "positive"),
        ("input_ids", "attention_mask"),
        32,
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": 2}, "format is 2, this version reads 1"),
        ({"engine": "tensorrt"}, "'engine'"),
        ({"file": "../model.onnx"}, "'file'"),
        ({"file": "/etc/passwd"}, "'file'"),
        ({"file": ".."}, "'file'"),
        ({"labels": []}, "'labels'"),
        ({"labels": "ab"}, "'labels'"),
        ({"max_length": 0}, "'max_length'"),
        ({"padding": {"id": 0}}, "'padding'"),
        ({"precision": "f8"}, "'precision'"),
    ],
)
def test_a_wrong_manifest_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RuntimeFolderError, match=said.replace("'", ".")):
        Manifest.read(write(tmp_path, **changes))


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_manifest_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(RuntimeFolderError):
        Manifest.read(tmp_path)


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFolderError, match="`hfcompress export` did not write it"):
        Pipeline.from_pretrained(tmp_path)


def test_a_missing_graph_is_named(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFolderError, match=r"model\.onnx is missing"):
        Pipeline.from_pretrained(write(tmp_path))


def test_precision_is_openvinos(tmp_path: Path) -> None:
    with pytest.raises(RuntimeFolderError, match="choice of OpenVINO"):
        Pipeline.from_pretrained(write(tmp_path), precision="bf16")


def test_importing_it_loads_neither_torch_nor_the_package() -> None:
    code = "import sys, hfcompress_runtime; print(sorted({'torch', 'transformers', 'hfcompress'} & sys.modules.keys()))"
    folder = Path(hfcompress_runtime.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.stdout.strip() == "[]", done.stderr


def test_it_names_nothing_but_its_few_requirements() -> None:
    named: set[str] = set()
    for file in Path(hfcompress_runtime.__file__).parent.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        named |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        named |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    outside = {name.split(".")[0] for name in named} - sys.stdlib_module_names
    assert outside == {"numpy", "tokenizers", "PIL", "hfcompress_runtime"}


def test_a_manifest_of_the_first_version_is_read(tmp_path: Path) -> None:
    read = Manifest.read(write(tmp_path))
    assert (read.outputs, read.mask_id, read.end_ids, read.image, read.products) == (("logits",), None, (), None, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "fill-mask"}, "'mask_id'"),
        ({"task": "question-answering"}, "'outputs'"),
        ({"task": "image-classification"}, "'image'"),
        ({"task": "text-generation", "padding": None}, "'padding'"),
        ({"task": "text-classification", "max_length": None}, "'max_length'"),
        ({"task": "image-classification", "image": {"height": 12}}, "'image'"),
        ({"end_ids": ["2"]}, "'end_ids'"),
        ({"task": "audio-classification"}, "'sound'"),
        ({"task": "audio-classification", "sound": {"rate": 16000, "normalize": True, "pitches": 80}}, "'sound'"),
        ({"task": "automatic-speech-recognition", "sound": HEARD, "labels": []}, "'labels'"),
        ({"task": "automatic-speech-recognition", "sound": HEARD, "inputs": ["decoder_input_ids"]}, "'begin_ids'"),
        ({"task": "text2text-generation", "inputs": ["input_ids", "decoder_input_ids"]}, "'begin_ids'"),
        ({"products": "amx"}, "'products'"),
    ],
)
def test_a_manifest_that_lacks_what_its_task_needs_is_refused(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RuntimeFolderError, match=said.replace("'", ".")):
        Manifest.read(write(tmp_path, **changes))


@pytest.mark.parametrize("numbers", [900, 16_000, 40_000])
def test_spectrograms_are_those_of_whisper(numbers: int) -> None:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(chunk_length=2)
    sound = np.random.default_rng(0).normal(size=numbers).astype(np.float32) / 3
    how = {"rate": 16_000, "normalize": False, "pitches": 80, "window": 400, "hop": 160, "numbers": 32_000}
    wanted = extractor(sound, sampling_rate=16_000, return_tensors="np").input_features
    found = heard([{"array": sound, "sampling_rate": 16_000}], how)
    assert found.shape == wanted.shape == (1, 80, 200) and found.dtype == np.float32
    assert np.abs(found - wanted).max() < 1e-4


def test_sounds_are_evened_out_as_by_wav2vec2() -> None:
    from transformers import Wav2Vec2FeatureExtractor

    sound = np.random.default_rng(0).normal(3, 2, size=700).astype(np.float32)
    wanted = Wav2Vec2FeatureExtractor()(sound, sampling_rate=16_000, return_tensors="np").input_values
    assert np.abs(heard([sound], HEARD) - wanted).max() < 1e-6
    for wrong in ([], [[0.1, 0.2]], {"raw": sound, "sampling_rate": 8_000}):
        with pytest.raises(ValueError, match=r"a sampling rate of 8000|one row of numbers"):
            heard([wrong], HEARD)


def test_repeated_letters_are_parted_by_blanks() -> None:
    said = [1, 1, 0, 1, 2, 2, 3, 0, 0]
    assert spelled(np.eye(4)[said], ["", "a", "b", " "]) == "aab"


def test_products_that_would_overflow_are_refused() -> None:
    require_products(None, frozenset({"avx2"}))
    require_products("vnni", frozenset())  # no x86 processor, or one that does not say
    require_products("vnni", frozenset({"avx2", "avx512_vnni"}))
    require_products("vnni", frozenset({"avx2", "avx_vnni"}))
    with pytest.raises(RuntimeFolderError, match="export it again with --target avx2"):
        require_products("vnni", frozenset({"avx2", "avx512f"}))


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize("size", [(12, 12), (60, 50), (30, 12), (12, 17), (12, 50)])
def test_images_are_resized_as_by_pillow(size: tuple[int, int], resample: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 17, 3)).astype("uint8")
    wanted = np.array(Image.fromarray(pixels).resize(size[::-1], resample)).astype(int)
    found = resized(pixels, *size, resample).astype(int)
    if size[0] == 30 or size[1] == 17:
        assert np.array_equal(found, wanted)
    else:  # Pillow may go the other way first, and noise shows it more than any picture
        assert np.abs(found - wanted).mean() < 0.5


@pytest.mark.parametrize("image", [np.zeros((4, 4, 4), "uint8"), np.zeros((4, 4, 3)), np.zeros(4, "uint8")])
def test_what_is_no_image_is_refused(image: np.ndarray) -> None:
    how = {"height": 2, "width": 2, "resample": 2, "factor": 1.0, "mean": [0, 0, 0], "std": [1, 1, 1]}
    with pytest.raises(ValueError, match="an image must be uint8"):
        pixel_values([image], how)


def test_a_span_is_the_best_of_all_windows() -> None:
    context = "a good film"

    def window(words: list[tuple[int, int]]) -> Any:
        parts = [None, 0, None, *[1] * len(words), None]
        return SimpleNamespace(sequence_ids=parts, offsets=[(0, 0), (0, 1), (0, 0), *words, (0, 0)])

    first, second = window([(0, 1), (2, 6)]), window([(2, 6), (7, 11)])
    starts = [np.array([0, 9, 9, 1, 2, 9.0]), np.array([0, 9, 9, 5, 1, 9.0])]
    ends = [np.array([0, 9, 9, 1, 2, 9.0]), np.array([0, 9, 9, 1, 5, 9.0])]
    found = spans(context, [first, second], starts, ends, 2)
    assert (found[0]["answer"], found[0]["start"], found[0]["end"]) == ("good film", 2, 11)
    assert len(found) == 2 and found[0]["score"] > found[1]["score"]
    # A strong first token takes its share from every span.
    starts[1][0] = ends[1][0] = 9
    assert spans(context, [second], starts[1:], ends[1:], 1)[0]["score"] < 0.01 * found[0]["score"]
