"""A folder of a workspace as a tree: walked once, and only what is not known is read. Nothing of a step runs meanwhile; a file that changes all the
same is refused.
"""

import hashlib
import os
import stat
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import msgspec

from libs.archives.rules import ArchiveRefused, LimitExceeded, shown
from libs.archives.tree import CHUNK, FILE_MODE, FOLDER_MODE, LINK_MODE, PROGRAM_MODE, ZERO_CHUNK, Entry, manifest_of, root_of
from services.worker.cache import SANE
from services.worker.copying import is_hole
from services.worker.placing import Stamp, stamp_of

Known = Callable[[Stamp, bool], bytes | None]
"""The digest of a file that is as it was placed: by its stamp, and whether it lies in the upper folder."""

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_THREADS = 2
_BATCH = 128
_CHUNKS = 8
_PIECE = 1 << 20
_STAMP = struct.Struct("=QQqq")


class FileChanged(Exception):
    """A file changed while it was read."""


class Found(msgspec.Struct, frozen=True, gc=False):
    """A plain file: its path in the captured folder, its stamp, and whether its contents are new to this worker."""

    path: bytes
    stamp: bytes
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

    def chunks(self) -> Iterator[Chunk]:
        """The distinct chunks, in the order in which they first appear."""
        seen: set[bytes] = set()
        for entry, file in zip((entry for entry in self.entries if entry.kind == "file"), self.files, strict=True):
            for number, (digest, size) in enumerate(entry.chunks()):
                if digest not in seen:
                    seen.add(digest)
                    yield Chunk(digest, size, file, number * CHUNK)

    def read(self, chunk: Chunk) -> bytes:
        """Raises FileChanged, OSError."""
        with _Reading(self.folder, chunk.file) as opened:
            return b"".join(_pieces(opened, chunk.file, chunk.at, chunk.size))


class _Row(msgspec.Struct, gc=False):
    path: bytes
    kind: Literal["file", "folder", "link"]
    mode: int
    size: int = 0
    digest: bytes | bytearray = b""
    target: bytes = b""


class _Part(NamedTuple):
    """Files that are read at once: the chunks of each from `begin` to `end`."""

    files: Sequence[tuple[_Row, Found]]
    begin: int
    end: int


def capture(folder: bytes, upper: bytes, known: Known, go_on: Callable[[], None] = lambda: None) -> Captured:
    """`upper` is where an overlay keeps what is new in `folder`, or `folder` itself; `go_on` is asked often, and may raise. Blocking, with threads of
    its own. Raises ArchiveRefused naming what is neither file, folder nor link, or too much; FileChanged; OSError."""
    rows: list[_Row] = []
    files: list[Found] = []
    unread: list[tuple[_Row, Found]] = []
    linked: dict[int, _Row] = {}
    links: list[tuple[_Row, _Row]] = []
    size = 0
    for path, seen, new in _walk(folder, upper):
        if len(rows) >= 2 * SANE.max_members:
            raise LimitExceeded(path, f"takes the tree past {2 * SANE.max_members} files and folders")
        if stat.S_ISDIR(seen.st_mode):
            go_on()
            rows.append(_Row(path, "folder", FOLDER_MODE))
        elif stat.S_ISLNK(seen.st_mode):
            rows.append(_Row(path, "link", LINK_MODE, target=_target(folder + b"/" + path)))
        elif stat.S_ISREG(seen.st_mode):
            row = _Row(path, "file", PROGRAM_MODE if seen.st_mode & stat.S_IXUSR else FILE_MODE, seen.st_size)
            rows.append(row)
            stamp = packed(seen)
            if seen.st_nlink > 1 and (one := linked.setdefault(seen.st_ino, row)) is not row:
                links.append((row, one))
                files.append(Found(path, stamp, False))
                continue
            # What follows takes time and memory by the chunk, of holes too.
            size += row.size
            if size > SANE.max_bytes:
                raise LimitExceeded(path, f"takes the tree past {SANE.max_bytes} bytes")
            digest = known(stamp_of(seen), new) if row.size else b""
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
    entries = [Entry(row.path, row.kind, row.mode, row.size, bytes(row.digest), row.target) for row in rows]
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
            if len(waiting) > SANE.max_depth:
                raise ArchiveRefused(path, f"lies more than {SANE.max_depth} folders deep")
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
    """Only a few parts wait at a time, however many there are."""
    waiting: deque[tuple[_Part, Future[list[bytes]]]] = deque()
    threads = ThreadPoolExecutor(_THREADS)

    def take() -> None:
        go_on()
        part, digests = waiting.popleft()
        for (row, _), digest in zip(part.files, digests.result(), strict=True):
            if row.size <= CHUNK:
                row.digest = digest
            elif isinstance(row.digest, bytearray):
                row.digest += digest
            else:
                row.digest = bytearray(digest)

    try:
        for part in _parts(unread):
            if len(waiting) == 2 * _THREADS:
                take()
            waiting.append((part, threads.submit(_digests, folder, part)))
        while waiting:
            take()
    finally:
        threads.shutdown(cancel_futures=True)


def _parts(unread: Sequence[tuple[_Row, Found]]) -> Iterator[_Part]:
    """Large files by some chunks, small ones by the batch."""
    small = []
    for row, file in unread:
        if row.size <= CHUNK:
            small.append((row, file))
        else:
            step = _CHUNKS * CHUNK
            yield from (_Part([(row, file)], at, at + step) for at in range(0, row.size, step))
    yield from (_Part(small[at : at + _BATCH], 0, CHUNK) for at in range(0, len(small), _BATCH))


def _digests(folder: bytes, part: _Part) -> list[bytes]:
    return [_digest(folder, row, file, part.begin, min(part.end, row.size)) for row, file in part.files]


def _digest(folder: bytes, row: _Row, file: Found, begin: int, end: int) -> bytes:
    digests = []
    with _Reading(folder, file) as opened:
        for at in range(begin, end, CHUNK):
            size = min(CHUNK, row.size - at)
            if size == CHUNK and is_hole(opened, at):
                digests.append(ZERO_CHUNK)
                continue
            digest = hashlib.sha256()
            for piece in _pieces(opened, file, at, size):
                digest.update(piece)
            digests.append(digest.digest())
    return b"".join(digests)


class _Reading:
    """A file open while it is read; at the end it must be what it was when it was found."""

    def __init__(self, folder: bytes, file: Found) -> None:
        self._file = file
        self._opened = os.open(folder + b"/" + file.path, _FILE)

    def __enter__(self) -> int:
        return self._opened

    def __exit__(self, kind: object, *_: object) -> None:
        stamp = packed(os.fstat(self._opened))
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


def packed(seen: os.stat_result) -> bytes:
    """A file's stamp, in little room: a tree may have very many."""
    return _STAMP.pack(*stamp_of(seen))


def _changed(file: Found) -> FileChanged:
    return FileChanged(f"`{shown(file.path)}` changed while it was read")
