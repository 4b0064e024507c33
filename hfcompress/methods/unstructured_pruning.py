"""Sets single weights to zero, freely or N of every M.

Zeros are stored and multiplied like any other number: dense kernels get no faster by them and files no smaller. What
is gained is sparsity that a sparse kernel, or a compressing archive, can use.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfcompress.configuration import Config
from hfcompress.errors import CompressionError
from hfcompress.methods.calibration import run_batches
from hfcompress.methods.registry import Batch, Context, Method, register
from hfcompress.modeling.anatomy import base_model, input_width, modules_of
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.layers.bitsandbytes import kind_of
from hfcompress.modeling.layers.low_rank import LowRankLinear

Target = Literal["attention", "ffn", "query", "key", "value", "attention_output", "ffn_input", "ffn_output", "linear"]
SPEED = "none: dense kernels multiply zeros too, so the model is neither faster nor smaller on disk"
_PATTERN = re.compile(r"([1-9]\d?):([1-9]\d?)")


class UnstructuredPruningConfig(Config):
    """Which weights become zero.

    Attributes:
        sparsity: Share of each layer's weights set to zero.
        pattern: `2:4` keeps 2 of every 4 neighbouring weights of an output, instead of `sparsity`.
        importance: `magnitude` of the weight, or `wanda`: magnitude times the size of its input on the calibration
            data, weights of one output compared (Sun et al. 2023); `auto` is `wanda` where there is such data.
        targets: Roles of the layers: `attention` and `ffn`, or single projections. `linear` is every linear layer
            of the base model, in any family.
    """

    sparsity: float = Field(0.5, gt=0, lt=1)
    pattern: str | None = None
    importance: Literal["auto", "wanda", "magnitude"] = "auto"
    targets: tuple[Target, ...] = Field(("attention", "ffn"), strict=False, min_length=1)

    @model_validator(mode="after")
    def _has_one_target(self) -> Self:
        if self.pattern is None:
            return self
        match = _PATTERN.fullmatch(self.pattern)
        if match is None or int(match[1]) >= int(match[2]):
            raise ValueError(f"pattern should be N:M with N below M, such as 2:4, not {self.pattern!r}")
        if "sparsity" in self.model_fields_set and abs(self.sparsity - (1 - int(match[1]) / int(match[2]))) > 1e-9:
            raise ValueError(f"pattern {self.pattern} says the sparsity: leave sparsity out")
        return self


def keep_share(scores: torch.Tensor, sparsity: float, *, by_output: bool) -> torch.Tensor:
    """Marks the weights with the highest scores.

    Args:
        scores: `(out, in)`.
        sparsity: Share not marked, rounded to whole weights.
        by_output: Whether each row gives up the same share; else the whole matrix is ranked together.

    Returns:
        Bool `(out, in)`.
    """
    ranked = scores if by_output else scores.reshape(1, -1)
    removed = round(ranked.shape[1] * sparsity)
    kept = torch.ones_like(ranked, dtype=torch.bool)
    kept.scatter_(1, ranked.argsort(dim=1, stable=True)[:, :removed], False)
    return kept.view_as(scores)


def keep_pattern(scores: torch.Tensor, n: int, m: int) -> torch.Tensor:
    """Marks the `n` highest of every `m` neighbouring scores of a row: `(out, in)` to bool `(out, in)`.

    Raises:
        CompressionError: `in` is not a multiple of `m`.
    """
    if scores.shape[1] % m:
        raise CompressionError(f"{scores.shape[1]} inputs are not a multiple of {m}")
    groups = scores.unflatten(1, (-1, m))
    kept = torch.zeros_like(groups, dtype=torch.bool)
    kept.scatter_(2, groups.argsort(dim=2, descending=True, stable=True)[..., :n], True)
    return kept.flatten(1)


def _input_sizes(model: PreTrainedModel, modules: dict[str, Any], batches: Sequence[Batch]) -> dict[str, torch.Tensor]:
    totals = {path: torch.zeros(input_width(module), device=module.weight.device) for path, module in modules.items()}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            totals[path] += arguments[0].detach().flatten(0, -2).float().square().sum(0)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for path, module in modules.items():
            stack.callback(module.register_forward_pre_hook(watch(path)).remove)
        for _ in run_batches(model, batches, description="calibration"):
            pass
    for path, total in totals.items():
        if not torch.isfinite(total).all():
            raise CompressionError(f"{path}: the calibration activations are not finite")
    return {path: total.sqrt() for path, total in totals.items()}


def unstructured_pruning(model: PreTrainedModel, config: UnstructuredPruningConfig, context: Context) -> dict[str, Any]:
    """Sets weights to zero, in place.

    Args:
        model: A float model; both factors of low-rank layers are pruned.
        config: Which weights.
        context: Calibration data for `importance: wanda`.

    Returns:
        The importance used, the share of zeros of each layer and of all, and what that does for speed: nothing.

    Raises:
        CompressionError: A target is quantized, not finite, or does not fit the pattern, or calibration data is
            missing. Nothing was changed then.
    """
    base = base_model(model)
    modules: dict[str, Any] = {}
    for path in modules_of(model, config.targets):
        module = base.get_submodule(path)
        factors = ("down", "up") if isinstance(module, LowRankLinear) else ()
        modules |= {f"{path}.{factor}": getattr(module, factor) for factor in factors} or {path: module}
    importance = config.importance
    if importance == "auto":
        importance = "wanda" if context.calibration else "magnitude"
    for path, module in modules.items():
        if kind_of(module):
            raise CompressionError(f"{path} is quantized already", hint="Prune before quantizing.")
        if not torch.isfinite(module.weight).all():
            raise CompressionError(f"{path}: the weight holds values that are not finite")
    sizes = _input_sizes(model, modules, context.calibration) if importance == "wanda" else {}
    masks = {path: _mask(path, module, config, sizes.get(path)) for path, module in modules.items()}
    zeros: dict[str, float] = {}
    with torch.no_grad():
        for path, module in modules.items():
            mask = masks[path].T if isinstance(module, Conv1D) else masks[path]
            module.weight.mul_(mask.to(module.weight.dtype))
            zeros[path] = round((module.weight == 0).float().mean().item(), 4)
    commit(model)
    weights = {path: module.weight.numel() for path, module in modules.items()}
    share = sum(zeros[path] * count for path, count in weights.items()) / sum(weights.values())
    return {"importance": importance, "sparsity": round(share, 4), "layers": zeros, "speed": SPEED}


def _mask(path: str, module: Any, config: UnstructuredPruningConfig, sizes: torch.Tensor | None) -> torch.Tensor:
    weight = module.weight.detach()
    scores = (weight.T if isinstance(module, Conv1D) else weight).float().abs()
    if sizes is not None:
        scores = scores * sizes
    if config.pattern is None:
        return keep_share(scores, config.sparsity, by_output=sizes is not None)
    n, m = map(int, config.pattern.split(":"))
    try:
        return keep_pattern(scores, n, m)
    except CompressionError as error:
        raise CompressionError(f"{path}: {error.message}", hint="Choose another pattern or other targets.") from None


register(
    Method(
        name="unstructured_pruning",
        config=UnstructuredPruningConfig,
        summary="Sets single weights to zero, freely or N of every M; makes nothing faster by itself.",
        apply=unstructured_pruning,
    )
)
