from __future__ import annotations

import pytest
import torch

from hfcompress import DistillationConfig
from hfcompress.errors import CompressionError, ConfigError
from hfcompress.methods.distillation import DistillationPart, soft_label_loss
from tests.workshop import batches, tiny_classifier

CPU = torch.device("cpu")


def test_the_soft_loss_is_the_divergence_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(5, 3, generator=generator), torch.randn(5, 3, generator=generator)
    wanted = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = torch.softmax(torch.tensor(t) / 3, 0), torch.softmax(torch.tensor(s) / 3, 0)
        wanted += sum(float(a) * (float(a.log()) - float(b.log())) for a, b in zip(p, q, strict=True))
    assert soft_label_loss(student, teacher, 3.0).item() == pytest.approx(9 * wanted / 5, rel=1e-5)
    assert soft_label_loss(student, student, 3.0).item() == pytest.approx(0, abs=1e-6)


def test_the_temperature_does_not_change_the_size_of_the_gradient_much() -> None:
    teacher = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)) * 0.1
    norms = []
    for temperature in (1.0, 10.0):
        student = torch.zeros(64, 4, requires_grad=True)
        soft_label_loss(student, teacher, temperature).backward()
        assert student.grad is not None
        norms.append(student.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.1)


def test_labels_are_matched_by_name_and_never_by_position() -> None:
    student, teacher, batch = tiny_classifier(0), tiny_classifier(1), batches(1)[0]
    with torch.no_grad():
        outputs = student(**batch)
    part = DistillationPart(DistillationConfig(), teacher)
    part.begin(student, 1, CPU)
    straight = part.losses(batch, outputs)["soft"]
    swapped = tiny_classifier(1, id2label={0: "positive", 1: "negative"}, label2id={"positive": 0, "negative": 1})
    with torch.no_grad():
        swapped.classifier.weight.copy_(teacher.classifier.weight.flip(0))
        swapped.classifier.bias.copy_(teacher.classifier.bias.flip(0))
    part = DistillationPart(DistillationConfig(), swapped)
    part.begin(student, 1, CPU)
    torch.testing.assert_close(part.losses(batch, outputs)["soft"], straight)


def test_the_teacher_is_frozen_and_in_evaluation_mode() -> None:
    teacher = tiny_classifier(1).train()
    DistillationPart(DistillationConfig(), teacher)
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}, "labels"),
        ({"vocab_size": 40}, "vocabulary"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_training(changes: dict, says: str) -> None:
    part = DistillationPart(DistillationConfig(), tiny_classifier(1, **changes))
    with pytest.raises(CompressionError, match=says):
        part.begin(tiny_classifier(), 1, CPU)


@pytest.mark.parametrize("values", [{"temperature": 0}, {"soft": 0, "hard": 0}, {"soft": -1}, {"alpha": 0.5}])
def test_bad_fields_are_refused(values: dict) -> None:
    with pytest.raises(ConfigError):
        DistillationConfig(**values)
