"""GPT-2: fused projections whose weights are kept transposed."""

from hfcompress.modeling.architectures import Architecture, Attention, FeedForward, Projection, Stack

SELF_ATTENTION = Attention(
    module="attn",
    query=Projection(path="attn.c_attn", part=0, parts=3),
    key=Projection(path="attn.c_attn", part=1, parts=3),
    value=Projection(path="attn.c_attn", part=2, parts=3),
    output="attn.c_proj",
    head_dim="head_dim",
    counts={"num_heads": "heads", "split_size": "width"},
    heads="n_head",
)
CROSS_ATTENTION = Attention(
    module="crossattention",
    query=Projection(path="crossattention.q_attn"),
    key=Projection(path="crossattention.c_attn", part=0, parts=2),
    value=Projection(path="crossattention.c_attn", part=1, parts=2),
    output="crossattention.c_proj",
    head_dim="head_dim",
    counts={"num_heads": "heads", "split_size": "width"},
    heads="n_head",
    optional=True,
)

ARCHITECTURE = Architecture(
    model_types=("gpt2",),
    stacks=(
        Stack(
            layers="h",
            attentions=(SELF_ATTENTION, CROSS_ATTENTION),
            feed_forwards=(
                FeedForward(
                    inputs=(Projection(path="mlp.c_fc"),), output="mlp.c_proj", neurons="n_inner", removable=False
                ),
            ),
            depth="n_layer",
            numbered_by=("scale_attn_by_inverse_layer_idx",),
        ),
    ),
    embeddings=("wte", "wpe"),
)
