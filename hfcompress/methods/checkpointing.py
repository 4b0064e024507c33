"""A Trainer whose checkpoints are whole or not there, and are resumed only by what wrote them.

Kept apart from `resuming`, whose functions need no Trainer, which takes seconds to import.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from hfcompress.configuration import Config
from hfcompress.errors import CheckpointError, TrainingError
from hfcompress.methods.resuming import require_same_shape, require_whole, write_manifest
from hfcompress.methods.training import Part
from hfcompress.modeling.adapters import load_adapters
from hfcompress.modeling.checkpoint import replace_directory

PARTS_FILE = "hfcompress_parts.safetensors"


class CheckpointingTrainer(Trainer):
    """Writes training checkpoints aside and moves them to their place with one rename; what parts keep goes with them.

    Attributes:
        parts: What is trained beside the model, or watches it.
    """

    parts: tuple[Part, ...] = ()
    _resume_from: Path | None = None
    _staging = False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        checkpoint = Path(resume_from_checkpoint)
        require_whole(checkpoint)
        if self.parts and not (checkpoint / PARTS_FILE).exists():
            raise CheckpointError(
                f"{checkpoint} was written by another kind of training: it has no {PARTS_FILE}",
                hint="Start the run again in an empty folder.",
            )
        self._require_same_configs(checkpoint)
        require_same_shape(checkpoint, self.accelerator.unwrap_model(self.model))
        self._resume_from = checkpoint
        if not load_adapters(self.accelerator.unwrap_model(self.model), checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _configs(self) -> str:
        """Returns what the parts were told, as JSON: by the place of each, field by field."""
        configs = [getattr(part, "config", None) for part in self.parts]
        return json.dumps([each.model_dump(mode="json") if isinstance(each, Config) else {} for each in configs])

    def _require_same_configs(self, checkpoint: Path) -> None:
        """Refuses to go on otherwise than a training began: its optimizer and its parts would not fit, or not show it.

        Raises:
            CheckpointError: A field of a config is another one.
        """
        if not self.parts:
            return
        with safe_open(checkpoint / PARTS_FILE, "pt") as file:
            was = json.loads((file.metadata() or {}).get("configs", self._configs()))
        now = json.loads(self._configs())
        changed = [
            f"{name} was {before.get(name)!r} and is {after.get(name)!r}"
            for before, after in itertools.zip_longest(was, now, fillvalue={})
            for name in sorted({*before, *after})
            if before.get(name) != after.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"{checkpoint} is of a training with other settings: {'; '.join(changed)}",
                hint="Go on with the settings that it began with, or start again in an empty folder.",
            )

    def _load_best_model(self) -> None:
        checkpoint = Path(str(self.state.best_model_checkpoint))
        require_whole(checkpoint)
        require_same_shape(checkpoint, self.accelerator.unwrap_model(self.model))
        if not load_adapters(self.accelerator.unwrap_model(self.model), checkpoint):
            super()._load_best_model()

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, ".partial") if self._staging else folder

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint aside and moves it to its place with one rename.

        Raises:
            CheckpointError: It could not be written; those before it are untouched.
        """
        self._require_finite_weights()
        folder = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staged, final = folder / ".partial" / name, folder / name
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            # torch's own archive writer says so of any write that failed, and gives no reason.
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            shutil.rmtree(staged, ignore_errors=True)
            said = str(error).partition("\n")[0]
            raise CheckpointError(
                f"{final} could not be written: {said}",
                hint="The training checkpoints before it are kept. Free some space, and resume.",
            ) from error
        finally:
            self._staging = False
        best = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best == final or best.is_dir():  # a training may be measured more often than it is saved
            self.state.best_model_checkpoint = str(best)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.state.save_to_json(str(staged / "trainer_state.json"))
            if self.parts:
                state = {f"{i}.{k}": v for i, part in enumerate(self.parts) for k, v in part.state().items()}
                save_file(state, staged / PARTS_FILE, metadata={"configs": self._configs()})
            write_manifest(staged)
            replace_directory(staged, final)
            shutil.rmtree(staged.parent)  # with what a run that was cut off while it wrote has left there
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
        self.accelerator.wait_for_everyone()

    def _require_finite_weights(self) -> None:
        """A checkpoint of weights that are lost would take the place of the last good one."""
        for name, parameter in self.accelerator.unwrap_model(self.model).named_parameters():
            if parameter.is_floating_point() and not torch.isfinite(parameter).all():
                raise TrainingError(
                    f"step {self.state.global_step}: {name} is no longer finite",
                    hint="The last whole training checkpoint is kept. Lower the learning rate, or train in fp32.",
                )
