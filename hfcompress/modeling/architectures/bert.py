"""BERT and the families that keep its layout."""

from hfcompress.modeling.architectures import Architecture, Attention, FeedForward, Projection, Stack

SELF_ATTENTION = Attention(
    module="attention.self",
    query=Projection(path="attention.self.query"),
    key=Projection(path="attention.self.key"),
    value=Projection(path="attention.self.value"),
    output="attention.output.dense",
    head_dim="attention_head_size",
    counts={"num_attention_heads": "heads", "all_head_size": "width"},
    removable=True,
)
# Of a decoder beside an encoder (`is_decoder`, `add_cross_attention`).
CROSS_ATTENTION = Attention(
    module="crossattention.self",
    query=Projection(path="crossattention.self.query"),
    key=Projection(path="crossattention.self.key"),
    value=Projection(path="crossattention.self.value"),
    output="crossattention.output.dense",
    head_dim="attention_head_size",
    counts={"num_attention_heads": "heads", "all_head_size": "width"},
    optional=True,
)
FEED_FORWARD = FeedForward(inputs=(Projection(path="intermediate.dense"),), output="output.dense")

ARCHITECTURE = Architecture(
    model_types=("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    stacks=(
        Stack(layers="encoder.layer", attentions=(SELF_ATTENTION, CROSS_ATTENTION), feed_forwards=(FEED_FORWARD,)),
    ),
    embeddings=(
        "embeddings.word_embeddings",
        "embeddings.position_embeddings",
        "embeddings.token_type_embeddings",
    ),
    detachable=("pooler",),
)
