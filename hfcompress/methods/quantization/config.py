"""What quantization can be asked for."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from hfcompress.configuration import Config
from hfcompress.methods.quantization.kinds import LinearKind
from hfcompress.modeling.layers.bitsandbytes import ComputeDtype
from hfcompress.modeling.tables import TableKind

Role = Literal["attention", "ffn", "query", "key", "value", "attention_output", "ffn_input", "ffn_output"]
MixedKind = Literal[LinearKind, "mixed"]
By = Literal["layer", "block", "role"]


class QuantizationConfig(Config):
    """How to quantize.

    Attributes:
        weights: Linear layers of the base model: `int8`, `nf4` or `fp4` (`-double`: their scales are quantized
            too) by bitsandbytes; `torchao-int8`, or `torchao-int8-dynamic`, which rounds inputs too and multiplies
            integers; `packed-8`, `packed-4`, `packed-2`, `ternary` or `binary` by our own bytes; `mixed` for the kind
            that is best for each, within `budget` or `max_divergence`; or None to leave them as they are. Task heads
            stay in float, and are named in the findings.
        attention: The same for attention alone, over `weights`.
        ffn: The same for feed-forward blocks alone, over `weights`.
        roles: The same role by role, over all of these, such as `{attention: int8, value: null, ffn: nf4}`; a single
            projection goes over its group.
        embeddings: Embedding tables: `int8`, `int4`, `mixed`, or None. An output layer that is tied to a table reads
            the quantized one.
        embedding_group_size: How many neighbours in a row of a table share a scale; None for a whole row of
            8-bit numbers and 32 of 4-bit ones.
        threshold: Inputs over this size, and the weights that they meet, are multiplied in float16 by `int8` layers
            (Dettmers et al. 2022, LLM.int8, where it is 6); 0 for none. It costs time.
        compute_dtype: What `nf4` and `fp4` layers compute in; None for the dtype of the model.
        budget: For `mixed`: the share of the model's bytes that the result may have.
        max_divergence: For `mixed`: how far the outputs may move, as the mean Kullback-Leibler divergence from what
            the model predicted before (of numbers the mean squared difference), on the calibration data. The fewest
            bytes that keep to it are chosen.
        candidates: The kinds that `mixed` chooses from for linear layers, and whose loss `sensitivity` measures; float
            is always among them. Tables are `int8` or `int4`.
        sensitivity: What is measured, and chosen for, as one: every linear `layer`, the attention or feed-forward
            `block` of a layer, or a `role` in all layers. None for nothing, and with `mixed` for blocks.
        sensitivity_batches: How many calibration batches that is measured on.
    """

    weights: MixedKind | None = "int8"
    attention: MixedKind | None = None
    ffn: MixedKind | None = None
    roles: dict[Role, MixedKind | None] = Field(default_factory=dict)
    embeddings: Literal[TableKind, "mixed"] | None = "int8"
    embedding_group_size: int | None = Field(None, ge=8)
    threshold: float = Field(0.0, ge=0, le=1e6)
    compute_dtype: ComputeDtype | None = None
    budget: float | None = Field(None, gt=0, lt=1)
    max_divergence: float | None = Field(None, gt=0)
    candidates: tuple[LinearKind, ...] = Field(("int8", "nf4", "packed-2"), strict=False, min_length=1)
    sensitivity: By | None = None
    sensitivity_batches: int = Field(4, ge=1)

    @property
    def is_mixed(self) -> bool:
        """Whether something is chosen by measurement."""
        kinds: list[Any] = [self.weights, self.attention, self.ffn, self.embeddings, *self.roles.values()]
        return "mixed" in kinds

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        bounds = [name for name in ("budget", "max_divergence") if getattr(self, name) is not None]
        if self.is_mixed and len(bounds) != 1:
            said = " and ".join(bounds) or "neither"
            raise ValueError(f"mixed needs exactly one of budget and max_divergence, not {said}")
        if bounds and not self.is_mixed:
            raise ValueError(f"{' and '.join(bounds)}: nothing is mixed; set weights: mixed, or embeddings: mixed")
        return self
