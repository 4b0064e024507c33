"""How much worse a model gets when one of its layers alone is factorised: measured, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import evaluating
from hfcompress.methods.registry import Batch
from hfcompress.methods.statistics import real_rows
from hfcompress.modeling.anatomy import base_model

By = Literal["loss", "outputs"]


def divergence(before: torch.Tensor, after: torch.Tensor) -> float:
    """Returns how far outputs `(rows, classes)` are from the original's.

    That is the mean Kullback-Leibler divergence from what the original predicts; for a single output, which is a
    number and no distribution, the mean squared difference.
    """
    before, after = before.double(), after.double()
    if before.shape[-1] == 1:
        return (before - after).square().mean().item()
    old, new = functional.log_softmax(before, -1), functional.log_softmax(after, -1)
    return functional.kl_div(new, old, reduction="batchmean", log_target=True).item()


class Probe:
    """Scores a model on a few batches.

    Args:
        model: The model, still as it was.
        batches: What it is scored on.
        by: `loss` on the labels, or `outputs`: the divergence of the outputs from those that the model gives now
            (of the last hidden state, relative to its size, where the model has no head).

    Raises:
        CompressionError: No batches, no labels for `loss`, or a score that is not finite.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], by: By) -> None:
        self.model, self.by = model, by
        self.batches = [{name: value.to(model.device) for name, value in batch.items()} for batch in batches]
        self._before = [self._outputs(batch) for batch in self.batches] if by == "outputs" else []
        self._start = self._score()

    def rise(self) -> float:
        """Returns by how much the model is worse now."""
        return self._score() - self._start

    def _score(self) -> float:
        total = rows = 0.0
        for number, batch in enumerate(self.batches):
            size = len(next(iter(batch.values())))
            total += size * (self._divergence(number, batch) if self.by == "outputs" else self._loss(batch))
            rows += size
        score = total / rows
        if score != score or score in (float("inf"), float("-inf")):
            raise CompressionError("the loss on the calibration batches is not finite")
        return score

    def _loss(self, batch: Batch) -> float:
        with torch.no_grad(), evaluating(self.model):
            return float(self.model(**batch).loss)

    def _outputs(self, batch: Batch) -> torch.Tensor:
        with torch.no_grad(), evaluating(self.model):
            outputs: Any = self.model(**batch)
        found = getattr(outputs, "logits", None)
        found = outputs[0] if found is None else found
        return real_rows(found, batch) if found.dim() > 2 else found

    def _divergence(self, number: int, batch: Batch) -> float:
        before, after = self._before[number], self._outputs(batch)
        if getattr(self.model, "base_model", None) is self.model:
            return ((after - before).double().square().sum() / before.double().square().sum()).item()
        return divergence(before, after)


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
