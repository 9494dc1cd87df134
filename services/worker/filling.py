"""Files that the cache lacks, put together from the chunks in which they come, in any order."""

import os
import shutil
from collections.abc import Iterable

from libs.archives.place import write_file
from libs.archives.tree import CHUNK, FILE_MODE, PROGRAM_MODE, ZERO_CHUNK, Entry
from services.worker.teamcache import TeamCache, is_full
from services.worker.trees import name_of

_FILE = 24
"""Where a chunk goes is one number, of its file and of its place there, because there may be very many: file << _FILE | place."""


class Filling:
    """All methods block. `sizes` are the chunks that must come (digest → size). `close` removes what did not become whole; the rest is cached."""

    def __init__(self, cache: TeamCache, missing: Iterable[Entry]) -> None:
        """`missing` are distinct files, pinned. Raises OSError."""
        self.sizes: dict[bytes, int] = {}
        self._cache = cache
        self._files = list(missing)
        self._lacks = [0] * len(self._files)
        self._places: dict[bytes, list[int]] = {}
        self._folder = cache.new_path()
        self._folder.mkdir()
        self._made_room = False
        for number, entry in enumerate(self._files):
            for place, (digest, size) in enumerate(entry.chunks()):
                if digest != ZERO_CHUNK:
                    self._lacks[number] += 1
                    self.sizes[digest] = size
                    self._places.setdefault(digest, []).append(number << _FILE | place)
            if not self._lacks[number]:
                self._write(number, b"", 0)

    @property
    def lacking(self) -> list[bytes]:
        """The chunks that have not come yet."""
        return list(self._places)

    def put(self, digest: bytes, contents: bytes | memoryview) -> None:
        """A chunk that was lacking has come, and is what its digest says. Raises OSError; it is lacking then."""
        places = self._places[digest]
        while places:
            number, place = places[-1] >> _FILE, places[-1] & ((1 << _FILE) - 1)
            try:
                self._write(number, contents, place * CHUNK)
            except OSError as error:
                if self._made_room or not is_full(error):
                    raise
                self._made_room = True
                self._cache.all.trim(0)
                continue
            places.pop()
        del self._places[digest]

    def close(self) -> None:
        shutil.rmtree(self._folder)

    def _write(self, number: int, contents: bytes | memoryview, at: int) -> None:
        entry, path = self._files[number], self._folder / str(number)
        opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            if at or entry.size > CHUNK:
                rest = memoryview(contents)
                while rest:
                    written = os.pwrite(opened, rest, at)
                    rest, at = rest[written:], at + written
            else:
                write_file(opened, (bytes(contents),))
            if self._lacks[number] > 1:
                self._lacks[number] -= 1
                return
            os.fchmod(opened, PROGRAM_MODE if entry.executable else FILE_MODE)
            os.truncate(opened, entry.size)
        finally:
            os.close(opened)
        self._cache.add(name_of(entry), path)
        self._lacks[number] = 0
