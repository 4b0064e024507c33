"""The losses on what lies between inputs and outputs: hidden states, attention, relations, embeddings."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.teaching.layers import LayerMap, Pair, depths, map_layers
from hfcompress.methods.teaching.losses import (
    HIDDEN_LOSSES,
    attention_divergence,
    mean_over_tokens,
    relation_divergence,
    weighted_mean,
)
from hfcompress.methods.teaching.signals import (
    Asked,
    Place,
    ProjectionTap,
    Signals,
    at_place,
    attention_at,
    example_weights,
    last_attention,
    layers_without_attention,
    relation_block,
    relation_widths,
    token_mask,
)
from hfcompress.methods.teaching.steady import Steady, refuse_checkpointing_without_gradients

logger = logging.getLogger(__name__)


class Weights(NamedTuple):
    """How much each of the terms counts."""

    hidden: float
    attention: float
    relations: float
    embeddings: float


class Wanted(Protocol):
    """What the terms are told; a `DistillationConfig` is one."""

    @property
    def between(self) -> Weights: ...  # noqa: D102
    @property
    def hidden_loss(self) -> str: ...  # noqa: D102
    @property
    def layers(self) -> LayerMap | tuple[Pair, ...]: ...  # noqa: D102
    @property
    def relation_heads(self) -> int | None: ...  # noqa: D102
    @property
    def relation_layers(self) -> Pair | None: ...  # noqa: D102


class Intermediate:
    """Compares a student with a teacher layer by layer.

    Each term is a mean over layers, and in each layer over the real tokens of an example; examples count as many
    times as outputs of theirs do.

    Args:
        config: Weights and choices.
        student: The student.
        teacher: The teacher; not kept.

    Attributes:
        asked: What the teacher is asked for.
        student_asked: What the student's forward must return.
        said: Which layers learn from which, for the report.

    Raises:
        CompressionError: Layers, heads or widths of the two cannot be compared.
    """

    def __init__(self, config: Wanted, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
        self.config, self.weights = config, config.between
        ours, theirs = depths(student), depths(teacher)
        if ours.keys() != theirs.keys():
            raise CompressionError("only one of teacher and student is an encoder-decoder: their layers do not match")
        self.pairs: dict[str, tuple[Pair, ...]] = {}
        if self.weights.hidden or self.weights.attention:
            self.pairs = {prefix: map_layers(config.layers, ours[prefix], theirs[prefix]) for prefix in ours}
        self._hidden = self._hidden_places(list(ours))
        self._without: set[int] = set()
        self._attention = self._attention_places(student, teacher) if self.weights.attention else []
        self._own_relations, relations = self._match_relations(student, teacher)
        self._tap: ProjectionTap | None = None
        if self._attention:
            _require_same_heads(student, teacher)
        self.asked = Asked(
            hidden=tuple(dict.fromkeys(other for _, other in self._hidden)),
            attentions=tuple(dict.fromkeys(other for _, other in self._attention)),
            relations=relations,
        )
        self.student_asked = Asked(
            hidden=tuple(own for own, _ in self._hidden), attentions=tuple(own for own, _ in self._attention)
        )
        self.projections = _projections(student, teacher, [own for own, _ in self._hidden])
        self._was_attention: str | None = None
        self._steady: Steady | None = None

    def _hidden_places(self, prefixes: Sequence[str]) -> list[tuple[Place, Place]]:
        places = [
            ((prefix, own), (prefix, other))
            for prefix, pairs in self.pairs.items()
            for own, other in pairs
            if self.weights.hidden
        ]
        if self.weights.embeddings:
            places += [((prefix, 0), (prefix, 0)) for prefix in prefixes]
        return list(dict.fromkeys(places))

    def _attention_places(self, student: PreTrainedModel, teacher: PreTrainedModel) -> list[tuple[Place, Place]]:
        """Returns the pairs of layers that both have their attention."""
        self._without, theirs = layers_without_attention(student), layers_without_attention(teacher)
        places: list[tuple[Place, Place]] = []
        for prefix, pairs in self.pairs.items():
            for own, other in pairs:
                whole = own not in self._without and other not in theirs
                if not whole and not isinstance(self.config.layers, str):
                    whose = "student" if own in self._without else "teacher"
                    raise CompressionError(
                        f"layers: [{own}, {other}] has no attention maps to compare: that layer of the {whose} has "
                        "lost its attention",
                        hint="Leave the pair out, or set attention to 0.",
                    )
                if whole and own and other:
                    places.append(((prefix, own), (prefix, other)))
        if not places:
            raise CompressionError(
                "attention: no layer of the student that has its attention is paired with such a one of the teacher",
                hint="Give the pairs yourself: layers: [[student, teacher], ...], or set attention to 0.",
            )
        return places

    def _match_relations(self, student: PreTrainedModel, teacher: PreTrainedModel) -> Pair | tuple[None, None]:
        if not self.weights.relations:
            return None, None
        own, other = self.config.relation_layers or (last_attention(student), last_attention(teacher))
        ours, theirs = relation_block(student, own), relation_block(teacher, other)
        self.relation_heads = self.config.relation_heads or theirs.query_heads
        for name, block in (("student", ours), ("teacher", theirs)):
            for width in relation_widths(block):
                if width % self.relation_heads:
                    common = math.gcd(*relation_widths(ours), *relation_widths(theirs))
                    raise CompressionError(
                        f"relation_heads {self.relation_heads} does not divide {width}, a width of the queries, keys "
                        f"or values of the {name}'s layer {own if name == 'student' else other}",
                        hint=f"Any divisor of {common} divides all of them.",
                    )
        return own, other

    @property
    def said(self) -> dict[str, list[list[int]]]:
        """Returns the pairs of layers by term."""
        found = {
            "hidden": [[own[1], other[1]] for own, other in self._hidden],
            "attention": [[own[1], other[1]] for own, other in self._attention],
            "relations": [[self._own_relations, self.asked.relations]] if self._own_relations else [],
        }
        return {term: pairs for term, pairs in found.items() if pairs}

    # In training

    def begin(self, model: PreTrainedModel, device: torch.device) -> None:
        """Readies the student: hooks on its projections, no layer skipped; eager and whole attention where compared.

        Raises:
            TrainingError: Reentrant checkpointing would keep gradients from what is compared.
        """
        refuse_checkpointing_without_gradients(model)
        self.projections.to(device)
        if self._own_relations and self._tap is None:
            self._tap = ProjectionTap(relation_block(model, self._own_relations))
        now = model.config._attn_implementation
        if self._attention and now != "eager":
            logger.info("attention is computed eagerly instead of by %s: its maps are compared", now)
            self._was_attention = now
            model.set_attn_implementation("eager")
        if self._steady is None:
            self._steady = Steady(model, maps=bool(self._attention))

    def end(self, model: PreTrainedModel) -> None:
        """Leaves the student as it was."""
        if self._steady:
            self._steady.end()
            self._steady = None
        if self._tap:
            self._tap.close()
            self._tap = None
        if self._was_attention:
            model.set_attn_implementation(self._was_attention)
            self._was_attention = None

    def losses(
        self,
        model: PreTrainedModel,
        inputs: Mapping[str, torch.Tensor],
        outputs: Any,
        taught: Signals,
        weights: Weights,
    ) -> dict[str, torch.Tensor]:
        """Returns the terms by name, weighted as `weights` says."""
        counts = example_weights(model, inputs)
        found: dict[str, list[torch.Tensor]] = {}
        for own, other in self._hidden:
            states, theirs = at_place(outputs, "hidden_states", own), taught.hidden[other]
            _require_same_tokens(states, theirs)
            mask = _compared(taught, token_mask(model, inputs, states.shape[:2], own[0]))
            values = mean_over_tokens(self._distances(states, theirs, own, mask), mask)
            is_embeddings = self.weights.embeddings and own[1] == 0 and other[1] == 0
            found.setdefault("embeddings" if is_embeddings else "hidden", []).append(values)
        for own, other in self._attention:
            maps = attention_at(outputs, own, self._without)
            _require_same_tokens(maps[:, 0], taught.attentions[other][:, 0])
            mask = token_mask(model, inputs, torch.Size((maps.shape[0], maps.shape[2])), own[0])
            values = attention_divergence(maps, taught.attentions[other], mask)
            found.setdefault("attention", []).append(values)
        if self._tap:
            ours = self._tap.take()
            _require_same_tokens(ours[0], taught.relations[0])
            mask = _compared(taught, token_mask(model, inputs, ours[0].shape[:2], next(iter(depths(model)))))
            found["relations"] = [
                relation_divergence(own, other, self.relation_heads, mask)
                for own, other in zip(ours, taught.relations, strict=True)
            ]
        by_name = weights._asdict()
        means = {name: torch.stack(values).mean(0) for name, values in found.items()}
        # Every choice of an example counts as the example does.
        return {
            name: by_name[name] * weighted_mean(values, counts.repeat_interleave(len(values) // len(counts)))
            for name, values in means.items()
        }

    def _distances(self, states: torch.Tensor, theirs: torch.Tensor, own: Place, mask: torch.Tensor) -> torch.Tensor:
        """Compares the real tokens of one place, 0 elsewhere: projecting padding costs as much as projecting words."""
        real = mask.flatten().nonzero().squeeze(1)
        ours, theirs = (each.flatten(0, 1).index_select(0, real) for each in (states, theirs))
        values = HIDDEN_LOSSES[self.config.hidden_loss](self._project(ours, own), theirs)
        return values.new_zeros(mask.numel()).index_copy(0, real, values).view_as(mask)

    # Projections

    def _project(self, states: torch.Tensor, place: Place) -> torch.Tensor:
        name = _module_name(place)
        if name not in self.projections:
            return states
        projection: Any = self.projections[name]
        return projection(states.to(projection.weight.dtype))  # of its own, in a student of 16 bits too

    def parameters(self) -> list[nn.Parameter]:
        """Returns what is trained with the student."""
        return list(self.projections.parameters())

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the projections' weights."""
        return {name: value.detach().clone() for name, value in self.projections.state_dict().items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes them back in place, where the optimizer knows them."""
        self.projections.load_state_dict(dict(state))


def _compared(taught: Signals, mask: torch.Tensor) -> torch.Tensor:
    return mask if taught.aligned is None else mask & taught.aligned


def _module_name(place: Place) -> str:
    return f"{place[0]}{place[1]}"


def _projections(student: PreTrainedModel, teacher: PreTrainedModel, places: Sequence[Place]) -> nn.ModuleDict:
    """Makes a projection for each of the student's places where widths differ, the same in every process and run."""
    ours, theirs = int(student.config.hidden_size), int(teacher.config.hidden_size)
    if ours == theirs:
        return nn.ModuleDict()
    generator = torch.Generator().manual_seed(0)  # not the global one: dropout must not depend on the loss
    made = nn.ModuleDict()
    for name in sorted({_module_name(place) for place in places}):
        linear: Any = nn.utils.skip_init(nn.Linear, ours, theirs)
        with torch.no_grad():
            linear.weight.normal_(std=ours**-0.5, generator=generator)
            linear.bias.zero_()
        made[name] = linear
    return made


def _require_same_tokens(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    if ours.shape[:2] != theirs.shape[:2]:
        raise CompressionError(
            f"the student sees an example as {ours.shape[1]} tokens, its teacher as {theirs.shape[1]}: what they make "
            "of them cannot be compared one by one",
            hint="Set hidden, attention, relations and embeddings to 0; outputs can be compared all the same.",
        )


def _require_same_heads(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    from hfcompress.modeling.anatomy import attention_blocks

    counts = [{block.query_heads for block in attention_blocks(model)} for model in (student, teacher)]
    if counts[0] != counts[1] or len(counts[0]) > 1:
        raise CompressionError(
            f"attention maps are compared head by head: the student has {sorted(counts[0])} heads a layer, the teacher "
            f"{sorted(counts[1])}",
            hint="Use relations, which allow for other numbers of heads.",
        )
