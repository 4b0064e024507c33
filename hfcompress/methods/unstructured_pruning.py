"""Sets single weights to zero, freely or N of every M, at once or gradually in training.

Zeros are stored and multiplied like any other number: dense kernels get no faster by them and files no smaller. What
is gained is sparsity that a sparse kernel, or a compressing archive, can use.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
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
from hfcompress.methods.pruning.search import cubic_share, window
from hfcompress.methods.registry import Batch, Context, Method, register
from hfcompress.methods.statistics import real_rows, remembering
from hfcompress.methods.training import Part
from hfcompress.modeling.adapters import require_no_adapters
from hfcompress.modeling.anatomy import base_model, input_width, modules_of
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.layers.bitsandbytes import kind_of
from hfcompress.modeling.layers.low_rank import LowRankLinear, PivotedLinear

Target = Literal["attention", "ffn", "query", "key", "value", "attention_output", "ffn_input", "ffn_output", "linear"]
SPEED = "none: dense kernels multiply zeros too, so the model is neither faster nor smaller on disk"
_PATTERN = re.compile(r"([1-9]\d?):([1-9]\d?)")


class UnstructuredPruningConfig(Config):
    """Which weights become zero.

    Attributes:
        sparsity: Share of each layer's weights set to zero.
        pattern: `2:4` keeps 2 of every 4 neighbouring weights of an output, instead of `sparsity`.
        importance: `magnitude` of the weight, or `wanda`: magnitude times the size of its input on the calibration
            data, weights of one output compared (Sun et al. 2023); `auto` is `wanda` where there is such data. In
            training: `magnitude` (which is `auto`), or `movement` by how far weights move away from 0 (Sanh et
            al. 2020).
        targets: Roles of the layers: `attention` and `ffn`, or single projections. `linear` is every linear layer
            of the base model, in any family.
        begin: Share of the training after which the first weights become zero.
        end: Share of the training after which no more do; the rest is fine-tuning.
        interval: Steps between two looks at the weights.
    """

    sparsity: float = Field(0.5, gt=0, lt=1)
    pattern: str | None = None
    importance: Literal["auto", "wanda", "magnitude", "movement"] = "auto"
    targets: tuple[Target, ...] = Field(("attention", "ffn"), strict=False, min_length=1)
    begin: float = Field(0.1, ge=0, lt=1)
    end: float = Field(0.6, gt=0, le=1)
    interval: int = Field(10, ge=1)

    @model_validator(mode="after")
    def _has_one_target(self) -> Self:
        if self.begin >= self.end:
            raise ValueError(f"begin ({self.begin}) must be before end ({self.end})")
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
        sparsity: Share not marked, rounded to whole weights; one stays.
        by_output: Whether each row gives up the same share; else the whole matrix is ranked together.

    Returns:
        Bool `(out, in)`.
    """
    ranked = scores if by_output else scores.reshape(1, -1)
    removed = min(round(ranked.shape[1] * sparsity), ranked.shape[1] - 1)
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
    current: dict[str, torch.Tensor] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            totals[path] += real_rows(model, arguments[0], current).float().square().sum(0)

        return hook

    with ExitStack() as stack, torch.no_grad():
        for path, module in modules.items():
            stack.callback(module.register_forward_pre_hook(watch(path)).remove)
        stack.callback(model.register_forward_pre_hook(remembering(current), with_kwargs=True).remove)
        for _ in run_batches(model, batches, description="calibration"):
            pass
    for path, total in totals.items():
        if not torch.isfinite(total).all():
            raise CompressionError(f"{path}: the calibration activations are not finite")
    return {path: total.sqrt() for path, total in totals.items()}


def why_not(config: UnstructuredPruningConfig, trains: bool) -> str | None:
    """Says why a config cannot work in training, or at once, and what would; None where it can."""
    if not trains and config.importance == "movement":
        return "importance 'movement' exists only in training: add `training`, or choose 'magnitude'"
    if trains and config.importance == "wanda":
        return (
            "importance 'wanda' exists only without training; in training choose 'magnitude' or 'movement'; 'auto' is "
            "'magnitude'"
        )
    return None


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
    if message := why_not(config, trains=False):
        raise CompressionError(message)
    importance = config.importance
    if importance == "auto":
        importance = "wanda" if context.calibration else "magnitude"
    modules = _modules(model, config)
    sizes = _input_sizes(model, modules, context.calibration) if importance == "wanda" else {}
    masks = _masks(modules, config, sizes)
    for path, module in modules.items():
        _zero(module, masks[path])
    commit(model)
    return {"importance": importance} | _findings(modules)


def _modules(model: PreTrainedModel, config: UnstructuredPruningConfig) -> dict[str, Any]:
    """Returns what is pruned, by path; of a low-rank layer both factors."""
    base = base_model(model)
    modules: dict[str, Any] = {}
    for path in modules_of(model, config.targets):
        module = base.get_submodule(path)
        factors = module.own_factors if isinstance(module, LowRankLinear) else ()
        modules |= {f"{path}.{factor}": getattr(module, factor) for factor in factors} or {path: module}
    for path, module in modules.items():
        if kind_of(module):
            raise CompressionError(f"{path} is quantized already", hint="Prune before quantizing.")
        if not torch.isfinite(module.weight).all():
            raise CompressionError(f"{path}: the weight holds values that are not finite")
    return modules


def _as_matrix(module: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Returns a weight, or what has its shape, as `(out, in)`."""
    return tensor.detach().T if isinstance(module, Conv1D) else tensor.detach()


def _zero(module: Any, mask: torch.Tensor) -> None:
    with torch.no_grad():
        module.weight.mul_((mask.T if isinstance(module, Conv1D) else mask).to(module.weight.dtype))


def _require_telling(path: str, scores: torch.Tensor) -> None:
    if scores.numel() > 1 and bool((scores == scores.flatten()[0]).all()):
        raise CompressionError(
            f"all weights of {path} are equally important: nothing says which should become zero",
            hint="Leave the layer out of the targets, or choose another importance.",
        )


def _findings(modules: dict[str, Any]) -> dict[str, Any]:
    zeros = {path: round((module.weight == 0).float().mean().item(), 4) for path, module in modules.items()}
    weights = {path: module.weight.numel() for path, module in modules.items()}
    share = sum(zeros[path] * count for path, count in weights.items()) / sum(weights.values())
    return {"sparsity": round(share, 4), "layers": zeros, "speed": SPEED}


def _masks(
    modules: dict[str, Any], config: UnstructuredPruningConfig, sizes: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    masks = {path: _mask(path, module, config, sizes.get(path)) for path, module in modules.items()}
    if all(bool(mask.all()) for mask in masks.values()):
        raise CompressionError(f"sparsity {config.sparsity:g} is less than half a weight of what is ranked together")
    return masks


def _mask(path: str, module: Any, config: UnstructuredPruningConfig, sizes: torch.Tensor | None) -> torch.Tensor:
    scores = _as_matrix(module, module.weight).float().abs()
    if sizes is not None:
        scores = scores * sizes
    _require_telling(path, scores)
    if config.pattern is None:
        return keep_share(scores, config.sparsity, by_output=sizes is not None)
    n, m = map(int, config.pattern.split(":"))
    try:
        return keep_pattern(scores, n, m)
    except CompressionError as error:
        raise CompressionError(f"{path}: {error.message}", hint="Choose another pattern or other targets.") from None


# In training


def keep_part_of_pattern(scores: torch.Tensor, n: int, m: int, share: float) -> torch.Tensor:
    """Marks as `keep_pattern` does, but in a share of the groups only: in those that lose least by it."""
    kept = keep_pattern(scores, n, m)
    lost = (scores * ~kept).unflatten(1, (-1, m)).sum(2).flatten()
    spared = lost.argsort(stable=True)[round(len(lost) * share) :]
    groups = kept.unflatten(1, (-1, m)).reshape(len(lost), m)
    return groups.index_fill(0, spared, True).view_as(kept)


class UnstructuredPruningPart(Part):
    """Sets more and more weights to zero while the others train; what is zero stays so.

    Raises:
        CompressionError: The config's importance cannot be had in training.
    """

    def __init__(self, config: UnstructuredPruningConfig, context: Context | None = None) -> None:
        if message := why_not(config, trains=True):
            raise CompressionError(message)
        self.config = config

    def prepare(self, model: PreTrainedModel) -> None:
        """Refuses pivoted layers: they are trained in another form, and the zeros of that form would be lost.

        Raises:
            CompressionError: One of the layers is pivoted.
        """
        require_no_adapters(model)
        base = base_model(model)
        for path in modules_of(model, self.config.targets):
            if isinstance(base.get_submodule(path), PivotedLinear):
                raise CompressionError(
                    f"{path} is pivoted, and cannot keep zeros that training makes",
                    hint="Factorize with pivoted: false, or prune without training.",
                )

    def begin(self, model: PreTrainedModel, total_steps: int, device: torch.device) -> None:
        """Starts with everything open, and checks that the pattern fits."""
        self._modules = _modules(model, self.config)
        self._first, self._last = window(self.config.begin, self.config.end, total_steps)
        self._is_settled = False
        _masks(self._modules, self.config, {})  # are refused now rather than when it is time for them
        frozen = [path for path, module in self._modules.items() if not module.weight.requires_grad]
        if frozen and self.config.importance == "movement":
            raise CompressionError(
                f"{frozen[0]} is frozen, and has no gradients to tell by which of its weights matter",
                hint="Train what is pruned, or choose another importance.",
            )
        shapes = {path: _as_matrix(module, module.weight) for path, module in self._modules.items()}
        self._masks = {path: torch.ones_like(weight, dtype=torch.bool) for path, weight in shapes.items()}
        moves = self.config.importance == "movement"
        self._moved = {path: torch.zeros_like(weight, dtype=torch.float32) for path, weight in shapes.items() if moves}

    def before_optimizer_step(self, step: int) -> None:
        """Adds up how far this step's gradients would move each weight away from 0."""
        if step >= self._last:
            return
        for path, moved in self._moved.items():
            module = self._modules[path]
            if module.weight.grad is not None:
                product = module.weight.detach().float() * module.weight.grad.float()
                if torch.isfinite(product).all():  # a step in float16 may overflow, and is left out by the optimizer
                    moved.sub_(_as_matrix(module, product))

    def after_step(self, step: int) -> None:
        """Closes more weights where the schedule says so, and holds at zero what is closed."""
        self._is_settled |= step >= self._last
        due = self._first <= step <= self._last and (step % self.config.interval == 0 or step == self._last)
        progress = cubic_share(1.0, step, self._first, self._last)
        for path, module in self._modules.items():
            if due and progress:
                self._masks[path] &= self._choose(path, module, progress)
            _zero(module, self._masks[path])

    def _choose(self, path: str, module: Any, progress: float) -> torch.Tensor:
        scores = _as_matrix(module, module.weight).float().abs()
        if path in self._moved:
            scores = self._moved[path] - self._moved[path].min()
        _require_telling(path, scores)
        scores = torch.where(self._masks[path], scores, -1.0)  # what is closed is chosen again, first
        if self.config.pattern is None:
            return keep_share(scores, self.config.sparsity * progress, by_output=False)
        n, m = map(int, self.config.pattern.split(":"))
        # A group that is closed already loses nothing by being chosen again.
        return keep_part_of_pattern(scores.clamp_min(0.0), n, m, progress)

    def settled(self, step: int) -> bool:
        """The zeros are final."""
        return step >= self._last

    def end(self, model: PreTrainedModel) -> dict[str, Any]:
        """Writes down what is zero; sets all of the target to zero, where training ended before its time."""
        if not self._is_settled:
            before = self._open()
            self.after_step(self._last)
            if gone := before - self._open():
                message = (
                    f"training ended before pruning did, after step {self._last}: {gone} more weights are zero now"
                )
                warnings.warn(message, stacklevel=2)
        for path, module in self._modules.items():
            _zero(module, self._masks[path])
        commit(model)
        importance = "magnitude" if self.config.importance == "auto" else self.config.importance
        return {"importance": importance} | _findings(self._modules)

    def _open(self) -> int:
        return sum(int(mask.sum()) for mask in self._masks.values())

    def state(self) -> dict[str, torch.Tensor]:
        """Masks, and movement."""
        masks = {f"masks.{path}": mask.to("cpu", torch.uint8) for path, mask in self._masks.items()}
        return masks | {f"moved.{path}": moved.cpu() for path, moved in self._moved.items()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes both back."""
        for key, value in state.items():
            what, _, path = key.partition(".")
            (self._masks if what == "masks" else self._moved)[path].copy_(value)


register(
    Method(
        name="unstructured_pruning",
        config=UnstructuredPruningConfig,
        summary="Sets single weights to zero, freely or N of every M; makes nothing faster by itself.",
        apply=unstructured_pruning,
        part=UnstructuredPruningPart,
        why_not=why_not,
    )
)
