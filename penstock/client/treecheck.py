"""Whether a tree may be written to a disk. A manifest comes from outside: a server is not trusted with the user's files."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from penstock.client.errors import Damaged
from penstock.client.tree import CHUNK, DIGEST, FILE_MODE, PROGRAM_MODE, Entry, order

_LONGEST_PATH = 4096
_LONGEST_NAME = 255
_DEEPEST = 256
_MOST_FOLLOWED = 40
"""Links that lead through one another, as in Linux."""
_MOST_COMPONENTS = 256
_COMPONENTS_PER_LINK, _FREE_COMPONENTS = 16, 1 << 16
"""All links' targets together: following them costs time by components."""


class Limits(NamedTuple):
    """Bounds on one tree, as the server has them by default: `names` bounds all paths and link targets together, in bytes like `size`."""

    entries: int = 500_000
    size: int = 64 << 30
    names: int = 64 << 20

    @property
    def manifest(self) -> int:
        """Bytes of manifest that a tree inside the limits can need: names, 80 bytes an entry, 32 for each whole chunk of 8 MiB."""
        return self.names + self.entries * 80 + (self.size >> 18) + 4096


def limits_of(environ: Mapping[str, str]) -> Limits:
    """Raised as a server's are that keeps more: by `PENSTOCK_MAX_ARTIFACT_BYTES` and `PENSTOCK_MAX_ARTIFACT_FILES`."""
    size, files = (environ.get(f"PENSTOCK_MAX_ARTIFACT_{what}", "") for what in ("BYTES", "FILES"))
    usual = Limits()
    return Limits(2 * int(files) if files.isdecimal() else usual.entries, int(size) if size.isdecimal() else usual.size)


def shown(path: bytes) -> str:
    """A path for people."""
    text = path.decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 300 else f"{text[:150]}…{text[-150:]}"


class Check:
    """Looks at a tree's entries as they come: each must lie inside the folder, sorted, none twice, in folders that were named before, no link leading
    out, all within the limits. Raises Damaged that names the culprit."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._files: dict[bytes, Entry] = {}  # that hard links may name
        self._links: dict[bytes, bytes] = {}
        self._within: list[bytes] = []
        self._last = b""
        self._entries = self._names = self._size = 0

    def add(self, entry: Entry) -> None:
        path, within = entry.path, self._within
        _check_path(path)
        key = order(path)
        if key <= self._last:
            raise _refused(path, "is not in order, or there twice")
        self._last = key
        parent = path.rpartition(b"/")[0]
        while within and within[-1] != parent:
            within.pop()
        if parent and not within:
            raise _refused(path, "lies in no folder of it")
        if entry.kind == "folder":
            within.append(path)
        elif entry.kind == "link":
            self._links[path] = entry.target
        else:
            _check_file(entry, self._files)
            if not entry.target:
                self._size += entry.size
        self._entries += 1
        self._names += len(path) + len(entry.target)
        if self._entries > self._limits.entries or self._names > self._limits.names:
            most = f"{self._limits.entries} files and folders (PENSTOCK_MAX_ARTIFACT_FILES=… lets it have more)"
            raise _refused(path, f"takes it past {most}, or past {self._limits.names} bytes of names")
        if self._size > self._limits.size:
            raise _refused(path, f"takes it past {self._limits.size} bytes (PENSTOCK_MAX_ARTIFACT_BYTES=… lets it have more)")

    def finish(self) -> None:
        """All entries are there: where the links lead."""
        links = self._links
        components = sum(target.count(b"/") + 1 for target in links.values())
        if components > _FREE_COMPONENTS + _COMPONENTS_PER_LINK * len(links):
            raise Damaged(f"the artifact has links of more than {_COMPONENTS_PER_LINK} components each, taken together: nothing is written")
        ends: dict[bytes, tuple[bytes, int]] = {}
        for path in links:
            _end_of(path, links, ends, [])


def part_of(entries: Iterable[Entry], path: bytes) -> Iterator[Entry]:
    """The contents of a folder, as a tree of their own; or one file under its name. A hard link to what is left behind is a plain file."""
    start = path + b"/"
    moved: dict[bytes, bytes] = {}
    for entry in entries:
        if entry.path == path and entry.kind != "folder":
            name = path.rpartition(b"/")[2]
            yield msgspec.structs.replace(entry, path=name, target=entry.target if entry.kind == "link" else b"")
        elif entry.path.startswith(start):
            inner = entry.path[len(start) :]
            target = entry.target
            if entry.kind == "file" and entry.digest:
                first = target or entry.path
                target = moved.get(first, b"")
                moved.setdefault(first, inner)
            yield msgspec.structs.replace(entry, path=inner, target=target)


def _check_path(path: bytes) -> None:
    if b"\0" in path:
        raise _refused(path, "has a NUL in its path")
    if not path or path.startswith(b"/"):
        raise _refused(path, "has an absolute path, or none")
    parts = path.split(b"/")
    if b".." in parts or b"." in parts or b"" in parts:
        raise _refused(path, "would be written outside the folder")
    if len(path) > _LONGEST_PATH or len(parts) > _DEEPEST or any(len(part) > _LONGEST_NAME for part in parts):
        raise _refused(path, "has too long a path")


def _check_file(entry: Entry, files: dict[bytes, Entry]) -> None:
    if entry.mode not in (FILE_MODE, PROGRAM_MODE):
        raise _refused(entry.path, "has a mode that no file has")
    if entry.size < 0 or len(entry.digest) != -(-entry.size // CHUNK) * DIGEST:
        raise _refused(entry.path, "has a digest that does not fit its size")
    if not entry.target:
        files[entry.path] = entry
        return
    original = files.get(entry.target)
    if original is None or (original.mode, original.size, original.digest) != (entry.mode, entry.size, entry.digest):
        raise _refused(entry.path, "is a hard link to no earlier file like it")


def _end_of(path: bytes, links: dict[bytes, bytes], ends: dict[bytes, tuple[bytes, int]], through: list[bytes]) -> tuple[bytes, int]:
    """Where a link ends, as a path from the root, and through how many links the way leads. It is walked component by component."""
    if (known := ends.get(path)) is not None:
        return known
    if path in through or len(through) >= _MOST_FOLLOWED:
        raise _refused(path, "is a link that leads in a circle, or through too many links")
    target = links[path]
    if not target or target.startswith(b"/") or b"\0" in target or len(target) > _LONGEST_PATH:
        raise _refused(path, f"is a link to `{shown(target)}`, which leaves the folder")
    if target.count(b"/") >= _MOST_COMPONENTS:
        raise _refused(path, f"is a link of more than {_MOST_COMPONENTS} components")
    here = path.rpartition(b"/")[0]
    followed = 1
    for part in target.split(b"/"):
        if part in (b"", b"."):
            continue
        if part == b"..":
            if not here:
                raise _refused(path, f"is a link to `{shown(target)}`, which leaves the folder")
            here = here.rpartition(b"/")[0]
            continue
        here = here + b"/" + part if here else part
        if here in links:
            here, more = _end_of(here, links, ends, [*through, path])
            followed += more
        if followed > _MOST_FOLLOWED:
            raise _refused(path, "is a link that leads in a circle, or through too many links")
    ends[path] = (here, followed)
    return here, followed


def _refused(path: bytes, rule: str) -> Damaged:
    return Damaged(f"the artifact holds `{shown(path)}`, which {rule}: nothing is written")
