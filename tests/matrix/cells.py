"""The matrix: every family and head, every method, and for each cell what must come out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

from transformers import PreTrainedModel

from hfcompress import (
    LayerDroppingConfig,
    LowRankConfig,
    QuantizationAwareConfig,
    QuantizationConfig,
    StructuredPruningConfig,
    StudentConfig,
    UnstructuredPruningConfig,
    VocabularyConfig,
)
from hfcompress.configuration import Config
from hfcompress.methods.student import sizes_of
from hfcompress.modeling.anatomy import embedding_paths
from hfcompress.modeling.depth import stack_depths
from tests.tiny_models import CELLS as HEADS

PRUNING = StructuredPruningConfig(heads=0.3, neurons=0.3, multiple_of=2)
# Every linear layer; the rank that holds a share of the energy is another one in each layer.
FACTORS = LowRankConfig(targets=("linear",), method="svd", energy=0.8, multiple_of=2)
PIVOTED = LowRankConfig(targets=("linear",), method="svd", energy=0.8, multiple_of=2, pivoted=True)
SHARED = LowRankConfig(targets=("linear",), method="svd", energy=0.8, multiple_of=2, share=True)


def _drop(model: PreTrainedModel) -> Sequence[Config]:
    return [LayerDroppingConfig(drop=1, stack=stack) for stack in stack_depths(model)]


def _student(model: PreTrainedModel) -> Sequence[Config]:
    halves = {name: size // 2 for name, size in sizes_of(model).items() if name != "head_dim"}
    return [StudentConfig(sizes=halves)]


def _chain(model: PreTrainedModel) -> Sequence[Config]:
    embeddings = "int8" if embedding_paths(model) else None
    return [PRUNING, FACTORS, QuantizationConfig(weights="nf4", embeddings=embeddings)]


# The steps of each method; some depend on what the model has.
METHODS: dict[str, Callable[[PreTrainedModel], Sequence[Config]]] = {
    "heads and neurons": lambda model: [PRUNING],
    "layers": _drop,
    "student": _student,
    "low rank": lambda model: [FACTORS],
    "pivoted": lambda model: [PIVOTED],
    "shared": lambda model: [SHARED],
    "int8": lambda model: [QuantizationConfig(weights="int8", embeddings=None)],
    "nf4": lambda model: [QuantizationConfig(weights="nf4", embeddings=None)],
    "torchao": lambda model: [QuantizationConfig(weights="torchao-int8", ffn="torchao-int8-dynamic", embeddings=None)],
    "embeddings int8": lambda model: [QuantizationConfig(weights=None, embeddings="int8")],
    "embeddings int4": lambda model: [QuantizationConfig(weights=None, embeddings="int4")],
    "embeddings low rank": lambda model: [LowRankConfig(targets=(), embeddings=0.5, method="svd", multiple_of=2)],
    "ternary": lambda model: [QuantizationAwareConfig(weights="ternary", embeddings=None)],
    "vocabulary": lambda model: [VocabularyConfig()],
    "unstructured": lambda model: [UnstructuredPruningConfig(sparsity=0.5)],
    "chain": _chain,
}
# torchao stands beside .venv (scripts/beside.sh torchao), and scripts/test.sh runs its cells there.
HERE = [method for method in METHODS if method != "torchao" or find_spec("torchao")]
# Where the stock config says all there is to say, an ordinary checkpoint is written.
STOCK = ("layers", "student", "vocabulary", "unstructured")


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Why a cell is not there.

    Attributes:
        text: One phrase for the page.
        error: What the library must say when it is tried all the same; None where there is nothing to compress.
    """

    text: str
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One family, head and method."""

    family: str
    head: str
    method: str

    @property
    def name(self) -> str:
        """Names the cell in folders and messages."""
        return f"{self.family}/{self.head or 'base'}/{self.method.replace(' ', '-')}"

    @property
    def reason(self) -> Reason | None:
        """Why it cannot be; None for a cell that must pass."""
        if self.method.startswith("embeddings"):
            return _no_table(self.family, self.head)
        return _no_tokens(self.family, self.head) if self.method == "vocabulary" else None


def _no_table(family: str, head: str) -> Reason | None:
    without = family in ("vit", "wav2vec2") or (family, head) == ("whisper", "AudioClassification")
    return Reason(text="the model has no embedding table") if without else None


def _no_tokens(family: str, head: str) -> Reason | None:
    if family == "vit":
        return Reason(text="images have no vocabulary")
    if family == "wav2vec2" or (family, head) == ("whisper", "AudioClassification"):
        return Reason(text="the model reads no tokens")
    return None


CELLS = [Cell(family=family, head=head, method=method) for family, head in HEADS for method in METHODS]
POSSIBLE = [cell for cell in CELLS if cell.reason is None]
