"""What a process that extracts archives runs at its start: on this machine, with this Python and this file system, hostile archives stay out."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from libs.archives.extract import Extraction
from libs.archives.rules import ArchiveRefused, Limits
from libs.archives.tar import END, write_header

_LIMITS = Limits(max_members=100, max_bytes=1 << 20)
_DEEP = b"/".join([b"d" * 240] * 16)
_HOSTILE: tuple[tuple[str, Sequence[bytes]], ...] = (
    ("a path above the folder", (write_header(b"../out", b"0", 0o644, 0),)),
    ("an absolute path", (write_header(b"/tmp/out", b"0", 0o644, 0),)),
    ("a file through a link", (write_header(b"l", b"2", 0o777, 0, b"sub"), write_header(b"l/out", b"0", 0o644, 0))),
    ("a link out", (write_header(b"l", b"2", 0o777, 0, b"../out"),)),
    ("a link out through a link", (write_header(b"a/b", b"2", 0o777, 0, b".."), write_header(b"l", b"2", 0o777, 0, b"a/b/../out"))),
    ("a link out at the end of a long path", (write_header(_DEEP + b"/l", b"2", 0o777, 0, b"../" * 17 + b"out"),)),
    ("a hard link out", (write_header(b"h", b"1", 0o644, 0, b"../out"),)),
    ("a device", (write_header(b"null", b"3", 0o666, 0),)),
)


class Unsafe(Exception):
    """Extraction is not safe here; the process must not start."""


def self_test() -> None:
    """Blocking, a few milliseconds. Raises Unsafe."""
    with tempfile.TemporaryDirectory(prefix="penstock-selftest-") as folder:
        for what, headers in _HOSTILE:
            _refused(Path(folder), what, b"".join(headers) + END)
        good = Path(folder) / "good"
        extraction = Extraction(good, _LIMITS)
        extraction.feed(write_header(b"d/f", b"0", 0o6755, 0) + write_header(b"l", b"2", 0o777, 0, b"d/f") + END)
        extraction.finish()
        if (good / "d/f").stat().st_mode & 0o7777 != 0o755 or (good / "l").readlink() != Path("d/f"):
            raise Unsafe("a sound archive did not come out as it should")


def _refused(folder: Path, what: str, archive: bytes) -> None:
    root = folder / "root"
    extraction = Extraction(root, _LIMITS)
    try:
        extraction.feed(archive)
        extraction.finish()
    except ArchiveRefused:
        extraction.undo()
    else:
        raise Unsafe(f"{what} was extracted")
    if any(folder.iterdir()):
        raise Unsafe(f"{what} was refused and left something behind")
