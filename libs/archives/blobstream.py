"""Blob streams (`application/vnd.penstock.blobs`): blobs one after another, each as its digest (32 bytes), its size (u32, big-endian) and its
contents, ended by 36 zero bytes, without which the stream was cut. Their order is free."""

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from typing import TypeVar

from libs.archives.pages import LARGE, Filling, Paged, is_paged, paged
from libs.archives.pump import gathered
from libs.archives.rules import ArchiveRefused
from libs.archives.tree import CHUNK, DIGEST

MEDIA_TYPE = "application/vnd.penstock.blobs"
_HEADER = DIGEST + 4
P = TypeVar("P", bound=bytes | memoryview)

Fill = Callable[[memoryview], Awaitable[int]]
"""Puts into memory as much of a stream as fits: less, and then nothing, only at its end."""

END_FRAME = bytes(_HEADER)
_PIECE = 1 << 20


def frame_header(digest: bytes, size: int) -> bytes:
    """What goes before a blob's contents."""
    return digest + size.to_bytes(4, "big")


def stream_size(count: int, size: int) -> int:
    """Bytes of a stream of so many blobs, with so many bytes in all."""
    return (count + 1) * _HEADER + size


def frames(blobs: Iterable[tuple[bytes, P]]) -> Iterator[P | bytes]:
    """The stream of these blobs (digest, contents), its end with it, small ones gathered. Blocking, as `blobs` is."""
    return gathered(_frames(blobs))


def _frames(blobs: Iterable[tuple[bytes, P]]) -> Iterator[P | bytes]:
    for digest, contents in blobs:
        yield frame_header(digest, len(contents))
        yield contents
    yield END_FRAME


async def whole_pieces(fill: Fill, filling: Filling) -> AsyncIterator[memoryview]:
    """A stream in pieces for a BlobStreamReader, each large blob in one, which lies so that it need not be copied to be stored; the memory for those
    is `filling`'s. What is out of order is left to the reader."""
    begun = memoryview(b"")
    inside = 0
    while True:
        if not inside and len(begun) < _HEADER:
            header = memoryview(bytearray(_HEADER))
            header[: len(begun)] = begun
            came = await fill(header[len(begun) :])
            begun = header[: len(begun) + came]
            if len(begun) < _HEADER:
                if came:
                    continue
                yield begun
                return
        if begun:
            size = int.from_bytes(begun[DIGEST:_HEADER], "big")
            if LARGE <= size <= CHUNK:
                async with filling(_HEADER + size, _HEADER) as whole:
                    whole[: len(begun)] = begun
                    piece = whole[: len(begun) + await fill(whole[len(begun) :])]
                    del whole
                yield piece
                del piece  # while the next one is waited for, nobody has it
                size = 0
            else:
                yield begun
            begun, inside = begun[:0], size
            continue
        piece = memoryview(bytearray(_PIECE))
        came, at = await fill(piece), inside
        if not came:
            return
        while at + _HEADER <= came and not LARGE <= (size := int.from_bytes(piece[at + DIGEST : at + _HEADER], "big")) <= CHUNK:
            at += _HEADER + size
        begun, inside = piece[at:came], max(at - came, 0)
        yield piece[: min(at, came)]


def poured(pieces: AsyncIterator[P]) -> Fill:
    """A stream that comes in pieces as a `fill`. What came before it broke off is given first."""
    rest: memoryview = memoryview(b"")
    broken: Exception | None = None

    async def fill(memory: memoryview) -> int:
        nonlocal rest, broken
        at = 0
        while at < len(memory):
            if not rest:
                try:
                    if broken is not None:
                        raise broken
                    rest = memoryview(await anext(pieces, b""))
                except Exception as error:
                    if not at:
                        raise
                    broken = error
                if not rest:
                    break
            part, rest = rest[: len(memory) - at], rest[len(memory) - at :]
            memory[at : at + len(part)] = part
            at += len(part)
        return at

    return fill


class BlobStreamReader:
    """Takes a blob stream apart as it arrives, and gives on only what was asked for, once, and is what its digest says; a large one in memory that
    begins at a page. Memory: one blob, and the digests of those that `came`."""

    def __init__(self, expected: Callable[[bytes], int | None]) -> None:
        """`expected` says how large the blob with a digest is, None when it is not wanted."""
        self._expected = expected
        self.came: set[bytes] = set()
        self._digest: bytes | None = None
        self._needed = _HEADER
        self._waiting: list[bytes] = []
        self._large: Paged | None = None
        self._ended = False

    def feed(self, data: bytes | memoryview) -> Iterator[tuple[bytes, bytes | memoryview]]:
        """The blobs that `data` completes: digest and contents; to be drawn to its end. Raises ArchiveRefused."""
        at = 0
        while at < len(data):
            if self._ended:
                raise ArchiveRefused(b"", "goes on after its end")
            if self._digest is not None and (self._large is not None or self._needed >= LARGE):
                part = memoryview(data)[at : at + self._needed]
                at += len(part)
                if self._large is None:
                    if len(part) == self._needed and is_paged(part):
                        yield self._verified(part)
                        continue
                    self._large = Paged(paged(self._needed))
                self._needed -= len(part)
                self._large.add(part)
                if self._needed:
                    return
                contents, self._large = self._large.filled(), None
                yield self._verified(contents)
                continue
            taken = bytes(data[at : at + self._needed])
            at += len(taken)
            self._needed -= len(taken)
            if self._needed or self._waiting:
                self._waiting.append(taken)
                if self._needed:
                    return
                taken = b"".join(self._waiting)
                self._waiting.clear()
            if self._digest is None:
                self._begin(taken)
            else:
                yield self._verified(taken)

    def finish(self) -> None:
        """The stream is over. Raises ArchiveRefused when it was cut."""
        if not self._ended:
            raise ArchiveRefused(b"", "is cut short")

    def _verified(self, contents: bytes | memoryview) -> tuple[bytes, bytes | memoryview]:
        """The blob that is whole now."""
        digest = self._digest
        assert digest is not None
        self._digest, self._needed = None, _HEADER
        if hashlib.sha256(contents).digest() != digest:
            raise ArchiveRefused(b"", f"holds bytes that are not those of blob {digest.hex()}")
        self.came.add(digest)
        return digest, contents

    def _begin(self, header: bytes) -> None:
        if header == END_FRAME:
            self._ended, self._needed = True, _HEADER
            return
        digest, size = header[:DIGEST], int.from_bytes(header[DIGEST:], "big")
        if digest in self.came:
            raise ArchiveRefused(b"", f"holds blob {digest.hex()} twice")
        wanted = self._expected(digest)
        if wanted is None:
            raise ArchiveRefused(b"", f"holds blob {digest.hex()}, which is not wanted")
        if size != wanted or not 0 < size <= CHUNK:
            raise ArchiveRefused(b"", f"holds blob {digest.hex()} in another size: {size} bytes")
        self._digest, self._needed = digest, size
