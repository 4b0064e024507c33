"""How much worse a model gets when one of its layers alone is factorised: measured, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.methods.probing import Probe, divergence
from hfcompress.modeling.anatomy import module_at, output_width

__all__ = ["Probe", "divergence", "measure"]


def measure(
    model: PreTrainedModel,
    products: Mapping[str, Callable[[], Mapping[int, torch.Tensor]]],
    probe: Probe,
    members: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, dict[int, float]]:
    """Puts low-rank products in the place of one layer's weight after the other, and scores the model.

    Args:
        model: The model; as before when this returns.
        products: For each layer, or group of layers by the name of its first, what makes its products by rank:
            `(out, in)`, those of a group's layers one below the other.
        probe: What scores.
        members: The layers of each group; what is not there is a layer alone.

    Returns:
        As `products`, the rise of the loss by rank.
    """
    rises: dict[str, dict[int, float]] = {}
    for name, make in products.items():
        layers: list[Any] = [module_at(model, path) for path in (members or {}).get(name, (name,))]
        widths = [output_width(layer) for layer in layers]
        rises[name] = {}
        for rank, product in make().items():
            with ExitStack() as stack:
                for layer, part in zip(layers, product.split(widths), strict=True):
                    stack.enter_context(_instead(layer, part))
                rises[name][rank] = probe.rise()
    return rises


@contextmanager
def _instead(module: Any, product: torch.Tensor) -> Iterator[None]:
    weight = module.weight.data
    module.weight.data = (product.T if isinstance(module, Conv1D) else product).to(weight)
    try:
        yield
    finally:
        module.weight.data = weight
