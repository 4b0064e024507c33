"""How a model is judged: quality on a task, cost beside the original, and the report of both."""

from __future__ import annotations

from hfcompress.evaluation.comparison import Answers, Comparison, compare
from hfcompress.evaluation.cost import Speed, measure_speed
from hfcompress.evaluation.quality import Quality, evaluate_quality
from hfcompress.evaluation.report import Report, Row, describe_environment, retention
from hfcompress.evaluation.usage import Usage, measure_usage

__all__ = [
    "Answers",
    "Comparison",
    "Quality",
    "Report",
    "Row",
    "Speed",
    "Usage",
    "compare",
    "describe_environment",
    "evaluate_quality",
    "measure_speed",
    "measure_usage",
    "retention",
]
