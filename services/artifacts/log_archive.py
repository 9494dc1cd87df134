"""The form of an archived log: zstd frames of some 256 KiB, each of whole records, and an index by line, so that a range reads only its frames.

`penstock log 1\\n`, the frames, the index (msgpack: an array of frames `[first_line, offset, size]`), the index's length (8 bytes, big-endian).
A record is its length (4 bytes, big-endian) and msgpack `[first_line, segment]`; these are the bytes that readers are given.
"""

import sys
from collections.abc import Iterator, Sequence

import msgspec

from proto.messages import LogChunk, Segment, count_lines

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_MAGIC = b"penstock log 1\n"
_FRAME = 256 << 10
_TAIL = 8
_CHECKED: dict[int, int] = {zstd.CompressionParameter.checksum_flag: 1, zstd.CompressionParameter.compression_level: 3}
_ENCODER = msgspec.msgpack.Encoder()
_RECORD = msgspec.msgpack.Decoder(tuple[int, Segment])


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """Where a frame lies in the archive, and the number of its first line."""

    first_line: int
    offset: int
    size: int


class DamagedArchive(Exception):
    """The bytes are no archive."""


_INDEX = msgspec.msgpack.Decoder(list[Frame])


class LogArchiveWriter:
    """Chunks in, in order; an archive out. Keeps what it holds compressed."""

    def __init__(self) -> None:
        self._parts: list[bytes] = [_MAGIC]
        self._size = len(_MAGIC)
        self._frames: list[Frame] = []
        self._records = bytearray()
        self._first = 0
        self.lines = 0
        self.bytes = 0

    def add(self, chunk: LogChunk) -> None:
        """`lines` becomes the number of the line after the chunk's last, `bytes` what all chunks hold."""
        line = chunk.first_line
        for segment in chunk.segments:
            self.put(line, segment)
            line += count_lines(segment.data)

    def put(self, line: int, segment: Segment) -> None:
        """The next segment, whose first line is number `line`."""
        if not self._records:
            self._first = line
        record = _ENCODER.encode((line, segment))
        self._records += len(record).to_bytes(4, "big") + record
        self.bytes += len(segment.data)
        self.lines = max(self.lines, line + count_lines(segment.data))
        if len(self._records) >= _FRAME:
            self._flush()

    def close(self) -> bytes:
        self._flush()
        index = _ENCODER.encode(self._frames)
        return b"".join([*self._parts, index, len(index).to_bytes(_TAIL, "big")])

    def _flush(self) -> None:
        if not self._records:
            return
        frame = zstd.compress(self._records, options=_CHECKED)
        self._frames.append(Frame(self._first, self._size, len(frame)))
        self._parts.append(frame)
        self._size += len(frame)
        self._records.clear()


def index_span(size: int, tail: bytes) -> tuple[int, int]:
    """Where the index of an archive of `size` bytes lies (start, length), given its last 8 bytes."""
    length = int.from_bytes(tail[-_TAIL:], "big")
    return size - _TAIL - length, length


def read_frames(index: bytes) -> list[Frame]:
    """Raises DamagedArchive."""
    try:
        return _INDEX.decode(index)
    except msgspec.MsgspecError as error:
        raise DamagedArchive(f"its index: {error}") from None


def frames_from(frames: Sequence[Frame], line: int) -> Sequence[Frame]:
    """The frames that may hold line `line` or what comes after it."""
    for number in range(len(frames) - 1, -1, -1):
        if frames[number].first_line <= line:
            return frames[number:]
    return frames


def records(frame: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The records of a frame: first line, the line after its last, and the record with its length. Raises DamagedArchive."""
    try:
        for line, segment, record in unpacked(zstd.decompress(frame)):
            yield line, line + count_lines(segment.data), record
    except (msgspec.MsgspecError, zstd.ZstdError) as error:
        raise DamagedArchive(f"a frame: {error}") from None


def unpacked(plain: bytes) -> Iterator[tuple[int, Segment, bytes]]:
    """Records one after another: first line, segment, and the record with its length. Raises MsgspecError."""
    at = 0
    while at < len(plain):
        end = at + 4 + int.from_bytes(plain[at : at + 4], "big")
        line, segment = _RECORD.decode(memoryview(plain)[at + 4 : end])
        yield line, segment, plain[at:end]
        at = end
