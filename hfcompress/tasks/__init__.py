"""What is learnt: tasks with their columns, labels, metrics and data, and the embedded demo."""

from __future__ import annotations

from hfcompress.tasks.catalog import get_task, task_names
from hfcompress.tasks.custom import TaskConfig, task_of
from hfcompress.tasks.data import load_data
from hfcompress.tasks.demo import fetch_model, is_demo_model
from hfcompress.tasks.kinds import KINDS, Given, Kind, kind_of
from hfcompress.tasks.metric_names import judged_by
from hfcompress.tasks.preprocessing import align_labels, preprocess
from hfcompress.tasks.task import Task

__all__ = [
    "KINDS",
    "Given",
    "Kind",
    "Task",
    "TaskConfig",
    "align_labels",
    "fetch_model",
    "get_task",
    "is_demo_model",
    "judged_by",
    "kind_of",
    "load_data",
    "preprocess",
    "task_names",
    "task_of",
]
