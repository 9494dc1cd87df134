"""Streams that may be gzip, zstd or plain: sniffed by their first bytes, unpacked piece by piece within limits; and the way back."""

import sys
import zlib
from collections.abc import AsyncIterator, Generator, Iterable, Iterator
from typing import Literal, TypeVar

from libs.archives.pump import drawn
from libs.archives.rules import ArchiveRefused, LimitExceeded, Limits

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

Format = Literal["tar", "tgz", "tzst"]
P = TypeVar("P", bound=bytes | memoryview)

_PIECE = 1 << 20
_GZIP = b"\x1f\x8b"
_ZSTD = b"\x28\xb5\x2f\xfd"
_FREE_STREAMS, _STREAM_BYTES = 1000, 64
"""An archive may be many compressed streams one after another, but beyond the first few each costs more than its bytes."""
_WINDOW_LOG = 25
"""The largest window a zstd stream may ask for: 32 MiB of memory for each upload."""


class Decompressor:
    """Push compressed bytes in, take plain pieces of at most 1 MiB out, whatever the ratio.

    An archive's format is known by its first bytes; that of a request body with a Content-Encoding is said: `Decompressor(limits, "tzst", most)`."""

    def __init__(self, limits: Limits, form: Format | None = None, most: int | None = None) -> None:
        """`most` bounds the bytes that may come out; without it, what an archive inside the limits can need."""
        self._limits = limits
        self._most = limits.max_stream if most is None else most
        self._head = b""
        self._format = form
        self._gzip: zlib._Decompress | None = None
        self._zstd: zstd.ZstdDecompressor | None = None
        self._between = False
        self._streams = 0
        self.came_in = 0
        self._went_out = 0

    def feed(self, data: P) -> Generator[P | bytes, None, None]:
        """Plain pieces; what is not packed, as it is. Raises ArchiveRefused for damaged data and LimitExceeded for a bomb."""
        self.came_in += len(data)
        if self._format is None:
            head = self._head = self._head + data
            if len(head) < len(_ZSTD):
                return
            self._format = "tgz" if head.startswith(_GZIP) else "tzst" if head.startswith(_ZSTD) else "tar"
            pieces: Iterator[P | bytes] = self._unpacked(head)
        else:
            pieces = self._unpacked(data)
        for piece in pieces:
            self._went_out += len(piece)
            limits = self._limits
            if self._went_out > limits.free_ratio_bytes and self._went_out > limits.max_ratio * self.came_in:
                raise LimitExceeded(b"", f"unpacks to more than {limits.max_ratio} times its size")
            if self._went_out > self._most:
                raise LimitExceeded(b"", f"holds more than {self._most} bytes")
            yield piece

    def _unpacked(self, data: P) -> Iterator[P | bytes]:
        if self._format == "tar":
            return iter((data,))
        return self._from_gzip(bytes(data)) if self._format == "tgz" else self._from_zstd(bytes(data))

    def finish(self) -> None:
        """No more will come. Raises ArchiveRefused when a compressed stream is unfinished."""
        if self._gzip is not None or self._zstd is not None or self._format is None or (self._format != "tar" and not self._streams):
            raise ArchiveRefused(b"", "is cut short")

    def _count_stream(self) -> None:
        self._streams += 1
        if self._streams > _FREE_STREAMS + self.came_in // _STREAM_BYTES:
            raise LimitExceeded(b"", f"is cut into compressed streams of less than {_STREAM_BYTES} bytes")

    def _from_gzip(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._gzip is None:
                # gzip files may be padded with zeros, and may be several one after another
                data = data.lstrip(b"\0") if self._between else data
                if not data:
                    return
                self._count_stream()
                self._gzip = zlib.decompressobj(31)
            try:
                piece = self._gzip.decompress(data, _PIECE)
            except zlib.error as error:
                raise ArchiveRefused(b"", f"is no sound gzip stream ({error})") from None
            if piece:
                yield piece
            if self._gzip.eof:
                data = self._gzip.unused_data
                self._gzip, self._between = None, True
            else:
                data = self._gzip.unconsumed_tail

    def _from_zstd(self, data: bytes) -> Iterator[bytes]:
        while True:
            if self._zstd is None:
                if not data:
                    return
                self._count_stream()
                self._zstd = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})
            try:
                piece = self._zstd.decompress(data, _PIECE)
            except zstd.ZstdError as error:
                raise ArchiveRefused(b"", f"is no sound zstd stream ({error})") from None
            if piece:
                yield piece
            if self._zstd.eof:
                data = self._zstd.unused_data
                self._zstd = None
            elif self._zstd.needs_input:
                return
            else:
                data = b""


async def unpacked(pieces: AsyncIterator[bytes], source: Decompressor) -> AsyncIterator[bytes]:
    """What they are packed, unpacked in threads. Raises as `source` does."""
    async for piece in pieces:
        async for plain in drawn(source.feed(piece)):
            yield plain
    source.finish()


def compressed(pieces: Iterable[bytes], form: Format) -> Iterator[bytes]:
    """The stream in a format; the same pieces give the same bytes."""
    if form == "tar":
        yield from pieces
        return
    packer = zlib.compressobj(6, zlib.DEFLATED, 31) if form == "tgz" else zstd.ZstdCompressor(level=3)
    for piece in pieces:
        if out := packer.compress(piece):
            yield out
    yield packer.flush()
