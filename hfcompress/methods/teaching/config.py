"""What a student learns from, and how much each of it counts."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hfcompress.configuration import Config
from hfcompress.methods.teaching.intermediate import Weights

_Pair = Annotated[tuple[int, int], Field(strict=False)]  # a list will do
Moving = Literal["temperature", "soft", "hard", "hidden", "attention", "relations", "embeddings"]


class DistillationConfig(Config):
    """What the student learns from. A weight of 0 leaves a term out.

    Attributes:
        temperature: Softens both distributions before they are compared.
        soft: Weight of the loss on the teacher's outputs.
        hard: Weight of the loss on the labels.
        soft_loss: How outputs are compared: `forward_kl`, `reverse_kl`, `jensen_shannon`, or `mse` of the logits.
            Regression takes the squared error and several labels at once binary cross-entropy.
        hidden: Weight of the loss on hidden states; where widths differ, learned projections go between.
        hidden_loss: How hidden states are compared: `mse` or `cosine`.
        attention: Weight of the loss on attention maps, which need as many heads in the student as in the teacher;
            both models compute attention eagerly then, which is slower, and the student's maps have no dropout.
        relations: Weight of MiniLMv2's loss on how queries, keys and values relate; heads may differ in number.
        relation_heads: Relation heads; by default as many as the teacher's layer has heads.
        relation_layers: The student's layer and the teacher's whose relations are compared; by default the last
            ones that have their attention.
        embeddings: Weight of the loss on what comes out of the embeddings, compared as hidden states are.
        layers: Which of the student's layers learn from which of the teacher's, for hidden states and attention:
            `uniform`, `last`, `skip`, or pairs such as [[1, 2], [2, 4]]. Where a layer's attention was taken out,
            the rules leave its maps out. While layers are compared, layerdrop skips none.
        stage: Share of the steps in which only hidden states, attention, relations and embeddings are learnt; the
            outputs and labels have the steps after it for themselves. 0 learns all together.
        final: What weights and the temperature, by name, come to, such as `{soft: 0.2, temperature: 1}`: they go there
            from their own values in equal steps, and are there after the last. Only of terms that are there from the
            beginning.
        teacher_weights: How much each of several teachers counts for the outputs; alike by default. Only the first
            teaches what lies between.
        cache: Keeps the teacher's outputs (and the hidden states that are compared) on disk, so that it runs over
            each row once and needs no memory in training; the rows must be the same in each epoch.
        cache_top_k: With `cache`, keeps only so many of the largest probabilities, for large vocabularies; the
            rest counts as one. 64 of them take 384 bytes a token.
    """

    temperature: float = Field(2.0, gt=0, le=100)
    soft: float = Field(0.5, ge=0, le=1000)
    hard: float = Field(0.5, ge=0, le=1000)
    soft_loss: Literal["forward_kl", "reverse_kl", "jensen_shannon", "mse"] = "forward_kl"
    hidden: float = Field(0.0, ge=0, le=1000)
    hidden_loss: Literal["mse", "cosine"] = "mse"
    attention: float = Field(0.0, ge=0, le=1000)
    relations: float = Field(0.0, ge=0, le=1000)
    relation_heads: int | None = Field(None, ge=1, le=4096)
    relation_layers: _Pair | None = None
    embeddings: float = Field(0.0, ge=0, le=1000)
    layers: Literal["uniform", "last", "skip"] | Annotated[tuple[_Pair, ...], Field(strict=False)] = "uniform"
    stage: float = Field(0.0, ge=0, le=1)
    final: dict[Moving, Annotated[float, Field(ge=0, le=1000)]] = Field(default_factory=dict)
    teacher_weights: tuple[float, ...] = Field((), strict=False)
    cache: bool = False
    cache_top_k: int | None = Field(None, ge=1, le=1_000_000)

    @property
    def between(self) -> Weights:
        """The weights of what lies between inputs and outputs."""
        return Weights(self.hidden, self.attention, self.relations, self.embeddings)

    def at(self, progress: float) -> DistillationConfig:
        """Returns what holds after a share of the training, from 0 to 1."""
        if not self.final:
            return self
        return self.model_copy(
            update={name: (1 - progress) * getattr(self, name) + progress * end for name, end in self.final.items()}
        )

    @model_validator(mode="after")
    def _moves_what_is_there(self) -> Self:
        absent = [name for name in self.final if not getattr(self, name)]
        if absent:
            raise ValueError(f"final: {absent[0]} is 0, which leaves it out; give it a small weight to begin with")
        if self.final.get("temperature") == 0 or self.final.get("temperature", 0) > 100:
            raise ValueError("final: temperature should be over 0, and at most 100")
        if self.cache_top_k and "temperature" in self.final:
            raise ValueError("final: probabilities are cached at one temperature; leave cache_top_k or this one out")
        return self

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if self.soft == 0 and self.hard == 0 and not any(self.between):
            raise ValueError("all weights, soft and hard too, are 0: there is nothing to learn from")
        return self

    @model_validator(mode="after")
    def _layers_are_named(self) -> Self:
        if not self.layers and (self.hidden or self.attention):
            raise ValueError("layers: no pair is given, so hidden and attention have nothing to compare")
        return self

    @model_validator(mode="after")
    def _stages_have_work(self) -> Self:
        if self.stage > 0 and not any(self.between):
            raise ValueError("stage: there is nothing to learn first: give hidden, attention, relations or embeddings")
        if 0 < self.stage < 1 and self.soft == 0 and self.hard == 0:
            raise ValueError("stage: there is nothing to learn after it: soft and hard are both 0")
        return self

    @model_validator(mode="after")
    def _cache_can_hold_it(self) -> Self:
        if self.cache and (self.attention or self.relations):
            raise ValueError("cache: attention and relations are not cached; set them to 0, or cache to false")
        if self.cache_top_k and not (self.cache and self.soft_loss == "forward_kl"):
            raise ValueError("cache_top_k needs cache: true and soft_loss: forward_kl")
        return self

    @model_validator(mode="after")
    def _teachers_count(self) -> Self:
        if self.teacher_weights and (min(self.teacher_weights) < 0 or sum(self.teacher_weights) == 0):
            raise ValueError("teacher_weights must not be negative, and at least one must be more than 0")
        return self
