"""MPNet: BERT's layout, but one relative position bias is computed once and added in every layer."""

from hfcompress.modeling.architectures import Architecture, Attention, Projection, Stack
from hfcompress.modeling.architectures.bert import FEED_FORWARD

ARCHITECTURE = Architecture(
    model_types=("mpnet",),
    stacks=(
        Stack(
            layers="encoder.layer",
            attentions=(
                Attention(
                    module="attention.attn",
                    query=Projection(path="attention.attn.q"),
                    key=Projection(path="attention.attn.k"),
                    value=Projection(path="attention.attn.v"),
                    output="attention.attn.o",
                    head_dim="attention_head_size",
                    counts={"num_attention_heads": "heads", "all_head_size": "width"},
                    shared_bias="given",
                    removable=True,
                ),
            ),
            feed_forwards=(FEED_FORWARD,),
        ),
    ),
    embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings"),
    detachable=("pooler",),
)
