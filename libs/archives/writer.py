"""Trees as tar streams, in canonical order and without owner or times: the same tree gives the same bytes. Blocking generators, constant memory."""

from collections.abc import Callable, Generator, Iterable, Iterator

from libs.archives.compression import Format, compressed
from libs.archives.pump import gathered
from libs.archives.tar import END, header_size, padding, write_header
from libs.archives.tree import Entry


def write_tree(entries: Iterable[Entry], contents: Callable[[Entry], Iterable[bytes]], form: Format = "tar") -> Generator[bytes, None, None]:
    """A tree as an archive; `contents` gives a plain file's bytes, exactly `size` of them. Hard links are tar's."""
    return gathered(compressed(_tar(entries, lambda entry, start: contents(entry), 0), form))


def tar_size(entries: Iterable[Entry]) -> int:
    """Bytes of the plain archive of a tree."""
    return sum(_size(entry) for entry in entries) + len(END)


def write_tar_from(entries: Iterable[Entry], contents: Callable[[Entry, int], Iterable[bytes]], start: int) -> Generator[bytes, None, None]:
    """The plain archive of a tree from its byte `start` on; `contents` gives a plain file's bytes from an offset in it, below its size, to its end.
    What lies before `start` is neither asked for nor made."""
    return gathered(_tar(entries, contents, start))


def _tar(entries: Iterable[Entry], contents: Callable[[Entry, int], Iterable[bytes]], start: int) -> Iterator[bytes]:
    """`start` is counted from the entry at hand on."""
    for entry in entries:
        if start and start >= (size := _size(entry)):
            start -= size
            continue
        header = write_header(*_header(entry))
        yield header[start:]
        start = max(start - len(header), 0)
        if size := _stored(entry):
            if start < size:
                yield from contents(entry, start)
            yield bytes(padding(size) - max(start - size, 0))
        start = 0
    yield END[start:]


def _size(entry: Entry) -> int:
    """Bytes that an entry takes in an archive."""
    stored = _stored(entry)
    return header_size(*_header(entry)) + stored + padding(stored)


def _stored(entry: Entry) -> int:
    """Bytes of contents: a hard link has none."""
    return 0 if entry.target else entry.size


def _header(entry: Entry) -> tuple[bytes, bytes, int, int, bytes]:
    """Name, kind, mode, size, link."""
    if entry.kind == "folder":
        return entry.path + b"/", b"5", entry.mode, 0, b""
    kind = b"2" if entry.kind == "link" else b"1" if entry.target else b"0"
    return entry.path, kind, entry.mode, _stored(entry), entry.target
