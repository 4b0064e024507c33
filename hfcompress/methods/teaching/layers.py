"""Which layer of the student learns from which layer of the teacher. Layers count from 1; 0 is the embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedModel

from hfcompress.errors import CompressionError, UnsupportedModelError
from hfcompress.modeling.depth import stack_depths

Pair = tuple[int, int]
LayerMap = Literal["uniform", "last", "skip"]


def map_layers(how: LayerMap | Sequence[Pair], student: int, teacher: int) -> tuple[Pair, ...]:
    """Pairs the layers of two stacks.

    Args:
        how: `uniform` spreads the student's layers over the teacher's, last to last (TinyBERT); `last` takes the
            teacher's last layers one by one; `skip` is `uniform` without the last layer, which the outputs teach
            (PKD, Sun et al. 2019, arXiv 1908.09355); or pairs of (student's layer, teacher's layer).
        student: Number of the student's layers.
        teacher: Number of the teacher's layers.

    Returns:
        Pairs of (student's layer, teacher's layer).

    Raises:
        CompressionError: A pair names a layer that is not there, or a rule cannot pair these depths.
    """
    if not isinstance(how, str):
        pairs = tuple((int(ours), int(theirs)) for ours, theirs in how)
        for ours, theirs in pairs:
            if not (0 <= ours <= student and 0 <= theirs <= teacher):
                raise CompressionError(
                    f"layers: there is no pair [{ours}, {theirs}]: the student has layers 0 to {student}, the teacher "
                    f"0 to {teacher} (0 is the embeddings)"
                )
        return pairs
    if student > teacher:
        raise CompressionError(
            f"layers: '{how}' cannot pair a student of {student} layers with a teacher of {teacher}",
            hint="Give the pairs yourself: layers: [[student, teacher], ...].",
        )
    if how == "last":
        return tuple((layer, teacher - student + layer) for layer in range(1, student + 1))
    pairs = tuple((layer, layer * teacher // student) for layer in range(1, student + 1))
    if how == "uniform":
        return pairs
    if student == 1:
        raise CompressionError("layers: 'skip' leaves the last layer out, and the student has no other")
    return pairs[:-1]


def depths(model: PreTrainedModel) -> dict[str, int]:
    """Returns the number of layers of each stack of hidden states that a model's outputs can hold.

    Returns:
        By the prefix in the outputs' names: "" for `hidden_states`, else `encoder_` and `decoder_`. The encoder alone
        of such a model (Whisper's for classes of sounds) gives `hidden_states`.
    """
    if not model.config.is_encoder_decoder:
        if not all(hasattr(model.config, field) for field in ("num_hidden_layers", "hidden_size")):
            raise UnsupportedModelError(
                f"the layers of '{model.config.model_type}' are not one stack whose depth and width its config tells",
                hint="Leave hidden, attention, relations and embeddings at 0.",
            )
        return {"": int(model.config.num_hidden_layers)}
    try:
        found = stack_depths(model)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"the layers of '{model.config.model_type}' cannot be told apart: {error.message}",
            hint="Leave hidden, attention, relations and embeddings at 0.",
        ) from None
    named = {"encoder_": "encoder", "decoder_": "decoder"}
    by_prefix = {
        prefix: depth
        for prefix, name in named.items()
        for path, depth in found.items()
        if name in path.partition("*")[0].split(".")
    }
    return by_prefix if "decoder_" in by_prefix else {"": by_prefix["encoder_"]}
