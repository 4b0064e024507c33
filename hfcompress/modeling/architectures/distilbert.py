"""DistilBERT."""

from hfcompress.modeling.architectures import Architecture, Attention, FeedForward, Projection, Stack

ARCHITECTURE = Architecture(
    model_types=("distilbert",),
    stacks=(
        Stack(
            layers="transformer.layer",
            attentions=(
                Attention(
                    module="attention",
                    query=Projection(path="attention.q_lin"),
                    key=Projection(path="attention.k_lin"),
                    value=Projection(path="attention.v_lin"),
                    output="attention.out_lin",
                    head_dim="attention_head_size",
                    counts={"n_heads": "heads", "dim": "width"},
                    heads="n_heads",
                    removable=True,
                ),
            ),
            feed_forwards=(
                FeedForward(inputs=(Projection(path="ffn.lin1"),), output="ffn.lin2", neurons="hidden_dim"),
            ),
            depth="n_layers",
        ),
    ),
    embeddings=("embeddings.word_embeddings", "embeddings.position_embeddings"),
)
