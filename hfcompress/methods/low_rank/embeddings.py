"""Low-rank factorization of a model's token table, and of the output layer that is tied to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import evaluating
from hfcompress.methods.low_rank import maths
from hfcompress.methods.low_rank.ranks import is_smaller, rank_for
from hfcompress.methods.registry import Batch
from hfcompress.methods.statistics import each_batch, real_rows
from hfcompress.modeling.anatomy import base_model
from hfcompress.modeling.layers.quantized_embedding import QuantizedEmbedding
from hfcompress.modeling.layers.tied import LowRankEmbedding
from hfcompress.modeling.ties import is_table, replace_table, scale_of, tied_readers

# How much the rows as they are looked up count beside the scores, in parts of the mean energy of the latter's inputs.
_LOOKUPS = 0.01


def token_table(model: PreTrainedModel) -> str:
    """Returns the path of the table that looks up tokens, relative to the base model, and checks that it can go.

    Raises:
        CompressionError: There is none, it is quantized, or it is tied to other modules than its class says.
    """
    base = base_model(model)
    table: Any = model.get_input_embeddings()
    path = next((name for name, module in base.named_modules() if module is table), None)
    if isinstance(table, QuantizedEmbedding):
        raise CompressionError(f"{path} is quantized already", hint="Factorize before quantizing.")
    if path is None or not (is_table(table) or isinstance(table, LowRankEmbedding)):
        raise CompressionError(
            f"the model's input is a {type(table).__name__}, not a table of tokens", hint="Set embeddings: null."
        )
    if not isinstance(table, LowRankEmbedding):
        tied_readers(model, path)
    return path


def score_moment(model: PreTrainedModel, batches: Sequence[Batch]) -> torch.Tensor | None:
    """Averages the second moments of what enters the output layer that is tied to the token table.

    Returns:
        `(width, width)`, float32; None where no output layer is tied to it, or there are no batches.

    Raises:
        CompressionError: The activations are not finite.
    """
    head = model.get_output_embeddings()
    table: Any = base_model(model).get_submodule(token_table(model))
    if not batches or not isinstance(head, nn.Linear) or head.weight is not getattr(table, "weight", None):
        return None
    total, count, batch = torch.zeros(()), 0, batches[0]

    def watch(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        nonlocal total, count
        rows = real_rows(model, arguments[0], batch).float()
        total, count = total + rows.T @ rows, count + len(rows)

    handle = head.register_forward_pre_hook(watch)
    try:
        with torch.no_grad(), evaluating(model):
            for batch in each_batch(model, batches, "reading the output layer"):
                model(**batch)
    finally:
        handle.remove()
    if not torch.isfinite(total).all():
        raise CompressionError("the output layer: the calibration activations are not finite")
    return total / max(count, 1)


def factorize_table(
    model: PreTrainedModel, keep: float, multiple_of: int, moment: torch.Tensor | None = None
) -> dict[str, int | None]:
    """Puts two thin tables in the place of the token table, by its singular values (Noach and Goldberg 2020).

    With `moment` those are weighed by what enters the output layer, so that its scores change least, and a little by
    nothing at all, for the sake of the rows that are looked up.

    The caller ends with `commit(model)`.

    Args:
        model: The model, changed in place.
        keep: Share of the table's parameters that the factors have.
        multiple_of: What the rank is a multiple of, where it can be.
        moment: What `score_moment` returned.

    Returns:
        The rank by the table's path; None where it is factorised already or the factors would not be smaller.

    Raises:
        CompressionError: As `token_table`; or the table, which is named, is not finite.
    """
    path = token_table(model)
    table: Any = base_model(model).get_submodule(path)
    if isinstance(table, LowRankEmbedding):
        return {path: None}
    weight = table.weight.detach()
    tokens, width = weight.shape
    rank = rank_for(tokens, width, keep, multiple_of)
    if not is_smaller(tokens, width, rank):
        return {path: None}
    if moment is not None:
        moment = moment + _LOOKUPS * moment.diagonal().mean() * torch.eye(width).to(moment)
    try:
        rows, up = maths.truncate(weight, rank, moment)
    except CompressionError as error:
        raise CompressionError(f"{path}: {error.message}", hint=error.hint) from None
    made = LowRankEmbedding.from_factors(rows.to(weight), up.T.to(weight), scale=scale_of(table))
    made.train(table.training)
    replace_table(model, path, made)
    assert isinstance(made.table, nn.Embedding)
    made.requires_grad_(table.weight.requires_grad)
    return {path: made.rank}
