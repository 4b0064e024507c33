"""A task that a recipe describes itself: any data in columns, of one of the known kinds."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, field_validator, model_validator

from hfcompress.configuration import Config, suggest
from hfcompress.errors import CheckpointError, ConfigError
from hfcompress.tasks.catalog import get_task
from hfcompress.tasks.kinds import KINDS
from hfcompress.tasks.metric_names import OF_TWO_CLASSES, expanded, judged_by
from hfcompress.tasks.task import Generation, KindName, Task

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_NAME = re.compile(r"[a-z0-9][a-z0-9._/-]{0,79}")
_SPLIT = re.compile(r"\w+", re.ASCII)
_INSTEAD = {"f1": "; use 'f1_macro'"}


class TaskConfig(Config):
    """A task in a recipe.

    What is left out is what is usual for the kind. Metrics are named, never loaded: `evaluate` would run a script
    for each.
    """

    kind: KindName = Field(description="what is learnt")
    data: str = Field(description="the data's id on the Hub (org/name), or a local folder (/, ./ or ../ first)")
    config: str | None = Field(
        default=None, description="the configuration of a Hub dataset, or a folder in a local one"
    )
    name: str = Field(default="", description="what it is called in reports; by default the last part of data")
    columns: tuple[str, ...] = Field(default=(), description="the columns that are read")
    label: str | None = Field(default=None, description="the column of right answers")
    labels: tuple[str, ...] = Field(default=(), description="the names of the labels, in the order of their ids")
    metrics: tuple[str, ...] = Field(default=(), description="what is reported; retention is computed on the first")
    answer_tokens: int | None = Field(
        default=None, ge=1, le=4096, description="the most tokens of a text that is written; 64 by default"
    )
    beams: int | None = Field(default=None, ge=1, le=64, description="beams by which texts are written; 1 by default")
    training_split: str | None = Field(default="train", description="the split that is learnt from")
    evaluation_split: str = Field(default="validation", description="the split that is measured")

    @field_validator("data")
    @classmethod
    def _is_place(cls, data: str) -> str:
        if not _is_local(data) and not _HUB_ID.fullmatch(data):
            raise ValueError(f"should be a Hub id (org/name), or a folder that starts with /, ./ or ../, not {data!r}")
        return data

    @field_validator("config")
    @classmethod
    def _is_inside(cls, config: str | None) -> str | None:
        if config is not None and not re.fullmatch(r"[\w][\w.-]*", config, re.ASCII):
            raise ValueError(f"should be letters, digits, '.', '_' and '-', not {config!r}")
        return config

    @field_validator("name")
    @classmethod
    def _is_name(cls, name: str) -> str:
        if name and not _NAME.fullmatch(name):
            raise ValueError(f"should be lower-case letters, digits, '.', '_', '/' and '-', not {name!r}")
        return name

    @field_validator("training_split", "evaluation_split")
    @classmethod
    def _is_split(cls, split: str | None) -> str | None:
        if split is not None and not _SPLIT.fullmatch(split):
            raise ValueError(f"should be letters, digits and '_', not {split!r}")
        return split

    @model_validator(mode="after")
    def _fits_its_kind(self) -> TaskConfig:
        kind = KINDS[self.kind]
        for metric in self.metrics:
            if not set(expanded([metric])) <= set(kind.metrics):
                raise ValueError(f"metrics: '{metric}' is none of {self.kind}; {suggest(metric, kind.metrics)}")
            if metric in OF_TWO_CLASSES and len(self.labels) > 2:
                raise ValueError(f"metrics: '{metric}' is of two classes{_INSTEAD.get(metric, '')}")
        if kind.labelled and len(set(self.labels)) < 2:
            raise ValueError(f"labels: {self.kind} needs the names of at least two labels, in the order of their ids")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("labels: each may be named once")
        if not kind.labelled and self.labels:
            raise ValueError(f"labels: the answers of {self.kind} are no labels; leave them out")
        if kind.generation is None and (self.answer_tokens or self.beams):
            raise ValueError(f"answer_tokens: {self.kind} writes no texts; leave answer_tokens and beams out")
        if len(self.columns) > max(2, len(kind.columns)):
            raise ValueError(
                f"columns: {self.kind} reads {' and '.join(kind.columns)}, not {len(self.columns)} columns"
            )
        return self

    @property
    def folder(self) -> str | None:
        """The local folder of the data, or None where they are on the Hub."""
        return self.data if _is_local(self.data) else None

    def task(self) -> Task:
        """Returns the task."""
        kind = KINDS[self.kind]
        last = Path(self.data).name or "data"
        return Task(
            name=self.name or re.sub(r"[^a-z0-9._-]", "-", last.lower()),
            kind=self.kind,
            columns=self.columns or kind.columns,
            label=kind.label if self.label is None or not kind.label else self.label,
            labels=self.labels,
            metrics=expanded(self.metrics) or kind.defaults,
            evaluation_split=self.evaluation_split,
            training_split=self.training_split,
            dataset=f"./{last}" if _is_local(self.data) else self.data,
            dataset_config=self.config,
            generation=self._generation(kind.generation),
        )

    def _generation(self, usual: Generation | None) -> Generation | None:
        if usual is None:
            return None
        return Generation(tokens=self.answer_tokens or usual.tokens, beams=self.beams or usual.beams)


def task_of(name: str, recipe: Mapping[str, Any]) -> Task:
    """Returns the task of a report: the one that its recipe describes, or the known one of that name.

    It is judged by the further metrics that the recipe names, too.

    Raises:
        CheckpointError: The recipe's description is not valid.
        DataError: There is no task of that name.
    """
    described, asked = recipe.get("task"), recipe.get("evaluation")
    more = asked.get("metrics") if isinstance(asked, Mapping) else None
    names = tuple(map(str, more)) if isinstance(more, list | tuple) else ()
    if not isinstance(described, Mapping):
        return judged_by(get_task(name), names)
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in described.items()
    }
    try:
        return judged_by(TaskConfig(**values).task(), names)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"the report's task is not valid: {error}") from None


def _is_local(data: str) -> bool:
    return data.startswith(("/", "./", "../"))


assert set(get_args(KindName)) == set(KINDS)
