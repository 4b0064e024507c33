"""Torch-Pruning's choice of heads and neurons, for comparison.

    pip install --no-deps --target ~/.cache/hfcompress/studies/torch-pruning torch-pruning==1.6.1

It lives in a folder of its own, for nothing else here needs it. Torch-Pruning ranks and chooses, by its grouped Taylor
importance and isomorphic ranking (Fang et al. 2023 and 2024), which its own examples of transformers use; what it
chose is cut out by this library, since Torch-Pruning does not know of the bias that MPNet's layers share.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hfcompress.methods.pruning.importance import unit_factors
from hfcompress.methods.pruning.targets import target_of
from hfcompress.methods.pruning.units import Units, total_cost
from hfcompress.methods.training import bf16_is_fast
from hfcompress.modeling.checkpoint import commit
from scripts.studies.material import study_root

Batches = Sequence[Mapping[str, torch.Tensor]]
STEP = 0.005  # of the share, where Torch-Pruning left more than was asked for


def library() -> Any:
    """Imports Torch-Pruning."""
    folder = str(study_root() / "torch-pruning")
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        import torch_pruning  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SystemExit(f"pip install --no-deps --target {folder} torch-pruning==1.6.1") from None
    return torch_pruning


def accumulate(model: Any, units: Sequence[Units], batches: Batches) -> list[torch.Tensor]:
    """Leaves in a model the gradients of its weights over all batches, which Torch-Pruning ranks by.

    Args:
        model: A fine-tuned model in evaluation mode.
        units: Whatever else is asked about in the same passes.
        batches: Calibration batches with labels.

    Returns:
        What `mask_gradients` returns for the units.
    """
    examples = sum(len(batch["labels"]) for batch in batches)
    rows: list[list[torch.Tensor]] = [[] for _ in units]
    model.zero_grad()
    with unit_factors(model, units) as factors:
        for batch in batches:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16_is_fast()):  # as `StructuredPruningConfig` does
                loss = model(**batch).loss
            (loss * (len(batch["labels"]) / examples)).backward()
            for found, factor in zip(rows, factors, strict=True):
                assert factor.grad is not None
                found.append(factor.grad * examples)
    return [torch.cat(found) for found in rows]


def prune(model: Any, batches: Batches, share: float, *, multivariable: bool = False) -> None:
    """Removes a share of the layers' FLOPs, as Torch-Pruning chooses.

    Args:
        model: A fine-tuned model in evaluation mode, with the gradients that `accumulate` leaves.
        batches: Calibration batches with labels.
        share: Of the FLOPs.
        multivariable: Whether Taylor terms of a unit's weights are added up before their size is taken.
    """
    target = target_of(model, flops=share, multiple_of=1)
    budget = total_cost(target.units, "flops") * (1 - share)
    asked = share
    while True:
        kept = _choice(model, target.units, batches[0], asked, multivariable)
        spent = sum(
            len(index) * unit + fixed
            for index, (unit, fixed) in zip(kept, (each.costs("flops") for each in target.units), strict=True)
        )
        if spent <= budget * (1 + 1e-6):
            break
        asked += STEP
    model.zero_grad()
    for each, index in zip(target.units, kept, strict=True):
        if len(index) < each.count:
            each.shrink(index)
    commit(model)


def _choice(
    model: Any, units: Sequence[Units], batch: Mapping[str, torch.Tensor], share: float, multivariable: bool
) -> list[torch.Tensor]:
    """Returns for each of `units` what Torch-Pruning keeps of it."""
    library_ = library()
    places: dict[nn.Module, int] = {each.entry: position for position, each in enumerate(units)}
    heads: dict[nn.Module, int] = {}
    roots: set[nn.Module] = set()
    for each in units:
        block: Any = each.block
        if each.are_heads:
            paths = [projection.path for _, projection in block.projections]
            heads |= {block.at(path): each.count for path in paths}
        else:
            paths = [projection.path for projection in block.inputs]
        roots |= {block.at(path) for path in paths}
    with _constant_bias(model):
        pruner = library_.pruner.BasePruner(
            model,
            {name: value[:2] for name, value in batch.items() if name != "labels"},
            importance=library_.importance.GroupTaylorImportance(multivariable=multivariable),
            global_pruning=True,
            isomorphic=True,
            pruning_ratio=share,
            head_pruning_ratio=share,
            num_heads=heads,
            prune_num_heads=True,
            prune_head_dims=False,
            ignored_layers=[each for each in model.modules() if isinstance(each, nn.Linear) and each not in roots],
            output_transform=lambda outputs: outputs.logits,
        )
    removed: dict[int, set[int]] = {}
    for group in pruner.step(interactive=True):
        for dependency, inputs in group:
            position = places.get(dependency.target.module)
            if position is not None and not pruner.DG.is_out_channel_pruning_fn(dependency.handler):
                removed[position] = {index // units[position].width for index in inputs}
    return [
        torch.tensor([index for index in range(each.count) if index not in removed.get(position, ())])
        for position, each in enumerate(units)
    ]


@contextmanager
def _constant_bias(model: Any) -> Any:
    """MPNet's shared bias would tie the heads of all layers together: Torch-Pruning is shown it as a constant."""
    encoder = model.base_model.encoder
    own = encoder.compute_position_bias
    encoder.compute_position_bias = lambda *arguments, **named: own(*arguments, **named).detach()
    try:
        yield
    finally:
        del encoder.compute_position_bias
