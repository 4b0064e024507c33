"""How much each batch's losses weigh: as in one batch of the whole accumulation window and of all processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from hfcompress.methods.reading import ReadingTrainer
from hfcompress.methods.training import Part, plain_model, shifts_labels, sums_over_rows


class WeighingTrainer(ReadingTrainer):
    """A Trainer that weighs every loss, a mean over its batch, by the batch's share; it also logs each of them."""

    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._window: list[torch.Tensor | None] = []
        self._terms: dict[str, torch.Tensor] = {}
        self._steps_seen = 0
        super().__init__(*args, **kwargs)
        # Trainer counts the labels of a whole accumulation window only for models that take the count.
        # Here it is taken for every model.
        self.model_accepts_loss_kwargs = True
        model = plain_model(self.accelerator.unwrap_model(self.model))
        self._loss_shifts_labels = shifts_labels(model)
        # Losses of sound are sums or means over rows, however many labels those have.
        self._of_rows = ("sum" if sums_over_rows(model) else "mean") if model.loss_type == "ForCTC" else None

    def _share_of_window(self, inputs: Mapping[str, Any], items: torch.Tensor | int | None) -> torch.Tensor | float:
        """Returns what share of the accumulation window's labels this batch holds, times the processes.

        Every loss is a mean over its own batch; weighted so, four batches of four are one batch of sixteen,
        whatever their padding, and the mean that DDP takes over processes is the mean over all labels.
        """
        if self._of_rows == "sum" and self.compute_loss_func is None:
            return float(self._processes)
        labels, rows = inputs.get("labels"), self._rows_judged(inputs)
        if items is not None and rows is not None:
            return rows * self._processes / torch.as_tensor(items).clamp(min=1)
        if items is None or labels is None:
            return 1.0 / self.current_gradient_accumulation_steps
        here = labels[..., 1:] if self._loss_shifts_labels else labels
        return here.ne(-100).sum() * self._processes / torch.as_tensor(items).clamp(min=1)

    def _rows_judged(self, inputs: Mapping[str, Any]) -> int | None:
        """Returns how many rows the loss on the labels is a mean over; None where it is one over the labels."""
        by_row = "labels" if self._of_rows == "mean" and self.compute_loss_func is None else "start_positions"
        return len(inputs[by_row]) if by_row in inputs else None

    def _share_of_part(self, index: int, inputs: Mapping[str, Any], share: Any) -> Any:
        """Returns the same for what a part's losses are means over."""
        total = self._window[index] if index < len(self._window) else None
        own = self.parts[index].items(inputs) if total is not None else None
        return share if own is None or total is None else own * self._processes / total.clamp(min=1)

    @property
    def _processes(self) -> int:
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Counts, over the accumulation window and all processes, what each part's losses are means over."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = [self._rows_judged(batch) for batch in batches]
        if rows and rows[0] is not None:  # they are counted by nobody else
            items = self._over_processes(torch.tensor(sum(each or 0 for each in rows), device=device))
        self._window = [self._count_items(part, batches, device) for part in self.parts]
        return batches, items

    def _count_items(self, part: Part, batches: Sequence[Any], device: torch.device) -> torch.Tensor | None:
        counts = [part.items(batch) for batch in batches]
        if not counts or counts[0] is None:
            return None
        total = torch.stack([torch.as_tensor(count) for count in counts]).sum().to(device)
        return self._over_processes(total)

    def _over_processes(self, count: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.accelerator.gather(count)).sum() if self._processes > 1 else count

    # What is logged

    def _add_up(self, terms: Mapping[str, torch.Tensor]) -> None:
        for name, term in terms.items():
            self._terms[name] = self._terms.get(name, torch.zeros_like(term)) + term.detach()

    def _step_seen(self) -> None:
        self._steps_seen += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each loss term, as it counts in the loss, averaged over the steps since the last log."""
        if "loss" in logs and self._terms and self._steps_seen:
            means = {
                f"loss_{name}": float(cast(torch.Tensor, self.accelerator.reduce(total / self._steps_seen, "mean")))
                for name, total in self._terms.items()
            }
            logs = {**logs, **means}
            self._terms, self._steps_seen = {}, 0
        super().log(logs, start_time)
