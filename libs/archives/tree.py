"""Trees: what a folder is once owner, times and archive flavour are gone. The same files give the same digest, whoever packed them.

A file is its chunks of 8 MiB, named by their sha256. A manifest is `penstock tree 1\\n` and blocks: a length (u32, big-endian) and a msgpack array
of 4,096 entries (the last: fewer) `[path, kind, mode, size, digest, target]`, sorted by the components of their paths, so that a folder is followed
by all that lies in it; every folder is named. A tree's digest is the sha256 of its root blob: the manifest, or, past one chunk, its pieces' digests.
"""

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Literal, NamedTuple

import msgspec

from libs.archives.links import refuse_escapes
from libs.archives.reader import Member
from libs.archives.rules import ArchiveRefused, LimitExceeded, Limits, check_target, shown

CHUNK = 8 << 20
"""Bytes of a file in one blob; a file's last blob is shorter."""
ZERO_CHUNK = bytes.fromhex("2daeb1f36095b44b318410b3f4e8b5d989dcc7bb023d1426c492dab0a3053e74")
"""The digest of a whole chunk of zeros, which nobody needs to read, send or write."""
DIGEST = 32

FILE_MODE, PROGRAM_MODE, FOLDER_MODE, LINK_MODE = 0o644, 0o755, 0o755, 0o777

_MAGIC = b"penstock tree 1\n"
MAGIC_BYTES = len(_MAGIC)
"""Where a manifest's first block begins."""
_LIST_MAGIC = b"penstock tree list 1\n"
_BLOCK = 4096
_MAX_BLOCK = 48 << 20
"""Bytes of a block: 4,096 of the longest paths and targets, and the digests of the largest files."""


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One line of a manifest. `digest` is the digests of a file's chunks one after another (b"" when it is empty); `target` a symbolic link's text,
    or, for a file that is a hard link, the path of the first file that it shares its contents with, which has an empty one. Both are empty for the
    rest."""

    path: bytes
    kind: Literal["file", "folder", "link"]
    mode: int
    size: int = 0
    digest: bytes = b""
    target: bytes = b""

    @property
    def executable(self) -> bool:
        return self.kind == "file" and self.mode == PROGRAM_MODE

    @property
    def file_id(self) -> str:
        """The name of a file's contents, for people and ETags."""
        return (self.digest if len(self.digest) == DIGEST else hashlib.sha256(self.digest).digest()).hex()

    def chunks(self) -> Iterator[tuple[bytes, int]]:
        """The file's chunks in order: digest and size."""
        remaining = self.size
        for at in range(0, len(self.digest), DIGEST):
            yield self.digest[at : at + DIGEST], min(remaining, CHUNK)
            remaining -= CHUNK


class TreeSummary(NamedTuple):
    """A tree in short: its `digest` (hex), `size` in bytes (hard links cost nothing) and number of its files (hard links are files)."""

    digest: str
    size: int
    files: int


class Root(NamedTuple):
    """A manifest as it is stored: the tree's `digest`, and the blobs, the root blob first."""

    digest: bytes
    blobs: Sequence[bytes]


class Tree(NamedTuple):
    """A whole tree: its summary, its entries in canonical order, its manifest as stored."""

    summary: TreeSummary
    entries: Sequence[Entry]
    root: Root


class InvalidManifest(Exception):
    """The bytes are no manifest in canonical form."""


def order(path: bytes) -> bytes:
    """Sort key of a path: by components."""
    return path.replace(b"/", b"\0")


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[Entry])


def manifest_of(entries: Iterable[Entry]) -> Iterator[bytes]:
    """The manifest of a tree, in pieces; `entries` are in canonical order."""
    yield _MAGIC
    left = iter(entries)
    while block := list(islice(left, _BLOCK)):
        encoded = _ENCODER.encode(block)
        yield len(encoded).to_bytes(4, "big")
        yield encoded


class RootBuilder:
    """Cuts a manifest that comes in pieces into the blobs that it is stored as. Memory: one chunk."""

    def __init__(self) -> None:
        self._waiting = bytearray()
        self._digests = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The blobs that `data` completes; to be drawn to its end."""
        self._waiting += data
        while len(self._waiting) > CHUNK:
            yield self._cut()

    def finish(self) -> Root:
        """The tree's digest, and the blobs that are still to be stored: the root blob, and the last piece when that is another one."""
        last = self._cut()
        if len(self._digests) == DIGEST:
            return Root(bytes(self._digests), [last])
        root = _LIST_MAGIC + self._digests
        return Root(hashlib.sha256(root).digest(), [root, last])

    def _cut(self) -> bytes:
        piece = bytes(memoryview(self._waiting)[:CHUNK])
        del self._waiting[:CHUNK]
        self._digests += hashlib.sha256(piece).digest()
        return piece


def root_of(manifest: bytes | Iterable[bytes]) -> Root:
    """The digest and all blobs of a manifest, whole or in pieces."""
    builder = RootBuilder()
    blobs = [blob for piece in ((manifest,) if isinstance(manifest, bytes) else manifest) for blob in builder.feed(piece)]
    root = builder.finish()
    return Root(root.digest, [root.blobs[0], *blobs, *root.blobs[1:]])


def pieces_of(root: bytes) -> Sequence[bytes]:
    """The digests of a manifest's pieces, given its root blob; none when that is the manifest itself. Raises InvalidManifest."""
    if not root.startswith(_LIST_MAGIC):
        return ()
    digests = root[len(_LIST_MAGIC) :]
    if len(digests) % DIGEST or len(digests) < 2 * DIGEST:
        raise InvalidManifest("its list of pieces is damaged")
    return [digests[at : at + DIGEST] for at in range(0, len(digests), DIGEST)]


class ManifestReader:
    """Decodes a manifest that comes in pieces; memory: one block, whatever the tree. Whether the entries make a tree is for TreeCheck to say."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._begun = self._ended = False

    def feed(self, data: bytes) -> Iterator[Entry]:
        """The entries that `data` completes; to be drawn to its end. Raises InvalidManifest."""
        buffer = self._buffer
        buffer += data
        at = 0
        if not self._begun:
            if not _MAGIC.startswith(buffer[: len(_MAGIC)]):
                raise InvalidManifest("it does not begin as one")
            if len(buffer) < len(_MAGIC):
                return
            at, self._begun = len(_MAGIC), True
        while len(buffer) - at >= 4:
            if self._ended:
                raise InvalidManifest(f"a block before the last has fewer than {_BLOCK} entries")
            end = at + 4 + int.from_bytes(buffer[at : at + 4], "big")
            if end - at > _MAX_BLOCK:
                raise InvalidManifest(f"a block has more than {_MAX_BLOCK} bytes")
            if len(buffer) < end:
                break
            entries = _decoded(bytes(memoryview(buffer)[at + 4 : end]))
            self._ended = len(entries) < _BLOCK
            at = end
            yield from entries
        del buffer[:at]

    def finish(self) -> None:
        """No more will come. Raises InvalidManifest when it was cut."""
        if self._buffer or not self._begun:
            raise InvalidManifest("it is cut short")


def _decoded(block: bytes) -> list[Entry]:
    # the count is looked at before memory is spent on that many
    head = block[:3]
    count = head[0] & 15 if head and head[0] & 0xF0 == 0x90 else int.from_bytes(head[1:], "big") if head.startswith(b"\xdc") else 0
    if not 1 <= count <= _BLOCK:
        raise InvalidManifest(f"a block is no array of 1 to {_BLOCK} entries")
    try:
        entries = _DECODER.decode(block)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidManifest(str(error)) from None
    if _ENCODER.encode(entries) != block:
        raise InvalidManifest("a block is not in canonical form")
    return entries


def first_path(block: bytes) -> bytes:
    """The first path of a block, given its beginning from its length on. Raises InvalidManifest."""
    at = 4 + (3 if block[4:5] == b"\xdc" else 1) + 1
    if block[at : at + 1] not in (b"\xc4", b"\xc5"):
        raise InvalidManifest("a block does not begin with a path")
    start = at + (2 if block[at] == 0xC4 else 3)
    return block[start : start + int.from_bytes(block[at + 1 : start], "big")]


def entries_of(manifest: Iterable[bytes]) -> Iterator[Entry]:
    """The entries of a manifest in pieces; memory: one block. Raises InvalidManifest."""
    reader = ManifestReader()
    for piece in manifest:
        yield from reader.feed(piece)
    reader.finish()


def read_manifest(manifest: bytes) -> list[Entry]:
    """The entries of a whole manifest. Raises InvalidManifest."""
    return list(entries_of([manifest]))


def tree_of(entries: Iterable[Entry]) -> Tree:
    """The tree with these entries, in whatever order they come."""
    ordered = sorted(entries, key=lambda entry: order(entry.path))
    root = root_of(manifest_of(ordered))
    files = [entry for entry in ordered if entry.kind == "file"]
    size = sum(entry.size for entry in files if not entry.target)
    return Tree(TreeSummary(root.digest.hex(), size, len(files)), ordered, root)


class TreeCheck:
    """Checks the entries of a manifest from outside, one by one as they come: that their order is the canonical one, that each lies in a folder named
    before it, that modes, sizes and digests fit, that hard links are equal to an earlier file, and that nothing leads out.

    Kept are the folders above the entry at hand, the links, a hash of each file, and `sizes`: the tree's distinct chunks, digest → size, in the order
    in which they first appear."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.sizes: dict[bytes, int] = {}
        self._limits = limits or Limits()
        self._entries = self._files = self._size = self._names = 0
        self._folder = self._last = self._before = b""
        self._above: list[tuple[bytes, bytes]] = []
        self._plain: set[int] = set()
        self._lately = array("q")
        self._links: dict[bytes, bytes] = {}

    def add(self, entry: Entry) -> None:
        """The next entry. Raises ArchiveRefused naming it and the rule it breaks."""
        path = entry.path
        self._find(path)
        self._entries += 1
        self._names += len(path) + len(entry.target)
        kind = entry.kind
        if kind == "file":
            self._add_file(entry)
            return
        if entry.size or entry.digest:
            raise ArchiveRefused(path, f"is a {kind} with contents")
        if kind == "folder":
            if entry.mode != FOLDER_MODE or entry.target:
                raise ArchiveRefused(path, f"is a folder with another mode than {FOLDER_MODE:o}" if not entry.target else "is a folder with a target")
            self._above.append((self._folder, self._last))
            self._folder, self._last = path, b""
        else:
            if entry.mode != LINK_MODE:
                raise ArchiveRefused(path, f"is a link with another mode than {LINK_MODE:o}")
            check_target(path, entry.target, self._limits)
            self._links[path] = entry.target

    def finish(self, digest: bytes) -> TreeSummary:
        """The tree whose root blob has this digest. Raises ArchiveRefused."""
        refuse_escapes(self._links)
        return TreeSummary(digest.hex(), self._size, self._files)

    def _find(self, path: bytes) -> None:
        """Go to the folder that the path lies in."""
        cut = path.rfind(b"/")
        parent, name = path[:cut] if cut > 0 else b"", path[cut + 1 :]
        while parent != self._folder:
            if not self._above:
                raise self._misplaced(path, parent)
            self._folder, self._last = self._above.pop()
        limits = self._limits
        if name <= self._last or not cut or name in (b".", b"..") or b"\0" in name or len(name) > limits.max_component:
            raise self._misnamed(path, cut, name)
        if len(path) > limits.max_path or len(self._above) >= limits.max_depth:
            raise ArchiveRefused(path, f"lies more than {limits.max_depth} folders deep, or has a path of more than {limits.max_path} bytes")
        if self._entries >= 2 * limits.max_members or self._names > limits.max_names:
            raise LimitExceeded(path, f"takes the tree past {2 * limits.max_members} files and folders, or past {limits.max_names} bytes of names")
        self._last, self._before = name, path

    def _add_file(self, entry: Entry) -> None:
        path, size, digest = entry.path, entry.size, entry.digest
        if entry.mode != FILE_MODE and entry.mode != PROGRAM_MODE:
            raise ArchiveRefused(path, f"is a file with another mode than {FILE_MODE:o} or {PROGRAM_MODE:o}")
        if not 0 <= size <= self._limits.max_bytes:
            raise LimitExceeded(path, f"has a size below 0 or past {self._limits.max_bytes} bytes")
        if len(digest) != (size + CHUNK - 1) // CHUNK * DIGEST:
            raise ArchiveRefused(path, "has more or fewer digests than chunks")
        self._files += 1
        if entry.target:
            self._plain.update(self._lately)
            del self._lately[:]
            if hash(Entry(entry.target, "file", entry.mode, size, digest)) not in self._plain:
                raise ArchiveRefused(path, "is a hard link to what is no earlier, equal file")
            return
        # the hash stands for the entry, which need not be kept; were two to collide, the worst is a hard link that cannot be made. Where there are
        # no hard links, a few bytes of each are all
        self._lately.append(hash(entry))
        self._size += size
        if self._size > self._limits.max_bytes:
            raise LimitExceeded(path, f"takes the tree past {self._limits.max_bytes} bytes")
        for chunk, length in entry.chunks() if size > CHUNK else ((digest, size),) if size else ():
            if self.sizes.setdefault(chunk, length) != length or (length != CHUNK and chunk == ZERO_CHUNK):
                raise ArchiveRefused(path, "has a chunk whose digest goes with another size")

    def _misplaced(self, path: bytes, parent: bytes) -> ArchiveRefused:
        before = self._before
        if path.startswith(b"/"):
            return ArchiveRefused(path, "has an absolute path")
        if path.startswith(before + b"/"):
            return ArchiveRefused(path, f"lies under `{shown(before)}`, which is no folder")
        if order(path) <= order(before):
            return ArchiveRefused(path, f"is not in order: it comes after `{shown(before)}`")
        return ArchiveRefused(path, f"lies in `{shown(parent)}`, which is not named before it")

    def _misnamed(self, path: bytes, cut: int, name: bytes) -> ArchiveRefused:
        if not cut:
            return ArchiveRefused(path, "has an absolute path")
        if name in (b"", b".", b".."):
            return ArchiveRefused(path, f"has `{shown(name)}` in its path")
        if b"\0" in name:
            return ArchiveRefused(path, "has a NUL in its path")
        if len(name) > self._limits.max_component:
            return ArchiveRefused(path, f"has a name of more than {self._limits.max_component} bytes in its path")
        return ArchiveRefused(path, "is there twice" if name == self._last else f"is not in order: it comes after `{shown(self._before)}`")


class TreeBuilder:
    """Puts members of a tar together into a tree, in whatever order they come, and refuses those that do not fit: a path twice, anything under a file
    or a link, a hard link to what is not there, and, at the end, a link that leads out."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._entries: dict[bytes, Entry] = {}
        self._implied: set[bytes] = set()
        self._linked: dict[bytes, bytes] = {}
        self._parent = b""
        self._names = 0

    def claim(self, member: Member) -> None:
        """Check that the member fits. Its entry is then given to `add`, once its contents are known. Raises ArchiveRefused."""
        path = member.path
        self._count_names(path, len(path) + len(member.target))
        parent = path.rpartition(b"/")[0]
        if parent != self._parent:
            self._claim_folders(parent, path)
        self._parent = parent
        if (there := self._entries.get(path)) is not None:
            if there.kind != "folder" or path not in self._implied:
                raise ArchiveRefused(path, "is there twice")
            if member.kind != "folder":
                raise ArchiveRefused(path, "is there twice, once as a folder")

    def add(self, entry: Entry) -> None:
        self._implied.discard(entry.path)
        self._entries[entry.path] = entry

    def add_folder(self, path: bytes) -> None:
        """b"", the root, is in every tree, and in no manifest."""
        if path:
            self.add(Entry(path, "folder", FOLDER_MODE))

    def link(self, member: Member) -> Entry:
        """The entry of a link or hard link: a hard link is, until the end, what it is linked to, under another name."""
        if member.kind == "link":
            return Entry(member.path, "link", LINK_MODE, target=member.target)
        original = self._entries.get(member.target)
        if original is None or original.kind == "folder":
            raise ArchiveRefused(member.path, "is a hard link to what is no earlier file of the archive")
        if original.kind == "file":
            self._linked[member.path] = self._linked.get(member.target, member.target)
        return msgspec.structs.replace(original, path=member.path)

    def finish(self) -> Tree:
        """The tree, all its links known to stay inside. Raises ArchiveRefused."""
        refuse_escapes({entry.path: entry.target for entry in self._entries.values() if entry.kind == "link"})
        same: dict[bytes, list[bytes]] = {}
        for path, original in self._linked.items():
            same.setdefault(original, [original]).append(path)
        for paths in same.values():
            first = min(paths, key=order)
            for path in paths:
                if path != first:
                    self._entries[path] = msgspec.structs.replace(self._entries[path], target=first)
                    self._count_names(path, len(first))
        return tree_of(self._entries.values())

    def _count_names(self, path: bytes, size: int) -> None:
        self._names += size
        if self._names > self._limits.max_names:
            raise LimitExceeded(path, f"takes the names of the archive past {self._limits.max_names} bytes")

    def _claim_folders(self, parent: bytes, path: bytes) -> None:
        """The folders that a member implies."""
        while parent:
            there = self._entries.get(parent)
            if there is not None and there.kind != "folder":
                raise ArchiveRefused(path, f"lies under a {there.kind}, `{shown(parent)}`")
            if there is not None:
                break
            self._names += len(parent)
            self._entries[parent] = Entry(parent, "folder", FOLDER_MODE)
            self._implied.add(parent)
            parent = parent.rpartition(b"/")[0]
        if len(self._entries) > 2 * self._limits.max_members:
            raise LimitExceeded(path, f"takes the archive past {2 * self._limits.max_members} files and folders")
