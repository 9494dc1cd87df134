"""Trees as tar streams, in canonical order and without owner or times: the same tree gives the same bytes. Blocking generators, constant memory."""

import os
import stat
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Iterator
from pathlib import Path

from libs.archives.compression import Format, compressed
from libs.archives.pump import drawn
from libs.archives.rules import ArchiveRefused, Limits
from libs.archives.tar import END, padding, write_header
from libs.archives.tree import FILE_MODE, FOLDER_MODE, LINK_MODE, PROGRAM_MODE, Entry

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_PIECE = 256 << 10
_READ = 1 << 20
_MAX_DEPTH = Limits().max_depth + 1


def pack(root: Path, form: Format = "tar") -> AsyncGenerator[bytes, None]:
    """The folder `root` as an archive; its files are read in threads. Raises OSError, ArchiveRefused for what is neither file, folder nor
    link (links are not checked: whoever reads the archive does), and FileChanged."""
    return drawn(pack_blocking(root, form))


def pack_blocking(root: Path, form: Format = "tar") -> Generator[bytes, None, None]:
    """As `pack`, for a thread of one's own."""
    yield from _gathered(compressed(_folder(root), form))


def write_tree(entries: Iterable[Entry], contents: Callable[[Entry], Iterable[bytes]], form: Format = "tar") -> Generator[bytes, None, None]:
    """A tree as an archive; `contents` gives a file's bytes, exactly `size` of them."""
    yield from _gathered(compressed(_entries(entries, contents), form))


class FileChanged(Exception):
    """A file shrank while it was being packed."""


def _entries(entries: Iterable[Entry], contents: Callable[[Entry], Iterable[bytes]]) -> Iterator[bytes]:
    for entry in entries:
        if entry.kind == "folder":
            yield write_header(entry.path + b"/", b"5", entry.mode, 0)
        elif entry.kind == "link":
            yield write_header(entry.path, b"2", entry.mode, 0, entry.target)
        else:
            yield write_header(entry.path, b"0", entry.mode, entry.size)
            if entry.size:
                yield from contents(entry)
                yield bytes(padding(entry.size))
    yield END


def _folder(root: Path) -> Iterator[bytes]:
    opened = os.open(root, _FOLDER)
    try:
        yield from _walk(opened, b"", 1)
    finally:
        os.close(opened)
    yield END


def _walk(folder: int, prefix: bytes, depth: int) -> Iterator[bytes]:
    if depth > _MAX_DEPTH:
        raise ArchiveRefused(prefix, f"lies more than {_MAX_DEPTH} folders deep")
    names = sorted(os.fsencode(name) for name in os.listdir(folder))
    for name in names:
        path = prefix + name
        found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            yield write_header(path + b"/", b"5", FOLDER_MODE, 0)
            inner = os.open(name, _FOLDER, dir_fd=folder)
            try:
                yield from _walk(inner, path + b"/", depth + 1)
            finally:
                os.close(inner)
        elif stat.S_ISLNK(found.st_mode):
            yield write_header(path, b"2", LINK_MODE, 0, os.readlink(name, dir_fd=folder))
        elif stat.S_ISREG(found.st_mode):
            yield from _file(folder, name, path)
        else:
            raise ArchiveRefused(path, "is neither a file, a folder nor a link")


def _file(folder: int, name: bytes, path: bytes) -> Iterator[bytes]:
    opened = os.open(name, _FILE, dir_fd=folder)
    try:
        found = os.fstat(opened)
        if not stat.S_ISREG(found.st_mode):
            raise ArchiveRefused(path, "is neither a file, a folder nor a link")
        size = found.st_size
        yield write_header(path, b"0", PROGRAM_MODE if found.st_mode & stat.S_IXUSR else FILE_MODE, size)
        remaining = size
        while remaining:
            piece = os.read(opened, min(_READ, remaining))
            if not piece:
                raise FileChanged(f"{os.fsdecode(path)} shrank while it was being packed")
            remaining -= len(piece)
            yield piece
        yield bytes(padding(size))
    finally:
        os.close(opened)


def _gathered(pieces: Iterable[bytes]) -> Generator[bytes, None, None]:
    """The same bytes in pieces of some 256 KiB, so that each is worth a step to another thread."""
    waiting: list[bytes] = []
    size = 0
    for piece in pieces:
        waiting.append(piece)
        size += len(piece)
        if size >= _PIECE:
            yield b"".join(waiting)
            waiting.clear()
            size = 0
    if waiting:
        yield b"".join(waiting)
