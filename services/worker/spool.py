"""The worker's journal on disk: what it said, kept until somebody has recorded it.

Records are appended to numbered files; each is written at once (so it survives the death of the process) and synced within `SYNC_SECONDS` by a
thread, many at a time (so it survives that of the machine). A file goes when nothing in it is wanted any more and all that was written before
that is synced; what is wanted of old files is carried forward when they hold mostly refuse. So a power cut takes what was written last, and nothing
before it.
"""

import asyncio
import errno
import os
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

FILE_BYTES = 16 << 20
SYNC_SECONDS = 0.02
_HEAD = struct.Struct("<II")


class Place(NamedTuple):
    """Where a record is."""

    file: int
    offset: int
    size: int


class Spool:
    """An append-only journal. Records are opaque. Everything here belongs to one event loop."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._wanted: dict[int, int] = {int(path.stem): 0 for path in folder.glob("*.journal")}
        self._sizes: dict[int, int] = {n: self._path(n).stat().st_size for n in self._wanted}
        self._wanted_bytes = 0
        self._current = max(self._wanted, default=0)
        self._files: dict[int, int] = {}
        self._size = FILE_BYTES
        self._threads = ThreadPoolExecutor(1, "spool-sync")
        self._unsynced: set[int] = set()
        self._busy: set[int] = set()
        self._unwanted: set[int] = set()
        self._leaving: set[int] = set()
        """Files to drop once what is written now is synced, and once what is being synced is: it may be what was moved from them."""
        self._timer: asyncio.TimerHandle | None = None
        self._syncing: asyncio.Future[None] | None = None

    def replay(self) -> Iterator[tuple[Place, bytes]]:
        """Everything that was written before, oldest first; a torn end is left out. Each record given counts as wanted until it is released."""
        for number in sorted(self._wanted):
            content = self._path(number).read_bytes()
            self._wanted[number] += 1  # the file stays while it is read, whatever of it is released meanwhile
            offset = 0
            while offset + _HEAD.size <= len(content):
                size, check = _HEAD.unpack_from(content, offset)
                record = content[offset + _HEAD.size : offset + _HEAD.size + size]
                if not 0 < size == len(record) or zlib.crc32(record) != check:
                    break  # zeros, too: what of a file a power cut has left unwritten
                place = Place(number, offset, size)
                self._keep(place)
                yield place, record
                offset += _HEAD.size + size
            self._wanted[number] -= 1

    def append(self, record: bytes) -> Place:
        """Write a record. Raises OSError (the disk may be full), and then nothing is written."""
        if self._size >= FILE_BYTES:
            self._rotate()
        descriptor = self._files[self._current]
        place = Place(self._current, self._size, len(record))
        text = _HEAD.pack(len(record), zlib.crc32(record)) + record
        try:
            written = os.pwrite(descriptor, text, self._size)
            if written != len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(descriptor, self._size)
            raise
        self._size += len(text)
        self._sizes[self._current] = self._size
        self._keep(place)
        self._unsynced.add(self._current)
        if self._timer is None and self._syncing is None:
            self._timer = asyncio.get_running_loop().call_later(SYNC_SECONDS, self._sync)
        return place

    def read(self, place: Place) -> bytes:
        """A record that is still wanted. Raises OSError."""
        if place.file not in self._files:
            self._files[place.file] = os.open(self._path(place.file), os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self._files[place.file], place.size, place.offset + _HEAD.size)

    def release(self, place: Place) -> None:
        """The record is not wanted any more."""
        self._wanted[place.file] -= 1
        self._wanted_bytes -= place.size
        self._drop_if_unwanted(place.file)

    def refuse(self) -> int | None:
        """The oldest file, if the journal holds mostly what nobody wants: its records should be moved."""
        old = [n for n in self._wanted if n != self._current]
        return min(old) if old and sum(self._sizes.values()) > 4 * self._wanted_bytes + 4 * FILE_BYTES else None

    def tidy(self) -> None:
        """After a replay: drop the files in which nothing was wanted."""
        for number in list(self._wanted):
            self._drop_if_unwanted(number)

    async def close(self) -> None:
        """Sync and let go."""
        if self._timer is not None:
            self._timer.cancel()
        while self._syncing is not None or self._unsynced:
            if self._syncing is None:
                self._sync()
            if self._syncing is not None:
                await asyncio.wait([self._syncing])
        self._threads.shutdown()
        for descriptor in self._files.values():
            os.close(descriptor)
        self._files = {}

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:08d}.journal"

    def _keep(self, place: Place) -> None:
        self._wanted[place.file] += 1
        self._wanted_bytes += place.size

    def _rotate(self) -> None:
        number = self._current + 1
        descriptor = os.open(self._path(number), os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        last, self._current = self._current, number
        self._files[number] = descriptor
        self._wanted[number] = self._sizes[number] = self._size = 0
        if last in self._wanted:
            self._drop_if_unwanted(last)

    def _drop_if_unwanted(self, number: int) -> None:
        if number == self._current and number in self._files:
            return
        if self._wanted.get(number) != 0:
            return
        if self._unsynced:
            self._unwanted.add(number)
        elif self._busy:
            self._leaving.add(number)
        else:
            self._drop(number)

    def _drop(self, number: int) -> None:
        del self._wanted[number], self._sizes[number]
        descriptor = self._files.pop(number, None)
        if descriptor is not None:
            os.close(descriptor)
        self._path(number).unlink(missing_ok=True)

    def _sync(self) -> None:
        self._timer = None
        self._busy, self._unsynced = self._unsynced, set()
        self._leaving, self._unwanted = self._unwanted, set()
        self._syncing = asyncio.get_running_loop().run_in_executor(self._threads, _sync_all, [self._files[n] for n in sorted(self._busy)])
        self._syncing.add_done_callback(self._synced)

    def _synced(self, done: asyncio.Future[None]) -> None:
        self._syncing = None
        self._busy = set()
        leaving, self._leaving = self._leaving, set()
        if done.exception() is None:
            for number in leaving:
                self._drop(number)
        else:
            self._unwanted |= leaving
        if self._unsynced and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SYNC_SECONDS, self._sync)


def _sync_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.fdatasync(descriptor)
