"""An exported model, called like a transformers pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from hfcompress_runtime import answers
from hfcompress_runtime.engines import Arrays, open_graph
from hfcompress_runtime.images import pixel_values
from hfcompress_runtime.manifest import WRITTEN, Manifest, RuntimeFolderError
from hfcompress_runtime.sounds import heard, spelled

Text = str | Mapping[str, str]
Precision = Literal["f32", "bf16", "f16"]
USUAL = -1
_USUAL_TOP_K = {"image-classification": 5, "audio-classification": 5, "fill-mask": 5}
_WINDOW, _STRIDE = 384, 128  # tokens of a long context that are read at once, and by how many windows overlap
_REAL = ("pixel_values", "input_values", "input_features")
_NEW_TOKENS = 20
_COLUMNS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}


class Pipeline:
    """Answers with an exported model what its head was trained for.

    Args:
        manifest: What the folder says.
        session: The graph in its engine.
        tokenizer: A `tokenizers.Tokenizer`; None where there are no tokens.
    """

    def __init__(self, manifest: Manifest, session: Any, tokenizer: Any = None) -> None:
        self.manifest = manifest
        self._session = session
        self._tokenizer = tokenizer
        if manifest.reads == "text":
            self._pad_and_cut()

    @property
    def _pads(self) -> Mapping[str, Any]:
        assert self.manifest.padding is not None  # `Manifest.read` has seen to it
        pads = self.manifest.padding
        # What a causal model says of a token does not depend on what comes after it.
        return {**pads, "side": "right"} if self.manifest.task == "text-generation" else pads

    def _pad_and_cut(self) -> None:
        pads = self._pads
        self._tokenizer.enable_padding(
            direction=pads["side"], pad_id=pads["id"], pad_type_id=pads["type_id"], pad_token=pads["token"]
        )
        self._tokenizer.enable_truncation(self.manifest.max_length, direction=self.manifest.truncation_side)

    @contextmanager
    def _unpadded(self) -> Iterator[None]:
        self._tokenizer.no_padding()
        try:
            yield
        finally:
            self._pad_and_cut()

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
            RuntimeFolderError: The folder is no export, is damaged, its engine is not installed, or the processor
                lacks what the graph or the precision needs.
        """
        folder = Path(folder)
        manifest = Manifest.read(folder)
        if precision is not None and manifest.engine != "openvino":
            raise RuntimeFolderError(f"precision is a choice of OpenVINO; this folder is for {manifest.engine}")
        graph, vocabulary = folder / manifest.file, folder / "tokenizer.json"
        tokens = manifest.reads == "text" or manifest.writes
        for file in (graph, vocabulary) if tokens else (graph,):
            if not file.is_file():
                raise RuntimeFolderError(f"{file} is missing from the export")
        try:
            tokenizer = _tokenizer(vocabulary) if tokens else None
            session = open_graph(folder, manifest, threads, precision)
        except RuntimeFolderError:
            raise
        except Exception as error:  # the engines raise classes of their own, some of them nothing but Exception
            raise RuntimeFolderError(f"{folder} is damaged: {error}") from error
        return cls(manifest, session, tokenizer)

    def __call__(
        self,
        inputs: Any = None,
        *,
        top_k: int | None = USUAL,
        batch_size: int = 32,
        aggregation_strategy: Literal["none", "simple"] = "none",
        max_new_tokens: int | None = None,
        **named: Any,
    ) -> Any:
        """Answers one input or a list of them, as transformers' pipeline of the task does.

        Args:
            inputs: Texts; a pair of texts is `{"text": ..., "text_pair": ...}`, a question `{"question": ...,
                "context": ...}`. Images are uint8 arrays `(height, width, 3)`, Pillow images or paths, which need
                Pillow. Sounds are arrays of numbers at the model's rate, or `{"raw": ..., "sampling_rate": ...}`,
                and are read one by one. What is longer than the model takes is cut; a long context is read in
                windows.
            top_k: How many answers to return, best first; None for all of them, and by default what transformers
                returns: 1 of texts and questions, 5 of images, sounds and masks.
            batch_size: Rows that go through the model together.
            aggregation_strategy: Of tokens: `simple` joins neighbours of one entity.
            max_new_tokens: Of generated texts: the most that is added, by default 20, and of speech what the model
                takes. The most likely token comes next, and everything is read again for each, as the graph keeps no
                cache.
            named: `question` and `context`, in place of `inputs`.

        Returns:
            As transformers' pipelines: of texts one `{"label", "score"}` a text, or with another `top_k` a list of
            them; of tokens a list of entities a text; of questions `{"score", "start", "end", "answer"}`; of masks
            a list of `{"score", "token", "token_str", "sequence"}`; of generated texts `[{"generated_text"}]`, of
            texts written of others `{"generated_text"}`; of speech `{"text"}`; of features a list
            `(1, tokens, width)`. For one input alone, the answer itself.
        """
        task = self.manifest.task
        given = named if inputs is None else inputs
        alone = not isinstance(given, list | tuple)
        rows: list[Any] = [given] if alone else list(given)
        top = _USUAL_TOP_K.get(task, 1) if top_k == USUAL else top_k
        if task == "question-answering":
            made: list[Any] = [self._answer(row, top or 1, batch_size) for row in rows]
        elif task == "text2text-generation":
            written = [
                text for part in _parts(rows, batch_size) for text in self.texts(self.encode(part), max_new_tokens)
            ]
            made = [{"generated_text": text} for text in written]
        elif self.manifest.reads == "sounds":  # without a mask, what fills up a shorter one would be heard
            made = [self._heard(self.encode([row]), top, max_new_tokens) for row in rows]
        elif task == "text-generation":
            count = _NEW_TOKENS if max_new_tokens is None else max_new_tokens
            made = [each for part in _parts(rows, batch_size) for each in self._continued(part, count)]
        else:
            made = [each for part in _parts(rows, batch_size) for each in self._read(part, top, aggregation_strategy)]
        # Of one text transformers returns a list of its one label.
        return made[0] if alone and (task != "text-classification" or top != 1) else made

    def encode(self, texts: Sequence[Text]) -> dict[str, np.ndarray]:
        """Turns texts, images, or sounds of one length into the graph's inputs.

        They are int64 `(texts, tokens)`, without what a decoder has written, or float32.
        """
        if self.manifest.sound is not None:
            return {self.manifest.inputs[0]: heard(texts, self.manifest.sound)}
        if self.manifest.image is not None:
            return {self.manifest.inputs[0]: pixel_values(texts, self.manifest.image)}
        return self._arrays(self._encode(texts))

    def outputs(self, inputs: Arrays) -> dict[str, np.ndarray]:
        """Runs the graph on its inputs; returns all outputs by name, float32."""
        arrays = {
            name: np.asarray(inputs[name], np.float32 if name in _REAL else np.int64) for name in self.manifest.inputs
        }
        return dict(zip(self.manifest.outputs, self._session.run(arrays), strict=True))

    def run(self, inputs: Arrays) -> np.ndarray:
        """Runs the graph on its inputs; returns the logits, float32.

        Of questions they are those of starts and ends, `(batch, tokens, 2)`; of features the hidden states.
        """
        found = list(self.outputs(inputs).values())
        return found[0] if len(found) == 1 else np.stack(found, axis=-1)

    def logits(self, texts: Sequence[Text]) -> np.ndarray:
        """Returns the logits of one batch of texts."""
        return self.run(self.encode(texts))

    def texts(self, inputs: Arrays, max_new_tokens: int | None = None) -> list[str]:
        """Returns what a model that writes or spells says of its inputs, without special tokens.

        Args:
            inputs: What the graph takes, but for what has been written.
            max_new_tokens: As of a call.
        """
        said = self.manifest
        if not said.writes:
            return [spelled(row, said.labels) for row in self.run(inputs)]
        assert said.max_length is not None
        prompt = 1 if said.reads == "text" else len(said.begin_ids)  # transformers counts what is forced as written
        usual = _NEW_TOKENS if said.reads == "text" else said.max_length
        longest = min(prompt + (usual if max_new_tokens is None else max_new_tokens), said.max_length)
        count = len(inputs[said.inputs[0]])
        rows, going = [list(said.begin_ids) for _ in range(count)], list(range(count))
        for length in range(len(said.begin_ids), longest):
            if not going:
                break
            read = {name: inputs[name][going] for name in said.inputs if name != WRITTEN}
            logits = self.run({**read, WRITTEN: np.array([rows[place] for place in going])})[:, -1]
            never = said.never_ids + (said.never_first_ids if length == len(said.begin_ids) else ())
            logits[:, list(never)] = -np.inf
            for place, token in zip(going, logits.argmax(-1).tolist(), strict=True):
                rows[place].append(token)
            going = [place for place in going if rows[place][-1] not in said.end_ids]
        own = len(said.begin_ids)
        return [self._tokenizer.decode(row[own:], skip_special_tokens=True) for row in rows]

    def _heard(self, inputs: Arrays, top_k: int | None, max_new_tokens: int | None) -> Any:
        if self.manifest.task == "automatic-speech-recognition":
            return {"text": self.texts(inputs, max_new_tokens)[0]}
        return answers.best_labels(self.run(inputs)[0], self.manifest.labels, self.manifest.scores, top_k)

    def _encode(self, texts: Sequence[Text]) -> list[Any]:
        pairs = [each if isinstance(each, str) else (each["text"], each["text_pair"]) for each in texts]
        return self._tokenizer.encode_batch(pairs)

    def _arrays(self, encodings: Sequence[Any]) -> dict[str, np.ndarray]:
        return {
            name: np.array([getattr(each, _COLUMNS[name]) for each in encodings], np.int64)
            for name in self.manifest.inputs
            if name != WRITTEN
        }

    def _read(self, part: list[Any], top_k: int | None, strategy: str) -> Iterator[Any]:
        """Yields the answers of one batch, of the tasks that one pass answers."""
        said = self.manifest
        if said.image is not None:
            for row in self.run(self.encode(part)):
                yield answers.best_labels(row, said.labels, said.scores, top_k)
            return
        encodings = self._encode(part)
        for text, encoding, row in zip(part, encodings, self.run(self._arrays(encodings)), strict=True):
            if said.task == "text-classification":
                found = answers.best_labels(row, said.labels, said.scores, top_k)
                yield found[0] if top_k == 1 else found
            elif said.task == "token-classification":
                yield self._entities(text if isinstance(text, str) else text["text"], encoding, row, strategy)
            elif said.task == "fill-mask":
                assert said.mask_id is not None
                yield answers.fillings(self._tokenizer, encoding.ids, row, said.mask_id, self._pads["id"], top_k)
            else:
                yield [row[np.array(encoding.attention_mask, bool)].tolist()]

    def _entities(self, text: str, encoding: Any, logits: np.ndarray, strategy: str) -> list[dict[str, Any]]:
        unknown = getattr(self._tokenizer.model, "unk_token", None)
        found = answers.entities(text, encoding, logits, self.manifest.labels, unknown)
        if strategy == "none":
            return [each for each in found if each["entity"] != "O"]
        return [each for each in answers.joined(found, text) if each["entity_group"] != "O"]

    def _answer(self, row: Mapping[str, str], top_k: int, batch_size: int) -> Any:
        """Answers one question: windows over a long context are rows of their own."""
        longest = self.manifest.max_length or _WINDOW
        window = min(longest, _WINDOW)
        asked = len(self._tokenizer.encode(row["question"]).ids)
        room = window - asked - 2  # some families put two separators between the two
        if room < 4:
            raise ValueError(f"the question has {asked} tokens, and no more than {window} are read at once")
        stride = min(_STRIDE, room // 2)
        with self._unpadded():
            self._tokenizer.enable_truncation(window, stride=stride, strategy="only_second")
            first = self._tokenizer.encode_batch([(row["question"], row["context"])])[0]
        encodings = [first, *first.overflowing]
        starts, ends = [], []
        for part in _parts(encodings, batch_size):
            found = self.run(self._padded([each.ids for each in part], [each.type_ids for each in part]))
            starts += [line[: len(each.ids), 0] for each, line in zip(part, found, strict=True)]
            ends += [line[: len(each.ids), 1] for each, line in zip(part, found, strict=True)]
        made = answers.spans(row["context"], encodings, starts, ends, top_k)
        if not made:
            made = [{"score": 0.0, "start": 0, "end": 0, "answer": ""}]
        return made[0] if top_k == 1 else made

    def _padded(self, ids: Sequence[Sequence[int]], types: Sequence[Sequence[int]] | None = None) -> dict[str, Any]:
        """Makes the graph's inputs of rows of tokens, filled up on the right."""
        longest = max(map(len, ids))
        pads = self._pads
        made = {
            "input_ids": np.full((len(ids), longest), pads["id"], np.int64),
            "attention_mask": np.zeros((len(ids), longest), np.int64),
            "token_type_ids": np.full((len(ids), longest), pads["type_id"], np.int64),
        }
        for place, row in enumerate(ids):
            made["input_ids"][place, : len(row)] = row
            made["attention_mask"][place, : len(row)] = 1
            made["token_type_ids"][place, : len(row)] = 0 if types is None else types[place]
        return {name: made[name] for name in self.manifest.inputs}

    def _continued(self, texts: list[str], count: int) -> list[list[dict[str, str]]]:
        """Adds to each text the most likely tokens, one after the other."""
        with self._unpadded():
            rows = [list(each.ids) for each in self._tokenizer.encode_batch(texts)]
        for text, row in zip(texts, rows, strict=True):
            if not row:
                raise ValueError(f"{text!r} has no tokens to go on from")
        begun, ended = [len(row) for row in rows], [False] * len(rows)
        for _ in range(count):
            going = [
                place
                for place, row in enumerate(rows)
                if not ended[place] and len(row) < (self.manifest.max_length or len(row) + 1)
            ]
            if not going:
                break
            logits = self.run(self._padded([rows[place] for place in going]))
            for place, scores in zip(going, logits, strict=True):
                token = int(scores[len(rows[place]) - 1].argmax())
                rows[place].append(token)
                ended[place] = token in self.manifest.end_ids
        return [
            [{"generated_text": text + self._tokenizer.decode(row[start:], skip_special_tokens=True)}]
            for text, row, start in zip(texts, rows, begun, strict=True)
        ]


def _parts(rows: Sequence[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])


def _tokenizer(file: Path) -> Any:
    from tokenizers import Tokenizer

    made = Tokenizer.from_file(str(file))
    made.no_padding()
    made.no_truncation()
    return made
