"""ModernBERT: fused projections, and layers of two types."""

from hfcompress.modeling.architectures import Architecture, Attention, FeedForward, Projection, Stack

ARCHITECTURE = Architecture(
    model_types=("modernbert",),
    stacks=(
        Stack(
            layers="layers",
            attentions=(
                Attention(
                    module="attn",
                    query=Projection(path="attn.Wqkv", part=0, parts=3),
                    key=Projection(path="attn.Wqkv", part=1, parts=3),
                    value=Projection(path="attn.Wqkv", part=2, parts=3),
                    output="attn.Wo",
                    head_dim="head_dim",
                    counts={},
                ),
            ),
            feed_forwards=(
                FeedForward(
                    inputs=(
                        Projection(path="mlp.Wi", part=0, parts=2),
                        Projection(path="mlp.Wi", part=1, parts=2),
                    ),
                    output="mlp.Wo",
                    removable=False,
                ),
            ),
            per_layer_fields=("layer_types",),
            first_stays=True,  # it alone has no norm before its attention
        ),
    ),
    embeddings=("embeddings.tok_embeddings",),
)
