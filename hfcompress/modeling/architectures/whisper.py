"""Whisper: BART's layout behind two convolutions."""

from hfcompress.modeling.architectures import Architecture
from hfcompress.modeling.architectures.bart import STACKS

ARCHITECTURE = Architecture(
    model_types=("whisper",),
    stacks=STACKS,
    embeddings=("decoder.embed_tokens",),
    heads=("projector", "classifier", "layer_weights"),
)
