"""What is uploaded on its way into the store: hostile streams in, chunks and a tree out. Blocking; fed in threads."""

from collections.abc import Mapping, Set
from hashlib import sha256

from libs.archives.blobstream import END_FRAME, BlobStreamReader
from libs.archives.compression import Decompressor, Format
from libs.archives.pages import LARGE, Paged, keep
from libs.archives.pump import Asking
from libs.archives.reader import HOLE, ArchiveReader, Member
from libs.archives.rules import ArchiveRefused, LimitExceeded, Limits
from libs.archives.tree import (
    CHUNK,
    DIGEST,
    FILE_MODE,
    PROGRAM_MODE,
    ZERO_CHUNK,
    Entry,
    ManifestReader,
    RootBuilder,
    TreeBuilder,
    TreeCheck,
    TreeSummary,
)
from libs.blobstore.store import Upload

LEAD = 1 << 20
"""Bytes that may come before a manifest."""


class TarIntake:
    """A tar, plain, gzip or zstd. Memory: one chunk and the tree's entries, whatever the sizes of its files."""

    def __init__(self, upload: Upload, limits: Limits) -> None:
        self._upload = upload
        self._reader = ArchiveReader(limits)
        self._tree = TreeBuilder(limits)
        self._member: Member | None = None
        self._remaining = 0
        self._chunk: list[bytes | memoryview] = []
        self._large: Paged | None = None
        self._hash = sha256()
        self._room = CHUNK
        self._digests = bytearray()

    def feed(self, data: bytes) -> Asking:
        """Asks for memory for each large chunk. Raises ArchiveRefused, QuotaExceeded, LogUnavailable, StoreUnavailable."""
        for found in self._reader.feed(data):
            if isinstance(found, Member):
                self._begin(found)
            else:
                yield from self._more(found)

    def finish(self) -> TreeSummary:
        """The tree; it is whole in the store. Raises as `feed`."""
        self._reader.finish()
        tree = self._tree.finish()
        for blob in tree.root.blobs:
            self._upload.add(blob)
        self._upload.flush()
        return tree.summary

    def _begin(self, member: Member) -> None:
        self._tree.claim(member)
        if member.kind == "folder":
            self._tree.add_folder(member.path)
        elif member.kind == "file":
            self._member, self._remaining = member, member.size
            if not member.size:
                self._end()
        else:
            self._tree.add(self._tree.link(member))

    def _more(self, piece: bytes | memoryview) -> Asking:
        while piece:
            if self._room == CHUNK and piece is not HOLE and self._remaining >= LARGE:
                self._large, self._hash = Paged((yield min(self._remaining, CHUNK))), sha256()
            part, piece = piece[: self._room], piece[self._room :]
            if self._large is None:
                self._chunk.append(part)
            else:
                self._large.add(part)
                self._hash.update(part)  # now, while it is at hand, and while more is read
            self._room -= len(part)
            self._remaining -= len(part)
            if not self._room or not self._remaining:
                self._keep()
        if not self._remaining:
            self._end()

    def _keep(self) -> None:
        """A chunk is complete."""
        large, parts = self._large, self._chunk
        self._chunk, self._large, self._room = [], None, CHUNK
        if large is None:
            chunk = HOLE if parts[0] is HOLE else b"".join(parts)
            self._digests += ZERO_CHUNK if chunk is HOLE or chunk == HOLE else self._upload.add(chunk)
            return
        digest = self._hash.digest()
        self._digests += digest
        if digest != ZERO_CHUNK:
            self._upload.add(large.filled(), digest)

    def _end(self) -> None:
        member = self._member
        assert member is not None
        mode = PROGRAM_MODE if member.executable else FILE_MODE
        self._tree.add(Entry(member.path, "file", mode, member.size, bytes(self._digests)))
        self._digests.clear()


class ManifestIntake:
    """A manifest; `sizes` are the distinct chunks of its tree (digest → size), in the order of their first appearance, and `blobs` the manifest
    itself, as it is to be stored. When it is `led`, a short blob stream comes before it: `ahead` are those of its chunks."""

    def __init__(self, limits: Limits, form: Format = "tar", led: bool = False) -> None:
        self.ahead: dict[bytes, bytes] = {}
        self._lead: bytearray | None = bytearray() if led else None
        self._led = 0
        self._unpacked = Decompressor(limits, form, limits.max_manifest)
        self._reader = ManifestReader()
        self._check = TreeCheck(limits)
        self._root = RootBuilder()
        self.sizes = self._check.sizes
        self.blobs: list[bytes] = []

    def feed(self, data: bytes) -> None:
        """Raises ArchiveRefused, InvalidManifest."""
        for came in self._unpacked.feed(data):
            piece = came if self._lead is None else self._after_lead(self._lead, came)
            for entry in self._reader.feed(piece):
                self._check.add(entry)
            self.blobs += self._root.feed(piece)

    def finish(self) -> TreeSummary:
        """The tree. Raises as `feed`."""
        self._unpacked.finish()
        self._reader.finish()
        if self._lead is not None:
            raise ArchiveRefused(b"", "is cut short")
        root = self._root.finish()
        self.blobs += root.blobs
        for digest, contents in self.ahead.items():
            if self.sizes.get(digest) != len(contents):
                raise ArchiveRefused(b"", f"comes with blob {digest.hex()}, which is not of its tree")
        return self._check.finish(root.digest)

    def _after_lead(self, lead: bytearray, data: bytes) -> bytes:
        """What is the manifest's of it."""
        lead += data
        while len(lead) >= len(END_FRAME):
            digest, size = bytes(lead[:DIGEST]), int.from_bytes(lead[DIGEST : len(END_FRAME)], "big")
            end = len(END_FRAME) + size
            if not size:
                self._lead = None
                return bytes(lead[end:])
            if self._led + end > LEAD:
                raise LimitExceeded(b"", f"brings more than {LEAD} bytes with its manifest")
            if end > len(lead):
                break
            contents = bytes(lead[len(END_FRAME) : end])
            if sha256(contents).digest() != digest:
                raise ArchiveRefused(b"", f"holds bytes that are not those of blob {digest.hex()}")
            self.ahead[digest] = contents
            del lead[:end]
            self._led += end
        return b""


class BlobIntake:
    """A blob stream; `came` are the blobs of it that were wanted and whole, whatever became of the rest."""

    def __init__(self, upload: Upload, sizes: Mapping[bytes, int]) -> None:
        self._upload = upload
        self._reader = BlobStreamReader(sizes.get)

    @property
    def came(self) -> Set[bytes]:
        return self._reader.came

    def feed(self, data: bytes | memoryview) -> None:
        """Raises as TarIntake."""
        for digest, contents in self._reader.feed(data):
            if digest != ZERO_CHUNK:
                self._upload.add(contents, digest)
            else:
                keep(contents)

    def finish(self) -> None:
        """All of it is in the store. Raises as `feed`."""
        self._reader.finish()
        self._upload.flush()
