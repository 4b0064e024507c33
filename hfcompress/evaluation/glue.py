"""The GLUE metrics as an `evaluate` metric that needs no network.

Use `Glue("mrpc")`, or `evaluate.load("<path of this file>", "mrpc")`.
"""

# `evaluate.load` reads this file's imports line by line: none may go over two lines.
from __future__ import annotations

from typing import Any

import datasets
import evaluate

from hfcompress.configuration import suggest
from hfcompress.errors import DataError
from hfcompress.evaluation.metrics import score
from hfcompress.tasks import catalog

CONFIGS = {task.dataset_config: task for task in catalog.TASKS.values() if task.dataset == catalog.GLUE_DATASET}

_CITATION = """\
@inproceedings{wang2019glue,
  title={{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author={Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer
    and Bowman, Samuel R.},
  booktitle={International Conference on Learning Representations},
  year={2019}
}
"""


class Glue(evaluate.Metric):
    """The official metrics of one GLUE task, named by `config_name` (`cola`, `sst2`, ...).

    `compute(predictions=..., references=...)` takes class ids in the order of `nyu-mll/glue`, or numbers
    for `stsb`. A metric that is undefined on the given rows is NaN.

    Raises:
        DataError: `config_name` is no GLUE task.
    """

    def __init__(self, config_name: str | None = None, keep_in_memory: bool = True, **options: Any) -> None:
        """Makes the metric; it keeps its rows in memory unless told to use a file."""
        super().__init__(config_name=config_name, keep_in_memory=keep_in_memory, **options)

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in CONFIGS:
            name = str(self.config_name)
            raise DataError(f"'{name}' is no GLUE task; {suggest(name, map(str, CONFIGS))}")
        value = datasets.Value("float32" if CONFIGS[self.config_name].kind == "regression" else "int64")
        return evaluate.MetricInfo(
            description="The official metrics of the GLUE tasks.",
            citation=_CITATION,
            inputs_description="Predictions and references: class ids, or numbers for stsb.",
            features=datasets.Features({"predictions": value, "references": value}),
            reference_urls=["https://gluebenchmark.com"],
            format="numpy",
        )

    def _compute(self, predictions: Any, references: Any) -> dict[str, float]:
        return score(CONFIGS[self.config_name].metrics, predictions, references)
