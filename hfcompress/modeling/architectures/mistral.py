"""Mistral and Qwen: Llama's layout, and any number of heads."""

from hfcompress.modeling.architectures.llama import architecture

ARCHITECTURE = architecture("mistral", "qwen2", "qwen3")
