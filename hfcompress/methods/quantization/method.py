"""Quantizes a model at once: each part in the kind that it was given, or that was found for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from hfcompress.errors import CompressionError
from hfcompress.methods.probing import Probe
from hfcompress.methods.quantization import choosing
from hfcompress.methods.quantization.config import QuantizationConfig
from hfcompress.methods.quantization.kinds import (
    BITS,
    LinearKind,
    quantize_layer,
    require_engine,
    require_float,
    spread,
)
from hfcompress.methods.quantization.sensitivity import (
    TABLE_KINDS,
    Bench,
    is_table_path,
    measure,
    module_bytes,
    parts_of,
)
from hfcompress.methods.registry import Batch, Context
from hfcompress.modeling.anatomy import base_model
from hfcompress.modeling.checkpoint import commit
from hfcompress.modeling.layers.bitsandbytes import Numerics
from hfcompress.modeling.tables import TableKind, plan_tables, quantize_tables

_MIXED = "mixed"


def quantization(model: PreTrainedModel, config: QuantizationConfig, context: Context) -> dict[str, Any]:
    """Quantizes a model in place.

    Args:
        model: A float model.
        config: Which parts, and to what.
        context: Calibration batches, where something is measured; `cache_dir` keeps what was.

    Returns:
        How many layers of each kind there are, the linear layers left in float, and what was measured.

    Raises:
        CompressionError: The model is quantized already, an embedding is tied to other modules than its class says,
            a group does not divide an embedding's width, a role has no layer, or a budget cannot be kept. The model is
            as it was then.
        MissingBackendError: The engine of a kind is not installed.
    """
    require_float(model)
    meant = spread(model, config.weights, {"attention": config.attention, "ffn": config.ffn}, config.roles)
    # Of mixed tables any plan tells which there are; that there is one for 4 bit too is asked for now, not later.
    plans = [plan_tables(model, kind, config.embedding_group_size) for kind in _table_kinds(config)]
    measures = config.is_mixed or config.sensitivity is not None
    for kind in sorted({*meant.values(), *(config.candidates if measures else ())} - {_MIXED}):
        require_engine(cast(LinearKind, kind))
    kinds = meant | {path: cast(str, config.embeddings) for path in (plans[0] if plans else {})}
    found: dict[str, Any] = {}
    if measures:
        chosen, found = _measure(model, config, context, kinds)
        kinds = {path: chosen.get(path, kind) for path, kind in kinds.items()}
    return _apply(model, config, {path: kind for path, kind in kinds.items() if kind != _MIXED}) | found


def _table_kinds(config: QuantizationConfig) -> tuple[TableKind, ...]:
    if config.embeddings is None:
        return ()
    return TABLE_KINDS if config.embeddings == _MIXED else (config.embeddings,)


def _numerics(config: QuantizationConfig) -> Numerics:
    return Numerics(config.threshold, config.compute_dtype)


def _apply(model: PreTrainedModel, config: QuantizationConfig, kinds: Mapping[str, str]) -> dict[str, Any]:
    base = base_model(model)
    linear: dict[str, int] = {}
    tables: dict[str, int] = {}
    for path, kind in kinds.items():
        counted = tables if is_table_path(model, path) else linear
        counted[kind] = counted.get(kind, 0) + 1
        if counted is tables:
            plan = plan_tables(model, cast(TableKind, kind), config.embedding_group_size)
            quantize_tables(model, {path: plan[path]})
        else:
            layer = quantize_layer(base.get_submodule(path), cast(LinearKind, kind), _numerics(config))
            base.set_submodule(path, layer)
    commit(model)
    in_float = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    held = tables if config.embeddings == _MIXED else config.embeddings
    return {"linear_layers": linear, "embeddings": held, "left_in_float": in_float}


# Measured


def _measure(
    model: PreTrainedModel, config: QuantizationConfig, context: Context, kinds: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, Any]]:
    """Measures what each part loses, and chooses for those that are mixed.

    Args:
        model: The float model.
        config: Which parts, and to what.
        context: Calibration batches, and where measurements are kept.
        kinds: What each module gets by path, or `mixed`.

    Returns:
        The kind of each mixed module by path, where it does not stay in float; and the findings.
    """
    by = config.sensitivity or "block"
    asked = [path for path, kind in kinds.items() if kind == _MIXED] if config.is_mixed else list(kinds)
    if not asked:
        raise CompressionError("weights, attention, ffn, roles and embeddings name nothing that could be measured")
    batches = context.calibration[: config.sensitivity_batches]
    bench = Bench(model, parts_of(model, asked, by), _numerics(config), config.embedding_group_size)
    folder = context.cache_dir / "quantization" if context.cache_dir else None
    costs = measure(bench, config.candidates, batches, folder, by)
    told = {name: {kind: _short(cost.loss) for kind, cost in each.items()} for name, each in costs.items()}
    found: dict[str, Any] = {"sensitivity": told}
    if not config.is_mixed:
        return {}, found
    given = {path: kind for path, kind in kinds.items() if kind != _MIXED}
    chosen, mixed = _choose(bench, costs, given, config, batches)
    bits = {name: {"kept": BITS[chosen[name]] if name in chosen else 32, "of": 32} for name in bench.parts}
    by_path = {path: kind for name, kind in chosen.items() for path in bench.parts[name].paths}
    return by_path, found | {"mixed": mixed, "kinds": chosen, "bits": bits}


def _choose(
    bench: Bench,
    costs: Mapping[str, Mapping[str, choosing.Cost]],
    given: Mapping[str, str],
    config: QuantizationConfig,
    batches: Sequence[Batch],
) -> tuple[dict[str, str], dict[str, Any]]:
    """Chooses a kind for each part, and measures the model with all of them.

    Args:
        bench: The float model and the parts that are free.
        costs: What each part costs in each kind.
        given: The kinds of all other modules, by path; they count in the bytes and in the divergence.
        config: Holds the budget, or the divergence that is allowed.
        batches: What the choice is measured on.

    Returns:
        The kind of each part that is not left in float; and what was found.
    """
    model = bench.model
    others = Bench(model, parts_of(model, list(given), "layer"), _numerics(config), config.embedding_group_size)
    path, probe, whole = choosing.moves(costs, bench.bytes_now()), Probe(model, batches, "outputs"), module_bytes(model)
    with others.standing_in(given) as sizes:
        total = whole - sum(others.bytes_now().values()) + sum(sizes.values())

        def measured(count: int) -> float:
            with bench.standing_in(choosing.after(path[:count])):
                return max(0.0, probe.rise())

        if config.budget is not None:
            count = _within_budget(path, total, whole, config.budget)
            diverged = measured(count)
        else:
            assert config.max_divergence is not None
            count, diverged = _within_divergence(measured, len(path), config.max_divergence)
    saved, expected = sum(move.saved for move in path[:count]), sum(move.loss for move in path[:count])
    share = round((total - saved) / whole, 4)
    found = {"bytes": total - saved, "share_of_bytes": share}
    return choosing.after(path[:count]), found | {"divergence": _short(diverged), "sum_of_parts": _short(expected)}


def _within_budget(path: Sequence[choosing.Move], total: int, whole: int, budget: float) -> int:
    count = choosing.within(path, total, int(budget * whole))
    if count is None:
        least = (total - sum(move.saved for move in path)) / whole
        raise CompressionError(
            f"budget: {budget:g} of the bytes cannot be had; the least is {least:.3f}",
            hint="Add smaller candidates (packed-2, ternary, binary), or set embeddings: mixed.",
        )
    return count


def _within_divergence(measured: Callable[[int], float], most: int, allowed: float) -> tuple[int, float]:
    """Finds how many moves keep to a divergence, by halves: each is measured, with all of the model together."""
    low, diverged = 0, measured(0)
    if diverged > allowed:
        raise CompressionError(
            f"max_divergence: {allowed:g} cannot be had: what is not mixed alone makes {diverged:.3g}",
            hint="Set more to mixed, or give it a larger kind.",
        )
    high = most + 1
    while high - low > 1:
        middle = (low + high) // 2
        now = measured(middle)
        if now <= allowed:
            low, diverged = middle, now
        else:
            high = middle
    return low, diverged


def _short(value: float) -> float:
    return float(f"{value:.3g}")
