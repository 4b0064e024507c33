"""Speech written down by a model that says a character for every moment (CTC: Wav2Vec2 and its like)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfcompress.errors import DataError
from hfcompress.tasks.checks import check_texts
from hfcompress.tasks.kinds.base import Given, Kind
from hfcompress.tasks.task import Task

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hfcompress.tasks.kinds.base import Rows

_SPEED_SECONDS = 1


class SpeechRecognition(Kind):
    """The words of a recording, character by character, the likeliest one at each moment (Graves et al. 2006).

    A recording is `{array: [...], sampling_rate: ...}`, numbers between -1 and 1, or `{bytes: ...}` of a sound file,
    which needs soundfile. It is brought to the sampling rate of the model. Transcripts are compared as they are: give
    data in the spelling that the model's tokenizer has.
    """

    name = "speech_recognition"
    auto_class = "AutoModelForCTC"
    pipeline_tag = "automatic-speech-recognition"
    metrics = ("wer", "cer", "same_text")
    defaults = ("wer", "cer")
    columns = ("audio",)
    label = "text"
    unit = "recordings"
    reads = "audio"
    encoded = ("audio", "labels", "right")

    def check(self, task: Task, split: Dataset, where: str, *, training: bool) -> None:
        """Recordings, and texts."""
        check_texts(split, task.label, where)
        for row, value in enumerate(_undecoded(split, task.columns[0])[task.columns[0]]):
            _require_sound(value, f"{where}: column '{task.columns[0]}', row {row}")

    def texts(self, task: Task, rows: Dataset) -> list[str]:
        """Returns the transcripts."""
        return list(rows[task.label])

    def load_processor(self, checkpoint: str | Path) -> Any:
        """Loads the feature extractor with the tokenizer."""
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(checkpoint)

    def processor_key(self, processor: Any) -> Any:
        """Returns the vocabulary and the extractor's settings."""
        return [processor.tokenizer.get_vocab(), processor.feature_extractor.to_json_string()]

    def encode(self, dataset: Dataset, task: Task, processor: Any, *, max_length: int) -> Dataset:
        """Returns recordings as bytes of 32-bit floats (`audio`), tokens, and the transcripts (`right`)."""
        from datasets import Dataset

        column, right = task.columns[0], list(dataset[task.label])
        rate = int(processor.feature_extractor.sampling_rate)
        undecoded = _undecoded(dataset, column)[column]
        audio = [sound(value, rate, f"task '{task.name}', row {row}").tobytes() for row, value in enumerate(undecoded)]
        return Dataset.from_dict({"audio": audio, "labels": processor.tokenizer(right)["input_ids"], "right": right})

    def collator(self, processor: Any) -> Any:
        """Makes what the model reads of recordings, padded at their ends."""
        import numpy as np
        import torch

        extractor = processor.feature_extractor

        def collate(rows: Rows) -> dict[str, torch.Tensor]:
            sounds = [np.frombuffer(row["audio"], dtype=np.float32) for row in rows]
            read = extractor(sounds, sampling_rate=extractor.sampling_rate, padding=True, return_tensors="pt")
            batch = dict(read)
            longest = max(len(row["labels"]) for row in rows)
            batch["labels"] = torch.full((len(rows), longest), -100, dtype=torch.long)
            for place, row in enumerate(rows):
                batch["labels"][place, : len(row["labels"])] = torch.as_tensor(row["labels"])
            return batch

        return collate

    def lengths(self, rows: Dataset) -> list[int]:
        """Returns the bytes of each recording."""
        return [len(each) for each in rows["audio"]]

    def batch_size(self, processor: Any, asked: int) -> int:
        """Returns 1 where the model is not told what is padding, which would change what it hears."""
        return asked if processor.feature_extractor.return_attention_mask else 1

    def speed_inputs(self, config: Any, batch_size: int) -> dict[str, torch.Tensor] | None:
        """Returns a second of noise at 16 kHz for each row, the same every time."""
        import torch

        generator = torch.Generator().manual_seed(0)
        return {"input_values": torch.randn(batch_size, 16_000 * _SPEED_SECONDS, generator=generator)}

    def ask(self, model: PreTrainedModel, batch: Mapping[str, torch.Tensor], processor: Any, task: Task) -> Any:
        """Returns the texts of the likeliest characters, of what is no padding."""
        logits = model(**batch).logits
        found = logits.argmax(-1)
        if "attention_mask" in batch:
            lengths = model._get_feat_extract_output_lengths(batch["attention_mask"].sum(-1))  # type: ignore[operator]
            rows = [row[: int(length)] for row, length in zip(found, lengths, strict=True)]
        else:
            rows = list(found)
        return {"logits": logits, "texts": [processor.tokenizer.decode(row).strip() for row in rows]}

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[Any]:
        """Keeps the texts."""
        return list(outputs["texts"])

    def answers(self, task: Task, ids: Sequence[int], rows: Dataset, kept: Sequence[Any]) -> Given:
        """Returns the texts."""
        return Given(list(kept), list(rows["right"]), [])


def sound(value: Mapping[str, Any], rate: int, where: str) -> np.ndarray:
    """Returns a recording as a model hears it.

    Args:
        value: `array` and `sampling_rate`, or the `bytes` of a sound file.
        rate: Numbers a second.
        where: Named where it cannot be read.

    Returns:
        (numbers,), float32; several channels become their mean.

    Raises:
        DataError: It cannot be read.
    """
    import numpy as np

    if value.get("array") is not None:
        samples, own = np.asarray(value["array"], dtype=np.float32), int(value["sampling_rate"])
    else:
        samples, own = _decoded(value["bytes"], where)
    if own != rate:
        from scipy.signal import resample_poly

        common = math.gcd(own, rate)
        samples = resample_poly(samples, rate // common, own // common)
    return np.ascontiguousarray(samples, dtype=np.float32)


def _decoded(data: bytes, where: str) -> tuple[np.ndarray, int]:
    try:
        import soundfile
    except ImportError:
        raise DataError(
            f"{where} is a sound file, and reading those needs soundfile", hint="pip install 'hfcompress[audio]'"
        ) from None
    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except (RuntimeError, OSError, ValueError) as error:
        raise DataError(f"{where} is no sound file that can be read: {error}") from None
    return samples.mean(1), int(rate)


def _require_sound(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        array, rate = value.get("array"), value.get("sampling_rate")
        if array is not None and len(array) and isinstance(rate, int) and rate > 0:
            return
        # A path in the data could name any file of this machine: only bytes are read.
        if array is None and value.get("bytes"):
            return
    raise DataError(f"{where} must be a recording: {{array: [...], sampling_rate: ...}}, or the bytes of a sound file")


def _undecoded(split: Dataset, column: str) -> Dataset:
    from datasets import Audio

    if isinstance(split.features[column], Audio):
        return split.cast_column(column, Audio(decode=False))
    return split
