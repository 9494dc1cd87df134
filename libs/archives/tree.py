"""Trees: what a folder is once owner, times and archive flavour are gone. The same files give the same digest, whoever packed them.

A manifest is `penstock tree 1\\n` and one msgpack array of entries `[path, kind, mode, size, digest, target]`, sorted by the components of their
paths (so that a folder is followed by all that lies in it), every folder named, hard links as plain files. A tree's digest is its manifest's sha256.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import msgspec

from libs.archives.reader import Member
from libs.archives.rules import ArchiveRefused, LimitExceeded, Limits

_MAGIC = b"penstock tree 1\n"
_MAX_FOLLOWED = 40
"""Links that lead through one another, as in Linux."""

FILE_MODE, PROGRAM_MODE, FOLDER_MODE, LINK_MODE = 0o644, 0o755, 0o755, 0o777


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One line of a manifest. `digest` is the sha256 (32 bytes) of a file's contents, `target` a link's text; both empty for the rest."""

    path: bytes
    kind: Literal["file", "folder", "link"]
    mode: int
    size: int = 0
    digest: bytes = b""
    target: bytes = b""

    @property
    def executable(self) -> bool:
        return self.kind == "file" and self.mode == PROGRAM_MODE


class TreeSummary(NamedTuple):
    """A tree in short: `digest` (hex) of its manifest, `size` in bytes and number of its files."""

    digest: str
    size: int
    files: int


class Tree(NamedTuple):
    """A whole tree: its summary, its entries in canonical order, its manifest as stored."""

    summary: TreeSummary
    entries: Sequence[Entry]
    manifest: bytes


class InvalidManifest(Exception):
    """The bytes are no manifest in canonical form."""


_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(list[Entry])


def order(path: bytes) -> bytes:
    """Sort key of a path: by components."""
    return path.replace(b"/", b"\0")


def tree_of(entries: Iterable[Entry]) -> Tree:
    """The tree with these entries, in whatever order they come."""
    ordered = sorted(entries, key=lambda entry: order(entry.path))
    manifest = _MAGIC + _ENCODER.encode(ordered)
    files = [entry for entry in ordered if entry.kind == "file"]
    summary = TreeSummary(hashlib.sha256(manifest).hexdigest(), sum(entry.size for entry in files), len(files))
    return Tree(summary, ordered, manifest)


def read_manifest(manifest: bytes) -> list[Entry]:
    """The entries of a manifest, as stored. Raises InvalidManifest."""
    if not manifest.startswith(_MAGIC):
        raise InvalidManifest("it does not begin as one")
    try:
        return _DECODER.decode(memoryview(manifest)[len(_MAGIC) :])
    except msgspec.MsgspecError as error:
        raise InvalidManifest(str(error)) from None


class TreeBuilder:
    """Puts members together into a tree, and refuses those that do not fit: a path twice, anything under a file or a link, a hard link to
    what is not there, and, at the end, a link that leads out. Independent of any disk."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._entries: dict[bytes, Entry] = {}
        self._implied: set[bytes] = set()
        self._parent = b""
        self._names = 0
        self._bytes = 0

    def claim(self, member: Member) -> Sequence[bytes]:
        """Check that the member fits; the parent folders that it implies and that no member has named, outermost first.
        Its own entry is then given to `add`, once its contents are known. Raises ArchiveRefused."""
        path = member.path
        self._names += len(path) + len(member.target)
        if self._names > self._limits.max_names:
            raise LimitExceeded(path, f"takes the names of the archive past {self._limits.max_names} bytes")
        parent = path.rpartition(b"/")[0]
        implied = self._claim_folders(parent, path) if parent != self._parent else ()
        self._parent = parent
        if (there := self._entries.get(path)) is not None:
            if there.kind != "folder" or path not in self._implied:
                raise ArchiveRefused(path, "is there twice")
            if member.kind != "folder":
                raise ArchiveRefused(path, "is there twice, once as a folder")
        return implied

    def add(self, entry: Entry) -> None:
        self._bytes += entry.size
        if self._bytes > self._limits.max_bytes:
            # hard links cost the archive nothing, and the tree their size
            raise LimitExceeded(entry.path, f"takes the tree past {self._limits.max_bytes} bytes")
        self._implied.discard(entry.path)
        self._entries[entry.path] = entry

    def implied(self, path: bytes) -> bool:
        """Whether a folder is there only because of what lies in it."""
        return path in self._implied

    def add_folder(self, path: bytes) -> None:
        if path:
            self.add(Entry(path, "folder", FOLDER_MODE))

    def link(self, member: Member) -> Entry:
        """The entry of a link or hard link: a hard link is what it is linked to, under another name."""
        if member.kind == "link":
            return Entry(member.path, "link", LINK_MODE, target=member.target)
        original = self._entries.get(member.target)
        if original is None or original.kind == "folder":
            raise ArchiveRefused(member.path, "is a hard link to what is no earlier file of the archive")
        return msgspec.structs.replace(original, path=member.path)

    def finish(self) -> Tree:
        """The tree, all its links known to stay inside. Raises ArchiveRefused."""
        links = {entry.path: entry.target for entry in self._entries.values() if entry.kind == "link"}
        refuse_escapes(links)
        return tree_of(self._entries.values())

    def _claim_folders(self, parent: bytes, path: bytes) -> Sequence[bytes]:
        missing: list[bytes] = []
        while parent:
            there = self._entries.get(parent)
            if there is not None and there.kind != "folder":
                raise ArchiveRefused(path, f"lies under a {there.kind}, `{parent.decode('utf-8', 'backslashreplace')}`")
            if there is not None:
                break
            self._names += len(parent)
            missing.append(parent)
            parent = parent.rpartition(b"/")[0]
        missing.reverse()
        for folder in missing:
            self._entries[folder] = Entry(folder, "folder", FOLDER_MODE)
            self._implied.add(folder)
        if len(self._entries) > 2 * self._limits.max_members:
            raise LimitExceeded(path, f"takes the archive past {2 * self._limits.max_members} files and folders")
        return missing


def refuse_escapes(links: dict[bytes, bytes]) -> None:
    """Refuse links (path → target) that lead out of the tree, by their text and by the links they lead through. The way is walked component
    by component, so no length of it hides where it ends. Raises ArchiveRefused."""
    ends: dict[bytes, tuple[bytes, int]] = {}
    for path in links:
        _end_of(path, links, ends, [])


def _end_of(path: bytes, links: dict[bytes, bytes], ends: dict[bytes, tuple[bytes, int]], through: list[bytes]) -> tuple[bytes, int]:
    """Where a link ends, as a path from the root, and through how many links the way leads."""
    if (known := ends.get(path)) is not None:
        return known
    if path in through or len(through) >= _MAX_FOLLOWED:
        raise ArchiveRefused(through[0], f"is a link that leads in a circle or through more than {_MAX_FOLLOWED} links")
    target = links[path]
    if target.startswith(b"/"):
        raise ArchiveRefused(path, "is a link to an absolute path")
    here = path.rpartition(b"/")[0]
    followed = 1
    for part in target.split(b"/"):
        if part in (b"", b"."):
            continue
        if part == b"..":
            if not here:
                raise ArchiveRefused(path, "is a link that leads out of the tree")
            here = here.rpartition(b"/")[0]
            continue
        here = here + b"/" + part if here else part
        if here in links:
            here, more = _end_of(here, links, ends, [*through, path])
            followed += more
        if followed > _MAX_FOLLOWED:
            raise ArchiveRefused(path, f"is a link that leads in a circle or through more than {_MAX_FOLLOWED} links")
    ends[path] = (here, followed)
    return here, followed
