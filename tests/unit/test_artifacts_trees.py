"""Listing parts of large trees, and pieces for readers of any speed, without a store."""

import asyncio
from collections.abc import Generator, Iterable
from typing import Any

import pytest

from libs.archives import pump
from libs.archives.tree import CHUNK, Entry, manifest_of, order, root_of
from services.artifacts.trees import NoSuchPath, Tree, _Blocks, listed


class Pieces:
    """A BlobReader, and what was read of it."""

    def __init__(self, blobs: dict[bytes, bytes]) -> None:
        self.blobs = blobs
        self.reads = 0

    def size(self, digest: bytes) -> int:
        return len(self.blobs[digest])

    def read(self, digest: bytes) -> bytes:
        self.reads += 1
        return self.blobs[digest]


class Stored(Tree):
    """A tree whose pieces are here."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        root = root_of(manifest_of(sorted(entries, key=lambda entry: order(entry.path))))
        self._root = root.blobs[0]
        self._blocks = _Blocks()
        self.blobs = Pieces(dict(zip(self.pieces, root.blobs[1:], strict=True)) if self.pieces else {})

    def reader(self, digests: Iterable[bytes]) -> Any:
        return self.blobs


def names(tree: Tree, path: bytes = b"", recursive: bool = False, after: bytes = b"") -> list[bytes]:
    return [entry.path for entry in listed(tree, path, recursive, after)]


def test_what_is_listed_is_the_same_wherever_one_begins() -> None:
    """Of names that sort next to a folder's, and of folders of several blocks."""
    paths = {b"a": "folder", b"a\x01": "file", b"a.b": "file", b"b": "folder", b"b/c": "folder", b"c": "file", b"b\x01": "folder"}
    entries = [Entry(path, kind, 0o755 if kind == "folder" else 0o644) for path, kind in paths.items()]  # type: ignore[arg-type]
    entries += [Entry(folder + b"/%05d" % n, "file", 0o644) for folder in (b"a", b"b/c") for n in range(9000)]
    tree, ordered = Stored(entries), [entry.path for entry in sorted(entries, key=lambda entry: order(entry.path))]
    assert names(tree) == [path for path in ordered if b"/" not in path]
    assert names(tree, recursive=True) == ordered
    assert names(tree, b"b") == [b"b/c"]
    assert names(tree, b"b", recursive=True) == [path for path in ordered if path.startswith(b"b/")]
    assert names(tree, b"a\x01", after=b"a") == [b"a\x01"]
    for after in (b"a", b"a/00000", b"a/04095", b"a/08999", b"a.b", b"a\x01", b"b", b"b/c/05000", b"c"):
        later = [path for path in ordered if order(path) > order(after)]
        assert names(tree, after=after) == [path for path in later if b"/" not in path]
        assert names(tree, recursive=True, after=after) == later
        assert names(tree, b"b/c", after=after) == [path for path in later if path.startswith(b"b/c/")]
    for nothing in (b"b/c/x", b"0", b"z", b"a/"):
        with pytest.raises(NoSuchPath):
            names(tree, nothing)
    assert names(Stored([])) == names(Stored([]), after=b"a") == []


def test_a_page_of_a_large_tree_costs_a_block_or_two_and_not_the_whole_of_it() -> None:
    tree = Stored([Entry(b"f%07d" % n + b"x" * 200, "file", 0o644) for n in range(100_000)])
    pieces = len(tree.blobs.blobs)
    assert pieces > 2
    for n in range(0, 99_000, 7000):
        tree.blobs.reads = 0
        assert next(listed(tree, b"", False, b"f%07d" % n + b"x" * 200)).path.startswith(b"f%07d" % (n + 1))
        assert tree.blobs.reads <= (pieces + 3 if n == 0 else 3)
    assert pieces * CHUNK > sum(map(len, tree.blobs.blobs.values()))


async def test_of_what_is_drawn_one_piece_waits_for_a_slow_reader_and_two_for_a_quick_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def pieces() -> Generator[bytes, None, None]:
        for number in range(6):
            made.append(number)
            yield b"%d" % number

    async def after(taken: int, pause: float = 0.0) -> int:
        made.clear()
        drawn = pump.drawn(pieces())
        for _ in range(taken):
            await anext(drawn)
            await asyncio.sleep(pause)
        await asyncio.sleep(0.05)
        found = len(made)
        await drawn.aclose()
        return found

    assert await after(1) == 1, "nobody knows yet whether it will be taken"
    assert await after(2) == 3
    monkeypatch.setattr(pump, "_QUICK", 0.01)
    assert await after(3, 0.02) == 3
