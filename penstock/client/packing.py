"""A folder as a stream of `tar` inside zstd, in constant memory: files are read and compressed on a thread while the stream is sent.

The same tree gives the same bytes: entries are sorted, owners are left out. Names are bytes, kept exactly.
"""

# Paths are bytes here, which pathlib does not have:
# ruff: noqa: PTH115, PTH118, PTH123

import asyncio
import contextlib
import os
import stat
import sys
import tarfile
import threading
from collections.abc import AsyncGenerator, Callable

from penstock.client.selection import Selection, Unreadable

if sys.version_info >= (3, 14):
    from compression.zstd import ZstdCompressor
else:
    from backports.zstd import ZstdCompressor

READ = 256 * 1024
SEND = 128 * 1024
AHEAD = 8  # pieces that may wait to be sent

Progress = Callable[[int], None]
"""Called with the bytes of content done so far."""


async def pack(selection: Selection, progress: Progress | None = None) -> AsyncGenerator[bytes, None]:
    """The stream. Raises Unreadable when a file cannot be read or shrinks under the reader. Close it (`aclose`) when it is not read to the end."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Queue[bytes | BaseException | None] = asyncio.Queue()
    room = threading.Semaphore(AHEAD)
    stop = threading.Event()

    def put(piece: bytes | BaseException | None) -> None:
        room.acquire()
        if stop.is_set():
            raise _Stopped
        loop.call_soon_threadsafe(ready.put_nowait, piece)

    def write() -> None:
        try:
            _write_tar(selection, put, progress)
            put(None)
        except _Stopped:
            pass
        except BaseException as error:
            with contextlib.suppress(_Stopped):
                put(error)

    thread = asyncio.ensure_future(asyncio.to_thread(write))
    try:
        while (piece := await ready.get()) is not None:
            room.release()
            if isinstance(piece, BaseException):
                raise piece
            yield piece
    finally:
        stop.set()
        room.release(AHEAD)
        await asyncio.shield(thread)


class _Stopped(Exception):
    """Nobody reads any more."""


class _Compressed:
    """The file that tarfile writes to: compresses, and passes pieces of a good size on."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        self._put = put
        self._zstd = ZstdCompressor(level=3)
        self._pieces: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> int:
        self._add(self._zstd.compress(data))
        return len(data)

    def finish(self) -> None:
        self._add(self._zstd.flush(ZstdCompressor.FLUSH_FRAME))
        self._pass_on()

    def _add(self, piece: bytes) -> None:
        if piece:
            self._pieces.append(piece)
            self._size += len(piece)
            if self._size >= SEND:
                self._pass_on()

    def _pass_on(self) -> None:
        if self._pieces:
            self._put(b"".join(self._pieces))
            self._pieces, self._size = [], 0


def _write_tar(selection: Selection, put: Callable[[bytes], None], progress: Progress | None) -> None:
    sink = _Compressed(put)
    top = os.fsencode(selection.root)
    done = 0
    for path in selection.paths:
        full = os.path.join(top, path)
        try:
            status = os.lstat(full)
            entry = _entry(path, full, status)
            if entry is None:
                continue
            if entry.type != tarfile.REGTYPE:
                sink.write(_header(entry))
                continue
            with open(os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb", buffering=0) as file:
                sink.write(_header(entry))
                left = entry.size
                while left:
                    data = file.read(min(READ, left))
                    if not data:
                        raise Unreadable(f"{os.fsdecode(full)} became shorter while it was read: try again when nothing writes to it")
                    sink.write(data)
                    left -= len(data)
                    done += len(data)
                    if progress:
                        progress(done)
                sink.write(b"\0" * (-entry.size % tarfile.BLOCKSIZE))
        except FileNotFoundError:  # gone since it was listed
            continue
        except OSError as error:
            raise Unreadable(f"cannot read {os.fsdecode(full)}: {error.strerror}") from error
    sink.write(b"\0" * (2 * tarfile.BLOCKSIZE))
    sink.finish()


def _entry(path: bytes, full: bytes, status: os.stat_result) -> tarfile.TarInfo | None:
    entry = tarfile.TarInfo(os.fsdecode(path))
    entry.mode = stat.S_IMODE(status.st_mode) & 0o777
    entry.mtime = max(0, int(status.st_mtime))
    if stat.S_ISREG(status.st_mode):
        entry.size = status.st_size
    elif stat.S_ISDIR(status.st_mode):
        entry.type = tarfile.DIRTYPE
    elif stat.S_ISLNK(status.st_mode):
        entry.type = tarfile.SYMTYPE
        entry.linkname = os.fsdecode(os.readlink(full))
    else:
        return None
    return entry


def _header(entry: tarfile.TarInfo) -> bytes:
    return entry.tobuf(format=tarfile.GNU_FORMAT, encoding="utf-8", errors="surrogateescape")
