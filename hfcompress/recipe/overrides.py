"""`--set steps.low_rank.keep=0.4`: finds the place that an override names and puts its value there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from hfcompress.configuration import suggest
from hfcompress.recipe.document import Document, KeyPath, Place, read_document

STEP_FIELDS = ("name", "training", "calibration")


class _NoSuchPlaceError(Exception):
    """The path leads nowhere; the message says where it could lead."""


def apply_overrides(document: Document, overrides: Iterable[str], methods: Collection[str]) -> None:
    """Replaces values of a document, or adds findings to it where an override makes no sense.

    Args:
        document: The recipe's document.
        overrides: Texts such as `seed=1`, `steps.low_rank.keep=0.4`, `steps.<name>.training.epochs=1`.
        methods: The names of the known methods.
    """
    for text in overrides:
        key, sign, value = text.partition("=")
        place = Place(source=f"--set {text[:80]}", line=0)
        keys = tuple(key.strip().split("."))
        if not sign or not all(keys):
            document.complain((), "should look like steps.low_rank.keep=0.4", place=place)
            continue
        part = read_document(value, str(place))
        try:
            path = _resolve(document.values, keys, methods)
            _make_room(document.values, path)
        except _NoSuchPlaceError as error:
            document.complain((), str(error), place=place)
        else:
            document.graft(path, part, place)


def step_name(step: Any, methods: Collection[str]) -> str:
    """Returns what a step is called: its own name, else its methods joined with `+`, else `fine_tune`."""
    if not isinstance(step, Mapping):
        return ""
    if isinstance(name := step.get("name"), str):
        return name
    return "+".join(method for method in methods if method in step) or "fine_tune"


def _resolve(values: Any, keys: tuple[str, ...], methods: Collection[str]) -> KeyPath:
    if keys[0] != "steps" or len(keys) == 1:
        return keys
    steps = values.get("steps") if isinstance(values, Mapping) else None
    if not isinstance(steps, tuple):
        raise _NoSuchPlaceError("the recipe has no list of steps")
    named, rest = keys[1], keys[2:]
    called = [index for index, step in enumerate(steps) if step_name(step, methods) == named]
    holding = [
        index for index, step in enumerate(steps) if named in methods and isinstance(step, Mapping) and named in step
    ]
    of_step = bool(rest) and (rest[0] in STEP_FIELDS or rest[0] in methods)
    if len(called) == 1 and (of_step or not holding):
        return ("steps", called[0], *rest)
    if len(holding) == 1:
        return ("steps", holding[0], named, *rest)
    if holding or called:
        names = ", ".join(step_name(steps[index], methods) for index in holding or called)
        raise _NoSuchPlaceError(f"{len(holding or called)} steps answer to '{named}' ({names}); give each a name")
    known = {step_name(step, methods) for step in steps} | {
        key for step in steps if isinstance(step, Mapping) for key in step if key in methods
    }
    raise _NoSuchPlaceError(f"no step is called '{named}' or holds it; {suggest(named, known - {''})}")


def _make_room(values: Any, path: KeyPath) -> None:
    """Creates the mappings that a path goes through, so that a field can be set in a part left out."""
    holder = values
    for depth, key in enumerate(path[:-1]):
        if isinstance(holder, dict):
            if holder.get(str(key)) is None:
                holder[str(key)] = {}
            holder = holder[str(key)]
        elif isinstance(holder, tuple) and isinstance(key, int):
            holder = holder[key]
        else:
            raise _NoSuchPlaceError(f"{_name(path[:depth])} holds no fields, so there is no '{key}' in it")
    if not isinstance(holder, dict):
        raise _NoSuchPlaceError(f"{_name(path[:-1])} holds no fields, so there is no '{path[-1]}' in it")


def _name(path: KeyPath) -> str:
    return ".".join(str(key) for key in path) or "the recipe"
