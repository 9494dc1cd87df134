"""Blob streams (`application/vnd.penstock.blobs`): blobs one after another, each as its digest (32 bytes), its size (u32, big-endian) and its
contents, ended by 36 zero bytes, without which the stream was cut. Their order is free."""

import hashlib
from collections.abc import Callable, Iterable, Iterator

from libs.archives.pump import gathered
from libs.archives.rules import ArchiveRefused
from libs.archives.tree import CHUNK, DIGEST

MEDIA_TYPE = "application/vnd.penstock.blobs"
_HEADER = DIGEST + 4
END_FRAME = bytes(_HEADER)


def frame_header(digest: bytes, size: int) -> bytes:
    """What goes before a blob's contents."""
    return digest + size.to_bytes(4, "big")


def frames(blobs: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    """The stream of these blobs (digest, contents), its end with it, small ones gathered. Blocking, as `blobs` is."""
    return gathered(_frames(blobs))


def _frames(blobs: Iterable[tuple[bytes, bytes]]) -> Iterator[bytes]:
    for digest, contents in blobs:
        yield frame_header(digest, len(contents))
        yield contents
    yield END_FRAME


class BlobStreamReader:
    """Takes a blob stream apart as it arrives, and gives on only what was asked for, once, and is what its digest says. Memory: one blob, and the
    digests of those that `came`."""

    def __init__(self, expected: Callable[[bytes], int | None]) -> None:
        """`expected` says how large the blob with a digest is, None when it is not wanted."""
        self._expected = expected
        self.came: set[bytes] = set()
        self._digest: bytes | None = None
        self._needed = _HEADER
        self._waiting: list[bytes] = []
        self._ended = False

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """The blobs that `data` completes: digest and contents; to be drawn to its end. Raises ArchiveRefused."""
        at = 0
        while at < len(data):
            if self._ended:
                raise ArchiveRefused(b"", "goes on after its end")
            taken = data[at : at + self._needed]
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
                continue
            digest, self._digest, self._needed = self._digest, None, _HEADER
            if hashlib.sha256(taken).digest() != digest:
                raise ArchiveRefused(b"", f"holds bytes that are not those of blob {digest.hex()}")
            self.came.add(digest)
            yield digest, taken

    def finish(self) -> None:
        """The stream is over. Raises ArchiveRefused when it was cut."""
        if not self._ended:
            raise ArchiveRefused(b"", "is cut short")

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
