"""How blobs lie in the store.

A pack is one object, `<team>/<name>`: blobs one after another, then a footer. The footer's records (digest, size) are in the order of the blobs, so
that they also say where each begins; after them come their own sha256, their length and a magic. So a pack is there whole or not at all, what is in
it can be read from its end (and the index be made again), and N files of B bytes cost B / 8 MiB store operations. Nothing is ever changed.
"""

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

PACK = 8 << 20
"""A pack is closed once its blobs have so many bytes."""
MOST_BLOBS = 4096
_RECORD = struct.Struct(">32sI")
_TAIL = struct.Struct(">32sI12s")
_MAGIC = b"penstockpack"
FOOTER = MOST_BLOBS * _RECORD.size + _TAIL.size
"""No footer is longer."""


class InvalidPack(Exception):
    """An object that is no whole pack."""


class Place(NamedTuple):
    """Where a blob lies: `size` bytes from `start` of a pack; `damaged`: it was not there once, or not itself."""

    pack: str
    start: int
    size: int
    damaged: bool = False


class Pack(NamedTuple):
    """What is to be put, or was read from a footer: blobs' digests and sizes in their order."""

    digests: Sequence[bytes]
    sizes: Sequence[int]

    def starts(self) -> list[int]:
        starts, at = [], 0
        for size in self.sizes:
            starts.append(at)
            at += size
        return starts

    def footer(self) -> bytes:
        records = b"".join(map(_RECORD.pack, self.digests, self.sizes))
        return records + _TAIL.pack(hashlib.sha256(records).digest(), len(records), _MAGIC)

    @property
    def bytes(self) -> int:
        """The object's size."""
        return sum(self.sizes) + len(self.digests) * _RECORD.size + _TAIL.size


def read_footer(end: bytes, size: int) -> Pack:
    """From the last FOOTER bytes (or all) of an object of that size. Raises InvalidPack."""
    if len(end) < _TAIL.size:
        raise InvalidPack("too short")
    digest, length, magic = _TAIL.unpack(end[-_TAIL.size :])
    records = end[-_TAIL.size - length : -_TAIL.size] if length else b""
    if magic != _MAGIC or len(records) != length or length % _RECORD.size or hashlib.sha256(records).digest() != digest:
        raise InvalidPack("no footer")
    rows = list(_RECORD.iter_unpack(records))
    pack = Pack([row[0] for row in rows], [row[1] for row in rows])
    if pack.bytes != size:
        raise InvalidPack("not whole")
    return pack


def key(team: str, name: str) -> str:
    return f"{team}/{name}"
