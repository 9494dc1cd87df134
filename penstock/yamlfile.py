"""YAML read the way a person means it: `NO` and `010` stay what was written, and every value knows its line.

The scalars are YAML 1.2's: only `true` and `false` are booleans, only decimal digits (and `0x…`, `0o…`) numbers, and a number remembers its text.
Duplicate keys, language tags and several documents are refused; size, depth and what aliases unfold to are bounded, so that no file can take the
program down (the C library's own composer overflows its stack on deep nesting, so only its events are used).
"""

import re
from collections.abc import Iterator
from typing import Any

import msgspec
import yaml  # type: ignore[import-untyped]

MAX_BYTES = 1024 * 1024
MAX_DEPTH = 64
MAX_VALUES = 50_000

Path = tuple[str | int, ...]

_INT = re.compile(r"[-+]?[0-9]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_LARGEST_NUMBER = 4096  # characters; Python refuses to read longer integers


class YamlProblem(Exception):
    """The text is not YAML, or not YAML that is taken here. `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


class WrittenInt(int):
    """An integer that remembers how it was written."""

    text: str


class WrittenFloat(float):
    """A number that remembers how it was written."""

    text: str


class Document(msgspec.Struct, frozen=True):
    """A file's value, and the line of each value in it by path."""

    value: Any
    lines: dict[Path, int]

    def line(self, path: Path) -> int:
        """The line of the value, or of the nearest one around it."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def read_yaml(text: str | bytes) -> Document:
    """The one document in the text (None for an empty one). Raises YamlProblem."""
    if len(text) > MAX_BYTES:
        raise YamlProblem(1, f"is larger than {MAX_BYTES // 1024} KiB")
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return _Reader(_events(loader(text))).document()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlProblem(mark.line + 1 if mark else 1, " ".join(filter(None, (error.context, error.problem)))) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise YamlProblem(1, f"is not text: {error}") from error


def _events(loader: Any) -> Iterator[Any]:
    try:
        while loader.check_event():
            yield loader.get_event()
    finally:
        loader.dispose()


class _Reader:
    """Builds values from the parser's events."""

    def __init__(self, events: Iterator[Any]) -> None:
        self._events = events
        self._anchors: dict[str, tuple[Any, int]] = {}  # value, and how many values it is
        self._count = 0
        self._lines: dict[Path, int] = {}

    def document(self) -> Document:
        value = None
        documents = 0
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise YamlProblem(event.start_mark.line + 1, "holds more than one document (`---`)")
            elif isinstance(event, yaml.NodeEvent):
                value = self._value(event, ())
        return Document(value, self._lines)

    def _value(self, event: Any, path: Path) -> Any:
        line = event.start_mark.line + 1
        self._lines.setdefault(path, line)
        before = self._count
        self._counted(1, line)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in self._anchors:
                raise YamlProblem(line, f"the alias `*{event.anchor}` refers to nothing before it")
            value, size = self._anchors[event.anchor]
            self._counted(size, line)
            return value
        if len(path) >= MAX_DEPTH:
            raise YamlProblem(line, f"is nested more than {MAX_DEPTH} deep")
        if event.tag and event.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:map", "tag:yaml.org,2002:seq", "!"):
            raise YamlProblem(line, f"the tag `{event.tag.replace('tag:yaml.org,2002:', '!!')}` is not taken here")
        if isinstance(event, yaml.ScalarEvent):
            value = event.value if event.style or event.tag else _scalar(event.value, line)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = [self._value(item, (*path, i)) for i, item in enumerate(self._until(yaml.SequenceEndEvent))]
        else:
            value = self._mapping(path)
        if event.anchor:
            self._anchors[event.anchor] = value, self._count - before
        return value

    def _mapping(self, path: Path) -> dict[str, Any]:
        value: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for event in self._until(yaml.MappingEndEvent):
            line = event.start_mark.line + 1
            if not isinstance(event, yaml.ScalarEvent):
                raise YamlProblem(line, "a key must be plain text")
            key = event.value
            inner = self._value(next(self._events), (*path, key))
            if key == "<<" and not event.style:
                for other in reversed(inner if isinstance(inner, list) else [inner]):
                    if not isinstance(other, dict):
                        raise YamlProblem(line, "`<<` merges mappings only")
                    merged |= other
            elif key in value:
                raise YamlProblem(line, f"the key `{key}` is there twice")
            else:
                value[key] = inner
                self._lines[(*path, key)] = line
        return merged | value

    def _until(self, end: type) -> Iterator[Any]:
        while not isinstance(event := next(self._events), end):
            yield event

    def _counted(self, values: int, line: int) -> None:
        self._count += values
        if self._count > MAX_VALUES:
            raise YamlProblem(line, f"holds more than {MAX_VALUES:,} values once its aliases are unfolded")


def _scalar(text: str, line: int) -> Any:
    """What a scalar without quotes means."""
    if text in ("", "~", "null", "Null", "NULL"):
        return None
    if text in ("true", "True", "TRUE", "false", "False", "FALSE"):
        return text.lower() == "true"
    number: WrittenInt | WrittenFloat
    if len(text) > _LARGEST_NUMBER:
        return text
    if _INT.fullmatch(text):
        number = WrittenInt(text)
    elif _HEX.fullmatch(text):
        number = WrittenInt(text, 0)
    elif _FLOAT.fullmatch(text):
        number = WrittenFloat(text)
    else:
        return text
    number.text = text
    return number
