"""Puts a compressed table in the place of an embedding, and of everything that is tied to it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError, UnsupportedModelError
from hfcompress.modeling.anatomy import base_model, tied_to
from hfcompress.modeling.layers.tied import TiedLookup, TiedOutput


def is_table(module: nn.Module) -> bool:
    """Tells whether a module is a float embedding that does no more than look up and, in some families, scale."""
    return type(module) is nn.Embedding or type(module).__name__.endswith("ScaledWordEmbedding")


def scale_of(module: nn.Module) -> float:
    """Returns what a float embedding multiplies its rows by."""
    return float(getattr(module, "embed_scale", 1.0))


def replace_table(model: PreTrainedModel, path: str, table: nn.Module) -> None:
    """Puts a compressed table in the place of an embedding; what is tied to it reads the new table from then on.

    Args:
        model: The model; on `meta` as well.
        path: The embedding, relative to the base model.
        table: A `QuantizedEmbedding` or `LowRankEmbedding` of the same shape.

    Raises:
        CompressionError: Other modules hold the same weight than those that the model's class ties.
        UnsupportedModelError: The class ties the embedding to something that is neither linear nor an embedding.
    """
    base = base_model(model)
    readers = tied_readers(model, path)
    base.set_submodule(path, table)
    for name, old in readers.items():
        made = TiedOutput(table, old.bias) if isinstance(old, nn.Linear) else TiedLookup(table, scale_of(old))
        made.train(old.training)
        model.set_submodule(name, made)
    if readers:
        _tie_no_more(model, {f"{name}.weight" for name in readers})


def tied_readers(model: PreTrainedModel, path: str) -> dict[str, nn.Module]:
    """Returns the modules, by path in the whole model, that the model's class ties to an embedding.

    Raises:
        As `replace_table`.
    """
    base = base_model(model)
    prefix = next(name for name, module in model.named_modules() if module is base)
    own = f"{prefix}.{path}.weight" if prefix else f"{path}.weight"
    ties = model.get_expanded_tied_weights_keys(all_submodels=True)
    sources = {own, ties.get(own, own)}
    names = {name for name, source in ties.items() if source in sources} | sources
    paths = sorted(name.removesuffix(".weight") for name in names - {own})
    readers = {name: model.get_submodule(name) for name in paths}
    weight: Any = base.get_submodule(path).weight
    if not weight.is_meta and set(tied_to(model, path)) != set(readers):
        raise CompressionError(
            f"{path} is tied to {', '.join(tied_to(model, path)) or 'nothing'}, its class ties it to "
            f"{', '.join(readers) or 'nothing'}: it would be loaded another way than it is saved",
            hint="Set tie_word_embeddings in the config as the model is, or leave the embeddings alone.",
        )
    for name, module in readers.items():
        if type(module) is not nn.Linear and not is_table(module):
            raise UnsupportedModelError(f"{path} is tied to {name}, a {type(module).__name__}")
    return readers


def _tie_no_more(model: PreTrainedModel, names: set[str]) -> None:
    """Takes ties of parameters that are gone from the rules by which transformers ties this one model."""
    parts = [(name, part) for name, part in model.named_modules() if isinstance(part, PreTrainedModel)]
    for prefix, part in parts:
        rules: Any = part._tied_weights_keys or {}
        kept = {name: source for name, source in rules.items() if (f"{prefix}.{name}" if prefix else name) not in names}
        if len(kept) < len(rules):
            vars(part)["_tied_weights_keys"] = kept
    for _, part in parts:
        part.all_tied_weights_keys = part.get_expanded_tied_weights_keys(all_submodels=True)
