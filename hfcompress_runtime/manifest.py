"""What an exported folder says about itself."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "hfcompress_export.json"
FORMAT = 1
ENGINES = ("onnx", "openvino")
WRITTEN = "decoder_input_ids"
TASKS = (
    "text-classification",
    "token-classification",
    "question-answering",
    "fill-mask",
    "text-generation",
    "feature-extraction",
    "image-classification",
    "text2text-generation",
    "automatic-speech-recognition",
    "audio-classification",
)


class RuntimeFolderError(ValueError):
    """The folder is no export, is damaged, or needs an engine or a processor that is not here."""

    user_error = True


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an exported folder says about itself.

    Attributes:
        engine: `onnx` or `openvino`.
        file: Name of the graph's file in the folder.
        task: One of `TASKS`.
        inputs: Names of the graph's inputs; each is int64 `(batch, tokens)`, but `pixel_values` float32
            `(batch, channels, height, width)`, `input_values` float32 `(batch, numbers)` and `input_features`
            float32 `(batch, pitches, moments)`.
        labels: Names of the classes in the order of the logits, or the letters that they spell; none elsewhere.
        scores: How logits become scores: `softmax`, `sigmoid`, or `none` for numbers.
        max_length: Tokens after which a text is cut; None of images and sounds.
        padding: `id`, `type_id`, `token` and `side` of what fills a batch's shorter rows; None of images and sounds.
        truncation_side: Where a text that is too long is cut.
        precision: The float type that OpenVINO computes in unless it is told otherwise; None for its own choice.
        outputs: Names of the graph's outputs.
        mask_id: The token that is filled in, of `fill-mask`.
        begin_ids: The tokens that a decoder's text begins with.
        end_ids: The tokens that end a text that is written.
        never_ids: The tokens that are not written.
        never_first_ids: The tokens that are not written first.
        image: How images become pixel values: `height`, `width`, `resample`, `factor`, `mean` and `std`.
        sound: How sounds are read: `rate`, numbers a second, whether to `normalize` them, and how many `pitches` a
            spectrogram has; None where they are read as they are. Spectrograms also have `window`, `hop` and
            `numbers`, which every sound is cut or filled up to.
        products: `vnni` where 8-bit products may overflow on an x86 processor without VNNI; None elsewhere.
    """

    engine: str
    file: str
    task: str
    inputs: tuple[str, ...]
    labels: tuple[str, ...]
    scores: str
    max_length: int | None
    padding: Mapping[str, Any] | None
    truncation_side: str
    precision: str | None
    outputs: tuple[str, ...] = ("logits",)
    mask_id: int | None = None
    begin_ids: tuple[int, ...] = ()
    end_ids: tuple[int, ...] = ()
    never_ids: tuple[int, ...] = ()
    never_first_ids: tuple[int, ...] = ()
    image: Mapping[str, Any] | None = field(default=None)
    sound: Mapping[str, Any] | None = field(default=None)
    products: str | None = None

    @property
    def writes(self) -> bool:
        """Whether a decoder writes, of which what it has written is an input."""
        return WRITTEN in self.inputs

    @property
    def reads(self) -> str:
        """What enters the graph: `text`, `images` or `sounds`."""
        if self.task in ("automatic-speech-recognition", "audio-classification"):
            return "sounds"
        return "images" if self.task == "image-classification" else "text"

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads and checks a folder's manifest.

        Raises:
            RuntimeFolderError: There is none, or it is not of a form that this version reads.
        """
        file = folder / MANIFEST
        try:
            said = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RuntimeFolderError(f"{folder} holds no {MANIFEST}: `hfcompress export` did not write it") from None
        except (OSError, ValueError) as error:
            raise RuntimeFolderError(f"{file} cannot be read: {error}") from None
        if not isinstance(said, dict):
            raise RuntimeFolderError(f"{file} must hold an object")
        if said.get("format") != FORMAT:
            raise RuntimeFolderError(f"{file}: format is {said.get('format')!r}, this version reads {FORMAT}")
        values = {}
        for name, check in _CHECKS.items():
            if name not in said and name in _ADDED:
                continue  # an earlier version wrote it
            if name not in said or not check(said[name]):
                raise RuntimeFolderError(f"{file}: '{name}' is missing or not of its kind: {said.get(name)!r}")
            values[name] = tuple(said[name]) if isinstance(said[name], list) else said[name]
        made = cls(**values)
        made._check_task(file)
        return made

    def _check_task(self, file: Path) -> None:
        """Refuses a manifest that lacks what its task needs."""
        needed: dict[str, Any] = {"padding": self.padding, "max_length": self.max_length}
        if self.reads != "text":
            needed = {"image": self.image} if self.reads == "images" else {"sound": self.sound}
        spells = self.task == "automatic-speech-recognition" and not self.writes
        if self.task.endswith("classification") or spells:
            needed["labels"] = self.labels
        if self.task == "fill-mask":
            needed["mask_id"] = self.mask_id
        if self.writes:
            needed |= {"begin_ids": self.begin_ids, "max_length": self.max_length}
        lacking = [name for name, value in needed.items() if value is None or value == ()]
        if self.task == "question-answering" and len(self.outputs) != 2:
            lacking.append("outputs")
        if lacking:
            raise RuntimeFolderError(f"{file}: '{lacking[0]}' is missing or not of its kind, for {self.task}")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _padding(value: Any) -> bool:
    kinds = {"id": int, "type_id": int, "token": str, "side": str}
    return value is None or (
        isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())
    )


def _image(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict):
        return False
    numbers = all(isinstance(value.get(name), list) for name in ("mean", "std"))
    sizes = all(type(value.get(name)) is int and value[name] > 0 for name in ("height", "width"))
    return numbers and sizes and isinstance(value.get("factor"), (int, float)) and value.get("resample") in (2, 3)


def _ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(each) is int for each in value)


def _sound(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or not isinstance(value.get("normalize"), bool) or "pitches" not in value:
        return False
    numbers = ("rate",) if value["pitches"] is None else ("rate", "pitches", "window", "hop", "numbers")
    return all(type(value.get(name)) is int and value[name] > 0 for name in numbers)


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "engine": lambda value: value in ENGINES,
    # A name and no path: the graph lies in the folder.
    "file": lambda value: isinstance(value, str) and value == Path(value).name and not value.startswith("."),
    "task": lambda value: value in TASKS,
    "inputs": lambda value: _texts(value) and bool(value),
    "labels": _texts,
    "scores": lambda value: value in ("softmax", "sigmoid", "none"),
    "max_length": lambda value: value is None or (type(value) is int and value > 0),
    "padding": _padding,
    "truncation_side": lambda value: value in ("left", "right"),
    "precision": lambda value: value in (None, "f32", "bf16", "f16"),
    "outputs": lambda value: _texts(value) and bool(value),
    "mask_id": lambda value: value is None or type(value) is int,
    "begin_ids": _ids,
    "end_ids": _ids,
    "never_ids": _ids,
    "never_first_ids": _ids,
    "image": _image,
    "sound": _sound,
    "products": lambda value: value in (None, "vnni"),
}
_ADDED = (
    "outputs",
    "mask_id",
    "begin_ids",
    "end_ids",
    "never_ids",
    "never_first_ids",
    "image",
    "sound",
    "products",
)
