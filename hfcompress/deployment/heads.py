"""Which heads can be exported: what each does, how it is loaded, and what its graph returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from hfcompress.errors import UnsupportedModelError

Reads = Literal["text", "images"]
_INPUTS: Mapping[Reads, tuple[str, ...]] = {
    "text": ("input_ids", "attention_mask", "token_type_ids"),
    "images": ("pixel_values",),
}
_MAIN_INPUT: Mapping[str, Reads] = {"input_ids": "text", "pixel_values": "images"}


@dataclass(frozen=True, kw_only=True)
class Head:
    """A kind of head.

    Attributes:
        task: Its name on the Hub, and what the runtime does with its outputs.
        auto_class: The class of transformers that loads it.
        outputs: The fields of the model's output that the graph returns, in order.
        reads: What enters the model.
    """

    task: str
    auto_class: str
    outputs: tuple[str, ...] = ("logits",)
    reads: Reads = "text"

    @property
    def inputs(self) -> tuple[str, ...]:
        """The tensors that a graph may take, in order."""
        return _INPUTS[self.reads]


# Suffixes of class names; a longer one comes before the shorter one that it ends with.
HEADS: Mapping[str, Head] = MappingProxyType(
    {
        "ForSequenceClassification": Head(task="text-classification", auto_class="AutoModelForSequenceClassification"),
        "ForTokenClassification": Head(task="token-classification", auto_class="AutoModelForTokenClassification"),
        "ForQuestionAnswering": Head(
            task="question-answering",
            auto_class="AutoModelForQuestionAnswering",
            outputs=("start_logits", "end_logits"),
        ),
        "ForMaskedLM": Head(task="fill-mask", auto_class="AutoModelForMaskedLM"),
        "ForCausalLM": Head(task="text-generation", auto_class="AutoModelForCausalLM"),
        "LMHeadModel": Head(task="text-generation", auto_class="AutoModelForCausalLM"),
        "ForImageClassification": Head(
            task="image-classification", auto_class="AutoModelForImageClassification", reads="images"
        ),
        "EncoderModel": Head(
            task="feature-extraction", auto_class="AutoModelForTextEncoding", outputs=("last_hidden_state",)
        ),
        "Model": Head(task="feature-extraction", auto_class="AutoModel", outputs=("last_hidden_state",)),
    }
)


def head_of(config: Any) -> Head:
    """Finds the head of a checkpoint.

    Args:
        config: Its config, of the family's class.

    Raises:
        UnsupportedModelError: It is none that can be exported.
    """
    import transformers

    named = str((config.architectures or ["nothing"])[0])
    head = next((each for suffix, each in HEADS.items() if named.endswith(suffix)), None)
    # Only a class that transformers itself lists for this config and head is loaded.
    listed = getattr(transformers, head.auto_class)._model_mapping if head else {}
    found = listed.get(type(config), None)
    model_class = next((each for each in _as_tuple(found) if each.__name__ == named), None)
    if head is None or model_class is None or _MAIN_INPUT.get(model_class.main_input_name) != head.reads:
        raise UnsupportedModelError(
            f"{named} cannot be exported; heads that can: {', '.join(HEADS)}",
            hint="Fine-tune it for one of these, or run the checkpoint with transformers.",
        )
    if head is HEADS["Model"] and config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{named} reads one text and writes another; such models cannot be exported",
            hint="Run the checkpoint with transformers. An encoder alone (T5EncoderModel) can be exported.",
        )
    return head


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else () if value is None else (value,)
