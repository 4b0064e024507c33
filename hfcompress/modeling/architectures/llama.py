"""Llama and the decoders that keep its layout: groups of query heads read one key-value head."""

from hfcompress.modeling.architectures import Architecture, Attention, FeedForward, Projection, Stack


def architecture(*model_types: str, heads_divide: str | None = None) -> Architecture:
    """Returns Llama's layout for other model types."""
    attention = Attention(
        module="self_attn",
        query=Projection(path="self_attn.q_proj"),
        key=Projection(path="self_attn.k_proj"),
        value=Projection(path="self_attn.v_proj"),
        output="self_attn.o_proj",
        head_dim="head_dim",
        counts={},
        kv_heads="num_key_value_heads",
        head_dim_field="head_dim",
        heads_divide=heads_divide,
    )
    feed_forward = FeedForward(
        inputs=(Projection(path="mlp.gate_proj"), Projection(path="mlp.up_proj")), output="mlp.down_proj"
    )
    stack = Stack(
        layers="layers",
        attentions=(attention,),
        feed_forwards=(feed_forward,),
        per_layer_fields=("layer_types",),
    )
    return Architecture(model_types=model_types, stacks=(stack,), embeddings=("embed_tokens",))


ARCHITECTURE = architecture("llama", heads_divide="hidden_size")
