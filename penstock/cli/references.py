"""How a command line names what is stored: `ID[/path]`, `artifact:ID[/path]`, `build:N/output[/path]`."""

import os
import re
from typing import Any

import click
import msgspec

from penstock.cli.quantities import readable_moment
from penstock.cli.running import Failure
from penstock.cli.terminal import printable
from penstock.cli.trees import Part, part_of
from penstock.client import Artifact, Build, Client, Expired, NotFound, TreeEntry

_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", re.IGNORECASE)
_BUILD = re.compile(r"#?([0-9]+)", re.ASCII)
WAYS = "an artifact's id (see `penstock artifact ls`), or build:N/output; both with /path or without"


class Reference(msgspec.Struct, frozen=True):
    """An artifact by id with a path in it; or, with a build, one of its outputs by `path`, which begins with the output's name. Paths have neither
    `.` nor `..` nor empty parts."""

    id: str = ""
    build: str = ""
    path: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (f"build:{self.build}" if self.build else f"artifact:{self.id}", self.path)))


class Found(msgspec.Struct, frozen=True):
    """What a reference means on the server: an artifact, and a path in it ("" for all of it). `given` is the reference, to be shown; `output` the
    output's name."""

    artifact: Artifact
    path: str
    given: str
    output: str = ""

    @property
    def reference(self) -> str:
        """The same for the server, which no later build can change."""
        return str(Reference(id=self.artifact.id, path=self.path))

    @property
    def name(self) -> str:
        """What to call a copy of it: what the path ends in, else the output's or the artifact's name where that is a name for a file, else the id."""
        names = (self.path.rpartition("/")[2], self.output.rpartition("/")[2], self.artifact.name)
        return next((name for name in names if name not in ("", ".", "..") and "/" not in name and name.isprintable()), self.artifact.id)


def is_reference(text: str) -> bool:
    """Whether it names something stored, rather than a folder here (which is never taken for it with a `./` before)."""
    return text.startswith(("artifact:", "build:")) or bool(_ID.fullmatch(text.partition("/")[0]))


def parse_reference(text: str) -> Reference:
    """Raises ValueError, which says what is wrong with it."""
    kind, colon, rest = text.partition(":")
    if not colon or kind not in ("artifact", "build"):
        kind, rest = "artifact", text
    first, _, path = rest.partition("/")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError(f"`{text}` leaves the artifact: a path in it has no `..`")
    if kind == "build":
        number = _BUILD.fullmatch(first)
        if not number and not _ID.fullmatch(first):
            raise ValueError(f"`{text}` names no build: it is build:N/output[/path] with a build's number or id")
        return Reference(build=number[1] if number else first.lower(), path="/".join(parts))
    if not _ID.fullmatch(first):
        raise ValueError(f"`{text}` names nothing stored: give {WAYS}")
    return Reference(id=first.lower(), path="/".join(parts))


class Ref(click.ParamType[Reference]):
    """A reference; `whole`: to all of an artifact, no part of it."""

    name = "ref"

    def __init__(self, *, whole: bool = False) -> None:
        self._whole = whole

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Reference:
        if isinstance(value, Reference):
            return value
        try:
            reference = parse_reference(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)
        if self._whole and reference.id and reference.path:
            self.fail(f"`{value}` is a part of an artifact, and only all of it can be meant: `{reference.id}`", param, ctx)
        return reference


async def find(client: Client, reference: Reference, *, whole: bool = False) -> Found:
    """Ask the server. Raises Failure, naming the reference, when it means nothing (any more)."""
    given = printable(str(reference))
    if reference.build:
        build = await client.build(reference.build)
        output, path = output_in(build, reference.path)
        if whole and path:
            raise Failure(f"{given} is a part of an artifact, and only all of it can be meant: build:{build.number}/{output}")
        return Found(await _artifact(client, build.outputs[output].id, given, build.number), path, given, output)
    return Found(await _artifact(client, reference.id, given), reference.path, given)


async def part_at(client: Client, found: Found) -> Part:
    """All that lies there. Raises Failure when nothing does."""
    part = part_of(await client.manifest(found.artifact.id), os.fsencode(found.path))
    if part is None:
        raise nothing(found)
    return part


async def look(client: Client, found: Found) -> TreeEntry | None:
    """The file or link that is there; None for a folder. Raises Failure when nothing is."""
    if found.path:
        try:
            async for entry in client.tree(found.artifact.id, os.fsencode(found.path)):
                return entry if entry.path_bytes == os.fsencode(found.path) else None
        except NotFound as error:
            raise nothing(found) from error
    return None


def nothing(found: Found) -> Failure:
    path = printable(found.path)
    whole = found.given.removesuffix(path).rstrip("/")
    return Failure(f"{found.given}: there is nothing at `{path}`; `penstock artifact ls -r {whole}` lists what there is")


async def _artifact(client: Client, artifact: str, given: str, build: int | None = None) -> Artifact:
    try:
        return await client.artifact(artifact)
    except Expired as error:
        again = f"run build {build}'s task again" if build else "upload it again with `penstock artifact upload`, or run again what made it"
        raise Failure(f"{given}: {error}; {again}") from error
    except NotFound as error:
        raise Failure(f"{given}: there is no such artifact; `penstock artifact ls` lists the team's") from error


def output_in(build: Build, path: str) -> tuple[str, str]:
    """The output that the path begins with, and the rest. In a build of several steps an output is called `step/name`; `name` will do where only
    one is called so. The only output needs no name."""
    if not path and len(build.outputs) == 1:
        return next(iter(build.outputs)), ""
    named = {key: key for key in build.outputs}
    short = [key.rpartition("/")[2] for key in build.outputs]
    named = {name: key for name, key in zip(short, build.outputs, strict=True) if short.count(name) == 1} | named
    matches = [name for name in named if path == name or path.startswith(f"{name}/")]
    if matches:
        name = max(matches, key=len)
        return named[name], path[len(name) + 1 :]
    wanted = f"no output `{path.partition('/')[0]}`" if path else "several outputs" if build.outputs else "no outputs"
    if not build.ended and (path or not build.outputs):
        raise Failure(f"build {build.number} is {build.status} and has {wanted} yet: wait with `penstock watch {build.number}`")
    there = ", ".join(f"build:{build.number}/{key}" for key in build.outputs)
    raise Failure(f"build {build.number} has {wanted}" + (f": there is {there}" if there else ""))


def lifetime(artifact: Artifact) -> str:
    """Until when it is kept, in words."""
    if artifact.pinned:
        return "pinned"
    return f"kept until {readable_moment(artifact.expires_at)}" if artifact.expires_at else "kept forever"
