"""The kinds of tasks by name. A new kind is one file beside these, and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from hfcompress.tasks.kinds.base import Given, Kind
from hfcompress.tasks.kinds.causal_lm import CausalLM
from hfcompress.tasks.kinds.classification import Classification, Regression
from hfcompress.tasks.kinds.image_classification import ImageClassification
from hfcompress.tasks.kinds.masked_lm import MaskedLM
from hfcompress.tasks.kinds.question_answering import QuestionAnswering
from hfcompress.tasks.kinds.speech_recognition import SpeechRecognition
from hfcompress.tasks.kinds.speech_to_text import SpeechToText
from hfcompress.tasks.kinds.summarization import Summarization
from hfcompress.tasks.kinds.token_classification import TokenClassification
from hfcompress.tasks.task import Task

__all__ = ["KINDS", "Given", "Kind", "kind_of"]

_KINDS = (
    Classification(),
    Regression(),
    CausalLM(),
    MaskedLM(),
    TokenClassification(),
    QuestionAnswering(),
    ImageClassification(),
    Summarization(),
    SpeechRecognition(),
    SpeechToText(),
)

KINDS: Mapping[str, Kind] = MappingProxyType({kind.name: kind for kind in _KINDS})


def kind_of(task: Task) -> Kind:
    """Returns the kind of a task."""
    return KINDS[task.kind]
