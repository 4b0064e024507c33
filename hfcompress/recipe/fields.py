"""Reads a config class out for people: each field's type, default, allowed values and meaning."""

from __future__ import annotations

import inspect
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from hfcompress.configuration import Config

_BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "length >=", "max_length": "length <="}


def describe_fields(config: type[Config]) -> list[dict[str, Any]]:
    """Returns name, type, required, default, allowed values and meaning of every field of a config."""
    told = _documented(config)
    return [
        {
            "name": name,
            "type": _type_name(info.annotation),
            "required": info.is_required(),
            "default": None if info.is_required() else to_jsonable_python(info.get_default(call_default_factory=True)),
            "allowed": _allowed(info),
            "description": info.description or told.get(name, ""),
        }
        for name, info in config.model_fields.items()
    ]


def _type_name(annotation: Any) -> str:
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(sorted({type(value).__name__ for value in inner}))
    if origin in (Union, types.UnionType):
        return " or ".join("null" if part is type(None) else _type_name(part) for part in inner)
    if origin is tuple:
        return f"list of {_type_name(inner[0])}"
    return "null" if annotation is type(None) else getattr(annotation, "__name__", str(annotation))


def _choices(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for part in get_args(annotation) for choice in _choices(part))


def _allowed(info: FieldInfo) -> str:
    if choices := _choices(info.annotation):
        return ", ".join(str(choice) for choice in choices)
    bounds = [
        f"{sign} {getattr(rule, bound)}"
        for rule in info.metadata
        for bound, sign in _BOUNDS.items()
        if getattr(rule, bound, None) is not None
    ]
    return ", ".join(bounds)


def _documented(config: type[Config]) -> dict[str, str]:
    """Returns the meanings that a class docstring gives under `Attributes:` or `Args:`."""
    section = re.search(r"(?:Attributes|Args):\n((?:[ \t]+.*\n?|\n)+)", inspect.getdoc(config) or "")
    if section is None:
        return {}
    entries = re.findall(r"^ {4}(\w+)(?: \(.*?\))?: (.*(?:\n {5,}.*)*)", section[1], re.MULTILINE)
    return {name: " ".join(meaning.split()) for name, meaning in entries}
