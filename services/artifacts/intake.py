"""An uploaded archive on its way into the store: a hostile stream in, blobs and a tree out. Blocking; fed in threads."""

from collections.abc import Sequence

from libs.archives.reader import ArchiveReader, Member
from libs.archives.rules import Limits
from libs.archives.tree import FILE_MODE, PROGRAM_MODE, Entry, TreeBuilder, TreeSummary
from libs.blobstore.packs import PART, Place, Upload


class Intake:
    """One archive. Memory: one part of the store, whatever the sizes of its files."""

    def __init__(self, upload: Upload, limits: Limits) -> None:
        self._upload = upload
        self._reader = ArchiveReader(limits)
        self._tree = TreeBuilder(limits)
        self._member: Member | None = None
        self._pieces: list[bytes] = []
        self._remaining = 0

    def feed(self, data: bytes) -> None:
        """Raises ArchiveRefused, StoreUnavailable."""
        for found in self._reader.feed(data):
            if isinstance(found, Member):
                self._begin(found)
            else:
                self._more(found)

    def finish(self) -> tuple[TreeSummary, Sequence[Place]]:
        """The tree, and where its new blobs lie, its manifest among them. Raises as `feed`."""
        self._reader.finish()
        tree = self._tree.finish()
        self._upload.add(tree.manifest)
        return tree.summary, self._upload.seal()

    def _begin(self, member: Member) -> None:
        self._tree.claim(member)
        if member.kind == "folder":
            self._tree.add_folder(member.path)
        elif member.kind == "file":
            self._member, self._remaining = member, member.size
            if member.size > PART:
                self._upload.begin()
            elif not member.size:
                self._end(self._upload.add(b""))
        else:
            self._tree.add(self._tree.link(member))

    def _more(self, piece: bytes) -> None:
        assert self._member is not None
        self._remaining -= len(piece)
        if self._member.size > PART:
            self._upload.write(piece)
            if not self._remaining:
                self._end(self._upload.end())
            return
        self._pieces.append(piece)
        if not self._remaining:
            contents = b"".join(self._pieces) if len(self._pieces) > 1 else piece
            self._pieces.clear()
            self._end(self._upload.add(contents))

    def _end(self, digest: bytes) -> None:
        member = self._member
        assert member is not None
        mode = PROGRAM_MODE if member.executable else FILE_MODE
        self._tree.add(Entry(member.path, "file", mode, member.size, digest))
