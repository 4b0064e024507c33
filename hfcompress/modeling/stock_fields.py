"""What the stock config can say of a compressed model, said there, so that an ordinary checkpoint is written."""

from __future__ import annotations

from transformers import PreTrainedModel

from hfcompress.modeling.anatomy import AttentionBlock, attention_blocks, base_model, feed_forward_blocks
from hfcompress.modeling.architectures import architectures


def say_in_stock_fields(model: PreTrainedModel) -> None:
    """Moves what the stock config can express into it, so that an ordinary checkpoint is written.

    That is feed-forward blocks of one width, and attentions with one number of heads in the families whose config
    holds the width of a head apart. An encoder and a decoder with fields of their own count each for itself.
    """
    if model.config.model_type not in architectures():
        return
    configs = {id(part.config): part.config for part in (model, base_model(model))}.values()
    widths: dict[str, set[int]] = {}
    for block in feed_forward_blocks(model):
        widths.setdefault(block.spec.neurons, set()).add(block.neurons)
    attentions: dict[str, list[AttentionBlock]] = {}
    for block in attention_blocks(model):
        attentions.setdefault(block.spec.heads, []).append(block)
    said: dict[str, int] = {field: found.pop() for field, found in widths.items() if len(found) == 1}
    for blocks in attentions.values():
        said |= _uniform_heads(model, blocks)
    for config in configs:
        for field, value in said.items():
            if getattr(config, field, None) != value:
                setattr(config, field, value)


def _uniform_heads(model: PreTrainedModel, blocks: list[AttentionBlock]) -> dict[str, int]:
    """Returns the config fields that say how many heads all these attentions have, where they can."""
    spec, config = blocks[0].spec, base_model(model).config
    sizes = {(block.heads, block.query_heads, block.head_dim) for block in blocks}
    sayable = spec.head_dim_field is not None and spec.shared_bias == "none"  # each layer may keep others of a bias
    if not sayable or len(sizes) > 1 or blocks[0].heads == blocks[0].stock_heads:
        return {}
    heads, query_heads, head_dim = sizes.pop()
    if spec.heads_divide is not None and getattr(config, spec.heads_divide) % query_heads:
        return {}
    said = {spec.heads: query_heads, spec.head_dim_field: head_dim}
    return said | ({spec.kv_heads: heads} if spec.kv_heads else {})
