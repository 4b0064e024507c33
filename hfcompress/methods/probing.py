"""How much worse a model gives its answers than it did: measured on a few batches, not guessed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import evaluating, examples_in
from hfcompress.methods.registry import Batch
from hfcompress.methods.replay import Replay
from hfcompress.methods.statistics import real_rows

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
        replay: Runs the model from the middle, over the very same batches; None to run all of it.

    Raises:
        CompressionError: No batches, no labels for `loss`, or a score that is not finite.
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[Batch], by: By, replay: Replay | None = None) -> None:
        self.model, self.by, self._replay = model, by, replay
        self.batches = [{name: value.to(model.device) for name, value in batch.items()} for batch in batches]
        self._before = [self._outputs(number) for number in range(len(self.batches))] if by == "outputs" else []
        self._start = self._score()

    def rise(self) -> float:
        """Returns by how much the model is worse now."""
        return self._score() - self._start

    def _score(self) -> float:
        total = rows = 0.0
        for number, batch in enumerate(self.batches):
            size = examples_in(batch)
            total += size * (self._divergence(number) if self.by == "outputs" else self._loss(batch))
            rows += size
        score = total / rows
        if score != score or score in (float("inf"), float("-inf")):
            raise CompressionError("the loss on the calibration batches is not finite")
        return score

    def _loss(self, batch: Batch) -> float:
        with torch.no_grad(), evaluating(self.model):
            return float(self.model(**batch).loss)

    def _outputs(self, number: int) -> torch.Tensor:
        batch = self.batches[number]
        if self._replay is not None:
            self._replay.at(number)
        with torch.no_grad(), evaluating(self.model):
            outputs: Any = self.model(**batch)
        found = getattr(outputs, "logits", None)
        if found is None:  # not the loss, which comes first where there are labels
            found = next(each for each in outputs.to_tuple() if isinstance(each, torch.Tensor) and each.dim() > 1)
        return real_rows(self.model, found, batch) if found.dim() > 2 else found

    def _divergence(self, number: int) -> float:
        before, after = self._before[number], self._outputs(number)
        if getattr(self.model, "base_model", None) is self.model:
            return ((after - before).double().square().sum() / before.double().square().sum()).item()
        return divergence(before, after)
