"""What a model says beside its labels: outputs at the positions that count, hidden states, attentions, relations."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.sound import count_frames, mask_of_frames
from hfcompress.methods.training import EXAMPLE_ID, shifts_labels
from hfcompress.modeling.anatomy import AttentionBlock, blocks_and_gaps
from hfcompress.modeling.architectures import architectures

# A place among the hidden states or attentions of a model's outputs: the stack's prefix and the layer.
Place = tuple[str, int]
_NOTHING_EXPECTED = -1e4  # far below any logit, and still a number in 16 bits
QUERY_KEY_VALUE = ("query", "key", "value")
_OF_FRAMES = ("CTC", "AudioFrameClassification")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What of a teacher is compared.

    Attributes:
        logits: Whether its outputs are.
        hidden: Places of hidden states; layer 0 is the embeddings.
        attentions: Places of attention maps.
        relations: The layer whose queries, keys and values are, or None.
    """

    logits: bool = True
    hidden: tuple[Place, ...] = ()
    attentions: tuple[Place, ...] = ()
    relations: int | None = None

    @property
    def arguments(self) -> dict[str, bool]:
        """More keyword arguments for a forward that is to return all this."""
        wanted = {"output_hidden_states": bool(self.hidden), "output_attentions": bool(self.attentions)}
        return {name: True for name, wished in wanted.items() if wished}


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What was asked for.

    Attributes:
        logits: At the positions that count, `(positions, outputs)`, or as `output_logits` has them; where only the
            largest are known, the log-probabilities `(positions, k)` of the classes in `indices`.
        indices: int64, `(positions, k)`, or None.
        hidden: By place, `(batch, tokens, width)`.
        attentions: By place, `(batch, heads, tokens, tokens)`.
        relations: Queries, keys and values, each `(batch, tokens, width)`.
        aligned: The student's tokens that all this is about, bool `(batch, tokens)`, where the teacher reads other
            tokens; None where it reads the same.
    """

    logits: torch.Tensor | None = None
    indices: torch.Tensor | None = None
    hidden: Mapping[Place, torch.Tensor] = field(default_factory=dict)
    attentions: Mapping[Place, torch.Tensor] = field(default_factory=dict)
    relations: tuple[torch.Tensor, ...] = ()
    aligned: torch.Tensor | None = None


# Positions


def is_token_level(model: PreTrainedModel) -> bool:
    """Tells whether a model says something about every token (or frame of sound), and not about every example."""
    if model.get_output_embeddings() is not None or model.loss_type == "ForTokenClassification":
        return True
    return head_name(model) in _OF_FRAMES and hasattr(model, "_get_feat_extract_output_lengths")


def head_name(model: PreTrainedModel) -> str:
    """Returns what a model is for, as its class says it: `MultipleChoice`, say. Not every head names its loss."""
    return type(model).__name__.rpartition("For")[2]


def token_mask(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], size: torch.Size | None = None, prefix: str = ""
) -> torch.Tensor:
    """Returns which tokens are real.

    Args:
        model: Student or teacher.
        inputs: The batch.
        size: `(batch, tokens)` of what is masked; by default that of the outputs.
        prefix: Of the stack; `decoder_` reads the labels.

    Returns:
        Of that size, bool; all True where the inputs have no mask of that size.
    """
    decoding = prefix == "decoder_" or (not prefix and model.config.is_encoder_decoder and is_token_level(model))
    if decoding:
        mask = inputs["labels"].ne(-100) if "labels" in inputs else inputs.get("decoder_attention_mask")
    else:
        mask = inputs.get("attention_mask")
    if size is None:
        size = inputs[("decoder_input_ids" if "labels" not in inputs else "labels") if decoding else "input_ids"].shape
    # An encoder-decoder that judges whole examples reads their tokens in its decoder too.
    masks = (mask, inputs.get("attention_mask")) if decoding and not is_token_level(model) else (mask,)
    for each in masks:
        if each is not None and each.dim() > 2:
            each = each.flatten(0, -2)  # a model reads several choices as so many examples
        elif each is not None and not decoding and each.shape != size:
            each = mask_of_frames(model, each, size)
        if each is not None and each.shape == size:
            return each.bool()
    some = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
    return torch.ones(size, dtype=torch.bool, device=some.device)


def _frames(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Size:
    """Returns for how many frames of sound a model gives outputs: `(batch, frames)`."""
    sound = next(inputs[name] for name in ("input_values", "input_features") if name in inputs)
    return torch.Size((sound.shape[0], count_frames(model, sound.shape[1])))


def positions(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """Returns which outputs count in the losses: `(batch, tokens)`, or None where every example has one output.

    Those that have a label count; where there are no labels, all real tokens. A causal model's output at a token is
    about the next one. Of sound all real frames count: its labels are not said about frames.
    """
    if not is_token_level(model):
        return None
    if head_name(model) in _OF_FRAMES:
        return token_mask(model, inputs, _frames(model, inputs))
    if "labels" not in inputs:
        return token_mask(model, inputs)
    labelled = inputs["labels"].ne(-100)
    if shifts_labels(model):
        labelled = torch.cat([labelled[:, 1:], torch.zeros_like(labelled[:, :1])], 1)
    if model.config.is_encoder_decoder:
        return labelled
    return labelled & token_mask(model, inputs, labelled.shape)  # padding on the left would predict the first token


def example_weights(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns how much each example counts, `(batch,)`: as many outputs as count in it.

    Weighted so, batches of one accumulation window add up to one large batch, for losses on outputs and for those
    that are means over an example's tokens.
    """
    counted = positions(model, inputs)
    if counted is not None:
        return counted.sum(1).float()
    some = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
    return torch.ones(some.shape[0], device=some.device)


def output_logits(outputs: Any, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns what a model says about its outputs.

    Args:
        outputs: The model's.
        inputs: The batch.

    Returns:
        Its logits, the labels on the last axis; for question answering those of starts and ends over the tokens,
        `(batch, 2, tokens)`, at padding so low that nothing is expected there.

    Raises:
        CompressionError: The model has no such head.
    """
    if "start_logits" not in outputs:
        if "logits" not in outputs:
            raise CompressionError(
                f"a model gives no logits to compare, but {', '.join(outputs)}",
                hint="Load both with a head for the task, or set soft: 0 to learn what lies between alone.",
            )
        logits = outputs["logits"]
        return logits.movedim(1, -1) if logits.dim() == 4 else logits  # of pixels: (batch, labels, height, width)
    both = torch.stack((outputs["start_logits"], outputs["end_logits"]), dim=1)
    mask = inputs.get("attention_mask")
    return both if mask is None else both.masked_fill(~mask.bool().unsqueeze(1), _NOTHING_EXPECTED)


def at_positions(logits: torch.Tensor, counted: torch.Tensor | None) -> torch.Tensor:
    """Returns the outputs that count, `(positions, outputs)`.

    Raises:
        CompressionError: A model gives outputs at other tokens than it is given, as with learnt prompts.
    """
    if counted is None:
        return logits if logits.dim() > 1 else logits.unsqueeze(-1)
    if logits.shape[:2] != counted.shape:
        raise CompressionError(
            f"a model gives outputs at {logits.shape[1]} tokens of a text of {counted.shape[1]}: they cannot be laid "
            "beside those of another",
            hint="Learnt prompts have outputs too: take an adapter without them, such as LoRA, or set soft: 0.",
        )
    return logits[counted]


# Queries, keys and values


def _self_attentions(model: PreTrainedModel) -> list[AttentionBlock]:
    """Returns the self-attention of every layer of the first stack, those that were taken out included."""
    blocks = [each for each in blocks_and_gaps(model) if isinstance(each, AttentionBlock)]
    first = blocks[0].stack
    return [block for block in blocks if block.stack is first and block.spec is first.attentions[0]]


def layers_without_attention(model: PreTrainedModel) -> set[int]:
    """Returns the layers, counted from 1, whose attention was taken out as a whole; only encoders have such."""
    if model.config.model_type not in architectures():
        return set()
    return {number for number, block in enumerate(_self_attentions(model), 1) if block.removed}


def last_attention(model: PreTrainedModel) -> int:
    """Returns the last layer of the first stack that has its attention, counted from 1."""
    return max(number for number, block in enumerate(_self_attentions(model), 1) if not block.removed)


def relation_block(model: PreTrainedModel, layer: int) -> AttentionBlock:
    """Returns the self-attention of a layer (counted from 1) of the first stack.

    Raises:
        CompressionError: There is no such layer, or its attention was taken out.
        UnsupportedModelError: The family has no file in `architectures/`.
    """
    own = _self_attentions(model)
    if not 1 <= layer <= len(own):
        raise CompressionError(f"relation_layers: {type(model).__name__} has layers 1 to {len(own)}, not {layer}")
    if own[layer - 1].removed:
        there = ", ".join(str(number) for number, block in enumerate(own, 1) if not block.removed)
        raise CompressionError(
            f"relation_layers: the attention of layer {layer} of {type(model).__name__} was taken out",
            hint=f"Layers with attention: {there}.",
        )
    return own[layer - 1]


class ProjectionTap:
    """Keeps what an attention's query, key and value projections gave in the last forward.

    Some families use them again in the same forward, for positions (DeBERTa-v2): the first time is about tokens.

    Args:
        block: The attention.
    """

    def __init__(self, block: AttentionBlock) -> None:
        self._seen: dict[str, torch.Tensor] = {}
        spec = block.spec
        self._parts = {"query": spec.query, "key": spec.key, "value": spec.value}
        paths = {projection.path for projection in self._parts.values()}
        self._hooks = [block.at(path).register_forward_hook(self._keep(path)) for path in sorted(paths)]
        self._hooks.append(block.module.register_forward_pre_hook(self._forget))

    def _forget(self, module: Any, inputs: Any) -> None:
        self._seen = {}

    def _keep(self, path: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            self._seen.setdefault(path, output)

        return hook

    def take(self) -> tuple[torch.Tensor, ...]:
        """Returns queries, keys and values, `(batch, tokens, width)` each, and forgets them."""
        seen, self._seen = self._seen, {}
        parts = (self._parts[role] for role in QUERY_KEY_VALUE)
        return tuple(seen[each.path].chunk(each.parts, -1)[each.part] for each in parts)

    def close(self) -> None:
        """Takes the hooks away."""
        for hook in self._hooks:
            hook.remove()


def relation_widths(block: AttentionBlock) -> tuple[int, ...]:
    """Returns the widths of a block's queries, keys and values."""
    keys = block.heads * block.head_dim
    return block.query_heads * block.head_dim, keys, keys


# Teachers


class LiveTeacher:
    """A teacher that runs beside the student: frozen, in evaluation mode, out of the optimizer.

    Args:
        model: The teacher; quantized and compressed ones work too.
        asked: What of it is compared.
    """

    def __init__(self, model: PreTrainedModel, asked: Asked) -> None:
        self.model, self.asked = model, asked
        self._without = layers_without_attention(model) if asked.attentions else set()
        self._tap = ProjectionTap(relation_block(model, asked.relations)) if asked.relations else None
        self._was_attention = str(model.config._attn_implementation)
        if asked.attentions and self._was_attention != "eager":
            model.set_attn_implementation("eager")  # no other attention returns its maps

    def signals(
        self, inputs: Mapping[str, torch.Tensor], counted: torch.Tensor | None, ids: torch.Tensor | None = None
    ) -> Signals:
        """Runs the teacher on the student's inputs.

        Args:
            inputs: The batch.
            counted: As `positions` returns it.
            ids: Not needed.
        """
        outputs = run_teacher(self.model, inputs, self.asked)
        return Signals(
            logits=at_positions(output_logits(outputs, inputs), counted) if self.asked.logits else None,
            hidden={place: at_place(outputs, "hidden_states", place) for place in self.asked.hidden},
            attentions={place: attention_at(outputs, place, self._without) for place in self.asked.attentions},
            relations=self._tap.take() if self._tap else (),
        )

    def close(self) -> None:
        """Leaves the model as it was."""
        if self._tap:
            self._tap.close()
        if self.model.config._attn_implementation != self._was_attention:
            self.model.set_attn_implementation(self._was_attention)


def run_teacher(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], asked: Asked) -> Any:
    """Returns a teacher's outputs for a batch, without gradients; images and sound are given in its own dtype."""
    wanted = {
        name: value.to(model.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
        if name not in ("labels", EXAMPLE_ID)
    }
    if model.config.is_encoder_decoder and "decoder_input_ids" not in wanted and "labels" in inputs:
        wanted["labels"] = inputs["labels"]  # the decoder's inputs are made from them
    with torch.no_grad():
        return model(**wanted, **asked.arguments)


def at_place(outputs: Any, kind: str, place: Place) -> torch.Tensor:
    """Returns the hidden states of one place from a model's outputs."""
    prefix, layer = place
    return outputs[f"{prefix}{kind}"][layer]


def attention_at(outputs: Any, place: Place, without: Collection[int]) -> torch.Tensor:
    """Returns the attention maps of one place from a model's outputs.

    Args:
        outputs: The model's.
        place: A layer that has its attention.
        without: What `layers_without_attention` returns: those layers give no maps, which some families leave out of
            their outputs, so that the maps of later layers move up.
    """
    prefix, layer = place
    given = [maps for maps in outputs[f"{prefix}attentions"] if maps is not None]
    return given[layer - 1 - sum(number < layer for number in without)]
