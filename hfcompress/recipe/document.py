"""Reads YAML strictly and remembers the place of everything, so that a finding can name its line.

Scalars follow YAML 1.2 (`1e-4` is a number; `no`, dates and `0123` are text). What a configuration
never needs and an attacker or an accident may use is refused: anchors, aliases, merge keys, tags,
duplicate keys, URLs, control characters, great size and great depth.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

MAX_BYTES = 1 << 20
MAX_DEPTH = 16

KeyPath = tuple[str | int, ...]

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,39})")
_NUMBER = re.compile(r"[-+]?(0|[1-9][0-9]{0,39})?(\.[0-9]{0,40})?([eE][-+]?[0-9]{1,5})?")
_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
}
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff]")


@dataclass(frozen=True, kw_only=True, order=True)
class Place:
    """Where a value was written: a line of a file (from 1), or an argument (line 0)."""

    line: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong: where it stands, under which keys, and what would be right."""

    place: Place
    path: KeyPath
    message: str


@dataclass
class Document:
    """A tree of dicts, tuples and scalars, with the place of every node.

    Attributes:
        source: What findings are reported against: a file's name, or an argument.
        values: The root.
        places: The place of each node by its path.
        findings: Everything found wrong so far.
    """

    source: str
    values: Any = None
    places: dict[KeyPath, Place] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    _refused: set[KeyPath] = field(default_factory=set)

    def place(self, path: KeyPath) -> Place:
        """Returns where a path was written, or the nearest thing that holds it."""
        for length in range(len(path), -1, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return Place(source=self.source, line=0)

    def complain(self, path: KeyPath, message: str, *, place: Place | None = None) -> None:
        """Adds a finding, unless the value it is about was refused already."""
        if not any(path[:length] in self._refused for length in range(1, len(path) + 1)):
            self.findings.append(Finding(place=place or self.place(path), path=path, message=message))

    def refuse(self, path: KeyPath, message: str) -> None:
        """Adds a finding about a value that nothing more shall be said about."""
        self.complain(path, message)
        self._refused.add(path)

    def graft(self, path: KeyPath, other: Document, place: Place) -> None:
        """Puts another document's root in a place of this one, whose parents are there already."""
        holder = self.values
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = other.values
        self.places = {old: at for old, at in self.places.items() if old[: len(path)] != path}
        self._refused = {old for old in self._refused if old[: len(path)] != path}
        self.findings = [old for old in self.findings if old.path[: len(path)] != path]
        self.places[path] = place
        self._refused |= {path + old for old in other._refused}
        for finding in other.findings:
            self.findings.append(Finding(place=place, path=path + finding.path, message=finding.message))


class _StopReadingError(Exception):
    """The text goes on in a way that cannot be followed."""


def read_document(text: str, source: str) -> Document:
    """Parses YAML text into a document whose findings tell what is wrong with it."""
    document = Document(source)
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        document.refuse((), f"is larger than {MAX_BYTES >> 10} KiB, which no recipe needs")
        return document
    try:
        _Reader(document, yaml.parse(text, Loader=yaml.SafeLoader)).read()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(source=source, line=mark.line + 1 if mark else 0)
        what = " ".join(str(part) for part in (error.context, error.problem) if part)
        document.complain((), f"is not YAML: {what}", place=place)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        document.complain((), f"is not YAML: {str(error).splitlines()[0]}")
    except _StopReadingError as error:
        document.complain((), str(error), place=document.places.get((), None))
    return document


@dataclass
class _Reader:
    document: Document
    events: Iterator[Any]

    def read(self) -> None:
        events = self.events
        next(events)
        if isinstance(next(events), yaml.StreamEndEvent):
            return
        self.document.values = self._node(next(events), ())
        next(events)
        if not isinstance(extra := next(events), yaml.StreamEndEvent):
            raise self._stop(extra, "holds a second document (`---`); one file is one recipe")

    def _stop(self, event: yaml.Event, message: str) -> _StopReadingError:
        self.document.places[()] = self._place(event)
        return _StopReadingError(message)

    def _place(self, event: Any) -> Place:
        return Place(source=self.document.source, line=event.start_mark.line + 1)

    def _node(self, event: Any, path: KeyPath) -> Any:
        self.document.places.setdefault(path, self._place(event))
        if len(path) > MAX_DEPTH:
            raise self._stop(event, f"is nested more than {MAX_DEPTH} levels deep")
        if isinstance(event, yaml.AliasEvent):
            self.document.refuse(path, f"an alias (*{event.anchor}) is not allowed; write the value out")
            return None
        if event.anchor:
            self.document.complain(path, f"an anchor (&{event.anchor}) is not allowed; write the value out")
        if event.tag:
            self.document.refuse(path, f"a tag ({event.tag}) is not allowed; remove it")
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path)
        return self._scalar(event, path)

    def _sequence(self, path: KeyPath) -> tuple[Any, ...]:
        values: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            values.append(self._node(event, (*path, len(values))))
        return tuple(values)

    def _mapping(self, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise self._stop(event, "a key must be a plain name")
            key, place = event.value, self._place(event)
            if event.anchor or event.tag:
                self.document.complain((*path, key), "a key takes no anchor and no tag", place=place)
            if key in values:
                first = self.document.places[(*path, key)].line
                message = f"is given twice (first in line {first}); keep one"
                self.document.complain((*path, key), message, place=place)
                self._skip(next(self.events))
                continue
            value_event = next(self.events)
            # A block's first inner key is a line below the name that people look for.
            at = self._place(value_event) if isinstance(value_event, yaml.ScalarEvent) else place
            self.document.places[(*path, key)] = at
            values[key] = self._node(value_event, (*path, key))
            if key == "<<":
                self.document.refuse((*path, key), "a merge key is not allowed; write the fields out")
        return values

    def _skip(self, event: yaml.Event) -> None:
        depth = 0
        while True:
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth == 0:
                return
            event = next(self.events)

    def _scalar(self, event: yaml.ScalarEvent, path: KeyPath) -> Any:
        value = _plain(event.value) if event.implicit[0] else event.value
        if isinstance(value, str):
            if "://" in value:
                self.document.refuse(path, "a URL is not allowed; give a Hub id or a local folder")
            elif _UNPRINTABLE.search(value):
                self.document.refuse(path, f"holds a character that cannot be printed: {value[:40]!a}")
        return value


def _plain(text: str) -> Any:
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text) and any(character.isdigit() for character in text.lower().partition("e")[0]):
        number = float(text)
        return number if math.isfinite(number) else text
    return text
