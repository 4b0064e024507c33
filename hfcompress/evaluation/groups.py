"""Groups of examples by any column of the data: who pays for what the mean does not show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from hfcompress.configuration import suggest
from hfcompress.errors import DataError
from hfcompress.evaluation.records import STRICT, Count, Figure

if TYPE_CHECKING:
    from datasets import Dataset

MOST_GROUPS = 20
# A share of fewer examples says little: one answer more or less moves it by five points.
FEWEST_EXAMPLES = 20


@dataclass(frozen=True, kw_only=True)
class GroupChange:
    """What became of the examples of one group.

    Attributes:
        column: The column that groups are made by.
        group: Its value in this group, or a range of its values.
        examples: How many examples are in it.
        before: The share of them that the original got right.
        after: The share that this model gets right.
    """

    __pydantic_config__ = STRICT

    column: str
    group: str
    examples: Count
    before: Figure
    after: Figure


def group_labels(rows: Dataset, columns: Sequence[str]) -> dict[str, list[str]]:
    """Returns each row's group, by column.

    A column of at most `MOST_GROUPS` values makes a group of each value, with a class label's own name. One of more
    numbers is cut into four ranges that hold a quarter of the rows each; texts are grouped by how many words they
    have, in the same way.

    Raises:
        DataError: A column is not in the data, or holds neither numbers nor text.
    """
    labels = {}
    for column in columns:
        if column not in rows.column_names:
            raise DataError(f"evaluation.groups: no column '{column}'; {suggest(column, rows.column_names)}")
        values = list(rows[column])
        names = getattr(rows.features[column], "names", None)
        if names is not None:
            values = [names[value] if 0 <= value < len(names) else str(value) for value in values]
        kinds = {type(value) for value in values if value is not None}
        if not kinds <= {str, bool, int, float}:
            raise DataError(f"evaluation.groups: column '{column}' holds neither numbers nor text")
        if len(set(values)) <= MOST_GROUPS:
            labels[column] = [str(value) for value in values]
        elif kinds <= {int, float, bool}:
            labels[column] = _ranges([math.nan if value is None else float(value) for value in values], "")
        else:
            labels[column] = _ranges([float(len(str(value or "").split())) for value in values], " words")
    return labels


def group_changes(groups: Mapping[str, Sequence[str]], right: Sequence[tuple[bool, bool]]) -> tuple[GroupChange, ...]:
    """Returns what became of each group, in the order in which groups are met.

    Args:
        groups: Each example's group, by column.
        right: Whether the original and this model have it right, in the same order.

    Raises:
        DataError: There are not as many examples as a column has values.
    """
    changes = []
    for column, labels in groups.items():
        if len(labels) != len(right):
            raise DataError(
                f"evaluation.groups: '{column}' has {len(labels)} values for {len(right)} examples",
                hint="Groups are for tasks where each row is one example.",
            )
        for group in sorted(set(labels), key=_in_order):
            own = [pair for label, pair in zip(labels, right, strict=True) if label == group]
            before, after = (sum(pair[place] for pair in own) / len(own) for place in (0, 1))
            changes.append(GroupChange(column=column, group=group, examples=len(own), before=before, after=after))
    return tuple(changes)


def worst_group(changes: Sequence[GroupChange]) -> GroupChange | None:
    """Returns the group of at least `FEWEST_EXAMPLES` that lost most, or None where none lost."""
    lost = [each for each in changes if each.examples >= FEWEST_EXAMPLES and each.after < each.before]
    return min(lost, key=lambda each: each.after - each.before, default=None)


def _ranges(values: Sequence[float], unit: str) -> list[str]:
    import numpy as np

    known = np.array([value for value in values if math.isfinite(value)])
    cuts = sorted({float(cut) for cut in np.quantile(known, [0.25, 0.5, 0.75], method="lower")}) if len(known) else []
    if not cuts:
        return ["none"] * len(values)
    between = [f"over {low:g} to {high:g}{unit}" for low, high in pairwise(cuts)]
    names = [f"to {cuts[0]:g}{unit}", *between, f"over {cuts[-1]:g}{unit}"]
    places = np.searchsorted(cuts, values, side="left")
    return [names[place] if math.isfinite(value) else "none" for place, value in zip(places, values, strict=True)]


def _in_order(label: str) -> tuple[float, str]:
    """Sorts ranges and numbers by where they begin, and all else by name."""
    first, _, rest = label.partition(" ")
    number = rest.partition(" ")[0] if first in ("to", "over") else label
    try:
        # `to 5` comes before `over 5 to 9`.
        return float(number) - (0.5 if first == "to" else 0.0), label
    except ValueError:
        return math.inf, label
