"""Sparse members of GNU tar: which parts of a file an archive holds; the rest are holes. The old format (type `S`), pax 0.0, 0.1 and 1.0."""

from array import array
from collections.abc import Generator, Iterator

from libs.archives.rules import ArchiveRefused, LimitExceeded
from libs.archives.tar import BLOCK, number

_MAX_PARTS = 1 << 18


class SparseMap:
    """The parts of one member: in order, inside the file, and together exactly as long as what is stored of it."""

    def __init__(self, member: bytes, size: int) -> None:
        """`size` is that of the file with its holes, and known to be inside the limits."""
        self.size = size
        self.stored = 0
        self._member = member
        self._end = 0
        self._parts = array("Q")

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Offset and length of each part."""
        numbers = iter(self._parts)
        return zip(numbers, numbers, strict=True)

    def add(self, offset: int, length: int) -> None:
        """Raises ArchiveRefused."""
        if not self._end <= offset <= offset + length <= self.size:
            raise ArchiveRefused(self._member, "is a sparse member whose parts overlap, are out of order or lie beyond its end")
        if len(self._parts) >= 2 * _MAX_PARTS:
            raise LimitExceeded(self._member, f"is a sparse member of more than {_MAX_PARTS} parts")
        self._parts.append(offset)
        self._parts.append(length)
        self._end = offset + length
        self.stored += length

    def add_fields(self, fields: bytes) -> None:
        """Pairs of 12-byte numbers, as the old format has them; empty ones are unused."""
        for at in range(0, len(fields), 24):
            if fields[at + 12]:
                self.add(number(fields[at : at + 12], self._member), number(fields[at + 12 : at + 24], self._member))

    def add_text(self, text: bytes) -> None:
        """`offset,length,offset,length…`, as in pax 0.1."""
        numbers = text.split(b",") if text else []
        if len(numbers) % 2:
            raise ArchiveRefused(self._member, "has a damaged sparse map")
        for at in range(0, len(numbers), 2):
            self.add(decimal(numbers[at], self._member), decimal(numbers[at + 1], self._member))

    def lines(self) -> Generator[None, bytes, None]:
        """Takes the blocks before the contents, as pax 1.0 has them, one for each step, until the map is whole: how many parts, then offset and
        length of each, a line for each number."""
        rest, left, offset = b"", -1, -1
        while True:
            *numbers, rest = (rest + (yield)).split(b"\n")
            for text in numbers:
                value = decimal(text, self._member)
                if left < 0:
                    left = value
                elif offset < 0:
                    offset = value
                else:
                    self.add(offset, value)
                    offset, left = -1, left - 1
                if not left:
                    return
            if len(rest) > BLOCK:
                raise ArchiveRefused(self._member, "has a damaged sparse map")


def decimal(text: bytes, member: bytes) -> int:
    """A number of an extended header. Raises ArchiveRefused."""
    if not text.isdigit() or len(text) > 19:
        raise ArchiveRefused(member, "has a damaged extended header")
    return int(text)
