"""Trees that this worker knows, and their files' names in its cache, in little room: a tree may have very many."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

from libs.archives.rules import Limits
from libs.archives.tree import DIGEST, PROGRAM_MODE, Entry, InvalidManifest, ManifestReader, RootBuilder, TreeCheck, entries_of

SANE = Limits(max_members=2_000_000, max_bytes=4 << 40, max_names=512 << 20)
"""What a tree takes of the worker's memory and time is bounded, in or out. What it may hold is for the service to say."""

MANIFEST = "manifest"
"""What it is called in a tree's folder of the cache."""
_PIECE = 256 << 10


def name_of(entry: Entry) -> str:
    """What a file is called in the cache. Its size is part of it so that what a crash of the machine cut short is found out."""
    digest = entry.digest
    contents = digest.hex() if len(digest) == DIGEST else entry.file_id
    return f"{contents}.{entry.size}x" if entry.mode == PROGRAM_MODE else f"{contents}.{entry.size}"


class Names:
    """A bag of names, by their hashes: a name may be taken for another's, which costs room or work, but nothing else."""

    def __init__(self, hashes: Iterable[int]) -> None:
        self._hashes = array("q", sorted(hashes))

    @classmethod
    def of(cls, *names: str) -> "Names":
        return cls(map(hash, names))

    def __contains__(self, name: str) -> bool:
        return self.count(hash(name)) > 0

    def count(self, hashed: int) -> int:
        """How many names have this hash."""
        return bisect_right(self._hashes, hashed) - bisect_left(self._hashes, hashed)

    def repeated(self) -> set[int]:
        """The hashes of those that are there more than once."""
        return {one for one, other in pairwise(self._hashes) if one == other}

    def counted(self, bags: Sequence["Names"]) -> Mapping[int, int]:
        """How many of the names in other bags each of these has the hash of, where there are any."""
        return {each: count for each in self._hashes if (count := sum(bag.count(each) for bag in bags))} if bags else {}


class KnownTree:
    """A checked tree, whose manifest lies in the cache for as long as it is pinned there: read again, block by block, whenever its entries are
    wanted. `names` are those of its plain files; `linked` are the paths of its hard links and of what they link to."""

    def __init__(self, digest: str, manifest: Path, names: Names, linked: frozenset[bytes], folders: int) -> None:
        self.digest = digest
        self.names = names
        self.linked = linked
        self.folders = folders
        self._manifest = manifest

    def __iter__(self) -> Iterator[Entry]:
        """Its entries, in canonical order. Raises OSError."""
        with self._manifest.open("rb") as file:
            yield from entries_of(pieces_in(file))

    def unlinked(self) -> Iterator[Entry]:
        """All but those."""
        return (entry for entry in self if entry.path not in self.linked) if self.linked else iter(self)

    def linked_files(self) -> list[Entry]:
        """Its hard links and what they link to. An overlay would not keep them together when one is written to."""
        return [entry for entry in self if entry.path in self.linked] if self.linked else []


class Survey:
    """Reads a manifest once, as it comes, and keeps what a KnownTree does."""

    def __init__(self, check: TreeCheck | None = None) -> None:
        """With `check`, a manifest from outside."""
        self._check = check
        self._root = RootBuilder()
        self._reader = ManifestReader()
        self._hashes = array("q")
        self._linked: set[bytes] = set()
        self._folders = 0

    def feed(self, data: bytes) -> None:
        """Raises InvalidManifest, ArchiveRefused."""
        for _ in self._root.feed(data):
            pass
        for entry in self._reader.feed(data):
            if self._check is not None:
                self._check.add(entry)
            if entry.kind == "folder":
                self._folders += 1
            elif entry.target and entry.kind == "file":
                self._linked |= {entry.path, entry.target}
            elif entry.kind == "file":
                self._hashes.append(hash(name_of(entry)))

    def finish(self, digest: str, manifest: Path) -> KnownTree:
        """All of it was fed; `manifest` is where it is. Raises InvalidManifest, for another digest too; ArchiveRefused."""
        self._reader.finish()
        if self._check is not None:
            self._check.finish(b"")
        if self._root.finish().digest.hex() != digest:
            raise InvalidManifest("it is not that of the tree")
        return KnownTree(digest, manifest, Names(self._hashes), frozenset(self._linked), self._folders)


def pieces_in(file: BinaryIO) -> Iterator[bytes]:
    while piece := file.read(_PIECE):
        yield piece
