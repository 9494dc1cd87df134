"""Which files of a folder are uploaded: what git would show of it (tracked and untracked, without the ignored), or all of it.

`.git` itself goes along only when asked for, and what a download gathers (penstock.client.placing) never. A `.penstockignore` in the folder, in
git's syntax, takes away more. While git lists the folder, the files that the index knows are looked at: when nothing came or went, that is all.
"""

# Paths are bytes here, which pathlib does not have:
# ruff: noqa: PTH115, PTH118

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import msgspec

from penstock.client.errors import Unreadable
from penstock.client.gitlist import GitList
from penstock.client.index import Index, index_path, read_index, read_stamp, stamp_of
from penstock.client.tree import FILE_MODE, FOLDER_MODE, LINK_MODE, PROGRAM_MODE, Entry, order

PART = (b".penstock-", b".part")
"""How the name of a file begins and ends that a download has not finished."""


class Selection(msgspec.Struct, kw_only=True):
    """A folder as it was looked at: `entries` in the order of a manifest, with a stamp each. Files that are in `unread` have no digest yet (see
    penstock.client.scan). `twins` are the files of one inode each, of which one is read and counted. `size` is the bytes of the regular files,
    `files` their number, `skipped` what is neither file, folder nor link. `stale`: the index is to be written."""

    root: Path
    include_ignored: bool = False
    include_git: bool = False
    entries: list[Entry] = []
    stamps: list[bytes] = []
    unread: list[int] = []
    twins: list[list[int]] = []
    skipped: list[str] = []
    size: int = 0
    files: int = 0
    index: Index
    stale: bool = True

    @property
    def paths(self) -> list[bytes]:
        """Relative to `root`, each after the folder that it is in."""
        return [entry.path for entry in self.entries]


def select(root: Path, *, include_ignored: bool = False, include_git: bool = False, environ: Mapping[str, str] = os.environ) -> Selection:
    """Look at the folder as it is now. Raises Unreadable."""
    if not root.exists():
        raise Unreadable(f"{root} does not exist")
    if not root.is_dir():
        raise Unreadable(f"{root} is not a folder")
    top = os.fsencode(root)
    try:
        listing = None if include_ignored else GitList(root)
        try:
            real = os.path.realpath(top)
            index = read_index(index_path(real, f"{include_ignored} {include_git}", environ), real)
            selection = Selection(root=root, include_ignored=include_ignored, include_git=include_git, index=index)
            looked = _stamps(top, index) if listing and index.listing else None
            return _selected(selection, top, listing, looked)
        finally:
            if listing:
                listing.close()
    except OSError as error:
        raise Unreadable(f"cannot read {os.fsdecode(error.filename or top)}: {error.strerror}") from error


def _selected(selection: Selection, top: bytes, listing: GitList | None, looked: list[bytes] | None) -> Selection:
    ignored = b"" if selection.include_ignored else _ignore_file(top)
    listed = listing.result() if listing else None
    plain = listed is not None and not selection.include_git
    digest = hashlib.sha256(hashlib.sha256(listed).digest() + ignored).digest() if plain and listed is not None else b""
    index = selection.index
    if looked is not None and digest == index.listing and _compared(selection, top, looked):
        return _measured(selection)
    known = {entry.path: n for n, entry in enumerate(index.entries)}
    before, index.listing = index.listing, digest
    found: dict[bytes, bytes] = {}
    if listed is None:
        found.update(_shared(_walk(top, b"", selection.include_git), index, known))
    elif not _expand(top, b"", listed.split(b"\0"), found):
        index.listing = b""  # that the listing is the same says nothing here
    if listed is not None and selection.include_git and os.path.lexists(os.path.join(top, b".git")):
        found.update(_walk(top, b".git", include_git=True))
    if ignored:
        found = _without_ignored(ignored, found)
    now = [found[entry.path] for entry in index.entries if entry.path in found]
    if len(found) == len(now) == len(index.entries) and _compared(selection, top, now):
        selection.stale = selection.stale or index.listing != before
        return _measured(selection)
    return _built(selection, top, found, known, before)


def _shared(pairs: Iterable[tuple[bytes, bytes]], index: Index, known: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """The same pairs of path and stamp; what the index has, too, is not held twice."""
    for path, stamp in pairs:
        n = known.get(path)
        if n is None:
            yield path, stamp
        else:
            yield index.entries[n].path, index.stamps[n] if index.stamps[n] == stamp else stamp


def _stamps(top: bytes, index: Index) -> list[bytes] | None:
    """The stamps that the entries of the index have now; None when one is gone or is something else."""
    start = top + b"/"
    lstat = os.lstat
    try:
        return [stamp_of(lstat(start + entry.path)) if entry.kind != "folder" else b"" for entry in index.entries]
    except (FileNotFoundError, NotADirectoryError):
        return None


def _compared(selection: Selection, top: bytes, now: list[bytes]) -> bool:
    """Take the entries of the index, where nothing came or went; False when something became something else."""
    entries, before = list(selection.index.entries), selection.index.stamps
    for n, (old, new) in enumerate(zip(before, now, strict=True)) if now != before else ():
        if old != new:
            fresh = _entry(top, entries[n].path, new)
            if fresh is None or fresh.kind != entries[n].kind:
                return False
            entries[n] = fresh
    selection.entries, selection.stamps, selection.stale = entries, now, now != before
    return True


def _built(selection: Selection, top: bytes, found: dict[bytes, bytes], known: Mapping[bytes, int], before: bytes) -> Selection:
    """Entries for everything that was found (path → stamp) and the folders it is in; what the index knows is taken from there, by `known` (path →
    place). `before`: the digest of the listing that it was made of."""
    for path in list(found):
        while b"/" in path and (path := path.rpartition(b"/")[0]) not in found:
            found[path] = b""
    index = selection.index
    entries: list[Entry] = []
    stamps: list[bytes] = []
    selection.skipped = []
    closed = b"/"  # what lies below a link is not of this folder
    for path in sorted(found, key=order):
        stamp = found[path]
        if path.startswith(closed):
            index.listing = b""
            continue
        n = known.get(path)
        same = n is not None and index.stamps[n] == stamp and (stamp or index.entries[n].kind == "folder")
        entry = index.entries[n] if n is not None and same else _entry(top, path, stamp)
        if entry is None:
            selection.skipped.append(os.fsdecode(path))
            index.listing = b""
            continue
        if entry.kind != "folder":
            closed = path + b"/"
        entries.append(entry)
        stamps.append(stamp)
    selection.entries, selection.stamps = entries, stamps
    selection.stale = index.listing != before or stamps != index.stamps or entries != index.entries
    return _measured(selection)


def _entry(top: bytes, path: bytes, stamp: bytes) -> Entry | None:
    """What is there, its contents not yet read; None for what is neither file, folder nor link."""
    if not stamp:
        return Entry(path, "folder", FOLDER_MODE)
    seen = read_stamp(stamp)
    if stat.S_ISREG(seen.mode):
        return Entry(path, "file", PROGRAM_MODE if seen.mode & 0o100 else FILE_MODE, seen.size)
    if stat.S_ISLNK(seen.mode):
        return Entry(path, "link", LINK_MODE, target=os.readlink(top + b"/" + path))
    return Entry(path, "folder", FOLDER_MODE) if stat.S_ISDIR(seen.mode) else None


def _measured(selection: Selection) -> Selection:
    inodes: dict[tuple[int, int], list[int]] = {}
    one = b"\0\0\0\1"
    for n, (entry, stamp) in enumerate(zip(selection.entries, selection.stamps, strict=True)):
        if entry.kind == "file":
            selection.files += 1
            selection.size += entry.size
            if entry.size and not entry.digest:
                selection.unread.append(n)
            if stamp[4:8] != one:
                seen = read_stamp(stamp)
                inodes.setdefault((seen.device, seen.inode), []).append(n)
    selection.twins = list(inodes.values())
    again = {n for twins in selection.twins for n in twins[1:]}
    if again:
        selection.size -= sum(selection.entries[n].size for n in again)
        selection.unread = [n for n in selection.unread if n not in again]
    return selection


def _walk(top: bytes, start: bytes, include_git: bool) -> Iterator[tuple[bytes, bytes]]:
    """Everything below (and with) `start` with its stamp, links not followed."""
    if start:
        status = os.lstat(top + b"/" + start)
        if not stat.S_ISDIR(status.st_mode):
            yield start, stamp_of(status)
            return
        yield start, b""
    pending = [start]
    while pending:
        prefix = pending.pop()
        with os.scandir(os.path.join(top, prefix)) as entries:
            for entry in entries:
                if entry.name == b".git" and not include_git:
                    continue
                path = prefix + b"/" + entry.name if prefix else entry.name
                if entry.is_dir(follow_symlinks=False):
                    pending.append(path)
                    yield path, b""
                elif not _is_part(entry.name):
                    try:
                        yield path, stamp_of(entry.stat(follow_symlinks=False))
                    except FileNotFoundError:  # gone since
                        continue


def _expand(top: bytes, prefix: bytes, named: Iterable[bytes], found: dict[bytes, bytes]) -> bool:
    """What git lists, with the content of the submodules and nested repositories that it lists as one name; whether there were none of these and
    all that is listed is there."""
    simple = True
    start = top + b"/" + prefix
    for listed in named:
        name = listed.rstrip(b"/")
        if not name:
            continue
        try:
            status = os.lstat(start + name)
        except (FileNotFoundError, NotADirectoryError):  # tracked, and deleted in the work tree
            simple = False
            continue
        path = prefix + name
        if not stat.S_ISDIR(status.st_mode):
            if not _is_part(name.rpartition(b"/")[2]):
                found[path] = stamp_of(status)
            continue
        simple = False
        found[path] = b""
        inner: bytes | None = None
        if os.path.lexists(start + name + b"/.git"):
            listing = GitList(Path(os.fsdecode(start + name)))
            try:
                inner = listing.result()
            finally:
                listing.close()
        if inner is None:
            found.update((path + b"/" + below, stamp) for below, stamp in _walk(start + name, b"", include_git=False))
        else:
            _expand(top, path + b"/", inner.split(b"\0"), found)
    return simple


def _is_part(name: bytes) -> bool:
    return name.startswith(PART[0]) and name.endswith(PART[1])


def _ignore_file(top: bytes) -> bytes:
    try:
        return Path(os.fsdecode(top), ".penstockignore").read_bytes()
    except FileNotFoundError:
        return b""


def _without_ignored(rules: bytes, found: dict[bytes, bytes]) -> dict[bytes, bytes]:
    from pathspec import GitIgnoreSpec

    ignored = GitIgnoreSpec.from_lines(rules.decode("utf-8", "surrogateescape").splitlines())
    return {path: stamp for path, stamp in found.items() if not ignored.match_file(os.fsdecode(path))}
