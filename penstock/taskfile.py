"""Concourse's task file, read and checked before anything leaves this machine, and made into a plan of one stage with one `run` step.

Its types are exact: an unknown key or a wrong type is refused with file, line and path. What it says of placement (`platform`, `image`,
`image_resource`, `rootfs_uri`, `run.user`, `container_limits`) goes into the plan as it is.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import msgspec

from penstock.variables import MissingVariable, interpolate
from penstock.yamlfile import Document, Path, WrittenFloat, WrittenInt, YamlProblem, read_yaml

Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}$")]

_MEMORY = re.compile(r"([0-9]+)([kmg]?)b?", re.IGNORECASE)
_UNITS = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3}
_MEMORY_MOST = 2**63 - 1


class TaskFileProblem(Exception):
    """`file:line: path: what is wrong`, or without line and path where there is none."""


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of a task file; an unknown key is refused."""


class Run(_Part, frozen=True, kw_only=True):
    """The command."""

    path: Annotated[str, msgspec.Meta(min_length=1)]
    args: list[str] = []
    dir: str | None = None
    user: str | None = None


class Input(_Part, frozen=True, kw_only=True):
    """A folder that the task gets."""

    name: Name
    path: str | None = None
    optional: bool = False


class Output(_Part, frozen=True, kw_only=True):
    """A folder that the task fills."""

    name: Name
    path: str | None = None


class Cache(_Part, frozen=True, kw_only=True):
    """A folder that a later run may find again."""

    path: str


class ImageResource(_Part, frozen=True, kw_only=True):
    """The image that the task wants."""

    type: str
    source: dict[str, Any] = {}
    params: dict[str, Any] = {}
    version: dict[str, str] | None = None


class Limits(_Part, frozen=True, kw_only=True):
    """`cpu` in shares; `memory` in bytes or with a unit: 512mb, 1GB."""

    cpu: Annotated[int, msgspec.Meta(ge=0)] | None = None
    memory: int | str | None = None


class Task(_Part, frozen=True, kw_only=True):
    """The whole file; `params` are text by now. Ours, not Concourse's, are `image`, a plain reference, and `network`: a container has none else."""

    run: Run
    platform: str = "linux"
    image: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    image_resource: ImageResource | None = None
    network: bool = False
    rootfs_uri: str | None = None
    inputs: list[Input] = []
    outputs: list[Output] = []
    caches: list[Cache] = []
    params: dict[str, str] = {}
    container_limits: Limits | None = None


def read_task(name: str, text: str | bytes, variables: Mapping[str, Any], environ: Mapping[str, str]) -> Task:
    """The task in the file `name`. Params that are null take the environment variable of their name, and so, as with fly, does every other one
    that has one. Raises TaskFileProblem."""
    try:
        document = read_yaml(text)
    except YamlProblem as problem:
        raise TaskFileProblem(f"{name}:{problem.line}: {problem.message}") from problem
    if not isinstance(document.value, dict):
        raise TaskFileProblem(f"{name}: is not a task file: it must be a mapping with at least `run`")
    return _Check(name, document).task(variables, environ)


def overridden_params(text: str | bytes, environ: Mapping[str, str]) -> list[str]:
    """The params with a value of their own that the environment replaces."""
    value = read_yaml(text).value
    params = value.get("params") if isinstance(value, dict) else None
    return [key for key, own in params.items() if own is not None and key in environ] if isinstance(params, dict) else []


def plan_of(
    task: Task,
    *,
    arguments: Sequence[str] = (),
    tags: Sequence[str] = (),
    timeout: int | None = None,
    image: str | None = None,
    privileged: bool = False,
) -> dict[str, Any]:
    """The plan that runs the task: `arguments` go after its own, `timeout` is in seconds, `image` instead of its own."""
    if image is not None:
        task = msgspec.structs.replace(task, image=image, image_resource=None, rootfs_uri=None)
    config: dict[str, Any] = msgspec.to_builtins(task)
    if arguments:
        config["run"]["args"] = [*task.run.args, *arguments]
    step: dict[str, Any] = {"step": "run", "name": "task", "config": config}
    if timeout is not None:
        step["timeout"] = timeout
    if privileged:
        step["privileged"] = True
    stage: dict[str, Any] = {"name": "task", "steps": [step]}
    if tags:
        stage["tags"] = list(tags)
    return {"stages": [stage]}


class _Check:
    """From a document to a task; every refusal names file, line and path."""

    def __init__(self, name: str, document: Document) -> None:
        self._name = name
        self._document = document

    def task(self, variables: Mapping[str, Any], environ: Mapping[str, str]) -> Task:
        try:
            value = interpolate(self._document.value, variables)
        except MissingVariable as missing:
            given = f"give it with `-v {missing.name}=…`, `-y {missing.name}=…` or `-l file.yml`"
            message = f"the variable `(({missing.name}))` has no value: {given}" if missing.absent else missing.why
            raise self._problem(missing.path, message) from missing
        value["params"] = self._params(value.get("params"), environ)
        try:
            task = msgspec.convert(_plain(value), Task)
        except msgspec.ValidationError as error:
            raise self._type_problem(error) from error
        return self._checked(task)

    def _params(self, params: Any, environ: Mapping[str, str]) -> dict[str, str]:
        if params is None:
            return {}
        if not isinstance(params, dict):
            raise self._problem(("params",), f"must be a mapping, not {_kind(params)}")
        texts: dict[str, str] = {}
        for key, value in params.items():
            if not key or "=" in key or "\0" in key:
                raise self._problem(("params", key), "is no name for an environment variable")
            if key in environ:
                texts[key] = environ[key]
            elif value is None:
                raise self._problem(("params", key), f"has no value and must be supplied: set it in the environment, `{key}=… penstock execute …`")
            else:
                texts[key] = _text(value)
            if "\0" in texts[key]:
                raise self._problem(("params", key), "holds a NUL, which no environment variable can")
        return texts

    def _checked(self, task: Task) -> Task:
        folders: tuple[tuple[str, Sequence[Input | Output]], ...] = (("inputs", task.inputs), ("outputs", task.outputs))
        for kind, items in folders:
            names: set[str] = set()
            for i, item in enumerate(items):
                if item.name in names:
                    raise self._problem((kind, i, "name"), f"`{item.name}` is named twice")
                names.add(item.name)
                self._stays_inside((kind, i, "path"), item.path)
        for i, cache in enumerate(task.caches):
            self._stays_inside(("caches", i, "path"), cache.path)
        self._stays_inside(("run", "dir"), task.run.dir)
        if task.image is not None and (task.image_resource or task.rootfs_uri):
            raise self._problem(("image",), "is named twice: `image_resource` or `rootfs_uri` does it too")
        if task.container_limits and task.container_limits.memory is not None:
            memory = self._memory(task.container_limits.memory)
            return msgspec.structs.replace(task, container_limits=msgspec.structs.replace(task.container_limits, memory=memory))
        return task

    def _stays_inside(self, path: Path, folder: str | None) -> None:
        if folder is not None and (folder == "" or folder.startswith("/") or ".." in folder.split("/") or "\0" in folder):
            raise self._problem(path, f"`{folder}` must be a folder inside the workspace: relative, without `..`")

    def _memory(self, memory: int | str) -> int:
        match = _MEMORY.fullmatch(memory.strip()) if isinstance(memory, str) else None
        size = memory if isinstance(memory, int) else int(match[1]) * _UNITS[match[2].lower()] if match and len(match[1]) < 20 else -1
        if not 0 <= size <= _MEMORY_MOST:
            raise self._problem(("container_limits", "memory"), f"`{memory}` is no size: a number of bytes, or like 512mb or 1GB")
        return size

    def _type_problem(self, error: msgspec.ValidationError) -> TaskFileProblem:
        """msgspec's `Expected `str`, got `int` - at `$.run.path`` in our words."""
        message, _, where = str(error).partition(" - at ")
        path: Path = tuple(int(index) if index else key for key, index in re.findall(r"\.([^.\[\]`]+)|\[(\d+)\]", where))
        if match := re.search(r"unknown field `(.*)`", message):
            return self._problem((*path, match[1]), "there is no such key in a task file")
        if match := re.search(r"missing required field `(.*)`", message):
            return self._problem((*path, match[1]), "is missing")
        if match := re.fullmatch(r"Expected `(.*)`, got `(.*)`", message):
            wanted = " or ".join(dict.fromkeys(_KINDS.get(kind, kind) for kind in match[1].split(" | ") if kind != "null"))
            hint = ": put it in quotes" if "str" in match[1] and match[2] in ("int", "float", "bool") else ""
            return self._problem(path, f"must be {wanted}, not {_KINDS.get(match[2], match[2])}{hint}")
        if "matching regex" in message:
            return self._problem(path, "must be a name: letters, digits, `_`, `-`, `.`; at most 64")
        if "length >= 1" in message:
            return self._problem(path, "is empty")
        return self._problem(path, message)

    def _problem(self, path: Path, message: str) -> TaskFileProblem:
        shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
        return TaskFileProblem(f"{self._name}:{self._document.line(path)}: {shown}: {message}")


_KINDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "nothing",
}


def _kind(value: object) -> str:
    kinds: list[tuple[type, str]] = [(str, "str"), (bool, "bool"), (int, "int"), (float, "float"), (list, "array"), (dict, "object")]
    return _KINDS[next((kind for type_, kind in kinds if isinstance(value, type_)), "null")]


def _text(value: Any) -> str:
    """A param as an environment variable has it: numbers as they were written, true and false, structures as JSON (as Concourse does)."""
    if isinstance(value, str):
        return value
    if isinstance(value, WrittenInt | WrittenFloat):
        return value.text
    return msgspec.json.encode(_plain(value)).decode()


def _plain(value: Any) -> Any:
    """Without the numbers' memory of how they were written."""
    if isinstance(value, WrittenInt):
        return int(value)
    if isinstance(value, WrittenFloat):
        return float(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value
