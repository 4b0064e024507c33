"""What one pass of a model takes: operations, memory, and where its time goes."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfcompress.evaluation.inference import inferring
from hfcompress.evaluation.records import STRICT, Count, Figure
from hfcompress.modeling.layers.bitsandbytes import kind_of

if TYPE_CHECKING:
    import torch
    from torch import nn

LINEAR, QUANTIZED, REST = "linear layers", "quantized linear layers", "everything else"
_PASSES = 5


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What one forward pass on the batch of the speed measurement takes.

    Attributes:
        operations: Floating-point operations (a multiplication and an addition are two). Those of a quantized
            layer are counted as if it were float: storing its weights in fewer bits leaves out none.
        memory: Bytes of the weights and of the most that a pass holds besides, as allocated by PyTorch;
            a kernel's own scratch space is not seen.
        load_seconds: The median time of `from_pretrained` with the files in the disk's cache.
        parts: What share of a pass's time goes into float linear layers, quantized ones, and the rest.
    """

    __pydantic_config__ = STRICT

    operations: Count
    memory: Count
    load_seconds: Figure
    parts: dict[str, Figure]


def measure_usage(load: Callable[[], nn.Module], inputs: Mapping[str, torch.Tensor]) -> Usage:
    """Measures a model's use of the machine.

    Args:
        load: Loads it, ready to be called; it is called three times.
        inputs: Arguments of the model.
    """
    import numpy as np

    times = []
    model = None
    for _ in range(3):
        model = None
        start = time.perf_counter()
        model = load()
        times.append(time.perf_counter() - start)
    assert model is not None
    return Usage(
        operations=count_operations(model, inputs),
        memory=peak_memory(model, inputs),
        load_seconds=float(np.median(times)),
        parts=time_parts(model, inputs),
    )


def count_operations(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> int:
    """Counts the floating-point operations of a forward pass: matrix products, attention and convolutions."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return sdpa_flop_count(query, key, value)

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # the counter does not know it
    counter = FlopCounterMode(display=False, custom_mapping={kernel: attention})
    with inferring(model), _as_float(model), _frozen(model), counter:
        model(**inputs)
    return int(counter.get_total_flops())


def peak_memory(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> int:
    """Returns the bytes of the weights and of the most that a forward pass holds besides."""
    from itertools import chain

    held = {each.untyped_storage() for each in chain(model.parameters(), model.buffers())}
    weights = sum({storage.data_ptr(): storage.nbytes() for storage in held}.values())
    with inferring(model), _watching(held) as watch:
        model(**inputs)
    return weights + watch.most


def time_parts(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Returns where the time of a forward pass goes, as shares of it that add up to 1.

    Shares, and not times: those of two models are comparable only where they are timed by turns.
    """
    import numpy as np

    spent: list[dict[str, float]] = []
    began: dict[nn.Module, float] = {}

    def before(module: nn.Module, _: Any) -> None:
        began[module] = time.perf_counter()

    def after(module: nn.Module, _: Any, __: Any) -> None:
        part = QUANTIZED if kind_of(module) else LINEAR
        spent[-1][part] += time.perf_counter() - began[module]

    layers = [module for module in model.modules() if kind_of(module) or is_linear(module)]
    handles = [layer.register_forward_pre_hook(before) for layer in layers]
    handles += [layer.register_forward_hook(after) for layer in layers]
    try:
        with inferring(model):
            for _ in range(_PASSES + 1):
                spent.append({LINEAR: 0.0, QUANTIZED: 0.0, REST: 0.0})
                start = time.perf_counter()
                model(**inputs)
                whole = time.perf_counter() - start
                spent[-1][REST] = whole - spent[-1][LINEAR] - spent[-1][QUANTIZED]
    finally:
        for handle in handles:
            handle.remove()
    parts = {name: float(np.median([each[name] for each in spent[1:]])) for name in spent[0]}  # the first warms up
    whole = sum(parts.values())
    return {name: seconds / whole for name, seconds in parts.items() if name == REST or seconds > 0}


def is_linear(module: nn.Module) -> bool:
    """Tells whether a module is a linear layer of floats, GPT-2's kind included."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    return type(module) in (nn.Linear, Conv1D)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Takes gradients off parameters: where one is a module's input, as under weight norm, a counter asks for them."""
    learnt = [each for each in model.parameters() if each.requires_grad]
    for each in learnt:
        each.requires_grad_(False)
    try:
        yield
    finally:
        for each in learnt:
            each.requires_grad_(True)


@contextmanager
def _as_float(model: nn.Module) -> Iterator[None]:
    """Lets quantized layers multiply by a float matrix of their shape, which is what a counter can see."""
    import torch

    layers: list[Any] = [module for module in model.modules() if kind_of(module)]

    def multiply(layer: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(inputs: torch.Tensor) -> torch.Tensor:
            weight = inputs.new_zeros(()).expand(layer.out_features, layer.in_features)  # no memory
            return torch.nn.functional.linear(inputs, weight)

        return forward

    for layer in layers:
        layer.forward = multiply(layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _watching(known: set[Any]) -> Any:
    """Returns a mode that adds up the storages that come to life, and remembers the most at once (`most`)."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        known: weakref.WeakSet[Any]
        now = most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            outputs = func(*args, **(kwargs or {}))
            for each in tree_leaves(outputs):
                if isinstance(each, torch.Tensor):
                    self.see(each.untyped_storage())
            return outputs

        def see(self, storage: Any) -> None:
            if storage in self.known:
                return
            self.known.add(storage)
            size = storage.nbytes()
            self.now += size
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.gone, size)

        def gone(self, size: int) -> None:
            self.now -= size

    watch = Watch()
    watch.known = weakref.WeakSet(known)
    return watch
