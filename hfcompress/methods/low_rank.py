"""Low-rank factorization of attention and feed-forward layers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from transformers import PreTrainedModel

from hfcompress.configuration import Config
from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import input_second_moments
from hfcompress.methods.registry import Context, Method, register
from hfcompress.modeling import surgery
from hfcompress.modeling.anatomy import ROLE_GROUPS, base_model, input_width, modules_by_role, output_width
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.layers.bitsandbytes import kind_of
from hfcompress.modeling.layers.low_rank import LowRankLinear

Target = Literal["attention", "ffn", "query", "key", "value", "attention_output", "ffn_input", "ffn_output"]


class LowRankConfig(Config):
    """How to factorise.

    Attributes:
        targets: Roles of the layers: `attention` and `ffn`, or single projections.
        keep: Share of the targets' parameters kept.
        method: `whitened` minimises the error of the layer's outputs on the calibration data, `svd` that of its
            weights; `auto` is `whitened` where there is calibration data.
        multiple_of: Ranks are rounded down to a multiple of this, which kernels and 4-bit blocks like.
    """

    targets: tuple[Target, ...] = Field(("attention", "ffn"), strict=False, min_length=1)
    keep: float = Field(0.5, gt=0, lt=1)
    method: Literal["auto", "whitened", "svd"] = "auto"
    multiple_of: int = Field(8, ge=1, le=256)


def truncate(
    weight: torch.Tensor, rank: int, second_moment: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the best product of two thin matrices, by singular value decomposition.

    With second moments of the inputs the product minimises `E |(W - up @ down) x|²`, the true error of the
    layer's outputs (Chen et al. 2021, DRONE; Wang et al. 2024, SVD-LLM: the closed form by whitening). The
    moments are whitened by their eigenvectors, which, unlike Cholesky factors, exist for rank-deficient ones.

    Args:
        weight: `(out, in)`, finite.
        rank: At least 1; clipped to `min(out, in)`.
        second_moment: `(in, in)`, symmetric positive semi-definite; None for the identity.

    Returns:
        `up` `(out, rank)` and `down` `(rank, in)`, float32, each scaled by the root of the singular values.

    Raises:
        CompressionError: The weight or the moments are not finite.
    """
    for name, matrix in (("weight", weight), ("second moment", second_moment)):
        if matrix is not None and not torch.isfinite(matrix).all():
            raise CompressionError(f"the {name} holds values that are not finite")
    rank = min(rank, *weight.shape)
    matrix = weight.double()
    if second_moment is None:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        root = values[:rank].sqrt()
        return (left[:, :rank] * root).float(), (right[:rank] * root.unsqueeze(1)).float()
    # W S^(1/2) = U s Vᵀ, so the best product is U_r U_rᵀ W: no inverse of the moments is ever needed.
    energies, directions = torch.linalg.eigh(second_moment.double())
    whitened = matrix @ (directions * energies.clamp_min(0).sqrt())
    left = torch.linalg.svd(whitened, full_matrices=False).U[:, :rank]
    down = left.T @ matrix
    # Balance the factors: equal norms quantize and train better.
    scale = (down.norm(dim=1) / left.norm(dim=0)).sqrt()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (left * scale).float(), (down / scale.unsqueeze(1)).float()


def rank_for(out_features: int, in_features: int, keep: float, multiple_of: int) -> int:
    """Returns the rank at which the factors hold at most `keep` of the matrix's numbers (at least 1)."""
    exact = int(keep * out_features * in_features / (out_features + in_features))
    return max(exact // multiple_of * multiple_of, min(exact, multiple_of), 1)


def low_rank(model: PreTrainedModel, config: LowRankConfig, context: Context) -> dict[str, Any]:
    """Factorises a model's layers in place; one that would not get smaller is left whole.

    Args:
        model: A float model of a supported family.
        config: What to factorise, and how far.
        context: Calibration data for the whitened method.

    Returns:
        The method used, the ranks by layer, and the layers left whole.

    Raises:
        CompressionError: A target is quantized or not finite, or calibration data is missing.
    """
    base = base_model(model)
    roles = [role for target in config.targets for role in ROLE_GROUPS.get(target, (target,))]
    by_role = modules_by_role(model)
    paths = [path for role in dict.fromkeys(roles) for path in by_role[role]]
    method = config.method
    if method == "auto":
        method = "whitened" if context.calibration else "svd"
    plan: dict[str, int] = {}
    whole: list[str] = []
    for path in paths:
        module = base.get_submodule(path)
        if isinstance(module, LowRankLinear):
            whole.append(path)
            continue
        if kind_of(module):
            raise CompressionError(f"{path} is quantized already", hint="Factorize before quantizing.")
        out_features, in_features = output_width(module), input_width(module)
        rank = rank_for(out_features, in_features, config.keep, config.multiple_of)
        smaller = rank * (out_features + in_features) < out_features * in_features
        if smaller:
            plan[path] = rank
        else:
            whole.append(path)
    moments = input_second_moments(model, list(plan), context.calibration) if method == "whitened" else {}
    for path, rank in plan.items():
        weight = base.get_submodule(path).weight.detach()
        if weight.shape[0] == input_width(base.get_submodule(path)) and hasattr(base.get_submodule(path), "nf"):
            weight = weight.T  # Conv1D keeps its weight as (in, out)
        try:
            factors = truncate(weight, rank, moments.get(path))
        except CompressionError as error:
            raise CompressionError(f"{path}: {error.message}") from None
        surgery.factorize(model, path, rank, factors)
    commit(model)
    return {"method": method, "ranks": plan, "left_whole": whole}


register(
    Method(
        name="low_rank",
        config=LowRankConfig,
        summary="Splits linear layers into products of two thin ones.",
        apply=low_rank,
    )
)
