"""Whether a tree may be written to a disk. A manifest comes from outside: a server is not trusted with the user's files."""

from collections.abc import Iterable, Iterator

import msgspec

from penstock.client.errors import Damaged
from penstock.client.tree import CHUNK, DIGEST, FILE_MODE, PROGRAM_MODE, Entry, order

_LONGEST_PATH = 4096
_LONGEST_NAME = 255
_DEEPEST = 256
_MOST_FOLLOWED = 40
"""Links that lead through one another, as in Linux."""


def shown(path: bytes) -> str:
    """A path for people."""
    text = path.decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= 300 else f"{text[:150]}…{text[-150:]}"


def checked(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries, each known to lie inside the folder: sorted, none twice, in folders that were named before, no link leading out. Raises Damaged
    that names the culprit; for links at the end."""
    files: dict[bytes, Entry] = {}  # that hard links may name
    links: dict[bytes, bytes] = {}
    within: list[bytes] = []
    last = b""
    for entry in entries:
        path = entry.path
        _check_path(path)
        key = order(path)
        if key <= last:
            raise _refused(path, "is not in order, or there twice")
        last = key
        parent = path.rpartition(b"/")[0]
        while within and within[-1] != parent:
            within.pop()
        if parent and not within:
            raise _refused(path, "lies in no folder of it")
        if entry.kind == "folder":
            within.append(path)
        elif entry.kind == "link":
            links[path] = entry.target
        else:
            _check_file(entry, files)
        yield entry
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
