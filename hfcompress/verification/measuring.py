"""Measures a folder's checkpoint, and the original where it can be had, as the run did."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hfcompress.errors import HFCompressError
from hfcompress.evaluation.attacks import Attempt
from hfcompress.evaluation.cost import Speed, cost_inputs, measure_speed
from hfcompress.evaluation.groups import group_labels
from hfcompress.evaluation.layers import Counted, count_layers
from hfcompress.evaluation.quality import Quality, evaluate_quality
from hfcompress.evaluation.report import Report, describe_environment
from hfcompress.evaluation.robustness import CHANGES, evaluate_changed
from hfcompress.evaluation.usage import count_operations
from hfcompress.material import find_model
from hfcompress.modeling.measure import count_parameters, weight_bytes
from hfcompress.publishing.model_card import read_report
from hfcompress.tasks import kind_of, load_data, preprocess, task_of
from hfcompress.verification.trials import attack_again, explain_again

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a folder's checkpoint, and the original where it can be had, measure now.

    Attributes:
        quality: The checkpoint's.
        split: What was measured.
        parameters: The checkpoint's.
        bytes: The checkpoint's.
        operations: The checkpoint's, or None where the report has none.
        original_parameters: The original's, or None without one.
        original_operations: The original's, or None without one.
        speed: Beside the original, or None without one.
        grid: The same at the batches of the report's grid; nothing without an original.
        layers: Kind, shape and operations of the checkpoint's linear layers, by path.
        original_layers: The same of the original's; nothing without one.
        without: Why there is no original.
        environment: Where this was measured.
        groups: Each example's group, by the columns that the report's recipe names.
        robustness: The checkpoint's metrics on changed texts, by change.
        explained: What words count for in the checkpoint, or None, and why.
        attacked: What an attack on the checkpoint comes to, or None, and why.
    """

    quality: Quality
    split: str
    parameters: int
    bytes: int
    operations: int | None
    original_parameters: int | None
    original_operations: int | None
    speed: Speed | None
    without: str
    environment: dict[str, str]
    grid: tuple[Speed, ...] = ()
    layers: dict[str, Counted] = field(default_factory=dict)
    original_layers: dict[str, Counted] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    robustness: dict[str, dict[str, float]] = field(default_factory=dict)
    explained: tuple[list[list[float]] | None, str] = (None, "")
    attacked: tuple[list[Attempt] | None, str] = (None, "")


def measure_again(
    directory: Path, *, original: str | None = None, data: str | None = None, progress: bool = True
) -> Measured:
    """Measures a folder's checkpoint as its report says that it was measured; see `verify`."""
    report = read_report(directory)
    task, settings = task_of(report.task, report.recipe), report.recipe.get("evaluation") or {}
    kind = kind_of(task)
    with _threads(report):
        model = kind.load(directory)
        tokenizer = kind.load_processor(directory)
        rows = load_data(task, data, progress=progress)[task.evaluation_split]
        labels = cast("dict[str, int]", model.config.label2id) if task.labels else None
        cut = _whole(report.recipe.get("max_length"), 128)
        examples = preprocess(rows, task, tokenizer, max_length=cut, label2id=labels)
        batch = _whole(settings.get("batch_size"), 32)
        quality = evaluate_quality(model, examples, task, tokenizer, batch_size=batch, progress=progress)
        speed_batch = _whole(settings.get("speed_batch_size"), 8)
        length = _whole(settings.get("speed_sequence_length"), 128)
        first, without = _original(directory, report, original, kind.head(task), progress)
        repeats = max(3, _whole(settings.get("speed_repeats"), 20))
        # The batch of the run, whose tokens both models know: a step may have made the vocabulary smaller.
        inputs_of = partial(cost_inputs, kind, [each for each in (first, model) if each is not None])
        inputs = inputs_of(speed_batch, length)
        tried = (report, model, rows, task, tokenizer)
        how = {"max_length": cut, "batch_size": batch}
        return Measured(
            quality=quality,
            split=task.evaluation_split,
            parameters=count_parameters(model),
            bytes=weight_bytes(directory),
            operations=count_operations(model, inputs),
            original_parameters=None if first is None else count_parameters(first),
            original_operations=None if first is None else count_operations(first, inputs),
            speed=None if first is None else measure_speed(first, model, inputs, repeats=repeats),
            grid=_grid(first, model, report, inputs_of, max(3, repeats // 2)),
            layers=count_layers(model, inputs),
            original_layers={} if first is None else count_layers(first, inputs),
            without=without,
            environment=describe_environment(),
            groups=group_labels(rows, settings.get("groups") or ()),
            robustness={
                each.change: evaluate_changed(model, rows, task, tokenizer, each.change, **how).metrics
                for each in report.robustness
                if each.change in CHANGES
            },
            explained=explain_again(directory, *tried, **how),
            attacked=attack_again(*tried, **how),
        )


def _grid(
    first: PreTrainedModel | None,
    model: PreTrainedModel,
    report: Report,
    inputs_of: Callable[[int, int], dict[str, torch.Tensor]],
    repeats: int,
) -> tuple[Speed, ...]:
    """Times the batches of the report's grid again; nothing without an original."""
    if first is None:
        return ()
    batches = [(max(each.batch_size, 1), max(each.sequence_length, 1)) for each in report.grid]
    return tuple(measure_speed(first, model, inputs_of(*batch), repeats=repeats) for batch in batches)


def _original(
    directory: Path, report: Report, given: str | None, head: dict[str, Any], progress: bool
) -> tuple[PreTrainedModel | None, str]:
    """Returns a model of the original's shape, which is all that its cost depends on, or why there is none."""
    kind = kind_of(task_of(report.task, report.recipe))
    kept = directory.with_name(f"{directory.name}.work") / f"1-{report.rows[0].name}" / "checkpoint"
    name = report.recipe.get("teacher") or report.base_model
    try:
        if given is not None:
            folder = Path(given) if Path(given).is_dir() else find_model(given, progress=progress)
        elif kept.is_dir():
            folder = kept
        elif name.startswith(("/", "./", "../")):
            return None, f"the original ({name}) is not here; name it with --original"
        else:
            folder = find_model(name, progress=progress)
        return kind.load(folder, ignore_mismatched_sizes=True, **head), ""
    except (HFCompressError, OSError) as error:
        said = str(error).partition("\n")[0]
        return None, f"the original cannot be had ({said}); name it with --original"


@contextlib.contextmanager
def _threads(report: Report) -> Iterator[None]:
    """Works with the report's number of threads, where the machine has that many."""
    import torch

    before = torch.get_num_threads()
    wanted = report.environment.get("threads", "")
    if wanted.isdecimal() and 0 < int(wanted) <= (os.cpu_count() or 1):
        torch.set_num_threads(int(wanted))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _whole(value: Any, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default
