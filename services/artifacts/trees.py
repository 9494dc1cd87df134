"""Trees out of the blob store: their names, their files, parts of them, as archives and as chunks."""

import asyncio
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from msgspec.structs import replace

from libs.archives.blobstream import frames
from libs.archives.compression import Format
from libs.archives.pump import drawn, in_thread
from libs.archives.reader import HOLE
from libs.archives.tree import CHUNK, MAGIC_BYTES, ZERO_CHUNK, Entry, ManifestReader, first_path, order, pieces_of
from libs.archives.writer import tar_size, write_tar_from, write_tree
from libs.blobstore.store import BlobReader, BlobStore

T = TypeVar("T")
P = TypeVar("P", bound=bytes | memoryview)

_AT_ONCE = 4096
"""Entries, or chunks, whose places are looked up together."""
_REMEMBERED = 64
"""Trees of which it is known where their blocks begin."""
_HEAD = 16 << 10
"""No block's first path ends later."""


class NoSuchPath(Exception):
    """The tree has nothing there that could be read."""


class Trees:
    """The trees of teams, by digest (hex). All calls raise BlobMissing, BlobDamaged, LogUnavailable, StoreUnavailable, generators at the latest in
    place of their last piece."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._blocks: OrderedDict[tuple[str, str], _Blocks] = OrderedDict()

    async def open(self, team: str, digest: str) -> "Tree":
        root = await self._store.get(team, bytes.fromhex(digest))
        blocks = self._blocks.setdefault((team, digest), _Blocks())
        self._blocks.move_to_end((team, digest))
        while len(self._blocks) > _REMEMBERED:
            self._blocks.popitem(last=False)
        return Tree(self._store, team, root, blocks)


class _Blocks:
    """Where the blocks of a manifest begin, and the first path of each, as it sorts; empty until somebody needed to know."""

    def __init__(self) -> None:
        self.known: tuple[list[bytes], list[int]] | None = None


class Tree:
    """One tree, of which only the root blob is in memory. What blocks is for threads."""

    def __init__(self, store: BlobStore, team: str, root: bytes, blocks: _Blocks) -> None:
        self._store = store
        self._blocks = blocks
        self._team = team
        self._root = root
        self._loop = asyncio.get_running_loop()

    @property
    def root(self) -> bytes:
        """The root blob."""
        return self._root

    @property
    def pieces(self) -> Sequence[bytes]:
        """What the manifest is stored as beside the root blob."""
        return pieces_of(self._root)

    def manifest(self) -> Iterator[bytes]:
        """The manifest in pieces. Blocking."""
        pieces = self.pieces
        if not pieces:
            yield self._root
            return
        blobs = self.reader(pieces)
        for piece in pieces:
            yield blobs.read(piece)

    def entries(self) -> Iterator[Entry]:
        """All of it, in order. Blocking."""
        reader = ManifestReader()
        for piece in self.manifest():
            yield from reader.feed(piece)
        reader.finish()

    def entries_from(self, place: bytes) -> Iterator[Entry]:
        """Those from `place` (as a path sorts) on, and at most a block of earlier ones, without a look at those before. Blocking."""
        if not place:
            yield from self.entries()
            return
        manifest = _Manifest(self)
        starts = self._starts(manifest)[1]
        reader = ManifestReader()
        yield from reader.feed(manifest.at(0, starts[0]))
        for number in range(self.block_of(place), len(starts)):
            end = starts[number + 1] if number + 1 < len(starts) else manifest.size
            yield from reader.feed(manifest.at(starts[number], end - starts[number]))

    def block_of(self, place: bytes) -> int:
        """The number of the block in which `place` lies, as it sorts. Blocking."""
        return max(bisect_right(self._starts(None)[0], place) - 1, 0)

    def _starts(self, manifest: "_Manifest | None") -> tuple[list[bytes], list[int]]:
        if self._blocks.known is None:
            self._blocks.known = (manifest or _Manifest(self)).blocks()
        return self._blocks.known

    def part(self, path: bytes) -> Iterator[Entry]:
        """The tree of what lies in the folder `path` (b"": all), or of the file `path` alone, under its name. Blocking. Raises NoSuchPath."""
        return part_of(self.entries(), path) if path else self.entries()

    async def find(self, path: bytes) -> Entry:
        """What is at a path. Raises NoSuchPath."""
        return await self._in_thread(lambda: _found(self.entries_from(order(path)), path))

    async def select(self, chosen: Callable[[Iterator[Entry]], T]) -> T:
        """What `chosen`, in a thread, makes of the entries."""
        return await self._in_thread(lambda: chosen(self.entries()))

    async def tar_size(self, path: bytes) -> int:
        """Bytes of the plain archive of a part."""
        return await self._in_thread(lambda: tar_size(self.part(path)))

    def drawn(self, pieces: Generator[P, None, None]) -> AsyncGenerator[P, None]:
        """A blocking generator's pieces, drawn in the store's threads."""
        return drawn(pieces, self._store.threads)

    def archive(self, path: bytes, form: Format, start: int = 0) -> Generator[bytes, None, None]:
        """A part as an archive; a plain one from its byte `start` on. Blocking."""
        contents = _Contents(self)
        entries = contents.ahead(self.part(path))
        if form == "tar":
            return write_tar_from(entries, contents.of, start)
        return write_tree(entries, contents.of, form)

    def file(self, entry: Entry, start: int = 0) -> Generator[bytes, None, None]:
        """A file's bytes from `start` on. Blocking."""
        contents = _Contents(self)
        for each in contents.ahead([entry]):
            yield from contents.of(each, start)

    def blobs(self, digests: Iterable[bytes]) -> Generator[bytes | memoryview, None, None]:
        """A blob stream of these chunks, each named once, in the store's order. Blocking."""
        yield from frames(self._stream(digests))

    def reader(self, digests: Iterable[bytes]) -> BlobReader:
        """Blocking."""
        return self._wait(self._store.reader(self._team, set(digests) - {ZERO_CHUNK}))

    def _stream(self, digests: Iterable[bytes]) -> Iterator[tuple[bytes, bytes | memoryview]]:
        left = iter(digests)
        while wanted := list(islice(left, _AT_ONCE)):
            if ZERO_CHUNK in wanted:
                wanted.remove(ZERO_CHUNK)
                yield ZERO_CHUNK, HOLE
            if wanted:
                yield from self.reader(wanted).stream(wanted)

    def _wait(self, asked: Coroutine[Any, Any, T]) -> T:
        """From a thread: what the event loop finds out."""
        return asyncio.run_coroutine_threadsafe(asked, self._loop).result()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await in_thread(work, self._store.threads)


class _Contents:
    """The contents of files, whose places are looked up for many of them at a time as their entries go by. Blocking."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._blobs: BlobReader | None = None

    def ahead(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """The same entries; until the next is drawn, `of` can read the one that came last."""
        left = iter(entries)
        while block := list(islice(left, _AT_ONCE)):
            digests = {digest for entry in block if not entry.target for digest, _ in entry.chunks()} - {ZERO_CHUNK}
            self._blobs = self._tree.reader(digests) if digests else None
            yield from block

    def of(self, entry: Entry, start: int = 0) -> Iterator[bytes]:
        """A file's bytes from `start` on."""
        for digest, size in entry.chunks():
            if start >= size:
                start -= size
                continue
            if digest == ZERO_CHUNK:
                chunk = HOLE
            else:
                assert self._blobs is not None
                chunk = self._blobs.read(digest)
            yield chunk[start:] if start else chunk
            start = 0


def part_of(entries: Iterable[Entry], path: bytes) -> Iterator[Entry]:
    """The tree below a folder, or of one file. The first of the hard links that it has of a file outside becomes the file. Raises NoSuchPath."""
    inside, after = path + b"/", order(path) + b"\1"
    moved: dict[bytes, bytes] = {}
    found = False
    for entry in entries:
        if entry.path == path:
            if entry.kind == "link":
                break
            found = True
            if entry.kind == "file":
                yield replace(entry, path=path.rpartition(b"/")[2], target=b"")
                return
        elif found and entry.path.startswith(inside):
            new = entry.path[len(inside) :]
            if entry.kind == "file" and entry.target:
                if entry.target.startswith(inside):
                    entry = replace(entry, target=entry.target[len(inside) :])
                elif entry.target in moved:
                    entry = replace(entry, target=moved[entry.target])
                else:
                    moved[entry.target] = new
                    entry = replace(entry, target=b"")
            yield replace(entry, path=new)
        elif order(entry.path) >= after:
            break
    if not found:
        raise NoSuchPath


def _found(entries: Iterable[Entry], path: bytes) -> Entry:
    for entry in entries:
        if entry.path == path:
            return entry
        if order(entry.path) > order(path):
            break
    raise NoSuchPath


def listed(tree: Tree, path: bytes, recursive: bool, after: bytes) -> Iterator[Entry]:
    """What lies in a folder, after the path `after`; of a file, itself. Folders that are not entered, and what comes before, are passed over in
    blocks. Blocking. Raises NoSuchPath."""
    if path:
        found = _found(tree.entries_from(order(path)), path)
        if found.kind != "folder":
            yield found
            return
    inside = path + b"/" if path else b""
    least = max(order(path), order(after) + b"\0" if after else b"")
    left = tree.entries_from(least)
    while (entry := next(left, None)) is not None:
        place = order(entry.path)
        if place < least or entry.path == path:
            continue
        if not entry.path.startswith(inside):
            return
        child, deeper, _ = entry.path[len(inside) :].partition(b"/")
        if recursive or not deeper:
            yield entry
            continue
        least = order(inside + child) + b"\1"
        if tree.block_of(least) > tree.block_of(place):
            left = tree.entries_from(least)


class _Manifest:
    """A manifest's bytes, of which one piece is in memory. Blocking."""

    def __init__(self, tree: Tree) -> None:
        self._pieces = tree.pieces
        self._root = b"" if self._pieces else tree.root
        self._reader = tree.reader(self._pieces) if self._pieces else None
        self._last = (-1, b"")
        last = self._reader.size(self._pieces[-1]) if self._reader is not None else 0
        self.size = (len(self._pieces) - 1) * CHUNK + last if self._pieces else len(self._root)

    def at(self, start: int, length: int) -> bytes:
        """Fewer bytes at its end."""
        if self._reader is None:
            return self._root[start : start + length]
        found = bytearray()
        while len(found) < length and start + len(found) < self.size:
            number, inside = divmod(start + len(found), CHUNK)
            if number != self._last[0]:
                self._last = number, self._reader.read(self._pieces[number])
            found += self._last[1][inside : inside + length - len(found)]
        return bytes(found)

    def blocks(self) -> tuple[list[bytes], list[int]]:
        """The first path of each block, as it sorts, and where it begins. Without a block, where one would."""
        firsts: list[bytes] = []
        starts: list[int] = []
        at = MAGIC_BYTES
        while at < self.size:
            head = self.at(at, _HEAD)
            firsts.append(order(first_path(head)))
            starts.append(at)
            at += 4 + int.from_bytes(head[:4], "big")
        return (firsts, starts) if starts else ([b""], [at])


assert len(HOLE) == CHUNK
