"""Trees out of the blob store: their names, their files, parts of them, as archives and as chunks."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, TypeVar

from msgspec.structs import replace

from libs.archives.blobstream import frames
from libs.archives.compression import Format
from libs.archives.pump import drawn, in_thread
from libs.archives.reader import HOLE
from libs.archives.tree import CHUNK, ZERO_CHUNK, Entry, ManifestReader, order, pieces_of
from libs.archives.writer import tar_size, write_tar_from, write_tree
from libs.blobstore.store import BlobReader, BlobStore

T = TypeVar("T")

_AT_ONCE = 4096
"""Entries, or chunks, whose places are looked up together."""


class NoSuchPath(Exception):
    """The tree has nothing there that could be read."""


class Trees:
    """The trees of teams, by digest (hex). All calls raise BlobMissing, BlobDamaged, LogUnavailable, StoreUnavailable, generators at the latest in
    place of their last piece."""

    def __init__(self, store: BlobStore) -> None:
        self._store = store

    async def open(self, team: str, digest: str) -> "Tree":
        return Tree(self._store, team, await self._store.get(team, bytes.fromhex(digest)))


class Tree:
    """One tree, of which only the root blob is in memory. What blocks is for threads."""

    def __init__(self, store: BlobStore, team: str, root: bytes) -> None:
        self._store = store
        self._team = team
        self._root = root
        self._loop = asyncio.get_running_loop()

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

    def part(self, path: bytes) -> Iterator[Entry]:
        """The tree of what lies in the folder `path` (b"": all), or of the file `path` alone, under its name. Blocking. Raises NoSuchPath."""
        return part_of(self.entries(), path) if path else self.entries()

    async def find(self, path: bytes) -> Entry:
        """What is at a path. Raises NoSuchPath."""
        return await self._in_thread(lambda: _found(self.entries(), path))

    async def select(self, chosen: Callable[[Iterator[Entry]], T]) -> T:
        """What `chosen`, in a thread, makes of the entries."""
        return await self._in_thread(lambda: chosen(self.entries()))

    async def tar_size(self, path: bytes) -> int:
        """Bytes of the plain archive of a part."""
        return await self._in_thread(lambda: tar_size(self.part(path)))

    def drawn(self, pieces: Generator[bytes, None, None]) -> AsyncGenerator[bytes, None]:
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

    def blobs(self, digests: Iterable[bytes]) -> Generator[bytes, None, None]:
        """A blob stream of these chunks, each named once, in the store's order. Blocking."""
        yield from frames(self._stream(digests))

    def reader(self, digests: Iterable[bytes]) -> BlobReader:
        """Blocking."""
        return self._wait(self._store.reader(self._team, set(digests) - {ZERO_CHUNK}))

    def _stream(self, digests: Iterable[bytes]) -> Iterator[tuple[bytes, bytes]]:
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
    raise NoSuchPath


assert len(HOLE) == CHUNK
