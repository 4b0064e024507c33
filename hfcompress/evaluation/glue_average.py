"""One number for several GLUE tasks, as the leaderboard computes it (Wang et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping

from hfcompress.tasks import get_task

# The two halves of MNLI count as one task; the diagnostic set is none.
TASKS = ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli")
_HALVES = {"mnli-mm": "mnli"}


def glue_average(scores: Mapping[str, Mapping[str, float]]) -> tuple[float, tuple[str, ...]]:
    """Returns the average over whichever of GLUE's nine tasks are there.

    Args:
        scores: The metrics of each task by its name. A task of two metrics counts by their mean, and MNLI by that of
            its two halves (`mnli`, `mnli-mm`), where both are there.

    Returns:
        The mean over tasks, NaN where there are none or a metric is undefined; and the tasks that it is of.
    """
    means: dict[str, list[float]] = {}
    for name, metrics in scores.items():
        if (task := _HALVES.get(name, name)) in TASKS:
            means.setdefault(task, []).append(
                _mean([metrics.get(metric, math.nan) for metric in get_task(name).metrics])
            )
    return _mean([_mean(own) for own in means.values()]), tuple(task for task in TASKS if task in means)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
