"""Speech written down word by word by an encoder and a decoder (Whisper)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from hfcompress.errors import DataError
from hfcompress.tasks.kinds.speech_recognition import SpeechRecognition
from hfcompress.tasks.kinds.writing import told_of, written
from hfcompress.tasks.task import Generation, Task

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel

    from hfcompress.tasks.kinds.base import Rows

_SPEED_TOKENS = 32  # of the text that is written, in the batch that costs are measured on


class SpeechToText(SpeechRecognition):
    """The words of a recording, as a text that is written token by token (Whisper; Radford et al. 2023).

    Recordings are given as for `speech_recognition`. Each is heard as one window of the extractor's length (Whisper:
    30 s), padded with silence; what is longer is cut. Costs are those of one pass over a window and 32 tokens of its
    text, not of writing it.
    """

    name = "speech_to_text"
    auto_class = "AutoModelForSpeechSeq2Seq"
    generation = Generation()

    def encode(self, dataset: Dataset, task: Task, processor: Any, *, max_length: int) -> Dataset:
        """Returns recordings as bytes of 32-bit floats (`audio`), tokens as many as are written, and transcripts."""
        assert task.generation is not None
        encoded = super().encode(dataset, task, processor, max_length=max_length)
        # A model begins with its first token by itself.
        first = list(getattr(processor.tokenizer, "prefix_tokens", None) or ())[:1]
        labels = [row[len(first) :] if row[: len(first)] == first else row for row in encoded["labels"]]
        cut = [row[: task.generation.tokens] for row in labels]
        return encoded.remove_columns("labels").add_column("labels", cut)  # pyright: ignore[reportCallIssue]

    def collator(self, processor: Any) -> Any:
        """Makes spectrograms of recordings, each a window long."""
        import numpy as np

        from hfcompress.tasks.kinds.base import pad

        extractor = processor.feature_extractor

        def collate(rows: Rows) -> dict[str, torch.Tensor]:
            sounds = [np.frombuffer(row["audio"], dtype=np.float32) for row in rows]
            heard = extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt")
            labels = pad([{"labels": row["labels"]} for row in rows], {"labels": -100})
            return {"input_features": heard["input_features"], **labels}

        return collate

    def batch_size(self, processor: Any, asked: int) -> int:
        """Returns what was asked: every recording is padded to the same window."""
        return asked

    def require_head(self, task: Task, model: PreTrainedModel) -> None:
        """Refuses a model that does not hear windows of one length.

        Raises:
            DataError: It does not.
        """
        if not hasattr(model.config, "num_mel_bins") or not hasattr(model.config, "max_source_positions"):
            raise DataError(
                f"task '{task.name}': {model.config.model_type} hears no windows of mel bands; {self.name} is for "
                "Whisper and its like",
                hint="Models that say a letter for every moment (CTC) are of kind speech_recognition.",
            )

    def speed_inputs(self, config: Any, batch_size: int) -> dict[str, torch.Tensor] | None:
        """Returns a window of noise for each row, the same every time, and the first tokens of what is written."""
        import torch

        generator = torch.Generator().manual_seed(0)
        # Of two frames the model's second convolution makes one.
        size = (batch_size, config.num_mel_bins, 2 * config.max_source_positions)
        tokens = torch.full(
            (batch_size, min(_SPEED_TOKENS, config.max_target_positions)), config.decoder_start_token_id
        )
        return {"input_features": torch.randn(size, generator=generator), "decoder_input_ids": tokens}

    def ask(self, model: PreTrainedModel, batch: Mapping[str, torch.Tensor], processor: Any, task: Task) -> Any:
        """Lets the model write."""
        assert task.generation is not None
        return written(model, batch, processor.tokenizer, task.generation)

    def read(self, outputs: Any, batch: Mapping[str, torch.Tensor]) -> list[Any]:
        """Keeps the texts."""
        return list(outputs)

    def told(self, task: Task) -> str:
        """Says how texts are written."""
        assert task.generation is not None
        return told_of(task.generation)
