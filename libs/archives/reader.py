"""A tar stream, plain, gzip or zstd, taken apart as it arrives: bytes pushed in, members and their contents out.
Nothing is kept but the header at hand. Holes of sparse members come out as zeros.

The reader checks each member by itself (kind, path, limits); how members relate to one another is `tree.py`'s part.
"""

from collections.abc import Generator, Iterator
from typing import Literal, NamedTuple

from libs.archives.compression import Decompressor
from libs.archives.rules import ArchiveRefused, LimitExceeded, Limits, check_target, clean_path
from libs.archives.sparse import SparseMap, decimal
from libs.archives.tar import BLOCK, Header, number, padding, read_header, read_pax

Kind = Literal["file", "folder", "link", "hardlink"]
_KINDS: dict[bytes, Kind] = {b"\0": "file", b"0": "file", b"7": "file", b"S": "file", b"1": "hardlink", b"2": "link", b"5": "folder"}
_NAMED = {b"3": "is a device", b"4": "is a device", b"6": "is a FIFO"}
_PER_MEMBER = (b"path", b"linkpath", b"size")
_MAX_EXTENDED = 1 << 20
_ZEROS = bytes(BLOCK)
HOLE = bytes(8 << 20)
"""What comes out for each chunk of a sparse member that is all hole: this very object, so that nobody has to read it."""


class Member(NamedTuple):
    """One member, before its contents: `size` bytes follow for a file, none for the rest. `path` is clean; b"" is the root.
    `target` is a symbolic link's text, or the path of the file that a hard link shares."""

    kind: Kind
    path: bytes
    executable: bool = False
    size: int = 0
    target: bytes = b""


class ArchiveReader:
    """Push parser: `feed` gives a Member, then the pieces of its contents, then the next; `finish` says whether all was there.
    A piece may be a view of what was fed: to keep it for long is to keep all of that."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._source = Decompressor(limits)
        self._buffer: bytes | memoryview = b""
        self._at = 0
        self._ended = False
        self._filled = 0
        self._steps = self._parse()

    def feed(self, data: bytes) -> Iterator[Member | bytes | memoryview]:
        """What `data` completes. Raises ArchiveRefused."""
        for piece in self._source.feed(data):
            self._buffer = memoryview(b"".join((self._buffer[self._at :], piece)) if self._at < len(self._buffer) else piece)
            self._at = 0
            for found in self._steps:
                if found is None:
                    break
                yield found

    def finish(self) -> None:
        """The stream is over. Raises ArchiveRefused when it ended before the archive did."""
        self._source.finish()
        if not self._ended:
            raise ArchiveRefused(b"", "is cut short")

    def _parse(self) -> Generator[Member | bytes | memoryview | None, None, None]:
        """The archive's grammar; None asks for more bytes."""
        members = total = 0
        long_name = long_link = None
        extended: dict[bytes, bytes] = {}
        while True:
            block = yield from self._take(BLOCK)
            if block == _ZEROS:
                yield from self._rest_is_empty()
            header = read_header(block)
            if header.type in (b"L", b"K", b"x", b"g"):
                if header.size > _MAX_EXTENDED:
                    raise LimitExceeded(header.name, f"has an extended header of more than {_MAX_EXTENDED} bytes")
                body = yield from self._take(header.size + padding(header.size))
                text = body[: header.size]
                if header.type == b"L":
                    long_name = text.removesuffix(b"\0")
                elif header.type == b"K":
                    long_link = text.removesuffix(b"\0")
                elif header.type == b"x":
                    extended = read_pax(text, header.name)
                elif not read_pax(text, header.name).keys().isdisjoint(_PER_MEMBER):
                    raise ArchiveRefused(b"", "gives all its members one path, link or size")
                continue
            member = self._member(header, block, extended, long_name, long_link)
            holes = None
            if member.kind == "file" and (header.type == b"S" or any(key.startswith(b"GNU.sparse.") for key in extended)):
                stored, holes = yield from self._sparse(member, block, header, extended)
            long_name, long_link, extended = None, None, {}
            members += 1
            total += member.size
            if members > self._limits.max_members:
                raise LimitExceeded(member.path, f"is one more than the {self._limits.max_members} members an archive may have")
            if total > self._limits.max_bytes:
                raise LimitExceeded(member.path, f"takes the archive past {self._limits.max_bytes} bytes")
            yield member
            if holes is None:
                yield from self._contents(member.size)
                yield from self._take(padding(member.size))
            else:
                yield from self._with_holes(member, holes)
                yield from self._take(padding(stored))

    def _take(self, size: int) -> Generator[None, None, bytes]:
        end = self._at + size
        while end > len(self._buffer):
            yield None
            end = self._at + size
        taken = bytes(self._buffer[self._at : end])
        self._at = end
        return taken

    def _contents(self, size: int) -> Generator[bytes | memoryview | None, None, None]:
        remaining = size
        while remaining:
            if self._at == len(self._buffer):
                yield None
            piece = self._buffer[self._at : self._at + remaining]
            self._at += len(piece)
            remaining -= len(piece)
            yield piece

    def _sparse(self, member: Member, block: bytes, header: Header, extended: dict[bytes, bytes]) -> Generator[None, None, tuple[int, SparseMap]]:
        """The map of a sparse member, and how many bytes are stored after it."""
        path, stored = member.path, self._stored(header, extended, member.path)
        parts = SparseMap(path, member.size)
        if member.size > self._limits.max_bytes:
            raise LimitExceeded(path, f"takes the archive past {self._limits.max_bytes} bytes")
        if header.type == b"S":
            parts.add_fields(block[386:482])
            more = block[482]
            while more:
                block = yield from self._take(BLOCK)
                parts.add_fields(block[:504])
                more = block[504]
        elif (extended.get(b"GNU.sparse.major"), extended.get(b"GNU.sparse.minor")) == (b"1", b"0"):
            lines = parts.lines()
            next(lines)
            while True:
                stored -= BLOCK
                if stored < 0:
                    raise ArchiveRefused(path, "has a damaged sparse map")
                try:
                    lines.send((yield from self._take(BLOCK)))
                except StopIteration:
                    break
        elif b"GNU.sparse.map" in extended:
            parts.add_text(extended[b"GNU.sparse.map"])
        else:
            raise ArchiveRefused(path, "is a sparse member of an unknown format")
        if parts.stored != stored:
            raise ArchiveRefused(path, "is a sparse member whose parts are not as long as what is stored of it")
        return stored, parts

    def _with_holes(self, member: Member, parts: SparseMap) -> Generator[bytes | memoryview | None, None, None]:
        at = 0
        for offset, length in parts:
            yield from self._holes(member, at, offset)
            yield from self._contents(length)
            at = offset + length
        yield from self._holes(member, at, member.size)

    def _holes(self, member: Member, start: int, end: int) -> Iterator[bytes]:
        limits = self._limits
        while start < end:
            size = min(end - start, len(HOLE) - start % len(HOLE))
            if size < len(HOLE):
                # they cost their reader as much as what is unpacked
                self._filled += size
                if self._filled > limits.free_ratio_bytes and self._filled > limits.max_ratio * self._source.came_in:
                    raise LimitExceeded(member.path, f"unpacks to more than {limits.max_ratio} times its size")
            yield HOLE[:size]
            start += size

    def _rest_is_empty(self) -> Generator[None, None, None]:
        if (yield from self._take(BLOCK)) != _ZEROS:
            raise ArchiveRefused(b"", "goes on after its end")
        self._ended = True
        while True:
            if bytes(self._buffer[self._at :]).strip(b"\0"):
                raise ArchiveRefused(b"", "goes on after its end")
            self._at = len(self._buffer)
            yield None

    def _member(self, header: Header, block: bytes, extended: dict[bytes, bytes], long_name: bytes | None, long_link: bytes | None) -> Member:
        raw = extended.get(b"GNU.sparse.name", extended.get(b"path", header.name if long_name is None else long_name))
        path = clean_path(raw, self._limits)
        kind = _KINDS.get(header.type)
        if kind is None:
            raise ArchiveRefused(raw, _NAMED.get(header.type, f"is of an unknown kind ({header.type!r})"))
        if kind == "folder":
            return Member(kind, path)
        if not path:
            raise ArchiveRefused(raw, "would take the place of the tree's root")
        if kind == "file":
            return Member(kind, path, bool(header.mode & 0o100), self._size(header, block, extended, raw))
        target = extended.get(b"linkpath", header.link if long_link is None else long_link)
        if kind == "hardlink" and target:
            target = clean_path(target, self._limits)
        check_target(raw, target, self._limits)
        return Member(kind, path, target=target)

    def _size(self, header: Header, block: bytes, extended: dict[bytes, bytes], raw: bytes) -> int:
        """The size of a file with its holes."""
        if header.type == b"S":
            return number(block[483:495], raw)
        text = extended.get(b"GNU.sparse.realsize", extended.get(b"GNU.sparse.size"))
        return self._stored(header, extended, raw) if text is None else decimal(text, raw)

    def _stored(self, header: Header, extended: dict[bytes, bytes], raw: bytes) -> int:
        """How many bytes follow the header."""
        text = extended.get(b"size")
        return header.size if text is None else decimal(text, raw)
