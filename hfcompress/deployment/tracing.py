"""From a checkpoint to a traced graph: what every engine starts from."""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from hfcompress.deployment.heads import WRITTEN, Head, head_of
from hfcompress.errors import CheckpointError, UnsupportedModelError
from hfcompress.modeling.layers.quantized_embedding import quantize_rows

_DEQUANTIZED = ("hfcompress", "bitsandbytes")  # what is turned into float again


@dataclass(frozen=True, kw_only=True)
class Source:
    """A loaded checkpoint, ready to be traced.

    Attributes:
        model: In float32 and evaluation mode.
        processor: The tokenizer in the folder; of images and sounds what prepares them.
        head: What the model's head does.
        inputs: The tensors that the graph takes, in the order of the trace.
        max_length: The most tokens a row may have, of speech those of its text; None where there are no tokens.
    """

    model: PreTrainedModel
    processor: Any
    head: Head
    inputs: tuple[str, ...]
    max_length: int | None

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of what the graph returns."""
        return self.head.outputs


def load(directory: Path, *, fused_attention: bool = False) -> Source:
    """Loads a checkpoint and checks that it can be exported.

    Args:
        directory: A checkpoint folder with its tokenizer, or what prepares its images or sounds.
        fused_attention: Whether to trace attention as one operation, where the family can.

    Raises:
        CheckpointError: The folder holds no checkpoint, or no tokenizer of the `tokenizers` library.
        UnsupportedModelError: The head is none of `HEADS`.
    """
    import transformers

    try:
        json.loads((directory / "config.json").read_text(encoding="utf-8"))
        config: Any = AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: config.json cannot be read: {error}") from None
    head = head_of(config)
    said = getattr(config, "quantization_config", None) or {}
    method = said.get("quant_method") if isinstance(said, dict) else getattr(said, "quant_method", None)
    if said and getattr(method, "value", method) not in _DEQUANTIZED:
        raise UnsupportedModelError(
            f"{directory} is quantized by {getattr(method, 'value', method)}, whose layers cannot be exported",
            hint="Export the float checkpoint that it was made from, with --int8.",
        )
    model = getattr(transformers, head.auto_class).from_pretrained(directory, dtype=torch.float32).eval()
    model.set_attn_implementation("sdpa" if fused_attention and model._supports_sdpa else "eager")
    taken = inspect.signature(model.forward).parameters
    if head.reads != "text":
        longest = model.config.max_target_positions if head.writes else None
        processor = _processor(directory, head)
        return Source(model=model, processor=processor, head=head, inputs=head.inputs, max_length=longest)
    tokenizer = _tokenizer(directory)
    given = {"input_ids", "attention_mask", WRITTEN, *tokenizer.model_input_names}
    inputs = tuple(name for name in head.inputs if name in taken and name in given)
    if inputs[:2] != head.inputs[:2]:
        raise UnsupportedModelError(f"{directory}: {type(model).__name__} does not take input_ids and attention_mask")
    return Source(model=model, processor=tokenizer, head=head, inputs=inputs, max_length=_max_length(model, tokenizer))


def _tokenizer(directory: Path) -> Any:
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
    return tokenizer


def _processor(directory: Path, head: Head) -> Any:
    from transformers import AutoFeatureExtractor, AutoImageProcessor, AutoProcessor

    auto = AutoProcessor if head.task == "automatic-speech-recognition" else AutoFeatureExtractor
    try:
        processor = (AutoImageProcessor if head.reads == "images" else auto).from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: what prepares its {head.reads} cannot be loaded: {error}") from None
    if head.writes and not getattr(processor.tokenizer, "is_fast", False):
        raise CheckpointError(f"{directory}: its tokenizer has no tokenizer.json, which the runtime reads")
    return processor


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
    # A tokenizer without a limit says a number that no graph can take.
    return min([*lengths, _NO_LIMIT])


_NO_LIMIT = 1 << 16
_MOMENTS = 2  # of a sound, at the least: one alone would be traced as a size that is always 1


class _Graph(nn.Module):
    """A model that takes its inputs by place and returns the tensors that its head is asked for."""

    def __init__(self, source: Source) -> None:
        super().__init__()
        self.model = source.model
        self.inputs = source.inputs
        self.outputs = source.outputs
        # A cache would be one more output, which a graph without one as input has no use for.
        self.more = {"use_cache": False} if "use_cache" in inspect.signature(source.model.forward).parameters else {}

    def forward(self, *values: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        made = self.model(**dict(zip(self.inputs, values, strict=True)), **self.more)
        found = [made[name] for name in self.outputs]
        return tuple(found) if len(found) > 1 else found[0]


def example(source: Source, rows: int, tokens: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Makes random inputs.

    Args:
        source: What they are for.
        rows: How many.
        tokens: In a row, as many as the model takes at most and at least; of sounds moments that it says something
            of; of images nothing.
        seed: Of the numbers.

    Returns:
        int64 `(rows, tokens)`, where the last row is padded if there is room for it, and a text that a decoder has
        begun is half as long; of images `pixel_values`, float32 `(rows, channels, height, width)`; of sounds
        `input_values`, float32 `(rows, numbers)`, or `input_features`, float32 `(rows, pitches, moments)`.
    """
    generator = torch.Generator().manual_seed(seed)
    config = cast(Any, source.model.config)
    tokens = max(min(tokens, source.max_length or tokens), source.head.fewest)
    if source.head.reads == "text":
        values = _texts(source, rows, tokens, generator)
    else:
        values = {source.inputs[0]: torch.randn(rows, *_sizes(source, tokens), generator=generator)}
    if source.head.writes:
        values[WRITTEN] = torch.randint(0, config.vocab_size, (rows, tokens // 2 + 1), generator=generator)
    return {name: values[name] for name in source.inputs}


def _sizes(source: Source, moments: int) -> tuple[int, ...]:
    """Returns the sizes of one image, or of a sound of so many moments."""
    config = cast(Any, source.model.config)
    if source.head.reads == "sounds":
        return (_numbers(config, max(moments, _MOMENTS)),)
    if source.head.reads == "spectrograms":
        return config.num_mel_bins, 2 * config.max_source_positions  # of half a minute, always
    size = config.image_size
    return config.num_channels, *(size if isinstance(size, list | tuple) else (size, size))


def _texts(source: Source, rows: int, tokens: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    config = cast(Any, source.model.config)
    ids = torch.randint(0, config.vocab_size, (rows, tokens), generator=generator)
    pad = source.processor.pad_token_id
    if pad is not None:
        ids[ids == pad] = (pad + 1) % config.vocab_size
    mask = torch.ones_like(ids)
    if rows > 1 and tokens > 2 and pad is not None:
        ids[-1, -(tokens // 3) :] = pad
        mask[-1, -(tokens // 3) :] = 0
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def _numbers(config: Any, moments: int) -> int:
    """Returns how many numbers of a sound become so many moments behind the convolutions that read it."""
    for kernel, stride in reversed(list(zip(config.conv_kernel, config.conv_stride, strict=True))):
        moments = (moments - 1) * stride + kernel
    return moments


def reference(source: Source, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Returns the model's own outputs, of the head's names."""
    with torch.no_grad():
        made = source.model(**inputs)
    return tuple(made[name] for name in source.outputs)


def trace(source: Source) -> torch.export.ExportedProgram:
    """Traces a model with any number of rows and tokens.

    Raises:
        UnsupportedModelError: The model's code cannot be traced, or only for one shape.
    """
    # The wrapper too: the tracer reads the mode off the outermost module and would turn dropout on.
    wrapper = _Graph(source).eval()
    inputs = example(source, 2, 9)
    shapes = (_dynamic(source),)
    try:
        with quiet():
            return torch.export.export(wrapper, tuple(inputs.values()), dynamic_shapes=shapes)
    except Exception as error:  # whatever the model's code and the tracer raise
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UnsupportedModelError(
            f"{type(source.model).__name__} cannot be traced with any number of rows and tokens: {said}",
            hint="Its checkpoint still runs with transformers. With a removed head or another family it may trace.",
        ) from error


def _dynamic(source: Source) -> tuple[dict[int, Any], ...]:
    """Returns for each input which of its sizes may be any: rows, and tokens or numbers of a sound."""
    batch = torch.export.Dim("batch", min=1)
    length: dict[str, Any] = {}
    if source.head.reads == "text":
        any_length = torch.export.Dim("sequence", min=source.head.fewest, max=source.max_length)
        length = dict.fromkeys(source.inputs, any_length)
    if source.head.writes:
        length[WRITTEN] = torch.export.Dim("written", min=1, max=source.max_length)
    if source.head.reads == "sounds":
        length["input_values"] = torch.export.Dim("numbers", min=_numbers(source.model.config, _MOMENTS))
    return tuple({0: batch} | ({1: length[name]} if name in length else {}) for name in source.inputs)


def module_path(noted: str) -> str:
    """Returns the path, in the exported model, of a module as a trace notes it.

    A trace begins at the wrapper, and notes it where a model walks through a part of its layers (`layers[:3]`).
    """
    return re.sub(r"\.slice\([^)]*\)", "", noted).removeprefix("model.")


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
