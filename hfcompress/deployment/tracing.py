"""From a checkpoint to a traced graph: what every engine starts from."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel

from hfcompress.errors import CheckpointError, CompressionError, UnsupportedModelError
from hfcompress.modeling.anatomy import base_model, embedding_paths, tied_to
from hfcompress.modeling.architectures import architectures
from hfcompress.modeling.layers.bitsandbytes import dequantize, kind_of
from hfcompress.modeling.layers.quantized_embedding import Bits, QuantizedEmbedding, quantize_rows

Embeddings = Literal["float", "int8", "int4"]
# Suffixes of class names, each with its task and the class that loads it.
HEADS = {
    "ForSequenceClassification": ("text-classification", "AutoModelForSequenceClassification"),
    "ForTokenClassification": ("token-classification", "AutoModelForTokenClassification"),
}
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_GROUP_OF_INT4 = 32


@dataclass(frozen=True, kw_only=True)
class Source:
    """A loaded checkpoint, ready to be traced.

    Attributes:
        model: In float32 and evaluation mode.
        tokenizer: The one in the folder.
        task: What the head does.
        inputs: The tensors that the graph takes, in the order of the trace.
        max_length: The most tokens a row may have.
    """

    model: PreTrainedModel
    tokenizer: Any
    task: str
    inputs: tuple[str, ...]
    max_length: int


def load(directory: Path, *, fused_attention: bool = False) -> Source:
    """Loads a checkpoint and checks that it can be exported.

    Args:
        directory: A checkpoint folder with its tokenizer.
        fused_attention: Whether to trace attention as one operation, where the family can.

    Raises:
        CheckpointError: The folder holds no checkpoint, or no tokenizer of the `tokenizers` library.
        UnsupportedModelError: The head is none of `HEADS`.
    """
    import transformers

    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: config.json cannot be read: {error}") from None
    named = str((config.get("architectures") or ["nothing"])[0])
    head = next((suffix for suffix in HEADS if named.endswith(suffix)), None)
    if head is None:
        raise UnsupportedModelError(
            f"{directory}: {named} cannot be exported; heads that can: {', '.join(HEADS)}",
            hint="Fine-tune it for one of these, or run the checkpoint with transformers.",
        )
    task, loader = HEADS[head]
    model = getattr(transformers, loader).from_pretrained(directory, dtype=torch.float32).eval()
    model.set_attn_implementation("sdpa" if fused_attention and model._supports_sdpa else "eager")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: its tokenizer cannot be loaded: {error}") from None
    files = {"tokenizer.json", *getattr(tokenizer, "vocab_files_names", {}).values()}
    if not any((directory / str(file)).is_file() for file in files):
        # Without a vocabulary transformers makes an empty tokenizer and says nothing.
        raise CheckpointError(f"{directory} holds no tokenizer", hint="Save the tokenizer into the same folder.")
    if not getattr(tokenizer, "is_fast", False):
        raise CheckpointError(f"{directory}: its tokenizer has no tokenizer.json, which the runtime reads")
    taken = inspect.signature(model.forward).parameters
    given = tokenizer.model_input_names
    inputs = tuple(name for name in _INPUTS if name in taken and name in given)
    if "input_ids" not in inputs or "attention_mask" not in inputs:
        raise UnsupportedModelError(f"{directory}: {named} does not take input_ids and attention_mask")
    return Source(model=model, tokenizer=tokenizer, task=task, inputs=inputs, max_length=_max_length(model, tokenizer))


def _max_length(model: PreTrainedModel, tokenizer: Any) -> int:
    lengths = [tokenizer.model_max_length]
    positions = getattr(model.config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # Where position 0 is the padding's, counting begins after it.
        starts = [
            cast(Any, module).padding_idx + 1
            for name, module in model.named_modules()
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None
        ]
        lengths.append(positions - max(starts, default=0))
    return min(lengths)


class _Lookup(nn.Module):
    """A quantized embedding in operations that every engine takes: gather, cast, multiply.

    Args:
        codes: int8 `(rows, columns)`, or uint8 `(rows, columns / 2)` of packed pairs.
        scales: float32 `(rows, groups)`.
        bits: 8 or 4.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor, bits: Bits) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """Looks up integers of any shape; returns `(*indices.shape, columns)`, float32."""
        codes = nn.functional.embedding(indices, self.codes).float()
        scales = nn.functional.embedding(indices, self.scales)
        if self.bits == 4:
            high = torch.floor(codes / 16)  # exact in float32: a byte over a power of two
            codes = torch.stack((high, codes - 16 * high), -1).flatten(-2) - 8
        if scales.shape[-1] == 1:
            return codes * scales
        return (codes.unflatten(-1, (scales.shape[-1], -1)) * scales.unsqueeze(-1)).flatten(-2)


def prepare(model: PreTrainedModel, embeddings: Embeddings) -> dict[str, list[str]]:
    """Turns what only PyTorch can run into what every engine can, in place.

    bitsandbytes layers become float ones of the values that they hold: what they round of the inputs, in 8 bit,
    is not traced. Embedding tables that are quantized stay so; with `embeddings` the float ones become so too.

    Args:
        model: A model loaded by `load`.
        embeddings: What becomes of float tables.

    Returns:
        The paths of the layers that became float, and of the tables that are quantized now.

    Raises:
        CompressionError: A table to quantize is tied to another layer.
    """
    in_float: list[str] = []
    tables: list[str] = []
    for name, module in list(model.named_modules()):
        if kind_of(module) is not None:
            model.set_submodule(name, _float_linear(cast(Any, module)))
            in_float.append(name)
        elif isinstance(module, QuantizedEmbedding):
            model.set_submodule(name, _Lookup(module.codes, module.scales, module.bits))
            tables.append(name)
    if embeddings != "float" and model.config.model_type in architectures():
        tables += _quantize_tables(model, 8 if embeddings == "int8" else 4)
    return {"dequantized": in_float, "quantized_embeddings": tables}


def _float_linear(module: Any) -> nn.Linear:
    weight = dequantize(module).float()
    with torch.device("meta"):
        linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if module.bias is not None:
        linear.bias = nn.Parameter(module.bias.detach().float(), requires_grad=False)
    return linear.eval()


def _quantize_tables(model: PreTrainedModel, bits: Bits) -> list[str]:
    base = base_model(model)
    done = []
    for path in embedding_paths(model):
        table = base.get_submodule(path)
        if not isinstance(table, nn.Embedding):
            continue
        if tied_to(model, path):
            raise CompressionError(f"{path} is tied to another layer", hint="Export with --embeddings float.")
        width = table.embedding_dim
        if bits == 4 and width % 2:
            raise CompressionError(f"{path} is {width} wide; 4-bit numbers go in pairs", hint="Use --embeddings int8.")
        group = width if bits == 8 or width % _GROUP_OF_INT4 else _GROUP_OF_INT4
        quantized = QuantizedEmbedding.from_float(table, bits=bits, group_size=group)
        base.set_submodule(path, _Lookup(quantized.codes, quantized.scales, bits))
        done.append(path)
    return done


class _Logits(nn.Module):
    """A model that takes its inputs by place and returns nothing but logits."""

    def __init__(self, model: PreTrainedModel, inputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.inputs = inputs

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        return self.model(**dict(zip(self.inputs, values, strict=True))).logits


def example(source: Source, rows: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Makes random inputs, int64 `(rows, tokens)`; the last row is padded where there is room for it."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = source.model.config.vocab_size
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
    pad = source.tokenizer.pad_token_id
    if pad is not None:
        ids[ids == pad] = (pad + 1) % vocabulary
    mask = torch.ones_like(ids)
    if rows > 1 and tokens > 2 and pad is not None:
        ids[-1, -(tokens // 3) :] = pad
        mask[-1, -(tokens // 3) :] = 0
    values = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    return {name: values[name] for name in source.inputs}


def reference(source: Source, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Returns the model's own logits."""
    with torch.no_grad():
        return source.model(**inputs).logits


def trace(source: Source) -> torch.export.ExportedProgram:
    """Traces a model with any number of rows and tokens.

    Raises:
        UnsupportedModelError: The model's code cannot be traced, or only for one shape.
    """
    # The wrapper too: the tracer reads the mode off the outermost module and would turn dropout on.
    wrapper = _Logits(source.model, source.inputs).eval()
    inputs = example(source, 2, min(9, source.max_length))
    batch = torch.export.Dim("batch", min=1)
    tokens = torch.export.Dim("sequence", min=1, max=source.max_length)
    shapes = (tuple({0: batch, 1: tokens} for _ in source.inputs),)
    try:
        with quiet():
            return torch.export.export(wrapper, tuple(inputs.values()), dynamic_shapes=shapes)
    except Exception as error:  # whatever the model's code and the tracer raise
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnsupportedModelError(
            f"{type(source.model).__name__} cannot be traced with any number of rows and tokens: {said}",
            hint="Its checkpoint still runs with transformers. With a removed head or another family it may trace.",
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the tracers' and converters' warnings about themselves away from the user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "nncf", "root")]
    levels = [each.level for each in loggers]
    for each in loggers:
        each.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for each, level in zip(loggers, levels, strict=True):
            each.setLevel(level)


def rounding_noise(source: Source, batches: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, float]:
    """Measures how much 8-bit weights and inputs would change the output of each linear layer, each on its own.

    Args:
        source: A prepared model.
        batches: Model inputs.

    Returns:
        The squared change over the squared output, by the layer's path in the model; 0 for one that is not reached.
    """
    layers = {name: module for name, module in source.model.named_modules() if isinstance(module, nn.Linear)}
    errors = dict.fromkeys(layers, 0.0)
    totals = dict.fromkeys(layers, 0.0)

    def watch(name: str) -> Any:
        weight = layers[name].weight.detach()
        codes, scales = quantize_rows(weight, 8, weight.shape[1])
        rounded = codes * scales

        def hook(module: nn.Linear, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            change = nn.functional.linear(round_to_bytes(args[0]), rounded, module.bias) - output
            errors[name] += float(change.square().sum())
            totals[name] += float(output.square().sum())

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in layers.items()]
    try:
        for batch in batches:
            reference(source, {name: batch[name] for name in source.inputs})
    finally:
        for handle in handles:
            handle.remove()
    return {name: errors[name] / totals[name] if totals[name] else 0.0 for name in layers}


def round_to_bytes(values: torch.Tensor) -> torch.Tensor:
    """Rounds a tensor to 256 evenly spaced values between its extremes and 0."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    step = (high - low) / 255
    return values if step == 0 else ((values - low) / step).round() * step + low
