"""How much worse a model gets when one of its layers alone is factorised: measured, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.methods.probing import Probe, divergence
from hfcompress.modeling.anatomy import base_model

__all__ = ["Probe", "divergence", "measure"]


def measure(
    model: PreTrainedModel,
    products: Mapping[str, Callable[[], Mapping[int, torch.Tensor]]],
    probe: Probe,
) -> dict[str, dict[int, float]]:
    """Puts low-rank products in the place of one layer's weight after the other, and scores the model.

    Args:
        model: The model; as before when this returns.
        products: For each layer, what makes its products `(out, in)` by rank.
        probe: What scores.

    Returns:
        For each layer the rise of the loss by rank.
    """
    base = base_model(model)
    rises: dict[str, dict[int, float]] = {}
    for path, make in products.items():
        module = base.get_submodule(path)
        rises[path] = {}
        for rank, product in make().items():
            with _instead(module, product):
                rises[path][rank] = probe.rise()
    return rises


@contextmanager
def _instead(module: Any, product: torch.Tensor) -> Iterator[None]:
    weight = module.weight.data
    module.weight.data = (product.T if isinstance(module, Conv1D) else product).to(weight)
    try:
        yield
    finally:
        module.weight.data = weight
