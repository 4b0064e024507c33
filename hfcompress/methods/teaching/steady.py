"""Keeps chance out of a student's layers while they are compared with a teacher's."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hfcompress.methods.training import refuse_reentrant_checkpointing
from hfcompress.modeling.anatomy import attention_blocks

_OF_MAPS = ("dropout", "attn_dropout", "attention_dropout")
_OF_LAYERS = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")


class Steady:
    """Switches off, until `end`, what makes a student's layers differ from its teacher's by chance.

    No layer is skipped, since those after it would be taken for others; attention maps, where they are compared, are
    whole: dropout leaves holes in them that no teacher has.

    Args:
        model: The student.
        maps: Whether attention maps are compared.
    """

    def __init__(self, model: PreTrainedModel, *, maps: bool) -> None:
        self._was: list[tuple[Any, str, Any]] = []
        for module in model.modules():
            self._run_all_layers(module)
        for block in attention_blocks(model) if maps else ():
            if block.spec is block.stack.attentions[0]:  # maps of what a decoder reads of its encoder are not compared
                self._keep_whole(block.module)

    def _run_all_layers(self, module: nn.Module) -> None:
        for name in _OF_LAYERS:
            if getattr(module, name, 0):
                self._put(module, name, 0.0)
        config = getattr(module, "config", None)
        # Such encoders ask the config. They get one of their own: the model's is saved with its checkpoints.
        if getattr(config, "layerdrop", 0) and not isinstance(module, PreTrainedModel):
            own: Any = copy.copy(config)
            own.layerdrop = 0.0
            self._put(module, "config", own)

    def _keep_whole(self, module: nn.Module) -> None:
        for name in _OF_MAPS:
            dropout = getattr(module, name, None)
            if isinstance(dropout, nn.Dropout):
                self._put(dropout, "p", 0.0)
            elif isinstance(dropout, float):
                self._put(module, name, 0.0)

    def _put(self, owner: Any, name: str, value: Any) -> None:
        self._was.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    def end(self) -> None:
        """Leaves the student as it was."""
        for owner, name, value in reversed(self._was):
            setattr(owner, name, value)
        self._was = []


def refuse_checkpointing_without_gradients(model: PreTrainedModel) -> None:
    """Refuses a student whose layers are computed without gradients at first, and so are compared without any.

    Raises:
        TrainingError: Reentrant checkpointing is on.
    """
    for module in model.modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(module, "gradient_checkpointing", False) and isinstance(function, partial):
            refuse_reentrant_checkpointing(function.keywords)
