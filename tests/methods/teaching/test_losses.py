from __future__ import annotations

import math

import pytest
import torch

from hfcompress.methods.teaching import losses

ROWS, CLASSES = 6, 5


def logits(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (ROWS, CLASSES)), generator=torch.Generator().manual_seed(seed)) * 2


def distributions(temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    return (logits(0) / temperature).softmax(-1), (logits(1) / temperature).softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergences_are_those_of_their_definitions(temperature: float) -> None:
    ours, theirs = distributions(temperature)
    middle = (ours + theirs) / 2

    def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
        return (p * (p / q).log()).sum(-1) * temperature**2

    pairs = [
        (losses.forward_kl, kl(theirs, ours)),
        (losses.reverse_kl, kl(ours, theirs)),
        (losses.jensen_shannon, (kl(ours, middle) + kl(theirs, middle)) / 2),
    ]
    for loss, wanted in pairs:
        torch.testing.assert_close(loss(logits(0), logits(1), temperature), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [*losses.OUTPUT_LOSSES.values(), losses.multi_label])
def test_a_loss_is_zero_where_both_agree_and_falls_along_its_gradient(loss) -> None:
    teacher = logits(1)
    torch.testing.assert_close(loss(teacher, teacher, 2.0), torch.zeros(ROWS), atol=1e-6, rtol=0)
    student = logits(0).requires_grad_()
    before = loss(student, teacher, 2.0).mean()
    before.backward()
    assert student.grad is not None
    with torch.no_grad():
        after = loss(student - 0.1 * student.grad, teacher, 2.0).mean()
    assert 0 < after < before


def test_jensen_shannon_is_symmetric_and_bounded() -> None:
    one, other = torch.tensor([[50.0, -50.0]]), torch.tensor([[-50.0, 50.0]])
    assert losses.jensen_shannon(one, other).item() == pytest.approx(math.log(2), abs=1e-6)
    torch.testing.assert_close(losses.jensen_shannon(logits(0), logits(1)), losses.jensen_shannon(logits(1), logits(0)))


def test_several_labels_are_bernoulli_divergences() -> None:
    ours, theirs = logits(0).sigmoid(), logits(1).sigmoid()
    wanted = theirs * (theirs / ours).log() + (1 - theirs) * ((1 - theirs) / (1 - ours)).log()
    torch.testing.assert_close(losses.multi_label(logits(0), logits(1)), wanted.mean(-1), rtol=1e-4, atol=1e-5)


def test_half_precision_is_computed_in_float() -> None:
    student, teacher = logits(0).bfloat16(), logits(1).bfloat16()
    for loss in (*losses.OUTPUT_LOSSES.values(), losses.multi_label):
        assert torch.equal(loss(student, teacher, 2.0), loss(student.float(), teacher.float(), 2.0))


def test_the_largest_probabilities_with_the_rest_as_one_class() -> None:
    teacher, student, temperature = logits(1) / 2.0, logits(0), 2.0
    full = losses.forward_kl(student, logits(1), temperature)
    last = torch.full((ROWS,), -1.0)
    for k in range(1, CLASSES + 1):
        values, indices = teacher.log_softmax(-1).topk(k)
        some = losses.top_k_forward_kl(student, values, indices, temperature)
        assert (some <= full + 1e-5).all() and (some >= last - 1e-5).all(), "coarser classes cannot differ more"
        last = some
    torch.testing.assert_close(last, full, rtol=1e-4, atol=1e-5)


def test_padding_changes_no_loss_of_layers() -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
    student, teacher = logits(0, 2, 5, 8), logits(1, 2, 5, 12)
    short = losses.relation_divergence(student[:1, :3], teacher[:1, :3], 4, mask[:1, :3])
    torch.testing.assert_close(losses.relation_divergence(student, teacher, 4, mask)[:1], short)
    maps, others = logits(2, 2, 3, 5, 5).softmax(-1), logits(3, 2, 3, 5, 5).softmax(-1)
    spoilt = maps.clone()
    spoilt[0, :, 3:] = 1e-3
    one, other = (losses.attention_divergence(each, others, mask) for each in (maps, spoilt))
    assert torch.equal(one, other)
    states, goal = logits(4, 2, 5, 8), logits(5, 2, 5, 8)
    for loss in losses.HIDDEN_LOSSES.values():
        mean = losses.mean_over_tokens(loss(states, goal), mask)
        torch.testing.assert_close(mean[0], loss(states[0, :3], goal[0, :3]).mean())


def test_relations_compare_any_numbers_of_heads_and_widths() -> None:
    mask = torch.ones(2, 5, dtype=torch.bool)
    states = logits(0, 2, 5, 12)
    assert losses.relation_divergence(states, states, 6, mask).abs().max() < 1e-6
    split = states.view(2, 5, 2, 6).transpose(1, 2)
    theirs = logits(1, 2, 5, 8).view(2, 5, 2, 4).transpose(1, 2)
    p = (theirs @ theirs.mT / 2).softmax(-1)
    q = (split @ split.mT / math.sqrt(6)).softmax(-1)
    wanted = (p * (p / q).log()).sum(-1).mean((1, 2))
    got = losses.relation_divergence(states, logits(1, 2, 5, 8), 2, mask)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_attention_divergence_by_its_definition() -> None:
    p, q = logits(0, 2, 3, 4, 4).softmax(-1), logits(1, 2, 3, 4, 4).softmax(-1)
    got = losses.attention_divergence(q, p, torch.ones(2, 4, dtype=torch.bool))
    torch.testing.assert_close(got, (p * (p / q).log()).sum(-1).mean((1, 2)), rtol=1e-4, atol=1e-5)


def test_weighted_means_of_parts_add_up() -> None:
    values, weights = logits(0, 6), torch.tensor([1.0, 3, 0, 2, 2, 5])
    parts = [
        losses.weighted_mean(values[part], weights[part]) * weights[part].sum() for part in (slice(2), slice(2, 6))
    ]
    torch.testing.assert_close(sum(parts) / weights.sum(), losses.weighted_mean(values, weights))
    assert losses.weighted_mean(torch.zeros(0)) == 0 and losses.weighted_mean(values, torch.zeros(6)) == 0
