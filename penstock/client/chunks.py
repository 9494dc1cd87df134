"""The chunks of a selection: where they are, what they hold, and whether their files still do.

A place is a file's number and that of a chunk in it: file << 32 | chunk."""

import hashlib
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from penstock.client.errors import Changed
from penstock.client.index import stamp_of
from penstock.client.scan import opened, read_chunk, save
from penstock.client.selection import Selection
from penstock.client.tree import CHUNK, DIGEST, ZERO_CHUNK


class Chunks:
    """What reads files is for threads."""

    def __init__(self, selection: Selection) -> None:
        self._selection = selection

    def located(self, missing: Sequence[tuple[int, int]]) -> "array[int]":
        """The places of those in these runs, counted as they first appear."""
        places = array("Q")
        seen: set[bytes] = set()
        ranges = iter(sorted(missing))
        first, last = next(ranges, (1 << 62, 1 << 62))
        for n, entry in enumerate(self._selection.entries):
            if entry.target or not entry.digest:
                continue
            for chunk in range(len(entry.digest) // DIGEST):
                digest = entry.digest[chunk * DIGEST : (chunk + 1) * DIGEST] if len(entry.digest) > DIGEST else entry.digest
                if digest in seen:
                    continue
                number = len(seen)
                seen.add(digest)
                while number > last:
                    first, last = next(ranges, (1 << 62, 1 << 62))
                if number >= first:
                    places.append(n << 32 | chunk)
        return places

    def streams(self, places: "array[int]", most: int) -> Iterator[Sequence[int]]:
        """Parts of about `most` bytes."""
        begin = size = 0
        for end, place in enumerate(places, 1):
            size += self.size(place)
            if size >= most:
                yield places[begin:end]
                begin, size = end, 0
        if begin < len(places):
            yield places[begin:]

    def size(self, place: int) -> int:
        """Bytes of a chunk."""
        return min(CHUNK, self._selection.entries[place >> 32].size - (place & 0xFFFFFFFF) * CHUNK)

    def digest(self, place: int) -> bytes:
        chunk = place & 0xFFFFFFFF
        return self._selection.entries[place >> 32].digest[chunk * DIGEST : (chunk + 1) * DIGEST]

    def read(self, place: int) -> tuple[bytes, bytes]:
        """A chunk as it was hashed. Raises Changed when the file is not the same any more."""
        n, chunk = place >> 32, place & 0xFFFFFFFF
        digest, size = self.digest(place), self.size(place)
        if digest == ZERO_CHUNK:
            return digest, bytes(CHUNK)
        with self.unchanged(n) as handle:
            contents = read_chunk(handle, chunk, size)
        if len(contents) != size:
            raise self.changed(n)
        return digest, contents

    @contextmanager
    def unchanged(self, n: int) -> Iterator[int]:
        """A file to read. Raises Changed when it is not, or in the end is no more, the one that was hashed."""
        path = os.fsencode(self._selection.root) + b"/" + self._selection.entries[n].path
        with opened(path) as handle:
            before = stamp_of(os.fstat(handle))
            if before != self._selection.stamps[n]:
                raise self.changed(n)
            yield handle
            if stamp_of(os.fstat(handle)) != before:
                raise self.changed(n)

    def changed(self, n: int) -> Changed:
        path = os.fsdecode(os.fsencode(self._selection.root) + b"/" + self._selection.entries[n].path)
        return Changed(f"{path} changed while it was uploaded: try again when nothing writes to it")

    def verify(self, places: Sequence[int]) -> None:
        """The server says that something does not match: find what was written to without a trace in its times, and do not trust it again.
        Raises Changed when there is such a file."""
        changed = -1
        for place in places:
            n = place >> 32
            digest, contents = self.read(place)
            if hashlib.sha256(contents).digest() != digest:
                changed = n
                self._selection.index.stamps[n] = b""
                self._selection.stale = True
        if changed >= 0:
            save(self._selection)
            raise self.changed(changed)
