"""What lies between inputs and outputs, compared in batches with padding and between models that see other tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hfcompress import DistillationConfig
from hfcompress.errors import CompressionError
from hfcompress.methods.distillation import DistillationPart
from tests.methods.test_distillation import CPU
from tests.tiny_models import inputs_for, make
from tests.workshop import tiny_classifier


def test_real_tokens_alone_are_projected_and_compared() -> None:
    student, teacher = tiny_classifier(0), tiny_classifier(1, hidden_size=32)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    inputs = {"input_ids": torch.full_like(mask, 5), "attention_mask": mask}
    part = DistillationPart(DistillationConfig(soft=0.0, hard=0.0, hidden=1.0, layers=((1, 2),)), teacher)
    part.begin(student, 1, CPU)
    assert part._between is not None
    projection, rows = part._between.projections["1"], []
    projection.register_forward_hook(lambda _module, given, _made: rows.append(len(given[0])))
    outputs = student(**inputs, **part.forward_arguments())
    found = part.losses(inputs, outputs)["hidden"]
    found.backward()
    assert rows == [int(mask.sum())] and student.get_input_embeddings().weight.grad.any()
    with torch.no_grad():
        theirs = teacher(**inputs, output_hidden_states=True).hidden_states[2]
        distances = (projection(outputs.hidden_states[1]) - theirs).square().mean(-1)
        by_example = [distances[row, : int(size)].mean() for row, size in enumerate(mask.sum(1))]
    torch.testing.assert_close(found, torch.stack(by_example).mean())


@pytest.mark.parametrize("term", ["hidden", "attention", "relations", "embeddings"])
def test_images_in_patches_of_another_size_have_no_common_tokens(term: str) -> None:
    inputs = inputs_for("vit", "ImageClassification")
    values: dict[str, Any] = {term: 1.0}
    student = make("vit", "ImageClassification")
    part = DistillationPart(
        DistillationConfig(**values),
        make("vit", "ImageClassification", seed=1, patch_size=student.config.patch_size // 2),
    )
    part.begin(student, 1, CPU)
    outputs = student(**inputs, **part.forward_arguments())
    with pytest.raises(CompressionError, match=r"as \d+ tokens, its teacher as \d+"):
        part.losses(inputs, outputs)
    part.end(student)
    alone = DistillationPart(DistillationConfig(), part.teachers)
    alone.begin(student, 1, CPU)
    assert alone.losses(inputs, outputs)["soft"] > 0
