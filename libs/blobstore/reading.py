"""Blobs out of their packs, each verified by its digest before it is given away. Blocking."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from libs.blobstore.objects import ObjectMissing, Objects, StoreUnavailable
from libs.blobstore.packs import Place, key

_GAP = 128 << 10
"""What is not wanted, but not worth a request of its own."""
_AT_ONCE = 16 << 20
"""No pack is longer, so that no range is."""
_KEPT = 24 << 20
_LARGE = 4 << 20
"""A blob of so many bytes that has no neighbours is not kept when it was read."""
_AGAIN = 256 << 10
_MOVES = 20


class BlobMissing(Exception):
    """The team has no such blob."""


class BlobDamaged(Exception):
    """What the store holds is not what was put: a pack is corrupt or gone. The next upload that carries the blob heals it."""


class _Range(NamedTuple):
    """Neighbouring blobs of a pack."""

    pack: str
    start: int
    end: int
    digests: list[bytes]


Find = Callable[[Collection[bytes]], dict[bytes, Place]]
Damaged = Callable[[str, bytes, int], None]
Sound = Callable[[str, Collection[bytes]], None]


class BlobReader:
    """Reads blobs of one team, neighbours together, so that reading many costs a request for each 8 MiB, not for each blob. For one thread at a time;
    at most 32 MiB of the store are in memory. All methods raise BlobDamaged, StoreUnavailable, LogUnavailable; BlobMissing when a blob has gone;
    KeyError for one that the reader is not for."""

    def __init__(
        self,
        objects: Objects,
        team: str,
        places: dict[bytes, Place],
        find: Find,
        damaged: Damaged,
        sound: Sound,
        ahead: ThreadPoolExecutor,
    ) -> None:
        """`find` looks places up again, `damaged` takes note of (pack, blob, where the pack ends), `sound` of what was noted so and is whole;
        all of them block."""
        self._objects = objects
        self._team = team
        self._places = places
        self._find = find
        self._damaged = damaged
        self._sound = sound
        self._ahead = ahead
        self._ranges: dict[bytes, _Range] | None = None
        self._kept: OrderedDict[tuple[str, int, int], memoryview] = OrderedDict()
        self._read: set[tuple[str, int, int]] = set()

    def size(self, digest: bytes) -> int:
        return self._places[digest].size

    def read(self, digest: bytes) -> bytes:
        """In any order, quickest in that of storing."""
        for _ in range(_MOVES):
            place = self._places[digest]
            start, data = self._around(digest, place)
            if data is None:
                self._look_again(self._ranges_of()[digest].digests, place.pack)
                continue
            return bytes(self._verified(digest, place, data[place.start - start : place.start - start + place.size], start + len(data)))
        raise BlobDamaged(f"blob {digest.hex()} is never where it is said to be")

    def stream(self, digests: Iterable[bytes]) -> Iterator[tuple[bytes, bytes | memoryview]]:
        """Each of these once, in the order in which they lie in the store; the next are read while these are dealt with."""
        waiting = _ranges({digest: self._places[digest] for digest in digests})
        waiting.reverse()
        ahead: tuple[_Range, Future[memoryview]] | None = None
        while waiting or ahead is not None:
            current, future = ahead or self._begun(waiting.pop())
            try:
                data = future.result()
                ahead = self._begun(waiting.pop()) if waiting else None
            except ObjectMissing:
                ahead = None
                self._look_again(current.digests, current.pack)
                moved = _ranges({digest: self._places[digest] for digest in current.digests})
                waiting.extend(reversed(moved))
                continue
            self._recheck(current.digests, current.start, data)
            for digest in current.digests:
                place = self._places[digest]
                piece = data[place.start - current.start : place.start - current.start + place.size]
                sound = self._verified(digest, place, piece, current.start + len(data))
                # a view of a small one would keep all of its neighbours
                yield digest, sound if place.size >= _LARGE else bytes(sound)

    def _begun(self, wanted: _Range) -> tuple[_Range, Future[memoryview]]:
        return wanted, self._ahead.submit(self._objects.get, key(self._team, wanted.pack), wanted.start, wanted.end - wanted.start)

    def _around(self, digest: bytes, place: Place) -> tuple[int, memoryview | None]:
        """The blob and its neighbours, and where they begin; None when the pack is not there. The first time all of its range is read; when that was
        not kept (they are wanted in another order), only a little."""
        wanted = self._ranges_of()[digest]
        name = wanted.pack, wanted.start, wanted.end
        kept = self._kept.get(name)
        if kept is not None:
            self._kept.move_to_end(name)
            return wanted.start, kept
        whole = name not in self._read
        start = wanted.start if whole else place.start
        end = wanted.end if whole else min(wanted.end, place.start + max(place.size, _AGAIN))
        try:
            data = self._objects.get(key(self._team, place.pack), start, end - start)
        except ObjectMissing:
            return start, None
        self._recheck(wanted.digests, start, data)
        if whole:
            self._read.add(name)
        if whole and (len(wanted.digests) > 1 or len(data) < _LARGE):
            self._kept[name] = data
            while sum(map(len, self._kept.values())) > _KEPT and len(self._kept) > 1:
                self._kept.popitem(last=False)
        return start, data

    def _ranges_of(self) -> dict[bytes, _Range]:
        if self._ranges is None:
            self._ranges = {digest: found for found in _ranges(self._places) for digest in found.digests}
        return self._ranges

    def _verified(self, digest: bytes, place: Place, data: memoryview, end: int) -> memoryview:
        if hashlib.sha256(data).digest() == digest:
            return data
        short = len(data) < place.size
        self._damaged(place.pack, digest, end if short else 1 << 30)
        raise BlobDamaged(f"blob {digest.hex()} in pack {self._team}/{place.pack} is not what was stored" + (": the pack is cut" if short else ""))

    def _recheck(self, digests: Collection[bytes], start: int, data: memoryview) -> None:
        """What was taken for damaged, and was only away, is sound again."""
        found: dict[bytes, Place] = {}
        for digest in digests:
            place = self._places[digest]
            at = place.start - start
            if place.damaged and at >= 0 and hashlib.sha256(data[at : at + place.size]).digest() == digest:
                found[digest] = place._replace(damaged=False)
        if found:
            self._sound(next(iter(found.values())).pack, found)
            self._places.update(found)

    def _look_again(self, digests: Collection[bytes], gone: str) -> None:
        """A pack is not there. It was rewritten, and they are elsewhere; or it is lost; or nothing is there at all, which says nothing of it."""
        found = self._find(digests)
        for digest in digests:
            if digest not in found:
                raise BlobMissing(digest.hex())
            if found[digest].pack == gone:
                if not self._objects.reachable(key(self._team, gone)):
                    raise StoreUnavailable(f"nothing is where pack {self._team}/{gone} should be")
                self._damaged(gone, digest, 0)
                raise BlobDamaged(f"blob {digest.hex()}: pack {self._team}/{gone} is gone")
        self._places.update(found)
        self._ranges = None


def _ranges(places: dict[bytes, Place]) -> list[_Range]:
    """What to read, in the order of the store."""
    ranges: list[_Range] = []
    for digest, place in sorted(places.items(), key=lambda item: item[1]):
        last = ranges[-1] if ranges else None
        end = place.start + place.size
        if last is not None and last.pack == place.pack and place.start - last.end <= _GAP and end - last.start <= _AT_ONCE:
            last.digests.append(digest)
            ranges[-1] = last._replace(end=max(end, last.end))
        else:
            ranges.append(_Range(place.pack, place.start, end, [digest]))
    return ranges
