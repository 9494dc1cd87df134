"""Secrets in plans: `((name))` stands for the value of one, in a task's params and in an image's source and params, and nowhere else. Pure.

A name with slashes is the gateway's own, for a value that came as it is under a name that looks secret: it belongs to one build.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from proto.plan import Plan, Stage, TaskConfig

NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
MAX_VALUE = 64 << 10
"""Bytes of one value (UTF-8)."""
MAX_TOGETHER = 512 << 10
"""Bytes of all values of one stage: a package carries them, and the bus carries it."""
OWN = "build/"
"""How the names of what the gateway keeps for a build begin: `build/<build>/<number>`."""

_REFERENCE = re.compile(r"\(\(([-/.:@\"\w]+)\)\)", re.ASCII)  # as Concourse's: `$((i + 1))` stays what it is
_LOOKS = re.compile(r"passw|secret|token|key|client_?id|credential", re.IGNORECASE)


def looks_secret(name: str) -> bool:
    """Whether what is called so is likely to be one."""
    return _LOOKS.search(name) is not None


def parts(text: str) -> list[tuple[str, bool]]:
    """The text in pieces: (a reference's name, True) or (literal text, False)."""
    pieces = _REFERENCE.split(text)
    return [(piece, bool(i % 2)) for i, piece in enumerate(pieces) if piece or i % 2]


def substituted(value: Any, secrets: Mapping[str, str]) -> Any:
    """`value` (text, or lists and mappings of it) with each reference replaced. Raises KeyError with the name of one that `secrets` lacks."""
    return mapped(value, lambda text, _: _REFERENCE.sub(lambda match: secrets[match[1]], text) if "((" in text else text)


def mapped(value: Any, change: Callable[[str, tuple[str, ...]], str], path: tuple[str, ...] = ()) -> Any:
    """`value` with each text in it changed; `change` is given the text and the keys that lead to it."""
    if isinstance(value, str):
        return change(value, path)
    if isinstance(value, Mapping):
        return {key: mapped(inner, change, (*path, str(key))) for key, inner in value.items()}
    if isinstance(value, list):
        return [mapped(inner, change, (*path, str(i))) for i, inner in enumerate(value)]
    return value


def stage_references(stage: Stage) -> set[str]:
    """The names of the secrets that a stage's steps need."""
    return {name for step in stage.steps for _, name in _references(step.config)}


def plan_references(plan: Plan) -> Iterator[tuple[str, str]]:
    """(path in the plan, name) of every reference that a secret is to stand for."""
    for i, stage in enumerate(plan.stages):
        for j, step in enumerate(stage.steps):
            for path, name in _references(step.config):
                yield f"stages[{i}].steps[{j}].config.{path}", name


def misplaced(plan: Plan) -> tuple[str, str] | None:
    """(path, rule) of the first reference that stands where no secret may: in what names an image."""
    for i, stage in enumerate(plan.stages):
        for j, step in enumerate(stage.steps):
            resource = step.config.image_resource
            named = {
                "image": step.config.image or "",
                "rootfs_uri": step.config.rootfs_uri or "",
                "image_resource.type": resource.type if resource else "",
                "image_resource.source.repository": str(resource.source.get("repository", "")) if resource else "",
                "image_resource.source.tag": str(resource.source.get("tag", "")) if resource else "",
            }
            for path, text in named.items():
                if _REFERENCE.search(text):
                    return f"stages[{i}].steps[{j}].config.{path}", "no secret may stand in what names an image: names are for everyone to read"
    return None


def _references(config: TaskConfig) -> Iterator[tuple[str, str]]:
    found: list[tuple[str, str]] = []

    def look(text: str, path: tuple[str, ...]) -> str:
        if "((" in text:
            found.extend((".".join(path), name) for name in _REFERENCE.findall(text))
        return text

    mapped(config.params, look, ("params",))
    if config.image_resource is not None:
        mapped(config.image_resource.source, look, ("image_resource", "source"))
        mapped(config.image_resource.params, look, ("image_resource", "params"))
    return iter(found)
