"""A folder of a workspace as a tree: walked once, in canonical order, and only what is not known is read. Nothing of a step runs meanwhile; a file
that changes all the same is refused. Kept are the manifest and each file's stamp, whatever the number of files.
"""

import hashlib
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import msgspec

from libs.archives.rules import ArchiveRefused, LimitExceeded, shown
from libs.archives.tree import CHUNK, FILE_MODE, FOLDER_MODE, LINK_MODE, PROGRAM_MODE, ZERO_CHUNK, Entry, RootBuilder, entries_of, manifest_of
from services.worker.copying import is_hole
from services.worker.stamps import STAMP, Stamp, stamp_of
from services.worker.trees import SANE

Known = Callable[[Stamp, bool], bytes | None]
"""The digest of a file that is as it was placed: by its stamp, and whether it lies in the upper folder."""

_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_THREADS = 2
_BATCH = 128
_ROWS = 1024
_CHUNKS = 8
_PIECE = 1 << 20
_WHOLE = 1 << 63


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


class Captured:
    """A folder as it was: its digest (hex) and manifest, as a tree."""

    def __init__(self, folder: bytes, rows: Iterable["_Row"]) -> None:
        """`rows` have been read, and are in canonical order."""
        self._folder = folder
        self._stamps = bytearray()
        self._new = bytearray()
        root = RootBuilder()
        self.manifest: list[bytes] = []
        for piece in manifest_of(map(self._entry, rows)):
            self.manifest.append(piece)
            for _ in root.feed(piece):
                pass
        self.digest = root.finish().digest.hex()

    def files(self) -> Iterator[tuple[Entry, Found]]:
        """Its plain files, in canonical order."""
        number = 0
        for entry in entries_of(self.manifest):
            if entry.kind == "file":
                yield entry, Found(entry.path, bytes(memoryview(self._stamps)[STAMP * number : STAMP * (number + 1)]), bool(self._new[number]))
                number += 1

    def chunks(self) -> Iterator[Chunk]:
        """The distinct chunks, in the order in which they first appear."""
        seen: set[bytes] = set()
        for entry, file in self.files():
            for number, (digest, size) in enumerate(entry.chunks()):
                if digest not in seen:
                    seen.add(digest)
                    yield Chunk(digest, size, file, number * CHUNK)

    def read(self, chunk: Chunk) -> bytes:
        """Raises FileChanged, OSError."""
        with _Reading(self._folder, chunk.file) as opened:
            return b"".join(_pieces(opened, chunk.file, chunk.at, chunk.size))

    def _entry(self, row: "_Row") -> Entry:
        if row.file is not None:
            self._stamps += row.file.stamp
            self._new.append(row.file.new)
        first = row.first
        return Entry(row.path, row.kind, row.mode, row.size, bytes((first or row).digest), first.path if first else row.target)


class _Row(msgspec.Struct, gc=False):
    """`first` is what a hard link is linked to, an earlier row."""

    path: bytes
    kind: Literal["file", "folder", "link"]
    mode: int
    size: int = 0
    digest: bytes | bytearray = b""
    target: bytes = b""
    file: Found | None = None
    first: "_Row | None" = None
    unread: bool = False


class _Part(NamedTuple):
    """Rows one after another, whose unread files are read at once, or one large file: its chunks from `begin` to `end`."""

    rows: Sequence[_Row]
    begin: int
    end: int


def capture(folder: bytes, upper: bytes, known: Known, go_on: Callable[[], None] = lambda: None) -> Captured:
    """`upper` is where an overlay keeps what is new in `folder`, or `folder` itself; `go_on` is asked often, and may raise. Blocking, with threads of
    its own. Raises ArchiveRefused naming what is neither file, folder nor link, or too much; FileChanged; OSError."""
    return Captured(folder, _read(folder, _rows(folder, upper, known, go_on), go_on))


def _rows(folder: bytes, upper: bytes, known: Known, go_on: Callable[[], None]) -> Iterator[_Row]:
    """All that lies below, in canonical order."""
    linked: dict[int, _Row] = {}
    size = 0
    for count, (path, seen, new) in enumerate(_walk(folder, upper)):
        if count >= 2 * SANE.max_members:
            raise LimitExceeded(path, f"takes the tree past {2 * SANE.max_members} files and folders")
        if stat.S_ISDIR(seen.st_mode):
            go_on()
            yield _Row(path, "folder", FOLDER_MODE)
        elif stat.S_ISLNK(seen.st_mode):
            yield _Row(path, "link", LINK_MODE, target=_target(folder + b"/" + path))
        elif stat.S_ISREG(seen.st_mode):
            stamp = stamp_of(seen)
            row = _Row(path, "file", PROGRAM_MODE if seen.st_mode & stat.S_IXUSR else FILE_MODE, seen.st_size)
            # What lies below an overlay has links in the cache, and none here.
            if new and seen.st_nlink > 1 and (first := linked.setdefault(seen.st_ino, row)) is not row:
                row.first, row.file = first, Found(path, stamp.packed(), False)
                yield row
                continue
            # What follows takes time and memory by the chunk, of holes too.
            size += row.size
            if size > SANE.max_bytes:
                raise LimitExceeded(path, f"takes the tree past {SANE.max_bytes} bytes")
            digest = known(stamp, new) if row.size else b""
            row.digest, row.unread = digest or b"", digest is None
            row.file = Found(path, stamp.packed(), new and row.unread)
            yield row
        else:
            raise ArchiveRefused(path, "is neither a file, a folder nor a link")


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


def _read(folder: bytes, rows: Iterable[_Row], go_on: Callable[[], None]) -> Iterator[_Row]:
    """The same rows with their digests. Only a few parts wait at a time, however many there are."""
    waiting: deque[tuple[_Part, Future[list[bytes]]]] = deque()
    threads = ThreadPoolExecutor(_THREADS)

    def taken() -> Sequence[_Row]:
        go_on()
        part, digests = waiting.popleft()
        for row, digest in zip((row for row in part.rows if row.unread), digests.result(), strict=True):
            if row.size <= CHUNK:
                row.digest = digest
            elif isinstance(row.digest, bytearray):
                row.digest += digest
            else:
                row.digest = bytearray(digest)
        return part.rows if part.end >= part.rows[-1].size else ()

    try:
        for part in _parts(rows):
            if len(waiting) == 2 * _THREADS:
                yield from taken()
            waiting.append((part, threads.submit(_digests, folder, part)))
        while waiting:
            yield from taken()
    finally:
        threads.shutdown(cancel_futures=True)


def _parts(rows: Iterable[_Row]) -> Iterator[_Part]:
    """Large files by some chunks, small ones by the batch."""
    some: list[_Row] = []
    unread = 0
    for row in rows:
        large = row.unread and row.size > CHUNK
        if some and (large or unread == _BATCH or len(some) == _ROWS):
            yield _Part(some, 0, _WHOLE)
            some, unread = [], 0
        if large:
            step = _CHUNKS * CHUNK
            yield from (_Part([row], at, at + step) for at in range(0, row.size, step))
        else:
            some.append(row)
            unread += row.unread
    if some:
        yield _Part(some, 0, _WHOLE)


def _digests(folder: bytes, part: _Part) -> list[bytes]:
    return [_digest(folder, row, row.file, part.begin, min(part.end, row.size)) for row in part.rows if row.unread and row.file is not None]


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
        stamp = stamp_of(os.fstat(self._opened)).packed()
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


def _changed(file: Found) -> FileChanged:
    return FileChanged(f"`{shown(file.path)}` changed while it was read")
