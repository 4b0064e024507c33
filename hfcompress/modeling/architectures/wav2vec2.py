"""wav2vec 2.0: a Transformer over the features of a convolutional encoder."""

from hfcompress.modeling.architectures import Architecture, Attention, FeedForward, Projection, Stack

ARCHITECTURE = Architecture(
    model_types=("wav2vec2",),
    stacks=(
        Stack(
            layers="encoder.layers",
            attentions=(
                Attention(
                    module="attention",
                    query=Projection(path="attention.q_proj"),
                    key=Projection(path="attention.k_proj"),
                    value=Projection(path="attention.v_proj"),
                    output="attention.out_proj",
                    head_dim="head_dim",
                    counts={"num_heads": "heads"},
                ),
            ),
            feed_forwards=(
                FeedForward(
                    inputs=(Projection(path="feed_forward.intermediate_dense"),),
                    output="feed_forward.output_dense",
                ),
            ),
        ),
    ),
    embeddings=(),
    # A head for speakers calls its own layer by a name of the base model's.
    heads=("feature_extractor.weight", "feature_extractor.bias"),
)
