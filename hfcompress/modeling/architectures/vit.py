"""Vision Transformer."""

from hfcompress.modeling.architectures import Architecture, Attention, FeedForward, Projection, Stack

ARCHITECTURE = Architecture(
    model_types=("vit",),
    stacks=(
        Stack(
            layers="layers",
            attentions=(
                Attention(
                    module="attention",
                    query=Projection(path="attention.q_proj"),
                    key=Projection(path="attention.k_proj"),
                    value=Projection(path="attention.v_proj"),
                    output="attention.o_proj",
                    head_dim="head_dim",
                    counts={"num_attention_heads": "heads"},
                    head_dim_field="head_dim",
                    removable=True,
                ),
            ),
            feed_forwards=(FeedForward(inputs=(Projection(path="mlp.fc1"),), output="mlp.fc2"),),
        ),
    ),
    embeddings=(),
    detachable=("pooler", "embeddings.mask_token"),
)
