"""BART, Pegasus and the like: an encoder and a decoder with fields of their own in the config."""

from hfcompress.modeling.architectures import Architecture, Attention, FeedForward, Projection, Stack


def attention(module: str, heads: str) -> Attention:
    """Returns the self or cross attention of a layer."""
    return Attention(
        module=module,
        query=Projection(path=f"{module}.q_proj"),
        key=Projection(path=f"{module}.k_proj"),
        value=Projection(path=f"{module}.v_proj"),
        output=f"{module}.out_proj",
        head_dim="head_dim",
        counts={"num_heads": "heads"},
        heads=heads,
    )


def stack(side: str, *attentions: str) -> Stack:
    """Returns the encoder or the decoder."""
    return Stack(
        layers=f"{side}.layers",
        attentions=tuple(attention(module, f"{side}_attention_heads") for module in attentions),
        feed_forwards=(FeedForward(inputs=(Projection(path="fc1"),), output="fc2", neurons=f"{side}_ffn_dim"),),
        depth=f"{side}_layers",
    )


STACKS = (stack("encoder", "self_attn"), stack("decoder", "self_attn", "encoder_attn"))

ARCHITECTURE = Architecture(
    model_types=("bart", "pegasus"),
    stacks=STACKS,
    # The positions' tables add an offset before they look up, so they are not listed.
    embeddings=("shared", "decoder.embed_tokens"),
)
