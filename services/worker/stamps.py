"""What is known of very many files by their inodes, in little room."""

import os
import struct
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

_STAMP = struct.Struct("=QQqq")
STAMP = _STAMP.size


class Stamp(NamedTuple):
    """What changes of a file when its contents do, or when another takes its place."""

    inode: int
    size: int
    modified: int
    changed: int

    def packed(self) -> bytes:
        """STAMP bytes."""
        return _STAMP.pack(*self)


def stamp_of(seen: os.stat_result) -> Stamp:
    return Stamp(seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)


class ByInode:
    """Some bytes for each of many inodes: first all are added, then they are found."""

    def __init__(self) -> None:
        self._inodes = array("Q")
        self._ends = array("Q", [0])
        self._bytes = bytearray()
        self._order = array("Q")

    def add(self, inode: int, what: bytes) -> None:
        self._inodes.append(inode)
        self._bytes += what
        self._ends.append(len(self._bytes))

    def find(self, inode: int) -> Iterator[bytes]:
        """What was added for it."""
        of = self._inodes.__getitem__
        if len(self._order) < len(self._inodes):
            self._order = array("Q", sorted(range(len(self._inodes)), key=of))
        for at in range(bisect_left(self._order, inode, key=of), len(self._order)):
            number = self._order[at]
            if of(number) != inode:
                return
            yield bytes(memoryview(self._bytes)[self._ends[number] : self._ends[number + 1]])
