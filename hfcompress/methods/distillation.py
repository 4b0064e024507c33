"""Knowledge distillation inside the Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from transformers import PreTrainedModel

from hfcompress.configuration import Config
from hfcompress.errors import CompressionError
from hfcompress.methods.registry import Context, Method, register
from hfcompress.methods.training import Part


class DistillationConfig(Config):
    """What the student learns from.

    Attributes:
        temperature: Softens both distributions before they are compared.
        soft: Weight of the loss on the teacher's outputs.
        hard: Weight of the loss on the labels.
    """

    temperature: float = Field(2.0, gt=0, le=100)
    soft: float = Field(0.5, ge=0, le=1000)
    hard: float = Field(0.5, ge=0, le=1000)

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if self.soft == 0 and self.hard == 0:
            raise ValueError("soft and hard are both 0: there is nothing to learn from")
        return self


def soft_label_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Kullback-Leibler divergence of the student's distribution from the teacher's (Hinton et al. 2015).

    Args:
        student: Logits, `(..., classes)`.
        teacher: Logits of the same shape.
        temperature: Divides both; the loss is multiplied by its square, so that the size of the gradients does
            not depend on it.

    Returns:
        The mean over all leading positions, float32.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=-1)
    divergence = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1)
    return divergence.mean() * temperature**2


class DistillationPart(Part):
    """Adds the distillation loss to training."""

    def __init__(self, config: DistillationConfig, teacher: PreTrainedModel) -> None:
        self.config = config
        self.label_weight = config.hard
        self.teacher = teacher.eval().requires_grad_(False)
        self._order: torch.Tensor | None = None
        self._regression = False

    def begin(self, model: PreTrainedModel, total_steps: int, device: torch.device) -> None:
        """Matches the teacher's labels to the student's by name.

        Raises:
            CompressionError: Their labels or vocabularies differ.
        """
        self.teacher.to(device)
        student, teacher = model.config, self.teacher.config
        if getattr(student, "vocab_size", None) != getattr(teacher, "vocab_size", None):
            raise CompressionError(
                f"the teacher's vocabulary has {teacher.vocab_size} tokens, the student's {student.vocab_size}",
                hint="Teacher and student must share a tokenizer.",
            )
        self._regression = student.num_labels == 1
        names, theirs = _label_names(student), _label_names(teacher)
        if set(names) != set(theirs):
            raise CompressionError(
                f"the teacher's labels ({', '.join(theirs)}) are not the student's ({', '.join(names)})",
                hint="Fine-tune the teacher on the same task, or name its labels alike in its config's id2label.",
            )
        self._order = torch.tensor([theirs.index(name) for name in names], device=device)

    def losses(self, inputs: Mapping[str, Any], outputs: Any) -> Mapping[str, torch.Tensor]:
        """Runs the teacher on the same inputs and compares."""
        if self.config.soft == 0:
            return {}
        assert self._order is not None
        with torch.no_grad():
            wanted = {name: value for name, value in inputs.items() if name != "labels"}
            teacher = self.teacher(**wanted).logits.index_select(-1, self._order)
        student = outputs["logits"]
        if self._regression:
            loss = F.mse_loss(student.float(), teacher.float())
        else:
            loss = soft_label_loss(student, teacher, self.config.temperature)
        return {"soft": self.config.soft * loss}

    def end(self, model: PreTrainedModel) -> dict[str, Any]:
        """Says how the student was taught."""
        return {"distillation": {"teacher": type(self.teacher).__name__, "temperature": self.config.temperature}}


def _label_names(config: Any) -> list[str]:
    return [str(config.id2label[index]).lower() for index in range(config.num_labels)]


def _part(config: DistillationConfig, context: Context) -> DistillationPart:
    if context.teacher is None:
        raise CompressionError("distillation needs a teacher", hint="Pass teacher=..., a fine-tuned model.")
    return DistillationPart(config, context.teacher)


register(
    Method(
        name="distillation",
        config=DistillationConfig,
        summary="Trains the model to agree with a teacher.",
        part=_part,
    )
)
