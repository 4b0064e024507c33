"""What becomes of a figure that is checked, and how two values are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

State = Literal["holds", "fails", "not checked"]

# Answers are compared one by one; of what is computed from them floats keep this much on any machine.
EXACT = 1e-6
# Numbers that a model computes are alike, as shares of them, on machines that add up in other orders.
ALIKE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Check:
    """What became of one figure, or of some that belong together.

    Attributes:
        figure: Which.
        state: Whether it holds.
        said: What was found.
    """

    figure: str
    state: State
    said: str = ""


def holds(checks: Sequence[Check]) -> bool:
    """Tells whether nothing fails."""
    return all(check.state != "fails" for check in checks)


def check(figure: str, right: bool, said: str) -> Check:
    """Returns what became of a figure."""
    return Check(figure=figure, state="holds" if right else "fails", said=said)


def equal(figure: str, stated: object, found: object, *, shown: bool = True) -> Check:
    """Holds where both are the same; values that are long are not shown."""
    said = f"{stated}" if stated == found else f"{stated} in the report, {found} found"
    return check(figure, stated == found, said if shown else "" if stated == found else "others were found")


def close(figure: str, stated: float | None, found: float, *, within: float = EXACT) -> Check:
    """Holds where both numbers are the same, as shares of the one that was found, or both undefined."""
    stated = math.nan if stated is None else stated
    margin = within * max(1, abs(found))
    right = stated == found or abs(stated - found) <= margin or (math.isnan(stated) and math.isnan(found))
    return check(figure, right, f"{found:.4f}" if right else f"{stated:.6f} in the report, {found:.6f} found")


def alike(stated: Any, found: Any) -> bool:
    """Compares two records, floats to `EXACT`."""
    if isinstance(found, dict):
        return (
            isinstance(stated, dict)
            and stated.keys() == found.keys()
            and all(alike(stated[key], found[key]) for key in found)
        )
    if isinstance(found, list | tuple):
        return isinstance(stated, list | tuple) and len(stated) == len(found) and all(map(alike, stated, found))
    if isinstance(found, float) and isinstance(stated, float):
        margin = EXACT * max(1, abs(found))
        return stated == found or abs(stated - found) <= margin or (math.isnan(stated) and math.isnan(found))
    return stated == found


def agreement(kept: Sequence[Any], now: Sequence[Any]) -> str:
    """Returns what differs between two models' answers, or nothing."""
    if len(kept) != len(now):
        return f"{len(kept)} were kept, {len(now)} given now"
    other = sum(not _same_answer(one, two) for one, two in zip(kept, now, strict=True))
    return f"{other} of {len(now)} differ from those that the run kept" if other else ""


def _same_answer(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_same_answer, one, other))
    return one == other if isinstance(one, str) else math.isclose(one, other, rel_tol=ALIKE, abs_tol=ALIKE)
