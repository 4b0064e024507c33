"""What each part of a model loses in each kind of quantized layer: put in its place, run, and taken out again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.digests import feed, model_digest
from hfcompress.methods.probing import Probe
from hfcompress.methods.quantization.choosing import Cost
from hfcompress.methods.quantization.kinds import LinearKind, quantize_layer
from hfcompress.methods.registry import Batch
from hfcompress.methods.replay import Replay
from hfcompress.modeling.anatomy import attention_blocks, base_model, feed_forward_blocks, modules_by_role
from hfcompress.modeling.architectures import architectures
from hfcompress.modeling.layers.bitsandbytes import Numerics
from hfcompress.modeling.layers.quantized_embedding import QuantizedEmbedding
from hfcompress.modeling.tables import TableKind, plan_tables
from hfcompress.modeling.ties import is_table, scale_of

TABLE_KINDS: tuple[TableKind, ...] = get_args(TableKind)


@dataclass(frozen=True)
class Part:
    """What gets one kind.

    Attributes:
        name: Where it is.
        paths: Its modules, relative to the base model.
        is_table: Whether it is an embedding table.
    """

    name: str
    paths: tuple[str, ...]
    is_table: bool = False


def is_table_path(model: PreTrainedModel, path: str) -> bool:
    """Tells whether a module is an embedding table, not a linear layer."""
    return is_table(base_model(model).get_submodule(path))


def parts_of(model: PreTrainedModel, paths: Sequence[str], by: str) -> list[Part]:
    """Groups linear layers; those of no block or role, and tables, stand alone.

    Args:
        model: The model.
        paths: The linear layers and embedding tables, relative to the base model.
        by: `layer`, `block` or `role`.
    """
    places = _places(model, by)
    groups: dict[str, list[str]] = {}
    tables = [path for path in paths if is_table_path(model, path)]
    for path in paths:
        if path not in tables:
            # The halves of a low-rank layer are where the layer is.
            name = places.get(path) or places.get(path.rpartition(".")[0]) or path
            groups.setdefault(name, []).append(path)
    linear = [Part(name, tuple(inside)) for name, inside in groups.items()]
    return [Part(path, (path,), is_table=True) for path in tables] + linear


def _places(model: PreTrainedModel, by: str) -> dict[str, str]:
    if by == "layer" or model.config.model_type not in architectures():
        return {}
    if by == "role":
        return {path: role for role, paths in modules_by_role(model).items() for path in paths}
    places: dict[str, str] = {}
    for block in attention_blocks(model):
        inner = [each.path for _, each in block.projections] + [block.spec.output]
        places |= {block.path(path): f"{block.layer}.attention" for path in inner}
    for block in feed_forward_blocks(model):
        inner = [each.path for each in block.inputs] + [block.spec.output]
        places |= {block.path(path): f"{block.layer}.ffn" for path in inner}
    return places


class Bench:
    """A model whose parts can be had in other kinds for a while.

    Args:
        model: A float model; as before whenever nothing stands in.
        parts: The parts.
        numerics: How layers by bitsandbytes compute.
        group_size: Of tables, as in the config.
    """

    def __init__(
        self, model: PreTrainedModel, parts: Sequence[Part], numerics: Numerics, group_size: int | None
    ) -> None:
        self.model, self.base = model, base_model(model)
        self.parts = {part.name: part for part in parts}
        self._numerics, self._group_size = numerics, group_size

    def bytes_now(self) -> dict[str, int]:
        """Returns the bytes of each part as it is."""
        found = {}
        for name, part in self.parts.items():
            modules = [self.base.get_submodule(path) for path in part.paths]
            # Of a table only the numbers count: what is tied to it is stored with it.
            found[name] = sum(_bytes([cast(Any, m).weight]) if part.is_table else module_bytes(m) for m in modules)
        return found

    @contextmanager
    def standing_in(self, kinds: Mapping[str, str]) -> Iterator[dict[str, int]]:
        """Runs the body with some parts in other kinds; gives the bytes of each."""
        sizes: dict[str, int] = {}
        with ExitStack() as stack:
            for name, kind in kinds.items():
                part = self.parts[name]
                stand_in = self._table if part.is_table else self._layer
                sizes[name] = sum(stack.enter_context(stand_in(path, kind)) for path in part.paths)
            yield sizes

    @contextmanager
    def _layer(self, path: str, kind: str) -> Iterator[int]:
        whole = self.base.get_submodule(path)
        made = quantize_layer(whole, cast(LinearKind, kind), self._numerics)
        self.base.set_submodule(path, made)
        try:
            yield module_bytes(made)
        finally:
            self.base.set_submodule(path, whole)

    @contextmanager
    def _table(self, path: str, kind: str) -> Iterator[int]:
        """Gives a table the values that it will have; what is tied to it reads them too."""
        bits, size = plan_tables(self.model, cast(TableKind, kind), self._group_size)[path]
        table: Any = self.base.get_submodule(path)
        whole = table.weight.data
        made = QuantizedEmbedding.from_float(table, bits=bits, group_size=size, scale=scale_of(table))
        table.weight.data = made.dense()
        try:
            yield module_bytes(made)
        finally:
            table.weight.data = whole


def measure(
    bench: Bench, candidates: Sequence[LinearKind], batches: Sequence[Batch], folder: Path | None, by: str
) -> dict[str, dict[str, Cost]]:
    """Measures by how much the outputs diverge when one part alone is of a kind.

    Layers are gone through from the input on, and those before the one in question are run once for all.

    Args:
        bench: The model and its parts.
        candidates: The kinds for linear layers; tables are tried in all of theirs.
        batches: What it is measured on.
        folder: Keeps what was measured: it holds for any budget, and another kind is measured beside it. None to keep
            nothing.
        by: How the parts were made, which the file's name stands for too.

    Returns:
        For each part its cost by kind.

    Raises:
        CompressionError: There are no batches, or the outputs are not finite.
    """
    if not batches:
        raise CompressionError(
            "sensitivity and mixed need calibration data, and there is none",
            hint="Pass calibration=[batch, ...]: mappings of model inputs such as a tokenizer returns.",
        )
    reads = bench.model.main_input_name
    if lacking := next((batch for batch in batches if reads not in batch), None):
        raise CompressionError(f"the calibration batches hold {', '.join(lacking)}; the model reads {reads}")
    file = folder / f"sensitivity-{_key(bench, batches, by)}.json" if folder else None
    kept: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file and file.is_file() else {}
    wanted = {
        name: [kind for kind in (TABLE_KINDS if part.is_table else candidates) if kind not in kept.get(name, {})]
        for name, part in bench.parts.items()
    }
    for name, kind, cost in _measured(bench, wanted, batches):
        kept.setdefault(name, {})[kind] = {"bytes": cost.bytes, "loss": cost.loss}
        if file:  # what was measured is not lost when this is cut off
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps(kept, indent=1))
            os.replace(partial, file)
    return {
        name: {kind: Cost(**kept[name][kind]) for kind in (TABLE_KINDS if part.is_table else candidates)}
        for name, part in bench.parts.items()
    }


def _measured(
    bench: Bench, wanted: Mapping[str, Sequence[str]], batches: Sequence[Batch]
) -> Iterator[tuple[str, str, Cost]]:
    if not any(wanted.values()):
        return
    replay = Replay(bench.model, batches)
    probe = Probe(bench.model, batches, "outputs", replay)
    layers = {name: _layer_of(replay, bench.parts[name]) for name in wanted}
    places = {path: number for number, (path, _) in enumerate(bench.base.named_modules())}
    # What lies in no single layer comes first: it needs all of the model to run. Then layer by layer, for one that is
    # finished gives the same whatever is put in it.
    order = sorted(wanted, key=lambda name: -1 if (layer := layers[name]) is None else places[layer])
    current: str | None = None
    try:
        with tqdm(total=sum(map(len, wanted.values())), desc="sensitivity", leave=False) as bar:
            for name in order:
                layer = layers[name]
                if current is not None and layer != current:
                    replay.finish(current)
                current = layer
                for kind in wanted[name]:
                    with bench.standing_in({name: kind}) as sizes:
                        loss = max(0.0, probe.rise())
                    bar.update()
                    yield name, kind, Cost(sizes[name], loss)
    finally:
        replay.close()


def _layer_of(replay: Replay, part: Part) -> str | None:
    layers = {replay.layer_of(path) for path in part.paths}
    return layers.pop() if len(layers) == 1 and not part.is_table else None


def _key(bench: Bench, batches: Sequence[Batch], by: str) -> str:
    hasher = hashlib.sha256(model_digest(bench.model).encode())
    feed(hasher, [by, list(bench.parts), bench._numerics._asdict(), bench._group_size, torch.__version__])
    for batch in batches:
        for name in sorted(batch):
            hasher.update(name.encode())
            feed(hasher, batch[name])
    return hasher.hexdigest()[:24]


def module_bytes(module: nn.Module) -> int:
    """Counts the bytes that a module's tensors take in a file; shared ones once."""
    return _bytes(list(module.state_dict().values()))


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    places = {(each.data_ptr(), each.dtype, each.numel()): each for each in tensors}
    return sum(each.numel() * each.element_size() for each in places.values())
