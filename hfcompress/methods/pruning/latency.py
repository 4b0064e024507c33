"""What blocks cost in time on this machine: measured once, kept in a file, and what is removed is what costs time."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.machine import cpu_name
from hfcompress.methods.pruning.search import keep_the_best, knapsack
from hfcompress.methods.pruning.targets import Target, rounded_down
from hfcompress.methods.pruning.units import Units, head_units, neuron_units
from hfcompress.methods.registry import Batch
from hfcompress.modeling.measure import tensor_bytes

_POINTS = 12
_REPEATS = 9


@dataclass(frozen=True, kw_only=True)
class LatencyTable:
    """Seconds of a forward pass, and of each block at several sizes.

    Attributes:
        whole: Of the whole model as it is.
        blocks: For each block, in the order of its units, seconds by the number of units kept.
    """

    whole: float
    blocks: Sequence[Mapping[int, float]]

    def seconds(self, position: int, counts: Sequence[int]) -> np.ndarray:
        """Returns the seconds of a block at any of its sizes, interpolated between those that were measured."""
        known = sorted(self.blocks[position])
        return np.interp(counts, known, [self.blocks[position][count] for count in known])

    @property
    def rest(self) -> float:
        """Seconds that no pruning of blocks can save."""
        return self.whole - sum(max(block.items())[1] for block in self.blocks)


@dataclass(frozen=True, kw_only=True)
class Latency(Target):
    """A share of the time of a forward pass.

    What is kept is the most important that fits into the time: a knapsack over all blocks, in which each may take
    any of its sizes at the price that was measured for it (the idea of ZipLM, Kurtic et al. 2023).

    Attributes:
        table: What was measured.
        share: How much of the time is to go.
    """

    table: LatencyTable
    share: float

    def choose(self, scores: Sequence[torch.Tensor], progress: float = 1.0) -> list[torch.Tensor]:
        """Chooses the sizes of all blocks together, and in each the most important units."""
        sizes = self._sizes()
        budget = self.table.whole * (1 - self.share * progress) - self.table.rest
        losses = []
        for score, counts in zip(scores, sizes, strict=True):
            # Units that are closed for good have scores below 0, beside which small ones would vanish by rounding.
            ranked = score.double().cpu().clamp(min=0).sort(descending=True).values.cumsum(0)
            ranked = np.concatenate([[0.0], ranked.numpy()])
            losses.append(ranked[-1] - ranked[counts])
        prices = [self.table.seconds(position, counts) for position, counts in enumerate(sizes)]
        chosen = knapsack(losses, prices, budget)
        return [keep_the_best(score, counts[pick]) for score, counts, pick in zip(scores, sizes, chosen, strict=True)]

    def require_reachable(self) -> None:
        """Raises CompressionError where the fastest that may stay takes more time than is left."""
        fastest = self.table.rest
        for position, counts in enumerate(self._sizes()):
            fastest += self.table.seconds(position, counts).min()
        if fastest > self.table.whole * (1 - self.share):
            raise CompressionError(
                f"latency: {self.share:g} cannot be removed, since every layer keeps a head and "
                f"{self.multiples['neurons']} neurons; reachable: up to {rounded_down(1 - fastest / self.table.whole)}"
            )

    def findings(self, kept: Sequence[torch.Tensor]) -> dict[str, Any]:
        """Returns the share of the time that the table says was removed."""
        seconds = self.table.rest
        for position, index in enumerate(kept):
            seconds += float(self.table.seconds(position, [len(index)])[0])
        return {"latency_removed_by_table": round(1 - seconds / self.table.whole, 4)}

    def _sizes(self) -> list[list[int]]:
        multiples = [self.multiples[name] for name, group in self.groups.items() for _ in group]
        return [_sizes(each.count, multiple) for each, multiple in zip(self.units, multiples, strict=True)]


def _sizes(count: int, multiple: int) -> list[int]:
    """Returns how many of `count` units may be kept."""
    return [*range(multiple, count, multiple), count]


def latency_target(
    model: PreTrainedModel, share: float, multiple_of: int, inputs: Batch, cache: Path | None = None
) -> Latency:
    """Makes the target of a share of the time that `model(**inputs)` takes on this machine.

    Args:
        model: The model, on the device that matters.
        share: The share of the time to remove.
        multiple_of: Each feed-forward block keeps a multiple of this many neurons.
        inputs: What to measure with.
        cache: A folder that keeps tables: the next model of the same shapes is not measured again there.

    Raises:
        CompressionError: The model is quantized, or a block takes no part in the forward pass.
        UnsupportedModelError: The model's family is not known.
    """
    groups = {"heads": head_units(model), "neurons": neuron_units(model)}
    multiples = {"heads": 1, "neurons": multiple_of}
    table = _table(model, [*groups["heads"], *groups["neurons"]], multiples, inputs, cache)
    return Latency(groups=groups, multiples=multiples, table=table, share=share)


def workload(model: PreTrainedModel, batch: int, tokens: int, calibration: Sequence[Batch]) -> Batch:
    """Returns what time is measured with: random tokens without padding, or as many of the examples that there are.

    Args:
        model: The model.
        batch: Examples.
        tokens: Length of each, where the model reads text.
        calibration: Where the inputs of other models are taken from, and of those that read several texts at once.

    Raises:
        CompressionError: The model does not read text, and there is no calibration data.
    """
    name = model.main_input_name
    if name == "input_ids" and not (calibration and calibration[0][name].dim() > 2):
        generator = torch.Generator().manual_seed(0)
        text = model.config.get_text_config()
        ids = torch.randint(text.vocab_size, (batch, tokens), generator=generator)
        end = getattr(text, "eos_token_id", None)
        if isinstance(end, int) and tokens > 1:  # some classifiers read the last token of this kind
            ids = torch.where(ids == end, (end + 1) % text.vocab_size, ids)
            ids[:, -1] = end
        inputs: dict[str, torch.Tensor] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = ids
    elif calibration:
        rows = [index % len(calibration[0][name]) for index in range(batch)]
        first = calibration[0]
        # A decoder that is given no tokens takes those that come before the labels.
        decodes = model.config.is_encoder_decoder and not {"decoder_input_ids", "decoder_inputs_embeds"} & set(first)
        inputs = {key: value[rows] for key, value in first.items() if decodes or key != "labels"}
    else:
        raise CompressionError(
            f"the time of a model that reads {name} is measured with calibration data; there is none",
            hint="Pass calibration=[batch, ...].",
        )
    return {key: value.to(model.device) for key, value in inputs.items()}


# Measuring


def _kind(units: Units) -> tuple[Any, ...]:
    """Blocks of one kind take the same time."""
    return units.are_heads, units.count, units.width, *units.costs("flops")


def _table(
    model: PreTrainedModel, units: list[Units], multiples: Mapping[str, int], inputs: Batch, cache: Path | None
) -> LatencyTable:
    kinds = [_kind(each) for each in units]
    steps = {kind: multiples["heads" if kind[0] else "neurons"] for kind in kinds}
    file = cache / f"{_key(model, kinds, steps, inputs)}.json" if cache else None
    return _agreed(lambda: _kept(file, lambda: _measure(model, units, kinds, steps, inputs)))


def _kept(file: Path | None, measure: Callable[[], LatencyTable]) -> LatencyTable:
    """Takes a table from its file, or measures it and writes it there, whole or not at all."""
    if file and file.is_file():
        stored = json.loads(file.read_text())
        return LatencyTable(
            whole=stored["whole"], blocks=[{int(n): s for n, s in each.items()} for each in stored["blocks"]]
        )
    table = measure()
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"whole": table.whole, "blocks": list(table.blocks)}))
        os.replace(partial, file)
    return table


def _agreed(table: Callable[[], LatencyTable]) -> LatencyTable:
    """Asks one process of a distributed run, and takes its word in all: they must prune alike.

    The others must not look at files of their own: where they had one, they would not wait for the first one's word.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return table()
    told: list[Any] = [table() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(told)
    return told[0]


def _key(model: PreTrainedModel, kinds: Any, steps: Any, inputs: Batch) -> str:
    shapes = {name: list(value.shape) for name, value in inputs.items()}
    machine = [cpu_name(), platform.machine(), os.cpu_count(), torch.get_num_threads(), torch.__version__]
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else str(model.device)
    loaded = [type(model).__name__, str(model.dtype), model.config._attn_implementation, device, tensor_bytes(model)]
    text = json.dumps([machine, loaded, list(map(list, kinds)), list(steps.values()), shapes])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _measure(
    model: PreTrainedModel, units: list[Units], kinds: list[Any], steps: Mapping[Any, int], inputs: Batch
) -> LatencyTable:
    """Times the model beside copies whose blocks have been shrunk, each to another size, by turns.

    Each block is set against the same block of the whole model in the same turn; so neither the place in the model
    nor what else the machine does counts.
    """
    waiting = {kind: _points(kind[1], steps[kind]) for kind in kinds}
    variants: list[dict[int, int]] = []
    while any(waiting.values()):
        sizes: dict[int, int] = {}
        for position, kind in enumerate(kinds):
            if waiting[kind]:
                sizes[position] = waiting[kind].pop()
        variants.append(sizes)
    models = [model, *(_shrunk(model, sizes) for sizes in variants)]
    with ExitStack() as stack:
        watches = [stack.enter_context(_Stopwatch(each, inputs)) for each in models]
        try:
            watches[0].run()
        except CompressionError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())
            raise CompressionError(
                f"latency: the model cannot be run on {shapes}: {error}",
                hint="Set latency_tokens to a length that the model reads, and latency_batch.",
            ) from error
        for _ in range(2):
            for watch in watches:
                watch.run()
        times = np.array([[watch.run() for watch in watches] for _ in range(_REPEATS)])
    full = np.median(times[:, 0], axis=0)
    by_kind: dict[Any, dict[int, float]] = {}
    for kind in dict.fromkeys(kinds):
        alike = [position for position, each in enumerate(kinds) if each == kind]
        by_kind[kind] = {kind[1]: float(np.mean(full[alike]))}
    for number, sizes in enumerate(variants, 1):
        for position, size in sizes.items():
            ratio = np.median(times[:, number, position] / times[:, 0, position])
            by_kind[kinds[position]][size] = by_kind[kinds[position]][kinds[position][1]] * float(ratio)
    return LatencyTable(whole=float(full[-1]), blocks=[by_kind[kind] for kind in kinds])


def _points(count: int, multiple: int) -> list[int]:
    """Returns sizes below `count` to measure."""
    sizes = _sizes(count, multiple)[:-1]
    picks = np.linspace(0, len(sizes) - 1, min(_POINTS, len(sizes)))
    return [sizes[round(pick)] for pick in picks]


def _shrunk(model: PreTrainedModel, sizes: Mapping[int, int]) -> PreTrainedModel:
    """Returns a copy with smaller blocks, which shares the tensors of all others with the model."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    small = copy.deepcopy(model, memo)
    units = [*head_units(small), *neuron_units(small)]
    for position, size in sizes.items():
        units[position].shrink(torch.arange(size))
    return small


class _Stopwatch:
    """Times each block inside a forward pass, from its first projection's call to its last one's return."""

    def __init__(self, model: PreTrainedModel, inputs: Batch) -> None:
        self._model, self._inputs = model, inputs
        self._units = [*head_units(model), *neuron_units(model)]
        self._now: Callable[[], float] = time.perf_counter
        if model.device.type == "cuda":
            self._now = self._synchronized

    def __enter__(self) -> _Stopwatch:
        self._training = self._model.training
        self._model.eval()
        self._handles: list[Any] = []
        for position, each in enumerate(self._units):
            block: Any = each.block
            inputs = [role[1] for role in block.projections] if each.are_heads else block.inputs
            for path in dict.fromkeys(projection.path for projection in inputs):
                self._handles.append(block.at(path).register_forward_pre_hook(self._begin(position)))
            self._handles.append(block.at(block.spec.output).register_forward_hook(self._end(position)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._model.train(self._training)

    def run(self) -> list[float]:
        """Runs the model once; returns the seconds of each block, and last of the whole."""
        self._began: dict[int, float] = {}
        self._took = [0.0] * len(self._units)
        with torch.inference_mode():
            start = self._now()
            self._model(**self._inputs)
            whole = self._now() - start
        for took, each in zip(self._took, self._units, strict=True):
            if not took:
                raise CompressionError(f"{each.block.name} takes no part in the forward pass: it has no latency")
        return [*self._took, whole]

    def _begin(self, position: int) -> Any:
        def hook(*_: Any) -> None:
            self._began.setdefault(position, self._now())

        return hook

    def _end(self, position: int) -> Any:
        def hook(*_: Any) -> None:
            self._took[position] += self._now() - self._began.pop(position)  # shared layers run several times

        return hook

    def _synchronized(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter()
