"""What the records of a run are made of: strict fields, and numbers that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field

# JSON has no NaN: an undefined figure is null in the file.
Figure = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
Count = Annotated[int, Field(ge=0)]
# Answers: label ids, numbers, texts, or for each example a list of one of these.
Values = list[int] | list[float] | list[str] | list[list[int]] | list[list[float]] | list[list[str]]
STRICT = ConfigDict(strict=True, extra="forbid")


def plain(value: Any) -> Any:
    """Turns numbers that JSON does not have into null, however deep."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value
