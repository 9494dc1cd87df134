"""Blobs out of their packs, each verified by its digest before its last byte is given away. Blocking."""

import hashlib
from collections.abc import Generator, Iterator, Mapping

from libs.blobstore.objects import ObjectMissing, Objects
from libs.blobstore.packs import PART, Place, part_key

_PIECE = 1 << 20


class BlobDamaged(Exception):
    """What the store holds is not what was put: a pack is corrupt or gone."""


class BlobReader:
    """Reads blobs of one team at known places. Neighbours in a pack are read together, so reading in the order of storing costs a
    store operation for each MiB, not for each blob. For one reader at a time."""

    def __init__(self, objects: Objects, team: str, places: Mapping[bytes, Place]) -> None:
        self._objects = objects
        self._team = team
        self._places = places
        self._window: tuple[str, int, bytes] = ("", 0, b"")

    def read(self, digest: bytes) -> Generator[bytes, None, None]:
        """The blob in pieces. Raises BlobDamaged (at the latest in place of the last piece), StoreUnavailable, KeyError for an unknown place."""
        place = self._places[digest]
        seen = hashlib.sha256()
        held: bytes | None = None
        for piece in self._pieces(place):
            seen.update(piece)
            if held is not None:
                yield held
            held = piece
        if seen.digest() != digest:
            raise BlobDamaged(f"blob {digest.hex()} in pack {self._team}/{place.pack} is not what was stored")
        if held is not None:
            yield held

    def read_all(self, digest: bytes) -> bytes:
        return b"".join(self.read(digest))

    def size(self, digest: bytes) -> int:
        return self._places[digest].size

    def read_range(self, digest: bytes, start: int, length: int) -> bytes:
        """Part of a blob, not verified: for contents that verify themselves."""
        place = self._places[digest]
        return b"".join(self._span(place, place.start + start, min(length, place.size - start)))

    def _pieces(self, place: Place) -> Iterator[bytes]:
        return self._span(place, place.start, place.size)

    def _span(self, place: Place, at: int, remaining: int) -> Iterator[bytes]:
        while remaining > 0:
            number, inside = divmod(at, PART)
            key = part_key(self._team, place.pack, number)
            piece = self._at(key, inside, min(remaining, PART - inside, _PIECE), place)
            yield piece
            at += len(piece)
            remaining -= len(piece)

    def _at(self, key: str, start: int, length: int, place: Place) -> bytes:
        window_key, window_start, window = self._window
        offset = start - window_start
        if key != window_key or offset < 0 or offset >= len(window):
            try:
                window = self._objects.get(key, start, min(_PIECE, PART - start))
            except ObjectMissing:
                window = b""
            if not window:
                raise BlobDamaged(f"pack {self._team}/{place.pack} is not whole: {key}")
            self._window = (key, start, window)
            offset = 0
        return window[offset : offset + length]
