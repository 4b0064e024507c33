"""The record of a run's measurements: the one source of every published figure."""

from __future__ import annotations

import json
import math
import os
import platform
import tempfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from hfcompress.errors import CheckpointError
from hfcompress.evaluation.attacks import Attack
from hfcompress.evaluation.comparison import Comparison
from hfcompress.evaluation.cost import Speed
from hfcompress.evaluation.curves import Training
from hfcompress.evaluation.explanations import Explanations
from hfcompress.evaluation.layers import LayerCost
from hfcompress.evaluation.metrics import retention
from hfcompress.evaluation.records import STRICT, Count, Figure, plain
from hfcompress.evaluation.robustness import Robustness
from hfcompress.evaluation.seeds import Seeds
from hfcompress.evaluation.usage import Usage
from hfcompress.machine import cpu_name

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["License", "Report", "Row", "describe_environment", "retention"]

_NOT_AVAILABLE = "n/a"
_METRICS_SHOWN = 2  # on the screen, where more would leave no room; documents show all


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model as it was after one step.

    Attributes:
        name: The step's name.
        methods: What was done in it; empty for the original and for fine-tuning.
        metrics: The task's metrics by name; NaN where undefined.
        retention: This row's first metric / the original's, or the other way round where less is better.
        parameters: The model's parameters.
        bytes: The size of its saved weights on disk.
        speed: Measured beside the original, or None where it was not.
        seconds: What the step took.
        findings: What each method found out (JSON values), by method.
        comparison: Its answers beside the original's; None for the original itself, or where none were kept.
        usage: What a pass of it takes, or None where it was not measured.
        training: How its training went, or None where the step did not train.
    """

    __pydantic_config__ = STRICT

    name: str
    methods: tuple[str, ...]
    metrics: dict[str, Figure]
    retention: Figure
    parameters: Count
    bytes: Count
    speed: Speed | None
    seconds: Figure
    findings: dict[str, Any]
    comparison: Comparison | None = None
    usage: Usage | None = None
    training: Training | None = None


@dataclass(frozen=True, kw_only=True)
class License:
    """A licence as card headers name it.

    Attributes:
        id: The Hub's identifier, such as `apache-2.0`, or `other`.
        name: Its name, where the identifier is `other`.
        link: Where its text is, where the identifier is `other`.
    """

    __pydantic_config__ = STRICT

    id: str
    name: str | None = None
    link: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a run measured, and everything needed to measure it again.

    Attributes:
        format: The version of this record.
        name: The recipe's name.
        base_model: The model it started from.
        license: What its own card stated, where it was a folder of this machine.
        task: The task's name.
        recipe: The recipe as it was run.
        environment: Versions and hardware, from `describe_environment`.
        split: The split that was measured.
        examples: Its number of rows.
        metric: The metric that retention is computed on.
        seed: The run's seed.
        rows: The original, the model after every step, and last the result.
        grid: The result's speed beside the original's at several batch sizes and lengths.
        robustness: What both score on changed texts, where the recipe asks for it.
        layers: What each linear layer takes, in the original and in the result; empty where it was not measured.
        seeds: What all seeds come to, or None where the recipe names one alone.
        explanations: How far the result's reasons are the original's, or None where the recipe does not ask.
        attack: How both withstood an attack, or None where the recipe does not ask.
    """

    __pydantic_config__ = STRICT

    format: Literal[1] = 1
    name: str
    base_model: str
    task: str
    recipe: dict[str, Any]
    environment: dict[str, str]
    split: str
    examples: Count
    metric: str
    seed: int
    rows: Annotated[tuple[Row, ...], Field(min_length=1)]
    grid: tuple[Speed, ...] = ()
    robustness: tuple[Robustness, ...] = ()
    layers: tuple[LayerCost, ...] = ()
    seeds: Seeds | None = None
    explanations: Explanations | None = None
    attack: Attack | None = None
    license: License | None = None

    @property
    def compression(self) -> float:
        """The original's bytes / the result's; NaN where the result has none."""
        return _ratio(self.rows[0].bytes, self.rows[-1].bytes)

    def to_json(self) -> str:
        """Returns the report as JSON text; what is not a finite number becomes null."""
        return json.dumps(plain(asdict(self)), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Reads what `to_json` wrote, strictly.

        Raises:
            CheckpointError: The text is no JSON, or a field is missing, unknown or of the wrong type.
        """
        try:
            json.loads(text, parse_constant=_refuse_constant)
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            lines = "".join(f"\n  {'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors())
            raise CheckpointError(f"the report is not valid:{lines}") from None
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"the report is not valid JSON: {error}") from None

    def save(self, path: str | Path) -> None:
        """Writes the report so that the file is whole at any moment.

        Raises:
            OSError: The file cannot be written.
        """
        path = Path(path)
        handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            # A temporary file is private to its owner; a report is as readable as its neighbours.
            os.chmod(scratch, 0o666 & ~_umask())
            os.replace(scratch, path)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise

    def table(self) -> Table:
        """Returns the rows for the screen, readable from 100 columns on; a speed-up has its 95% interval."""
        from rich import box
        from rich.table import Table

        names = [self.metric, *(name for name in self.rows[0].metrics if name != self.metric)][:_METRICS_SHOWN]
        title = f"{self.name}: {self.base_model} on {self.task}, {self.examples} rows of {self.split}"
        table = Table(
            title=title, caption=self._over_seeds(), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
        )
        table.add_column("step", overflow="fold")
        for name in (*names, "retention", "params", "on disk", "smaller", "speed-up"):
            table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
        for row in self.rows:
            table.add_row(
                row.name,
                *(_number(row.metrics.get(name, math.nan), ".4f") for name in names),
                _number(row.retention, ".1%"),
                _count(row.parameters),
                f"{row.bytes / 1e6:.1f} MB",
                _times(_ratio(self.rows[0].bytes, row.bytes)),
                _speed(row.speed),
            )
        return table

    def _over_seeds(self) -> str | None:
        if self.seeds is None:
            return None
        last = self.seeds.rows[-1]
        known = last.metrics[self.metric]
        pairs = zip(self.seeds.seeds, known.values, strict=True)
        told = ", ".join(f"{seed}: {_number(value, '.4f')}" for seed, value in pairs)
        return f"{self.metric} of {last.name} by seed: {told}; mean {_number(known.mean, '.4f')}; shown is the first"


def describe_environment() -> dict[str, str]:
    """Returns the versions and the hardware that a measurement depends on."""
    import torch

    packages = ("torch", "transformers", "hfcompress")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "cpu": cpu_name(),
        "threads": str(torch.get_num_threads()),
        "platform": platform.platform(),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed as a package"


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _ratio(original: int, compressed: int) -> float:
    return original / compressed if compressed else math.nan


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else _NOT_AVAILABLE


def _times(value: float) -> str:
    return f"{value:.2f}x" if math.isfinite(value) else _NOT_AVAILABLE


def _count(parameters: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return str(parameters)


def _speed(speed: Speed | None) -> str:
    if speed is None:
        return "-"
    return f"{_times(speed.ratio)} ({speed.low:.2f}-{speed.high:.2f})"
