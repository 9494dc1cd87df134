"""The contents of a selection's files: their digests, read in threads, and their chunks again when they are sent. Holes are not read."""

# Paths are bytes here, which pathlib does not have:

import asyncio
import errno
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence

import msgspec

from penstock.client.errors import Changed, Unreadable
from penstock.client.index import moment, settled, stamp_of, write_index
from penstock.client.selection import Selection
from penstock.client.threads import Threads
from penstock.client.tree import CHUNK, DIGEST, FILE_MODE, PROGRAM_MODE, ZERO_CHUNK, Entry, manifest_of, tree_digest

_BATCH_FILES = 64
_BATCH_BYTES = 8 << 20
_PART = 8
"""Chunks of a big file that are read together."""
TICK = 0.1
"""Seconds between two words on progress."""
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EISDIR}


class Meter:
    """Bytes done, counted by several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.done = 0

    def add(self, size: int) -> None:
        with self._lock:
            self.done += size


async def hash_files(selection: Selection, threads: Threads, tell: Callable[[int], None]) -> bytes:
    """Give every file its digest; the tree's digest. `tell` is told the bytes done. Raises Unreadable; Changed when a file does not hold still."""
    asked = moment(os.fsencode(selection.root)) if selection.stale else 0
    if selection.unread:
        meter = Meter()
        large: dict[int, list[Part]] = {}
        left = {threads.start(_read_files, selection, unit, meter, threads) for unit in _units(selection)}
        while left:
            done, left = await asyncio.wait(left, timeout=TICK, return_when=asyncio.FIRST_EXCEPTION)
            for read in done:
                for part in read.result():
                    if selection.entries[part[0]].size > CHUNK:
                        large.setdefault(part[0], []).append(part)
                    else:
                        _take(selection, part[0], [part])
            tell(meter.done)
        for n, parts in large.items():
            _take(selection, n, parts)
        selection.unread = []
    _link_twins(selection)
    index = selection.index
    if selection.stale or not index.tree:
        index.tree = tree_digest(manifest_of(selection.entries))
        index.entries = selection.entries
        index.stamps = [stamp if not stamp or settled(stamp, asked) else b"" for stamp in selection.stamps]
        selection.stale = True
    return index.tree


def save(selection: Selection) -> None:
    """Remember what was read."""
    if selection.stale:
        write_index(selection.index)
        selection.stale = False


Unit = tuple[Sequence[int], int, int]
"""(files, first chunk, chunks) of what is read in one go."""
Part = tuple[int, int, bytes, int, bytes]
"""(file, first chunk, stamp, size, digests) of what was."""


def _units(selection: Selection) -> Iterator[Unit]:
    batch: list[int] = []
    room = _BATCH_BYTES
    for n in selection.unread:
        size = selection.entries[n].size
        if size > CHUNK:
            count = -(-size // CHUNK)
            for first in range(0, count, _PART):
                yield [n], first, min(_PART, count - first)
            continue
        batch.append(n)
        room -= size
        if room <= 0 or len(batch) >= _BATCH_FILES:
            yield batch, 0, 1
            batch, room = [], _BATCH_BYTES
    if batch:
        yield batch, 0, 1


def _read_files(selection: Selection, unit: Unit, meter: Meter, threads: Threads) -> list[Part]:
    top = os.fsencode(selection.root) + b"/"
    parts: list[Part] = []
    files, first, count = unit
    for n in files:
        path = selection.entries[n].path
        with opened(top + path) as handle:
            for last in (False, True):
                status = os.fstat(handle)
                stamp = stamp_of(status)
                end = first + count if status.st_size > CHUNK else 1
                digests = _digests(handle, first, end, status.st_size, meter, threads)
                if stamp_of(os.fstat(handle)) == stamp:
                    parts.append((n, first, stamp, status.st_size, digests))
                    break
                if last:
                    raise Changed(f"{os.fsdecode(top + path)} changed while it was uploaded: try again when nothing writes to it")
    return parts


def _digests(handle: int, first: int, end: int, size: int, meter: Meter, threads: Threads) -> bytes:
    digests: list[bytes] = []
    for chunk in range(first, end):
        threads.check()
        room = min(CHUNK, size - chunk * CHUNK)
        if room <= 0:
            break
        if is_hole(handle, chunk, size):
            digests.append(ZERO_CHUNK)
        else:
            digests.append(hashlib.sha256(read_chunk(handle, chunk, room)).digest())
        meter.add(room)
    return b"".join(digests)


def is_hole(handle: int, chunk: int, size: int) -> bool:
    """Whether a whole chunk of the file is a hole."""
    start = chunk * CHUNK
    if size < start + CHUNK or size <= CHUNK or not hasattr(os, "SEEK_DATA"):
        return False
    try:
        return os.lseek(handle, start, os.SEEK_DATA) >= start + CHUNK
    except OSError as error:
        return error.errno == errno.ENXIO  # no data up to the end


def read_chunk(handle: int, chunk: int, size: int) -> bytes:
    """So many bytes of a chunk, or fewer if the file has become shorter."""
    data = os.pread(handle, size, chunk * CHUNK)
    while len(data) < size and (more := os.pread(handle, size - len(data), chunk * CHUNK + len(data))):
        data += more
    return data


class opened:
    """A file to read, no link, no pipe; closed at the end. Raises Changed when it is gone, Unreadable."""

    def __init__(self, path: bytes) -> None:
        self._path = path
        self._handle = -1

    def __enter__(self) -> int:
        try:
            self._handle = os.open(self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise self._fault(error) from error
        return self._handle

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        os.close(self._handle)
        if isinstance(error, OSError):
            raise self._fault(error) from error

    def _fault(self, error: OSError) -> Unreadable:
        name = os.fsdecode(self._path)
        if error.errno in _GONE:
            return Changed(f"{name} was there and is no longer: it changed while it was uploaded; try again when nothing writes to it")
        return Unreadable(f"cannot read {name}: {error.strerror}")


def _take(selection: Selection, n: int, parts: list[Part]) -> None:
    """Put a file's digest together from what was read of it."""
    parts.sort(key=lambda part: part[1])
    _, _, stamp, size, _ = parts[0]
    entry = selection.entries[n]
    digest = b"".join(part[4] for part in parts)
    if any(part[2] != stamp for part in parts) or len(digest) != -(-size // CHUNK) * DIGEST:
        path = os.path.join(selection.root, os.fsdecode(entry.path))  # noqa: PTH118
        raise Changed(f"{path} changed while it was uploaded: try again when nothing writes to it")
    mode = PROGRAM_MODE if int.from_bytes(stamp[:4], "big") & 0o100 else FILE_MODE
    selection.size += size - entry.size
    selection.entries[n] = Entry(entry.path, "file", mode, size, digest)
    if stamp != selection.stamps[n]:
        selection.stamps[n] = stamp


def _link_twins(selection: Selection) -> None:
    """Files of one inode: the first stands for itself, the others name it."""
    entries = selection.entries
    for first, *others in selection.twins:
        if entries[first].target:
            entries[first] = msgspec.structs.replace(entries[first], target=b"")
            selection.stale = True
        for n in others:
            original = entries[first]
            linked = msgspec.structs.replace(original, path=entries[n].path, target=original.path)
            if linked != entries[n]:
                entries[n] = linked
                selection.stamps[n] = selection.stamps[first]
                selection.stale = True
