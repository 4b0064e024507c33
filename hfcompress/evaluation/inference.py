"""Running a model for its outputs alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def inferring(*models: nn.Module) -> Iterator[None]:
    """Puts models in evaluation mode without gradients, and every module back as it was."""
    import torch

    with evaluating(*models), torch.inference_mode():
        yield


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Puts models in evaluation mode, and every module back as it was."""
    # Module by module: a frozen part may be in evaluation mode inside a model that is training.
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
