"""Files that the cache lacks, put together from the chunks in which they come, in any order."""

import os
from collections.abc import Iterable
from pathlib import Path

import msgspec

from libs.archives.place import write_file
from libs.archives.tree import CHUNK, FILE_MODE, PROGRAM_MODE, ZERO_CHUNK, Entry
from services.worker.cache import Cache, is_full, name_of


class _Part(msgspec.Struct):
    """A file on its way. `lacks` counts the chunks that must still come; what came lies at `path`."""

    entry: Entry
    path: Path
    lacks: int = 0


class Filling:
    """All methods block. `sizes` are the chunks that must come (digest → size). `close` removes what did not become whole; the rest is cached."""

    def __init__(self, cache: Cache, missing: Iterable[Entry]) -> None:
        """`missing` are distinct files, pinned. Raises OSError."""
        self.sizes: dict[bytes, int] = {}
        self._cache = cache
        self._places: dict[bytes, list[tuple[_Part, int]]] = {}
        self._parts: list[_Part] = []
        self._made_room = False
        for entry in missing:
            part = _Part(entry, cache.new_path())
            self._parts.append(part)
            for number, (digest, size) in enumerate(entry.chunks()):
                if digest != ZERO_CHUNK:
                    part.lacks += 1
                    self.sizes[digest] = size
                    self._places.setdefault(digest, []).append((part, number * CHUNK))
            if not part.lacks:
                self._write(part, b"", 0)

    @property
    def lacking(self) -> list[bytes]:
        """The chunks that have not come yet."""
        return list(self._places)

    def put(self, digest: bytes, contents: bytes) -> None:
        """A chunk that was lacking has come, and is what its digest says. Raises OSError; it is lacking then."""
        places = self._places[digest]
        while places:
            part, at = places[-1]
            try:
                self._write(part, contents, at)
            except OSError as error:
                if self._made_room or not is_full(error):
                    raise
                self._made_room = True
                self._cache.trim(0)
                continue
            places.pop()
        del self._places[digest]

    def close(self) -> None:
        for part in self._parts:
            part.path.unlink(missing_ok=True)

    def _write(self, part: _Part, contents: bytes, at: int) -> None:
        entry = part.entry
        opened = os.open(part.path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        try:
            if at or entry.size > CHUNK:
                rest = memoryview(contents)
                while rest:
                    written = os.pwrite(opened, rest, at)
                    rest, at = rest[written:], at + written
            else:
                write_file(opened, (contents,))
            if part.lacks > 1:
                part.lacks -= 1
                return
            os.fchmod(opened, PROGRAM_MODE if entry.executable else FILE_MODE)
            os.truncate(opened, entry.size)
        finally:
            os.close(opened)
        self._cache.add(name_of(entry), part.path)
        part.lacks = 0
