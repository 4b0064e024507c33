"""Which heads can be exported: what each does, how it is loaded, and what its graph returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from hfcompress.errors import UnsupportedModelError

Reads = Literal["text", "images", "sounds", "spectrograms"]
_INPUTS: Mapping[Reads, tuple[str, ...]] = {
    "text": ("input_ids", "attention_mask", "token_type_ids"),
    "images": ("pixel_values",),
    "sounds": ("input_values",),
    "spectrograms": ("input_features",),
}
WRITTEN = "decoder_input_ids"


@dataclass(frozen=True, kw_only=True)
class Head:
    """A kind of head.

    Attributes:
        suffix: How the names of its classes end.
        task: Its name on the Hub, and what the runtime does with its outputs.
        auto_class: The class of transformers that loads it.
        outputs: The fields of the model's output that the graph returns, in order.
        reads: What enters the model.
        writes: Whether a decoder writes another text, of which what is there already enters too.
        fewest: Tokens that every row has: some families split the outputs of a question in a way that is traced
            apart for fewer.
    """

    suffix: str
    task: str
    auto_class: str
    outputs: tuple[str, ...] = ("logits",)
    reads: Reads = "text"
    writes: bool = False
    fewest: int = 1

    @property
    def inputs(self) -> tuple[str, ...]:
        """The tensors that a graph may take, in order."""
        return (*_INPUTS[self.reads], WRITTEN) if self.writes else _INPUTS[self.reads]


# A longer suffix comes before the shorter one that it ends with.
HEADS = (
    Head(
        suffix="ForSequenceClassification",
        task="text-classification",
        auto_class="AutoModelForSequenceClassification",
    ),
    Head(
        suffix="ForSequenceClassification",
        task="audio-classification",
        auto_class="AutoModelForAudioClassification",
        reads="sounds",
    ),
    Head(suffix="ForTokenClassification", task="token-classification", auto_class="AutoModelForTokenClassification"),
    Head(
        suffix="ForQuestionAnswering",
        task="question-answering",
        auto_class="AutoModelForQuestionAnswering",
        outputs=("start_logits", "end_logits"),
        fewest=4,
    ),
    Head(suffix="ForMaskedLM", task="fill-mask", auto_class="AutoModelForMaskedLM"),
    Head(suffix="ForCausalLM", task="text-generation", auto_class="AutoModelForCausalLM"),
    Head(suffix="LMHeadModel", task="text-generation", auto_class="AutoModelForCausalLM"),
    Head(
        suffix="ForConditionalGeneration",
        task="text2text-generation",
        auto_class="AutoModelForSeq2SeqLM",
        writes=True,
    ),
    Head(
        suffix="ForConditionalGeneration",
        task="automatic-speech-recognition",
        auto_class="AutoModelForSpeechSeq2Seq",
        reads="spectrograms",
        writes=True,
    ),
    Head(
        suffix="ForImageClassification",
        task="image-classification",
        auto_class="AutoModelForImageClassification",
        reads="images",
    ),
    Head(
        suffix="ForAudioClassification",
        task="audio-classification",
        auto_class="AutoModelForAudioClassification",
        reads="spectrograms",
    ),
    Head(suffix="ForCTC", task="automatic-speech-recognition", auto_class="AutoModelForCTC", reads="sounds"),
    Head(
        suffix="EncoderModel",
        task="feature-extraction",
        auto_class="AutoModelForTextEncoding",
        outputs=("last_hidden_state",),
    ),
    Head(suffix="Model", task="feature-extraction", auto_class="AutoModel", outputs=("last_hidden_state",)),
)


def head_of(config: Any) -> Head:
    """Finds the head of a checkpoint.

    Args:
        config: Its config, of the family's class.

    Raises:
        UnsupportedModelError: It is none that can be exported.
    """
    named = str((config.architectures or ["nothing"])[0])
    head = next((each for each in HEADS if named.endswith(each.suffix) and _loads(each, config, named)), None)
    if head is None:
        raise UnsupportedModelError(
            f"{named} cannot be exported; heads that can: {', '.join(dict.fromkeys(each.suffix for each in HEADS))}",
            hint="Fine-tune it for one of these, or run the checkpoint with transformers.",
        )
    if head.suffix == "Model" and config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{named} reads one text and writes another, and has no head; such models cannot be exported",
            hint="Export it with its head (ForConditionalGeneration), or its encoder alone (T5EncoderModel).",
        )
    return head


def _loads(head: Head, config: Any, named: str) -> bool:
    """Whether a head is what a class is: only one that transformers itself lists for the config is ever loaded."""
    import transformers

    found = getattr(transformers, head.auto_class)._model_mapping.get(type(config), None)
    listed = found if isinstance(found, tuple) else () if found is None else (found,)
    if head.reads == "text" and hasattr(config, "num_mel_bins"):
        return False  # Whisper's decoder alone, which has nothing to listen to
    return any(each.__name__ == named and each.main_input_name == head.inputs[0] for each in listed)
