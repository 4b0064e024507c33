"""The base of every configuration: frozen, strict, and explaining all of its problems at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from hfcompress.errors import ConfigError, Problem


class Config(BaseModel):
    """A frozen set of named values that checks itself.

    Unknown names, wrong types (`True` is no integer, `"8"` is no number) and values outside their
    range are refused together. A subclass is the only home of its defaults.

    Raises:
        ConfigError: With one `Problem` for every field that is wrong.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = tuple(_explain(type(self), details) for details in error.errors())
            raise ConfigError(type(self).__name__, problems) from None


def suggest(name: str, allowed: Iterable[str]) -> str:
    """Returns a phrase with the nearest right name, where one is near, and all the allowed ones."""
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    meant = f"did you mean '{near[0]}'? " if near else ""
    return f"{meant}allowed: {', '.join(names)}"


def _explain(cls: type[Config], details: ErrorDetails) -> Problem:
    path = tuple(details["loc"])
    if details["type"] == "extra_forbidden":
        return Problem(path, f"unknown field; {suggest(str(path[-1]), cls.model_fields)}")
    if details["type"] == "missing":
        return Problem(path, "is required")
    if details["type"] == "value_error":
        return Problem(path, str(details.get("ctx", {}).get("error")))
    said = details["msg"].removeprefix("Input ")
    return Problem(path, f"{said}, not {details['input']!r}")
