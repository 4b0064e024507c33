"""What model and parts read of the training rows."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from hfcompress.methods.checkpointing import CheckpointingTrainer
from hfcompress.methods.training import EXAMPLE_ID, Numbering, Rows


class ReadingTrainer(CheckpointingTrainer):
    """A Trainer that keeps the columns and row numbers that its parts need, and shows its model none of them."""

    _for_parts: frozenset[str] = frozenset()

    def _rows(self) -> Rows | None:
        is_stream = isinstance(self.train_dataset, torch.utils.data.IterableDataset)  # which may know its length
        if is_stream or not all(hasattr(self.train_dataset, name) for name in ("__getitem__", "__len__")):
            return None
        return Rows(
            dataset=self.train_dataset,
            collate=self._get_collator_with_removed_columns(self.data_collator, description="training"),
            batch_size=self.args.train_batch_size,
            device=self.args.device,
            autocast=lambda: self.accelerator.autocast(),
            folder=Path(str(self.args.output_dir)),
        )

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is not None:
            return
        super()._set_signature_columns_if_needed()
        known = cast(list[str], self._signature_columns)
        read = {name for part in self.parts for name in part.columns} - set(known)
        own = inspect.signature(self.accelerator.unwrap_model(self.model).forward).parameters.values()
        takes_all = all(each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in own)
        self._for_parts = frozenset({EXAMPLE_ID} | (set() if takes_all else read))
        self._signature_columns = [*known, *sorted(read)]

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        return Numbering(super()._get_collator_with_removed_columns(data_collator, description))

    def _for_model(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Leaves out what the parts alone read."""
        self._set_signature_columns_if_needed()
        return {name: value for name, value in inputs.items() if name not in self._for_parts}

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        prepared = super()._prepare_inputs(inputs)
        training = cast(nn.Module, self.model).training
        return prepared if training else self._for_model(prepared)  # parts have no say in evaluation
