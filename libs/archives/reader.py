"""A tar stream, plain, gzip or zstd, taken apart as it arrives: bytes pushed in, members and their contents out.
Nothing is kept but the header at hand.

The reader checks each member by itself (kind, path, limits); how members relate to one another is `tree.py`'s part.
"""

from collections.abc import AsyncIterator, Generator, Iterator
from typing import Literal, NamedTuple

from libs.archives.compression import Decompressor
from libs.archives.rules import ArchiveRefused, LimitExceeded, Limits, clean_path
from libs.archives.tar import BLOCK, Header, padding, read_header, read_pax

Kind = Literal["file", "folder", "link", "hardlink"]
_KINDS: dict[bytes, Kind] = {b"\0": "file", b"0": "file", b"7": "file", b"1": "hardlink", b"2": "link", b"5": "folder"}
_NAMED = {b"3": "is a device", b"4": "is a device", b"6": "is a FIFO", b"S": "is a sparse member: pack it without --sparse"}
_PER_MEMBER = (b"path", b"linkpath", b"size")
_MAX_EXTENDED = 1 << 20
_ZEROS = bytes(BLOCK)


class Member(NamedTuple):
    """One member, before its contents: `size` bytes follow for a file, none for the rest. `path` is clean; b"" is the root.
    `target` is a symbolic link's text, or the path of the file that a hard link shares."""

    kind: Kind
    path: bytes
    executable: bool = False
    size: int = 0
    target: bytes = b""


class ArchiveReader:
    """Push parser: `feed` gives a Member, then the pieces of its contents, then the next; `finish` says whether all was there."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._source = Decompressor(limits)
        self._buffer = b""
        self._at = 0
        self._ended = False
        self._steps = self._parse()

    def feed(self, data: bytes) -> Iterator[Member | bytes]:
        """What `data` completes. Raises ArchiveRefused."""
        for piece in self._source.feed(data):
            self._buffer = self._buffer[self._at :] + piece if self._at < len(self._buffer) else piece
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

    def _parse(self) -> Generator[Member | bytes | None, None, None]:
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
            member = self._member(header, extended, long_name, long_link)
            long_name, long_link, extended = None, None, {}
            members += 1
            total += member.size
            if members > self._limits.max_members:
                raise LimitExceeded(member.path, f"is one more than the {self._limits.max_members} members an archive may have")
            if total > self._limits.max_bytes:
                raise LimitExceeded(member.path, f"takes the archive past {self._limits.max_bytes} bytes")
            yield member
            yield from self._contents(member.size)

    def _take(self, size: int) -> Generator[None, None, bytes]:
        end = self._at + size
        while end > len(self._buffer):
            yield None
            end = self._at + size
        taken = self._buffer[self._at : end]
        self._at = end
        return taken

    def _contents(self, size: int) -> Generator[bytes | None, None, None]:
        remaining = size
        while remaining:
            if self._at == len(self._buffer):
                yield None
            piece = self._buffer[self._at : self._at + remaining]
            self._at += len(piece)
            remaining -= len(piece)
            yield piece
        if size % BLOCK:
            yield from self._take(padding(size))

    def _rest_is_empty(self) -> Generator[None, None, None]:
        if (yield from self._take(BLOCK)) != _ZEROS:
            raise ArchiveRefused(b"", "goes on after its end")
        self._ended = True
        while True:
            if self._buffer.count(0, self._at) != len(self._buffer) - self._at:
                raise ArchiveRefused(b"", "goes on after its end")
            self._at = len(self._buffer)
            yield None

    def _member(self, header: Header, extended: dict[bytes, bytes], long_name: bytes | None, long_link: bytes | None) -> Member:
        raw = extended.get(b"path", header.name if long_name is None else long_name)
        path = clean_path(raw, self._limits)
        if any(key.startswith(b"GNU.sparse") for key in extended):
            raise ArchiveRefused(raw, _NAMED[b"S"])
        kind = _KINDS.get(header.type)
        if kind is None:
            raise ArchiveRefused(raw, _NAMED.get(header.type, f"is of an unknown kind ({header.type!r})"))
        if kind == "folder":
            return Member(kind, path)
        if not path:
            raise ArchiveRefused(raw, "would take the place of the tree's root")
        if kind == "file":
            return Member(kind, path, bool(header.mode & 0o100), self._size(header, extended, raw))
        target = extended.get(b"linkpath", header.link if long_link is None else long_link)
        if not target:
            raise ArchiveRefused(raw, "is a link to nothing")
        if kind == "hardlink":
            return Member(kind, path, target=clean_path(target, self._limits))
        if b"\0" in target:
            raise ArchiveRefused(raw, "has a NUL in its link")
        if len(target) >= self._limits.max_path:
            raise ArchiveRefused(raw, f"has a link of {self._limits.max_path} bytes or more")
        return Member(kind, path, target=target)

    def _size(self, header: Header, extended: dict[bytes, bytes], raw: bytes) -> int:
        if (text := extended.get(b"size")) is None:
            return header.size
        if not text.isdigit() or len(text) > 19:
            raise ArchiveRefused(raw, "has a damaged extended header")
        return int(text)


class Entry(NamedTuple):
    """A member and its contents, which are to be read before the next member is asked for (what is not read is passed over)."""

    member: Member
    contents: AsyncIterator[bytes]


async def members(chunks: AsyncIterator[bytes], limits: Limits) -> AsyncIterator[Entry]:
    """Every member of the archive in `chunks`, in constant memory. Raises ArchiveRefused."""
    found = _events(chunks, limits)
    async for event in found:
        if isinstance(event, Member):
            yield Entry(event, _pieces(found, event.size))


async def _events(chunks: AsyncIterator[bytes], limits: Limits) -> AsyncIterator[Member | bytes]:
    reader = ArchiveReader(limits)
    async for chunk in chunks:
        for event in reader.feed(chunk):
            yield event
    reader.finish()


async def _pieces(events: AsyncIterator[Member | bytes], size: int) -> AsyncIterator[bytes]:
    while size:
        piece = await anext(events)
        assert isinstance(piece, bytes)
        size -= len(piece)
        yield piece
