"""How blobs lie in the store.

A pack is one upload's new bytes, one blob after another, cut into parts of 8 MiB: objects `<team>/<pack>/000000`, `000001`, … . Its last object,
`<team>/<pack>/index`, says which blobs lie where: without it a pack was never finished, and with it the blob index can be rebuilt from the packs.
So N files of B bytes cost B / 8 MiB store operations, and nothing is staged, renamed or changed. A blob larger than a part has a pack of its own.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Sequence

import msgspec

from libs.blobstore.objects import Objects

PART = 8 << 20


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a blob lies: `size` bytes from `start` of a pack. `digest` is its sha256 (32 bytes)."""

    digest: bytes
    size: int
    pack: str
    start: int


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[Place])


def part_key(team: str, pack: str, number: int) -> str:
    return f"{team}/{pack}/{number:06d}"


def index_key(team: str, pack: str) -> str:
    return f"{team}/{pack}/index"


def read_index(data: bytes) -> list[Place]:
    """Raises msgspec.MsgspecError for what is no index."""
    return _DECODER.decode(data)


class _Pack:
    """One pack as it is written."""

    def __init__(self, objects: Objects, team: str, name: str) -> None:
        self._objects = objects
        self._team = team
        self.name = name
        self.keys: list[str] = []
        self._buffer = bytearray()
        self.length = 0

    def write(self, data: bytes) -> None:
        self._buffer += data
        self.length += len(data)
        while len(self._buffer) >= PART:
            self._put(part_key(self._team, self.name, len(self.keys)), bytes(memoryview(self._buffer)[:PART]))
            del self._buffer[:PART]

    def close(self, places: Sequence[Place]) -> None:
        if self._buffer:
            self._put(part_key(self._team, self.name, len(self.keys)), bytes(self._buffer))
            self._buffer.clear()
        self._put(index_key(self._team, self.name), _ENCODER.encode(places))

    def _put(self, key: str, data: bytes) -> None:
        self.keys.append(key)
        self._objects.put(key, data)


class Upload:
    """Blobs on their way into the store; blocking. All of them are there once `seal` returns and its places are in the index; after `undo`, none.

    `known` tells which digests the team's index has already: those are not stored again."""

    def __init__(self, objects: Objects, team: str, writer: str, numbers: Iterator[int], known: Callable[[list[bytes]], Collection[bytes]]) -> None:
        """Packs are named `<writer>.<number>`."""
        self.team = team
        self.writer = writer
        self._objects = objects
        self._numbers = numbers
        self._known = known
        self._waiting: dict[bytes, bytes] = {}
        self._waiting_bytes = 0
        self._settled: set[bytes] = set()
        self._places: list[Place] = []
        self._small: _Pack | None = None
        self._small_places: list[Place] = []
        self._large: _Pack | None = None
        self._large_digest = hashlib.sha256()
        self._keys: list[str] = []

    def add(self, contents: bytes) -> bytes:
        """A blob that is in memory whole; its digest. Raises StoreUnavailable."""
        digest = hashlib.sha256(contents).digest()
        if contents and digest not in self._waiting and digest not in self._settled:
            self._waiting[digest] = contents
            self._waiting_bytes += len(contents)
            if self._waiting_bytes >= PART:
                self._flush()
        return digest

    def begin(self) -> None:
        """Start a blob that comes in pieces, by `write` until `end`."""
        self._large = self._new_pack()
        self._large_digest = hashlib.sha256()

    def write(self, piece: bytes) -> None:
        assert self._large is not None
        self._large_digest.update(piece)
        self._large.write(piece)

    def end(self) -> bytes:
        """The digest of the blob begun last."""
        pack, digest = self._large, self._large_digest.digest()
        assert pack is not None
        if digest in self._settled or self._known([digest]):
            self._objects.delete(pack.keys)
        else:
            place = Place(digest, pack.length, pack.name, 0)
            pack.close([place])
            self._places.append(place)
            self._keys += pack.keys
        self._large = None
        self._settled.add(digest)
        return digest

    def seal(self) -> Sequence[Place]:
        """Everything is in the store and would survive a power cut; where the new blobs lie. Raises StoreUnavailable."""
        self._flush()
        if self._small is not None:
            self._small.close(self._small_places)
            self._places += self._small_places
            self._keys += self._small.keys
            self._small = None
        self._objects.settle(self._keys)
        return self._places

    def undo(self) -> None:
        """Remove all that was written. Raises StoreUnavailable; what is left then is collected after this instance's end."""
        for pack in (self._small, self._large):
            if pack is not None:
                self._keys += pack.keys
        self._small = self._large = None
        self._waiting.clear()
        self._objects.delete(self._keys)

    def _new_pack(self) -> _Pack:
        return _Pack(self._objects, self.team, f"{self.writer}.{next(self._numbers)}")

    def _flush(self) -> None:
        if not self._waiting:
            return
        known = set(self._known(list(self._waiting)))
        for digest, contents in self._waiting.items():
            self._settled.add(digest)
            if digest in known:
                continue
            if self._small is None:
                self._small = self._new_pack()
            self._small_places.append(Place(digest, len(contents), self._small.name, self._small.length))
            self._small.write(contents)
        self._waiting.clear()
        self._waiting_bytes = 0
