"""ALBERT: the layers of a group are run over and over, so they are pruned once."""

from hfcompress.modeling.architectures import Architecture, Attention, FeedForward, Projection, Stack

ARCHITECTURE = Architecture(
    model_types=("albert",),
    stacks=(
        Stack(
            layers="encoder.albert_layer_groups.*.albert_layers",
            attentions=(
                Attention(
                    module="attention",
                    query=Projection(path="attention.query"),
                    key=Projection(path="attention.key"),
                    value=Projection(path="attention.value"),
                    output="attention.dense",
                    head_dim="attention_head_size",
                    counts={"num_attention_heads": "heads", "all_head_size": "width"},
                ),
            ),
            feed_forwards=(FeedForward(inputs=(Projection(path="ffn"),), output="ffn_output"),),
            shared=True,
        ),
    ),
    embeddings=(
        "embeddings.word_embeddings",
        "embeddings.position_embeddings",
        "embeddings.token_type_embeddings",
    ),
    detachable=("pooler", "pooler_activation"),
)
