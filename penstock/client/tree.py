"""Trees as the server knows them: entries, the manifest that lists them, and the digests that name them. The client's own copy of the format.

A manifest is `penstock tree 1\\n`, then blocks of a length (u32, big-endian) and a msgpack array of 4,096 entries (the last: 1 … 4,096), sorted by
the components of their paths. A file's contents are cut into chunks of 8 MiB; its `digest` is its chunks' sha256 one after another. A manifest past
one chunk is itself cut into chunks, and the tree's digest is the sha256 of the list of their digests.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Annotated, Literal

import msgspec

CHUNK = 8 << 20
DIGEST = 32
ZERO_CHUNK = bytes.fromhex("2daeb1f36095b44b318410b3f4e8b5d989dcc7bb023d1426c492dab0a3053e74")
"""The digest of a whole chunk of zeros: known to everybody, and never read, sent or written."""

FILE_MODE, PROGRAM_MODE, FOLDER_MODE, LINK_MODE = 0o644, 0o755, 0o755, 0o777
MAGIC = b"penstock tree 1\n"
LIST_MAGIC = b"penstock tree list 1\n"
BLOCK = 4096
"""Entries in a block."""
_LARGEST_BLOCK = 128 << 20  # bytes: more is no manifest, or one that nobody should hold in memory
_ENCODE = msgspec.msgpack.Encoder().encode


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One name in a tree. `digest`: a file's chunks' digests, joined. `target`: a symbolic link's text, or of a hard link the path of the first
    of the files that it shares its contents with."""

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
        """A file's public name, in hex; for a file of one chunk the sha256 of its contents."""
        return self.digest.hex() if len(self.digest) == DIGEST else hashlib.sha256(self.digest).hexdigest()

    def chunks(self) -> Iterator[tuple[bytes, int]]:
        """(digest, size) of each of a file's chunks."""
        for start in range(0, len(self.digest), DIGEST):
            yield self.digest[start : start + DIGEST], min(CHUNK, self.size - start // DIGEST * CHUNK)


_DECODER: msgspec.msgpack.Decoder[list[Entry]] = msgspec.msgpack.Decoder(Annotated[list[Entry], msgspec.Meta(max_length=BLOCK)])
"""Entries are counted before they are made."""


class InvalidManifest(Exception):
    """These bytes are no manifest."""


def order(path: bytes) -> bytes:
    """Sort key of a path: by components, so that a folder is followed by all that lies in it."""
    return path.replace(b"/", b"\0")


def manifest_of(entries: Iterable[Entry]) -> Iterator[bytes]:
    """The manifest of sorted entries, piece by piece."""
    yield MAGIC
    source = iter(entries)
    while block := list(islice(source, BLOCK)):
        data = _ENCODE(block)
        yield len(data).to_bytes(4, "big") + data


def tree_digest(manifest: Iterable[bytes]) -> bytes:
    """The digest of the tree with this manifest, given in pieces of any size."""
    whole, piece = hashlib.sha256(), hashlib.sha256()
    digests: list[bytes] = []
    room = CHUNK
    for data in manifest:
        whole.update(data)
        view = memoryview(data)
        while len(view) > room:
            piece.update(view[:room])
            digests.append(piece.digest())
            view, piece, room = view[room:], hashlib.sha256(), CHUNK
        piece.update(view)
        room -= len(view)
    if not digests:
        return whole.digest()
    digests.append(piece.digest())
    return hashlib.sha256(LIST_MAGIC + b"".join(digests)).digest()


class ManifestReader:
    """Feed it a manifest as it comes, however it is cut; entries come out. The format alone is checked here: what they say may be hostile."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._begun = False
        self._last = False

    def feed(self, data: bytes) -> Iterator[Entry]:
        """The entries that are complete now. Raises InvalidManifest."""
        self._rest += data
        if not self._begun:
            if len(self._rest) < len(MAGIC) and MAGIC.startswith(self._rest):
                return
            if not self._rest.startswith(MAGIC):
                raise InvalidManifest("it does not begin as one")
            del self._rest[: len(MAGIC)]
            self._begun = True
        while len(self._rest) >= 4:
            size = int.from_bytes(self._rest[:4], "big")
            if size > _LARGEST_BLOCK:
                raise InvalidManifest("a block of it is too large")
            if len(self._rest) < 4 + size:
                return
            block = self._block(bytes(memoryview(self._rest)[4 : 4 + size]))
            del self._rest[: 4 + size]
            yield from block

    def finish(self) -> None:
        """Raises InvalidManifest when it is cut short."""
        if not self._begun or self._rest:
            raise InvalidManifest("it is cut short")

    def _block(self, data: bytes) -> Sequence[Entry]:
        try:
            entries = _DECODER.decode(data)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise InvalidManifest(str(error)) from None
        if self._last or not 1 <= len(entries) <= BLOCK:
            raise InvalidManifest("its blocks are not 4,096 entries each")
        self._last = len(entries) < BLOCK
        return entries


def read_manifest(manifest: bytes) -> list[Entry]:
    """All entries of a manifest. Raises InvalidManifest."""
    reader = ManifestReader()
    entries = list(reader.feed(manifest))
    reader.finish()
    return entries
