"""Runs what `hfcompress export` wrote, called like a transformers pipeline.

It needs numpy, tokenizers and the engine (onnxruntime or openvino), and neither torch nor transformers. That is why
it stands beside the package, whose import loads both: `pip install --no-deps hfcompress` next to the three is enough,
and so is a copy of this one file.

    from hfcompress_runtime import Pipeline

    classify = Pipeline.from_pretrained("exported")
    classify(["A fine film."])  # [{'label': 'positive', 'score': 0.98}]
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

MANIFEST = "hfcompress_export.json"
FORMAT = 1
ENGINES = ("onnx", "openvino")
TASKS = ("text-classification", "token-classification")

Arrays = Mapping[str, np.ndarray]
Text = str | Mapping[str, str]
Precision = Literal["f32", "bf16", "f16"]


class RuntimeFolderError(ValueError):
    """The folder is no export, is damaged, or needs an engine that is not installed."""

    user_error = True


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an exported folder says about itself.

    Attributes:
        engine: `onnx` or `openvino`.
        file: Name of the graph's file in the folder.
        task: `text-classification` or `token-classification`.
        inputs: Names of the graph's inputs; each is int64 `(batch, tokens)`.
        labels: Names of the classes in the order of the logits.
        scores: How logits become scores: `softmax`, `sigmoid`, or `none` for numbers.
        max_length: Tokens after which a text is cut.
        padding: `id`, `type_id`, `token` and `side` of what fills a batch's shorter rows.
        truncation_side: Where a text that is too long is cut.
        precision: The float type that OpenVINO computes in unless it is told otherwise; None for its own choice.
    """

    engine: str
    file: str
    task: str
    inputs: tuple[str, ...]
    labels: tuple[str, ...]
    scores: str
    max_length: int
    padding: Mapping[str, Any]
    truncation_side: str
    precision: str | None

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
        for name, check in _CHECKS.items():
            if name not in said or not check(said[name]):
                raise RuntimeFolderError(f"{file}: '{name}' is missing or not of its kind: {said.get(name)!r}")
        values = {name: said[name] for name in _CHECKS}
        values |= {name: tuple(values[name]) for name in ("inputs", "labels")}
        return cls(**values)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, str) for each in value)


def _padding(value: Any) -> bool:
    kinds = {"id": int, "type_id": int, "token": str, "side": str}
    return isinstance(value, dict) and all(isinstance(value.get(name), kind) for name, kind in kinds.items())


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "engine": lambda value: value in ENGINES,
    # A name and no path: the graph lies in the folder.
    "file": lambda value: isinstance(value, str) and value == Path(value).name and not value.startswith("."),
    "task": lambda value: value in TASKS,
    "inputs": _texts,
    "labels": _texts,
    "scores": lambda value: value in ("softmax", "sigmoid", "none"),
    "max_length": lambda value: type(value) is int and value > 0,
    "padding": _padding,
    "truncation_side": lambda value: value in ("left", "right"),
    "precision": lambda value: value in (None, "f32", "bf16", "f16"),
}


class _OnnxSession:
    def __init__(self, file: Path, threads: int | None, precision: str | None) -> None:
        onnxruntime = _engine("onnxruntime")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE":
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Arrays) -> np.ndarray:
        return self._session.run(["logits"], dict(inputs))[0]


class _OpenVinoSession:
    def __init__(self, file: Path, threads: int | None, precision: str | None) -> None:
        openvino = _engine("openvino")
        options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        if precision is not None:
            options["INFERENCE_PRECISION_HINT"] = precision
        self._model = openvino.Core().compile_model(str(file), "CPU", options)

    def run(self, inputs: Arrays) -> np.ndarray:
        return np.array(self._model(dict(inputs))[0])


_SESSIONS = {"onnx": _OnnxSession, "openvino": _OpenVinoSession}


def _engine(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RuntimeFolderError(f"this folder needs {name}, which is not installed\npip install {name}") from error


class Pipeline:
    """Classifies texts, or the tokens of texts, with an exported model.

    Args:
        manifest: What the folder says.
        session: The graph in its engine.
        tokenizer: A `tokenizers.Tokenizer`.
    """

    def __init__(self, manifest: Manifest, session: Any, tokenizer: Any) -> None:
        self.manifest = manifest
        self._session = session
        self._tokenizer = tokenizer
        pads = manifest.padding
        tokenizer.enable_padding(
            direction=pads["side"], pad_id=pads["id"], pad_type_id=pads["type_id"], pad_token=pads["token"]
        )
        tokenizer.enable_truncation(manifest.max_length, direction=manifest.truncation_side)

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, threads: int | None = None, precision: Precision | None = None
    ) -> Pipeline:
        """Opens an exported folder.

        Args:
            folder: What `hfcompress export` wrote.
            threads: Threads of the engine; None for its own choice.
            precision: The float type that OpenVINO computes in; None for what the folder says.

        Raises:
            RuntimeFolderError: The folder is no export, is damaged, or its engine is not installed.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if precision is not None and manifest.engine != "openvino":
            raise RuntimeFolderError(f"precision is a choice of OpenVINO; this folder is for {manifest.engine}")
        graph, vocabulary = folder / manifest.file, folder / "tokenizer.json"
        for file in (graph, vocabulary):
            if not file.is_file():
                raise RuntimeFolderError(f"{file} is missing from the export")
        from tokenizers import Tokenizer

        try:
            tokenizer = Tokenizer.from_file(str(vocabulary))
            session = _SESSIONS[manifest.engine](graph, threads, precision or manifest.precision)
        except RuntimeFolderError:
            raise
        except Exception as error:  # the engines raise classes of their own, some of them nothing but Exception
            raise RuntimeFolderError(f"{folder} is damaged: {error}") from error
        return cls(manifest, session, tokenizer)

    def __call__(
        self,
        texts: Text | Sequence[Text],
        *,
        top_k: int | None = 1,
        batch_size: int = 32,
        aggregation_strategy: Literal["none", "simple"] = "none",
    ) -> list[Any]:
        """Classifies one text or several; a pair of texts is `{"text": ..., "text_pair": ...}`.

        Args:
            texts: What to classify. What is longer than the model takes is cut.
            top_k: Of texts: how many labels to return, best first; None for all.
            batch_size: Texts that go through the model together.
            aggregation_strategy: Of tokens: `simple` joins neighbours of one entity.

        Returns:
            As transformers' pipelines: of texts one `{"label", "score"}` a text, or with another `top_k` a list of
            them; of tokens a list of entities a text (for one text alone, the list itself).
        """
        alone = isinstance(texts, (str, Mapping))
        rows: list[Text] = [texts] if alone else list(texts)  # type: ignore[list-item]
        tokens = self.manifest.task == "token-classification"
        made: list[Any] = []
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            encodings = self._encode(part)
            logits = self.run(self._arrays(encodings))
            for text, encoding, row in zip(part, encodings, logits, strict=True):
                if tokens:
                    made.append(self._entities(text, encoding, row, aggregation_strategy))
                else:
                    made.append(self._labels(row, top_k))
        return made[0] if alone and (tokens or top_k != 1) else made

    def encode(self, texts: Sequence[Text]) -> dict[str, np.ndarray]:
        """Tokenizes texts into the graph's inputs, int64 `(texts, tokens)`."""
        return self._arrays(self._encode(texts))

    def run(self, inputs: Arrays) -> np.ndarray:
        """Runs the graph on its inputs, int64 `(batch, tokens)`; returns the logits, float32."""
        return self._session.run({name: np.asarray(inputs[name], np.int64) for name in self.manifest.inputs})

    def logits(self, texts: Sequence[Text]) -> np.ndarray:
        """Returns the logits of one batch of texts."""
        return self.run(self.encode(texts))

    def _encode(self, texts: Sequence[Text]) -> list[Any]:
        pairs = [each if isinstance(each, str) else (each["text"], each["text_pair"]) for each in texts]
        return self._tokenizer.encode_batch(pairs)

    def _arrays(self, encodings: Sequence[Any]) -> dict[str, np.ndarray]:
        columns = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
        return {
            name: np.array([getattr(each, columns[name]) for each in encodings], np.int64)
            for name in self.manifest.inputs
        }

    def _scores(self, logits: np.ndarray) -> np.ndarray:
        if self.manifest.scores == "softmax" or self.manifest.task == "token-classification":
            powers = np.exp(logits - logits.max(-1, keepdims=True))
            return powers / powers.sum(-1, keepdims=True)
        return 1 / (1 + np.exp(-logits)) if self.manifest.scores == "sigmoid" else logits

    def _labels(self, logits: np.ndarray, top_k: int | None) -> Any:
        scores = self._scores(logits)
        order = np.argsort(-scores, kind="stable")[:top_k]
        found = [{"label": self.manifest.labels[index], "score": float(scores[index])} for index in order]
        return found[0] if top_k == 1 else found

    def _entities(self, text: Text, encoding: Any, logits: np.ndarray, strategy: str) -> list[dict[str, Any]]:
        scores = self._scores(logits)
        content = text if isinstance(text, str) else text["text"]
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        found = []
        for index, special in enumerate(encoding.special_tokens_mask):
            if special or not encoding.attention_mask[index]:
                continue
            best = int(scores[index].argmax())
            start, end = encoding.offsets[index]
            token = encoding.tokens[index]
            found.append(
                {
                    "entity": self.manifest.labels[best],
                    "score": float(scores[index, best]),
                    "index": index,
                    "word": content[start:end] if token == unknown else token,
                    "start": start,
                    "end": end,
                }
            )
        if strategy == "none":
            return [each for each in found if each["entity"] != "O"]
        return [each for each in _joined(found, content) if each["entity_group"] != "O"]


def _joined(entities: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """Joins neighbours whose tags are of one kind; `B-` begins anew."""
    groups: list[list[Mapping[str, Any]]] = []
    for entity in entities:
        kind = _kind(entity["entity"])
        if groups and kind == _kind(groups[-1][-1]["entity"]) and not entity["entity"].startswith("B-"):
            groups[-1].append(entity)
        else:
            groups.append([entity])
    return [
        {
            "entity_group": _kind(group[0]["entity"]),
            "score": float(np.mean([each["score"] for each in group])),
            "word": text[group[0]["start"] : group[-1]["end"]],
            "start": group[0]["start"],
            "end": group[-1]["end"],
        }
        for group in groups
    ]


def _kind(tag: str) -> str:
    return tag[2:] if tag[:2] in ("B-", "I-") else tag
