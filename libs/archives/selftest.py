"""What a process that takes archives or writes trees out runs at its start: on this machine, with this Python and this file system, hostile ones stay
out."""

import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from libs.archives.place import create_file, place
from libs.archives.reader import ArchiveReader, Member
from libs.archives.rules import ArchiveRefused, Limits
from libs.archives.tar import END, write_header
from libs.archives.tree import CHUNK, FILE_MODE, FOLDER_MODE, LINK_MODE, PROGRAM_MODE, Entry, TreeBuilder, TreeSummary

_LIMITS = Limits(max_members=100, max_bytes=1 << 20)
_DEEP = b"/".join([b"d" * 240] * 16)
_HOSTILE_ARCHIVES: tuple[tuple[str, Sequence[bytes]], ...] = (
    ("a path above the folder", (write_header(b"../out", b"0", 0o644, 0),)),
    ("an absolute path", (write_header(b"/tmp/out", b"0", 0o644, 0),)),
    ("a file through a link", (write_header(b"l", b"2", 0o777, 0, b"sub"), write_header(b"l/out", b"0", 0o644, 0))),
    ("a link out", (write_header(b"l", b"2", 0o777, 0, b"../out"),)),
    ("a link out through a link", (write_header(b"a/b", b"2", 0o777, 0, b".."), write_header(b"l", b"2", 0o777, 0, b"a/b/../out"))),
    ("a link out at the end of a long path", (write_header(_DEEP + b"/l", b"2", 0o777, 0, b"../" * 17 + b"out"),)),
    ("a hard link out", (write_header(b"h", b"1", 0o644, 0, b"../out"),)),
    ("a device", (write_header(b"null", b"3", 0o666, 0),)),
)
_HOSTILE_TREES: tuple[tuple[str, Sequence[Entry]], ...] = (
    ("a path above the folder", (Entry(b"..", "folder", FOLDER_MODE), Entry(b"../out", "file", FILE_MODE))),
    ("an absolute path", (Entry(b"/tmp/out", "file", FILE_MODE),)),
    (
        "a file through a link",
        (Entry(b"l", "link", LINK_MODE, target=b"sub"), Entry(b"l/out", "file", FILE_MODE), Entry(b"sub", "folder", FOLDER_MODE)),
    ),
    ("a link out", (Entry(b"l", "link", LINK_MODE, target=b"../out"),)),
    ("a hard link out", (Entry(b"a", "file", FILE_MODE), Entry(b"h", "file", FILE_MODE, target=b"../out"))),
    ("a set-uid program", (Entry(b"su", "file", 0o4755),)),
)


class Unsafe(Exception):
    """Writing trees out is not safe here; the process must not start."""


def self_test() -> None:
    """Blocking, a few milliseconds. Raises Unsafe."""
    with tempfile.TemporaryDirectory(prefix="penstock-selftest-") as folder:
        for what, headers in _HOSTILE_ARCHIVES:
            _refused(Path(folder), what, partial(extract, (*headers, END)))
        for what, entries in _HOSTILE_TREES:
            _refused(Path(folder), what, partial(_place, entries))
        good = Path(folder) / "good"
        extract((write_header(b"d/f", b"0", 0o6755, 0), write_header(b"l", b"2", 0o777, 0, b"d/f"), END), good, _LIMITS)
        if (good / "d/f").stat().st_mode & 0o7777 != PROGRAM_MODE or (good / "l").readlink() != Path("d/f"):
            raise Unsafe("a sound archive did not come out as it should")


def extract(archive: Iterable[bytes], root: Path, limits: Limits) -> TreeSummary:
    """A small archive the whole way, its contents in memory: taken apart, put together into a tree, and placed. Raises ArchiveRefused, OSError."""
    builder = TreeBuilder(limits)
    contents: dict[bytes, list[bytes]] = {}
    pieces = _read(archive, limits)
    for member in pieces:
        assert isinstance(member, Member)
        builder.claim(member)
        if member.kind == "folder":
            builder.add_folder(member.path)
        elif member.kind == "file":
            whole = bytearray()
            while len(whole) < member.size:
                piece = next(pieces)
                assert not isinstance(piece, Member)
                whole += piece
            chunks = [bytes(whole[at : at + CHUNK]) for at in range(0, len(whole), CHUNK)]
            digest = b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)
            contents[digest] = chunks
            builder.add(Entry(member.path, "file", PROGRAM_MODE if member.executable else FILE_MODE, member.size, digest))
        else:
            builder.add(builder.link(member))
    tree = builder.finish()
    place(tree.entries, root, lambda entry, parent, name: create_file(entry, parent, name, contents[entry.digest]), limits)
    return tree.summary


def _read(archive: Iterable[bytes], limits: Limits) -> Iterator[Member | bytes | memoryview]:
    reader = ArchiveReader(limits)
    for data in archive:
        yield from reader.feed(data)
    reader.finish()


def _place(entries: Sequence[Entry], root: Path, limits: Limits) -> None:
    place(entries, root, lambda entry, parent, name: create_file(entry, parent, name, ()), limits)


def _refused(folder: Path, what: str, write: Callable[[Path, Limits], object]) -> None:
    try:
        write(folder / "root", _LIMITS)
    except ArchiveRefused:
        pass
    else:
        raise Unsafe(f"{what} was written out")
    if any(folder.iterdir()):
        raise Unsafe(f"{what} was refused and left something behind")
