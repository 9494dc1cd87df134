"""A folder of a workspace as a tree: walked once, and only what is not known is read. Nothing of a step runs meanwhile; a file that changes all the
same is refused.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple

import msgspec

from libs.archives.rules import ArchiveRefused, LimitExceeded, Limits, shown
from libs.archives.tree import CHUNK, FILE_MODE, FOLDER_MODE, LINK_MODE, PROGRAM_MODE, ZERO_CHUNK, Entry, manifest_of, root_of
from services.worker.placing import Stamp, stamp_of

Known = Callable[[Stamp, bool], bytes | None]
"""The digest of a file that is as it was placed: by its stamp, and whether it lies in the upper folder."""

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_LIMITS = Limits()
_THREADS = 2
_BATCH = 128
_PIECE = 1 << 20


class FileChanged(Exception):
    """A file changed while it was read."""


class Found(NamedTuple):
    """A plain file: its path in the captured folder, its stamp, and whether its contents are new to this worker."""

    path: bytes
    stamp: Stamp
    new: bool


class Chunk(NamedTuple):
    """Where a blob's contents are."""

    digest: bytes
    size: int
    file: Found
    at: int


class Captured(NamedTuple):
    """A folder as it was: its entries in canonical order, its plain files in the same, the tree's digest (hex) and manifest."""

    folder: bytes
    entries: Sequence[Entry]
    files: Sequence[Found]
    digest: str
    manifest: Sequence[bytes]

    def chunks(self) -> list[Chunk]:
        """The distinct chunks, in the order in which they first appear."""
        chunks: dict[bytes, Chunk] = {}
        for entry, file in zip((entry for entry in self.entries if entry.kind == "file"), self.files, strict=True):
            for number, (digest, size) in enumerate(entry.chunks()):
                chunks.setdefault(digest, Chunk(digest, size, file, number * CHUNK))
        return list(chunks.values())

    def read(self, chunk: Chunk) -> bytes:
        """Raises FileChanged, OSError."""
        with _Reading(self.folder, chunk.file) as opened:
            return b"".join(_pieces(opened, chunk.file, chunk.at, chunk.size))


class _Row(msgspec.Struct, gc=False):
    path: bytes
    kind: Literal["file", "folder", "link"]
    mode: int
    size: int = 0
    digest: bytes = b""
    target: bytes = b""


def capture(folder: bytes, upper: bytes, known: Known, go_on: Callable[[], None] = lambda: None) -> Captured:
    """`upper` is where an overlay keeps what is new in `folder`, or `folder` itself; `go_on` is asked often, and may raise. Blocking, with threads of
    its own. Raises ArchiveRefused naming what is neither file, folder nor link, or too much; FileChanged; OSError."""
    rows: list[_Row] = []
    files: list[Found] = []
    unread: list[tuple[_Row, Found]] = []
    linked: dict[int, _Row] = {}
    links: list[tuple[_Row, _Row]] = []
    for path, seen, new in _walk(folder, upper):
        if len(rows) >= 2 * _LIMITS.max_members:
            raise LimitExceeded(path, f"takes the tree past {2 * _LIMITS.max_members} files and folders")
        if stat.S_ISDIR(seen.st_mode):
            go_on()
            rows.append(_Row(path, "folder", FOLDER_MODE))
        elif stat.S_ISLNK(seen.st_mode):
            rows.append(_Row(path, "link", LINK_MODE, target=_target(folder + b"/" + path)))
        elif stat.S_ISREG(seen.st_mode):
            row = _Row(path, "file", PROGRAM_MODE if seen.st_mode & stat.S_IXUSR else FILE_MODE, seen.st_size)
            rows.append(row)
            stamp = stamp_of(seen)
            if seen.st_nlink > 1 and (one := linked.setdefault(seen.st_ino, row)) is not row:
                links.append((row, one))
                files.append(Found(path, stamp, False))
                continue
            digest = known(stamp, new) if row.size else b""
            files.append(Found(path, stamp, new and digest is None))
            if digest is None:
                unread.append((row, files[-1]))
            else:
                row.digest = digest
        else:
            raise ArchiveRefused(path, "is neither a file, a folder nor a link")
    _read(folder, unread, go_on)
    for row, one in links:
        row.digest, row.target = one.digest, one.path
    entries = [Entry(row.path, row.kind, row.mode, row.size, row.digest, row.target) for row in rows]
    manifest = list(manifest_of(entries))
    return Captured(folder, entries, files, root_of(manifest).digest.hex(), manifest)


def _walk(folder: bytes, upper: bytes) -> Iterator[tuple[bytes, os.stat_result, bool]]:
    """All that lies below, in canonical order: path, lstat, whether it lies in the upper folder."""
    waiting = [_listed(folder, upper, b"")]
    while waiting:
        found = next(waiting[-1], None)
        if found is None:
            waiting.pop()
            continue
        path, seen, new = found
        yield found
        if stat.S_ISDIR(seen.st_mode):
            if len(waiting) > _LIMITS.max_depth:
                raise ArchiveRefused(path, f"lies more than {_LIMITS.max_depth} folders deep")
            waiting.append(_listed(folder, upper if new else b"", path))


def _listed(folder: bytes, upper: bytes, path: bytes) -> Iterator[tuple[bytes, os.stat_result, bool]]:
    with os.scandir(folder + b"/" + path) as listing:
        found = sorted(listing, key=lambda entry: entry.name)
    new = None if upper == folder else _names(upper + b"/" + path) if upper else set[bytes]()
    for entry in found:
        yield (path + b"/" + entry.name if path else entry.name), entry.stat(follow_symlinks=False), new is None or entry.name in new


def _names(folder: bytes) -> set[bytes]:
    try:
        with os.scandir(folder) as listing:
            return {entry.name for entry in listing}
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _target(link: bytes) -> bytes:
    return os.readlink(link)  # noqa: PTH115 (its bytes)


def _read(folder: bytes, unread: Sequence[tuple[_Row, Found]], go_on: Callable[[], None]) -> None:
    """Small files by the batch, large ones by the chunk."""
    large = [[(row, file, at)] for row, file in unread if row.size > CHUNK for at in range(0, row.size, CHUNK)]
    small = [(row, file, 0) for row, file in unread if row.size <= CHUNK]
    work = large + [small[at : at + _BATCH] for at in range(0, len(small), _BATCH)]
    threads = ThreadPoolExecutor(_THREADS)
    try:
        for part, digests in zip(work, threads.map(lambda part: [_digest(folder, *each) for each in part], work), strict=True):
            go_on()
            for (row, _, _), digest in zip(part, digests, strict=True):
                row.digest += digest
    finally:
        threads.shutdown(cancel_futures=True)


def _digest(folder: bytes, row: _Row, file: Found, at: int) -> bytes:
    size = min(CHUNK, row.size - at)
    with _Reading(folder, file) as opened:
        if size == CHUNK and _is_hole(opened, at):
            return ZERO_CHUNK
        digest = hashlib.sha256()
        for piece in _pieces(opened, file, at, size):
            digest.update(piece)
        return digest.digest()


class _Reading:
    """A file open while it is read; at the end it must be what it was when it was found."""

    def __init__(self, folder: bytes, file: Found) -> None:
        self._file = file
        self._opened = os.open(folder + b"/" + file.path, _FILE)

    def __enter__(self) -> int:
        return self._opened

    def __exit__(self, kind: object, *_: object) -> None:
        stamp = stamp_of(os.fstat(self._opened))
        os.close(self._opened)
        if kind is None and stamp != self._file.stamp:
            raise _changed(self._file)


def _pieces(opened: int, file: Found, at: int, size: int) -> Iterable[bytes]:
    end = at + size
    while at < end:
        piece = os.pread(opened, min(_PIECE, end - at), at)
        if not piece:
            raise _changed(file)
        at += len(piece)
        yield piece


def _is_hole(opened: int, at: int) -> bool:
    try:
        return os.lseek(opened, at, os.SEEK_DATA) >= at + CHUNK
    except OSError as error:
        if error.errno == errno.ENXIO:
            return True
        raise


def _changed(file: Found) -> FileChanged:
    return FileChanged(f"`{shown(file.path)}` changed while it was read")
