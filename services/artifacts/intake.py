"""What is uploaded on its way into the store: hostile streams in, chunks and a tree out. Blocking; fed in threads."""

from collections.abc import Mapping, Set

from libs.archives.blobstream import BlobStreamReader
from libs.archives.compression import Decompressor, Format
from libs.archives.reader import HOLE, ArchiveReader, Member
from libs.archives.rules import Limits
from libs.archives.tree import (
    CHUNK,
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


class TarIntake:
    """A tar, plain, gzip or zstd. Memory: one chunk and the tree's entries, whatever the sizes of its files."""

    def __init__(self, upload: Upload, limits: Limits) -> None:
        self._upload = upload
        self._reader = ArchiveReader(limits)
        self._tree = TreeBuilder(limits)
        self._member: Member | None = None
        self._remaining = 0
        self._chunk: list[bytes | memoryview] = []
        self._room = CHUNK
        self._digests = bytearray()

    def feed(self, data: bytes) -> None:
        """Raises ArchiveRefused, QuotaExceeded, LogUnavailable, StoreUnavailable."""
        for found in self._reader.feed(data):
            if isinstance(found, Member):
                self._begin(found)
            else:
                self._more(found)

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

    def _more(self, piece: bytes | memoryview) -> None:
        self._remaining -= len(piece)
        while len(piece) > self._room:
            part, piece = piece[: self._room], piece[self._room :]
            self._chunk.append(part)
            self._keep()
        self._chunk.append(piece)
        self._room -= len(piece)
        if not self._room or not self._remaining:
            self._keep()
        if not self._remaining:
            self._end()

    def _keep(self) -> None:
        """A chunk is complete."""
        chunk = HOLE if self._chunk[0] is HOLE else b"".join(self._chunk)
        self._chunk, self._room = [], CHUNK
        self._digests += ZERO_CHUNK if chunk is HOLE or chunk == HOLE else self._upload.add(chunk)

    def _end(self) -> None:
        member = self._member
        assert member is not None
        mode = PROGRAM_MODE if member.executable else FILE_MODE
        self._tree.add(Entry(member.path, "file", mode, member.size, bytes(self._digests)))
        self._digests.clear()


class ManifestIntake:
    """A manifest; `sizes` are the distinct chunks of its tree (digest → size), in the order of their first appearance, and `blobs` the manifest
    itself, as it is to be stored."""

    def __init__(self, limits: Limits, form: Format = "tar") -> None:
        self._unpacked = Decompressor(limits, form, limits.max_manifest)
        self._reader = ManifestReader()
        self._check = TreeCheck(limits)
        self._root = RootBuilder()
        self.sizes = self._check.sizes
        self.blobs: list[bytes] = []

    def feed(self, data: bytes) -> None:
        """Raises ArchiveRefused, InvalidManifest."""
        for piece in self._unpacked.feed(data):
            for entry in self._reader.feed(piece):
                self._check.add(entry)
            self.blobs += self._root.feed(piece)

    def finish(self) -> TreeSummary:
        """The tree. Raises as `feed`."""
        self._unpacked.finish()
        self._reader.finish()
        root = self._root.finish()
        self.blobs += root.blobs
        return self._check.finish(root.digest)


class BlobIntake:
    """A blob stream; `came` are the blobs of it that were wanted and whole, whatever became of the rest."""

    def __init__(self, upload: Upload, sizes: Mapping[bytes, int], limits: Limits, form: Format = "tar") -> None:
        self._upload = upload
        self._unpacked = Decompressor(limits, form)
        self._reader = BlobStreamReader(sizes.get)

    @property
    def came(self) -> Set[bytes]:
        return self._reader.came

    def feed(self, data: bytes) -> None:
        """Raises as TarIntake."""
        for piece in self._unpacked.feed(data):
            for digest, contents in self._reader.feed(piece):
                if digest != ZERO_CHUNK:
                    self._upload.add(contents, digest)

    def finish(self) -> None:
        """All of it is in the store. Raises as `feed`."""
        self._unpacked.finish()
        self._reader.finish()
        self._upload.flush()
