"""T5: each stack's first layer makes the position bias, which is handed from layer to layer."""

from hfcompress.modeling.architectures import Architecture, Attention, FeedForward, Projection, Stack


def attention(module: str, *, optional: bool = False) -> Attention:
    """Returns the self or cross attention of a layer."""
    return Attention(
        module=module,
        query=Projection(path=f"{module}.q"),
        key=Projection(path=f"{module}.k"),
        value=Projection(path=f"{module}.v"),
        output=f"{module}.o",
        head_dim="key_value_proj_dim",
        counts={"n_heads": "heads", "inner_dim": "width"},
        heads="num_heads",
        head_dim_field="d_kv",
        shared_bias="passed_on",
        optional=optional,
    )


def stack(layers: str, feed_forward: str, depth: str, *attentions: Attention) -> Stack:
    """Returns the encoder or the decoder."""
    inputs = tuple(Projection(path=f"{feed_forward}.DenseReluDense.{name}") for name in ("wi", "wi_0", "wi_1"))
    return Stack(
        layers=layers,
        attentions=attentions,
        feed_forwards=(
            FeedForward(inputs=inputs, output=f"{feed_forward}.DenseReluDense.wo", neurons="d_ff", removable=False),
        ),
        depth=depth,
        carried={"layer.0.SelfAttention.relative_attention_bias": "has_relative_attention_bias"},
    )


SELF_ATTENTION = attention("layer.0.SelfAttention")

ARCHITECTURE = Architecture(
    model_types=("t5", "mt5"),
    stacks=(
        stack("encoder.block", "layer.1", "num_layers", SELF_ATTENTION),
        stack(
            "decoder.block",
            "layer.2",
            "num_decoder_layers",
            SELF_ATTENTION,
            attention("layer.1.EncDecAttention", optional=True),
        ),
    ),
    embeddings=("shared",),
    heads=("lm_head", "qa_outputs"),
)
