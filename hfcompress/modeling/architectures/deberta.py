"""DeBERTa v2 and v3: BERT's layout, with attention to relative positions through projections of its own."""

from hfcompress.modeling.architectures import Architecture, Attention, Projection, Stack
from hfcompress.modeling.architectures.bert import FEED_FORWARD

ARCHITECTURE = Architecture(
    model_types=("deberta-v2",),
    stacks=(
        Stack(
            layers="encoder.layer",
            attentions=(
                Attention(
                    module="attention.self",
                    query=Projection(path="attention.self.query_proj"),
                    key=Projection(path="attention.self.key_proj"),
                    value=Projection(path="attention.self.value_proj"),
                    # Where `share_att_key` is set the query and key projections serve positions too.
                    also={
                        "query": Projection(path="attention.self.pos_query_proj"),
                        "key": Projection(path="attention.self.pos_key_proj"),
                    },
                    output="attention.output.dense",
                    head_dim="attention_head_size",
                    counts={"num_attention_heads": "heads", "all_head_size": "width"},
                ),
            ),
            feed_forwards=(FEED_FORWARD,),
        ),
    ),
    # The table of relative positions is read whole, not looked up.
    embeddings=(
        "embeddings.word_embeddings",
        "embeddings.position_embeddings",
        "embeddings.token_type_embeddings",
    ),
)
