"""`((name))` in a task file: given by `-v name=text`, `-y name=yaml` and `-l file.yml`, as with fly.

A value that is nothing but a variable takes its value, type included; inside other text it must be plain. `((name.field))` looks into a mapping;
a part with dots of its own is quoted: `(("a.b".field))`. What stands on the command line wins over files, a later file over an earlier one.
In params, and in what an image's source and params hold, one that has no value stays as it is: there it may be a secret that the server has.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from penstock.yamlfile import Path, WrittenFloat, WrittenInt, YamlProblem, read_yaml

_REFERENCE = re.compile(r"\(\(([-/.:@\"\w]+)\)\)")  # as Concourse's: `$((i + 1))` in a script stays what it is
_PART = re.compile(r'"([^"]+)"|([^."]+)')
_SECRET = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_NAME = re.compile(r'("[^"]+"|[^."]+)(\.("[^"]+"|[^."]+))*')


class VariableProblem(Exception):
    """A variable on the command line, or a file of them, that cannot be read."""


class MissingVariable(Exception):
    """A variable at `path` that has no value (`absent`), or one that does not fit where it stands (`why`)."""

    def __init__(self, name: str, path: Path, why: str = "") -> None:
        super().__init__(why or f"(({name})) has no value")
        self.name = name
        self.path = path
        self.why = why
        self.absent = not why


def gather_variables(texts: Sequence[str], yamls: Sequence[str], files: Sequence[tuple[str, bytes]]) -> dict[str, Any]:
    """All variables: `texts` and `yamls` are `name=value`, `files` names with contents. Raises VariableProblem."""
    variables: dict[str, Any] = {}
    for name, content in files:
        try:
            value = read_yaml(content).value
        except YamlProblem as problem:
            raise VariableProblem(f"{name}:{problem.line}: {problem.message}") from problem
        if value is not None and not isinstance(value, dict):
            raise VariableProblem(f"{name}: is not a file of variables: it must be a mapping of names to values")
        variables |= value or {}
    for pair in texts:
        name, value = _pair("-v", pair)
        _set(variables, name, value)
    for pair in yamls:
        name, text = _pair("-y", pair)
        try:
            value = read_yaml(text).value
        except YamlProblem as problem:
            raise VariableProblem(f"-y {name}: {problem.message}") from problem
        _set(variables, name, value)
    return variables


def interpolate(value: Any, variables: Mapping[str, Any], path: Path = ()) -> Any:
    """The value with every variable in it replaced. Raises MissingVariable."""
    if isinstance(value, str):
        return _interpolated(value, variables, path)
    if isinstance(value, dict):
        return {str(_interpolated(key, variables, (*path, key))): interpolate(inner, variables, (*path, key)) for key, inner in value.items()}
    if isinstance(value, list):
        return [interpolate(inner, variables, (*path, i)) for i, inner in enumerate(value)]
    return value


def _interpolated(text: str, variables: Mapping[str, Any], path: Path) -> Any:
    whole = _REFERENCE.fullmatch(text)
    if whole:
        return _look_up(whole[1], variables, path)

    def plain(match: re.Match[str]) -> str:
        value = _look_up(match[1], variables, path)
        if isinstance(value, WrittenInt | WrittenFloat):
            return value.text
        if isinstance(value, bool):
            return "true" if value else "false"
        if isinstance(value, str):
            return value
        raise MissingVariable(match[1], path, f"`(({match[1]}))` is a list, a mapping or nothing, and cannot stand inside other text")

    return _REFERENCE.sub(plain, text)


def _look_up(name: str, variables: Mapping[str, Any], path: Path) -> Any:
    if _may_be_secret(name, path) and _parts(name)[0] not in variables:
        return f"(({name}))"
    if not _NAME.fullmatch(name):
        raise MissingVariable(name, path, f"`(({name}))` is no name of a variable")
    value: Any = variables
    for part in _parts(name):
        if not isinstance(value, Mapping) or part not in value:
            raise MissingVariable(name, path)
        value = value[part]
    return value


def _may_be_secret(name: str, path: Path) -> bool:
    place = (path[:1] == ("params",) and len(path) == 2) or path[:2] in (("image_resource", "source"), ("image_resource", "params"))
    return place and _SECRET.fullmatch(name) is not None


def _parts(name: str) -> list[str]:
    return [quoted or plain for quoted, plain in _PART.findall(name)]


def _pair(option: str, pair: str) -> tuple[str, str]:
    name, equals, value = pair.partition("=")
    if not equals or not _NAME.fullmatch(name):
        raise VariableProblem(f"{option} {pair}: must be name=value")
    return name, value


def _set(variables: dict[str, Any], name: str, value: Any) -> None:
    *outer, last = _parts(name)
    for part in outer:
        inner = variables.get(part)
        variables[part] = dict(inner) if isinstance(inner, dict) else {}
        variables = variables[part]
    variables[last] = value
