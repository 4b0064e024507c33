"""Writes a compressed checkpoint in the stock shapes of its family, for servers that know nothing else."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import CheckpointError, RunFolderError, UnsupportedModelError
from hfcompress.modeling.anatomy import (
    AttentionBlock,
    FeedForwardBlock,
    attention_blocks,
    base_model,
    blocks_and_gaps,
    feed_forward_blocks,
    prefix_of,
)
from hfcompress.modeling.architectures import Projection, architectures
from hfcompress.modeling.layers.bitsandbytes import dequantize, kind_of
from hfcompress.modeling.layers.low_rank import LowRankLinear
from hfcompress.modeling.layers.quantized_embedding import QuantizedEmbedding
from hfcompress.modeling.layers.tied import LowRankEmbedding, TiedLookup, TiedOutput
from hfcompress.modeling.placement import require_inside
from hfcompress.modeling.saving import save

# What goes along with the weights; each where it is there.
_COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)

Tensors = dict[str, torch.Tensor]
_COMPRESSED = (LowRankLinear, QuantizedEmbedding, LowRankEmbedding, TiedLookup, TiedOutput)


def densify(directory: Path | str, out: Path | str) -> None:
    """Writes a checkpoint that computes the same with the family's stock modules.

    Removed heads and neurons come back as zeros in their places, low-rank factors are multiplied, quantized
    weights and embeddings become floats again. The result is as large as the uncompressed model.

    Args:
        directory: A compressed checkpoint.
        out: Where the stock checkpoint goes; must not exist, or be empty.

    Raises:
        CheckpointError: The checkpoint does not load.
        RunFolderError: `out` holds something.
        UnsupportedModelError: The structure has no counterpart of stock shapes.
    """
    directory, out = Path(directory), Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} is not empty", hint="Choose a new folder.")
    model = _load(directory)
    save(stock_twin(model), out, tokenizer=Companions(directory))


class Companions:
    """Saves like a tokenizer: copies the files that go with a folder's weights as they are."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def save_pretrained(self, place: Path) -> None:
        """Copies the files into a folder."""
        for name in _COMPANIONS:
            if (self.directory / name).exists():
                require_inside(self.directory / name, self.directory)
                shutil.copyfile(self.directory / name, place / name)


def _load(directory: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    return _class_of(config).from_pretrained(directory)


def _class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Finds the class that a config names among those that transformers lists for its type, and nowhere else."""
    import transformers
    from transformers.models.auto import modeling_auto

    named = (config.architectures or [None])[0]
    for table, names in vars(modeling_auto).items():
        if table.endswith("MAPPING_NAMES"):
            listed = names.get(config.model_type)
            if named in ((listed,) if isinstance(listed, str) else listed or ()):
                return getattr(transformers, cast(str, named))
    raise CheckpointError(f"config.json: architectures names no model class for '{config.model_type}': {named!r}")


def stock_twin(model: PreTrainedModel) -> PreTrainedModel:
    """Returns a stock model of the same class that computes the same; the model itself is left as it was.

    Raises:
        UnsupportedModelError: A tensor has no counterpart of the stock shape.
    """
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    config._is_quantized = False
    with torch.device("meta"):
        twin = type(model)(config)
    if model.can_generate():
        twin.generation_config = copy.deepcopy(model.generation_config)
    twin_base, prefix = base_model(twin), prefix_of(model)
    tensors = _plain_tensors(model, twin)
    if config.model_type in architectures():
        for attention in attention_blocks(model):
            _spread_attention(tensors, attention, twin_base, prefix)
        for block in feed_forward_blocks(model):
            _spread_feed_forward(tensors, block, twin_base, prefix)
        for block in blocks_and_gaps(model):
            if block.removed:
                _fill_gap(tensors, block, twin_base, prefix)
    expected = {name: tuple(tensor.shape) for name, tensor in twin.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise UnsupportedModelError(
            f"{wrong[0]} has no stock counterpart: it is {found.get(wrong[0])}, stock is {expected.get(wrong[0])}"
        )
    twin.load_state_dict(tensors, assign=True)
    return twin.eval()


def _plain_tensors(model: PreTrainedModel, twin: PreTrainedModel) -> Tensors:
    """Returns the model's tensors by stock names, floats again, still without what was cut off."""
    made: Tensors = {}
    inside: list[str] = []
    weights: dict[int, torch.Tensor] = {}
    for name, module in model.named_modules():
        if any(name.startswith(f"{parent}.") for parent in inside):
            continue
        if isinstance(module, _COMPRESSED) or kind_of(module) is not None:
            inside.append(name)
            read = module.table if isinstance(module, (TiedLookup, TiedOutput)) else module
            if id(read) not in weights:  # what is tied stays so
                weights[id(read)] = _float_weight(read).to(model.dtype)
            weight = weights[id(read)]
            transposed = isinstance(twin.get_submodule(name), Conv1D)
            made[f"{name}.weight"] = (weight.T if transposed else weight).contiguous()
            bias = getattr(module, "bias", None)
            if bias is not None:
                made[f"{name}.bias"] = bias.detach()
    kept = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[2] != "kept_heads" and not any(name.startswith(f"{parent}.") for parent in inside)
    }
    return kept | made


def _float_weight(module: Any) -> torch.Tensor:
    """Returns the float matrix, `(out, in)` or `(rows, columns)`, that a compressed module stands for."""
    if isinstance(module, LowRankLinear):
        up, down = _float_weight(module.up), _float_weight(module.down)
        return module.compose(up.double(), down.double()).float()
    if isinstance(module, (QuantizedEmbedding, LowRankEmbedding)):
        return module.dense()
    return module.weight.detach() if kind_of(module) is None else dequantize(module)


def _members(groups: torch.Tensor, width: int) -> torch.Tensor:
    return (groups.unsqueeze(1) * width + torch.arange(width)).flatten()


def _spread_attention(tensors: Tensors, block: AttentionBlock, twin: PreTrainedModel, prefix: str) -> None:
    if block.heads == block.stock_heads:
        return
    # Where a bias is shared between layers, the heads must go back to their own places; elsewhere any will do.
    kept = getattr(block.module, "kept_heads", torch.arange(block.heads)).cpu()
    widths = dict.fromkeys(("query", "key", "value"), block.head_dim)
    widths["query"] *= block.queries_per_head
    places = {role: _members(kept, width) for role, width in widths.items()}
    sizes = {role: block.stock_heads * width for role, width in widths.items()}
    wanted = [(projection, places[role]) for role, projection in block.projections]
    totals = [sizes[role] for role, _ in block.projections]
    _spread_outputs(tensors, block, wanted, totals, twin, prefix)
    _spread_inputs(tensors, block.path(block.spec.output), places["query"], sizes["query"], twin, prefix)


def _spread_feed_forward(tensors: Tensors, block: FeedForwardBlock, twin: PreTrainedModel, prefix: str) -> None:
    if block.neurons == block.stock_neurons:
        return
    place = torch.arange(block.neurons)
    totals = [block.stock_neurons] * len(block.inputs)
    _spread_outputs(tensors, block, [(each, place) for each in block.inputs], totals, twin, prefix)
    _spread_inputs(tensors, block.path(block.spec.output), place, block.stock_neurons, twin, prefix)


def _fill_gap(tensors: Tensors, block: AttentionBlock | FeedForwardBlock, twin: PreTrainedModel, prefix: str) -> None:
    """Puts zeros where a block was taken out; the bias that it left behind is there already."""
    attends = isinstance(block, AttentionBlock)
    inputs = [each.path for _, each in block.projections] if attends else [each.path for each in block.inputs]
    device = next(iter(tensors.values())).device
    for path in (*inputs, block.spec.output):
        name = block.path(path)
        for kind, stock in twin.get_submodule(name).state_dict().items():
            tensors.setdefault(f"{prefix}{name}.{kind}", torch.zeros_like(stock, device=device))


def _spread_outputs(
    tensors: Tensors,
    block: AttentionBlock | FeedForwardBlock,
    wanted: Sequence[tuple[Projection, torch.Tensor]],
    totals: Sequence[int],
    twin: PreTrainedModel,
    prefix: str,
) -> None:
    """Puts outputs back into their places; a fused module's blocks each into its own."""
    places: dict[str, dict[int, tuple[torch.Tensor, int]]] = {}
    parts: dict[str, int] = {}
    for (projection, place), total in zip(wanted, totals, strict=True):
        parts[projection.path] = projection.parts
        places.setdefault(projection.path, {})[projection.part] = (place, total)
    for path, by_part in places.items():
        name = block.path(path)
        dims = {"weight": 1 if isinstance(twin.get_submodule(name), Conv1D) else 0, "bias": 0}
        for kind, dim in dims.items():
            key = f"{prefix}{name}.{kind}"
            if key in tensors:
                blocks = tensors[key].chunk(parts[path], dim)
                spread = [
                    _spread(each, dim, *by_part[part]) if part in by_part else each for part, each in enumerate(blocks)
                ]
                tensors[key] = torch.cat(spread, dim)


def _spread_inputs(
    tensors: Tensors, name: str, place: torch.Tensor, total: int, twin: PreTrainedModel, prefix: str
) -> None:
    dim = 0 if isinstance(twin.get_submodule(name), Conv1D) else 1
    key = f"{prefix}{name}.weight"
    tensors[key] = _spread(tensors[key], dim, place, total)


def _spread(tensor: torch.Tensor, dim: int, place: torch.Tensor, total: int) -> torch.Tensor:
    """Returns zeros of `total` along `dim` with the tensor's slices at `place`."""
    shape = list(tensor.shape)
    shape[dim] = total
    return tensor.new_zeros(shape).index_copy_(dim, place.to(tensor.device), tensor.detach())
