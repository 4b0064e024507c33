"""The losses of distillation: pure functions of tensors, computed in float32.

Each returns one value for every position or example; `weighted_mean` reduces them. A batch's loss is the mean over
its positions, so batches weighted by their number of positions add up to the loss of one large batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def weighted_mean(values: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """Reduces values to one.

    Args:
        values: Of any shape.
        weights: Of the same shape; None weighs all alike.

    Returns:
        The weighted mean as a scalar; 0 where there is no weight at all.
    """
    if weights is None:
        return values.mean() if values.numel() else values.sum()
    return (values * weights).sum() / weights.sum().clamp(min=torch.finfo(values.dtype).tiny)


def mean_over_tokens(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Averages over each example's real tokens.

    Args:
        values: `(batch, tokens)`.
        mask: `(batch, tokens)`, True at real tokens.

    Returns:
        `(batch,)`.
    """
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def per_real_token(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Makes means over all tokens means over the real ones, where padding differs by nothing.

    Args:
        values: `(batch, ...)`, each averaged over an example's tokens.
        mask: `(batch, tokens)`, True or 1 at real tokens; None where all are.
    """
    if mask is None:
        return values
    share = mask.shape[1] / mask.sum(1).clamp(min=1)
    return values * share.view(-1, *[1] * (values.dim() - 1))


# Outputs


def forward_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Kullback-Leibler divergence KL(teacher || student) (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student: Logits, `(..., classes)`.
        teacher: Logits of the same shape.
        temperature: Divides both; the loss is multiplied by its square, so that the size of the gradients does
            not depend on it.

    Returns:
        `(...)`, summed over the classes.
    """
    ours, theirs = _log_probabilities(student, temperature), _log_probabilities(teacher, temperature)
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1) * temperature**2


def reverse_kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """KL(student || teacher), which seeks the teacher's modes (Gu et al. 2024, arXiv 2306.08543).

    Args and returns as in `forward_kl`.
    """
    return forward_kl(teacher, student, temperature)


def jensen_shannon(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Jensen-Shannon divergence, symmetric and bounded by ln 2 (Wen et al. 2023, arXiv 2307.15190).

    Args and returns as in `forward_kl`.
    """
    ours, theirs = _log_probabilities(student, temperature), _log_probabilities(teacher, temperature)
    middle = torch.logaddexp(ours, theirs) - math.log(2)
    toward = F.kl_div(middle, theirs, reduction="none", log_target=True)
    away = F.kl_div(middle, ours, reduction="none", log_target=True)
    return (toward + away).sum(-1) * (temperature**2 / 2)


def logit_mse(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Mean squared difference of the logits (Ba and Caruana 2014, arXiv 1312.6184); also for regression.

    Args:
        student: `(..., outputs)`.
        teacher: Of the same shape.
        temperature: Not used.

    Returns:
        `(...)`, averaged over the outputs.
    """
    return F.mse_loss(student.float(), teacher.float(), reduction="none").mean(-1)


def multi_label(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Binary cross-entropy with the teacher's probability of each label, less the teacher's own entropy.

    The sum over labels of Bernoulli divergences is Hinton's loss label by label (Yang et al. 2023,
    arXiv 2308.06453); 0 where both agree.

    Args and returns as in `forward_kl`, averaged over the labels.
    """
    ours, theirs = student.float() / temperature, teacher.float() / temperature
    wanted = theirs.sigmoid()
    cross = F.binary_cross_entropy_with_logits(ours, wanted, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(theirs, wanted, reduction="none")
    return (cross - entropy).mean(-1) * temperature**2


def top_k_forward_kl(
    student: torch.Tensor, log_probabilities: torch.Tensor, indices: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """KL(teacher || student) where only the teacher's largest probabilities are known.

    All other classes count as one, whose probability is what is left of 1 (Anshumann et al. 2025,
    arXiv 2503.16870, on why the remainder must not be dropped). It never exceeds the full divergence and equals it
    where all classes are given.

    Args:
        student: Logits, `(..., classes)`.
        log_probabilities: The teacher's at this temperature, `(..., k)`.
        indices: Their classes, int64, `(..., k)`.
        temperature: As in `forward_kl`.

    Returns:
        `(...)`.
    """
    scaled = student.float() / temperature
    total = scaled.logsumexp(-1)
    theirs = log_probabilities.float()
    ours = scaled.gather(-1, indices) - total.unsqueeze(-1)
    known = (theirs.exp() * (theirs - ours)).sum(-1)
    if indices.shape[-1] == student.shape[-1]:
        return known * temperature**2
    rest = (1 - theirs.exp().sum(-1)).clamp(min=1e-7)
    our_rest = scaled.scatter(-1, indices, -torch.inf).logsumexp(-1) - total
    return (known + rest * (rest.log() - our_rest)) * temperature**2


OUTPUT_LOSSES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "mse": logit_mse,
}


def soft_label_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """The mean of `forward_kl` over all positions, float32."""
    return forward_kl(student, teacher, temperature).mean()


def _log_probabilities(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    return F.log_softmax(logits.float() / temperature, dim=-1)


# What lies between


def hidden_mse(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared difference of hidden states (TinyBERT, Jiao et al. 2020, arXiv 1909.10351).

    Args:
        student: `(..., width)`, already projected to the teacher's width.
        teacher: Of the same shape.

    Returns:
        `(...)`, averaged over the width.
    """
    return F.mse_loss(student.float(), teacher.float(), reduction="none").mean(-1)


def hidden_cosine(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """One minus the cosine of hidden states (DistilBERT, Sanh et al. 2019, arXiv 1910.01108).

    Args and returns as in `hidden_mse`.
    """
    return 1 - F.cosine_similarity(student.float(), teacher.float(), dim=-1)


HIDDEN_LOSSES = {"mse": hidden_mse, "cosine": hidden_cosine}


def attention_divergence(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of attention maps, head by head (MobileBERT, Sun et al. 2020, arXiv 2004.02984).

    Args:
        student: Attention probabilities, `(batch, heads, tokens, tokens)`.
        teacher: Of the same shape.
        mask: `(batch, tokens)`, True at real tokens.

    Returns:
        `(batch,)`, averaged over heads and over the queries that are real tokens.
    """
    theirs, ours = teacher.float(), student.float().clamp(min=1e-9)
    divergence = torch.xlogy(theirs, theirs.clamp(min=1e-9)) - torch.xlogy(theirs, ours)
    return mean_over_tokens(divergence.sum(-1).mean(1), mask)


def relation_divergence(student: torch.Tensor, teacher: torch.Tensor, heads: int, mask: torch.Tensor) -> torch.Tensor:
    """KL(teacher || student) of self-attention relations (MiniLMv2, Wang et al. 2021, arXiv 2012.15828).

    Queries (or keys, or values) of all heads are laid side by side and split anew into relation heads, whose scaled
    products with themselves are compared; so neither widths nor numbers of heads need be the same.

    Args:
        student: `(batch, tokens, width)`; its width is a multiple of `heads`.
        teacher: `(batch, tokens, other width)`, likewise.
        heads: Number of relation heads.
        mask: `(batch, tokens)`, True at real tokens.

    Returns:
        `(batch,)`, averaged over relation heads and over the tokens that are real.
    """
    ours, theirs = _relations(student, heads, mask), _relations(teacher, heads, mask)
    divergence = theirs.exp() * (theirs - ours)
    divergence = divergence.masked_fill(~mask[:, None, None, :], 0.0)
    return mean_over_tokens(divergence.sum(-1).mean(1), mask)


def _relations(states: torch.Tensor, heads: int, mask: torch.Tensor) -> torch.Tensor:
    batch, tokens, width = states.shape
    split = states.float().view(batch, tokens, heads, width // heads).transpose(1, 2)
    scores = split @ split.transpose(-1, -2) / math.sqrt(width // heads)
    return scores.masked_fill(~mask[:, None, None, :], torch.finfo(scores.dtype).min).log_softmax(-1)
