"""Contents from one file into another: shared by the file system until one of them is written to, where it can, and copied otherwise."""

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from libs.archives.rules import ArchiveRefused
from libs.archives.tree import CHUNK, ZERO_CHUNK, Entry

MTIME_NS = 946_684_800_000_000_000
"""When every file of an input was changed: 2000-01-01. Equal, so that `make` takes nothing that came for older than what it was made from; not 0,
which `make` reads as missing and zip cannot say; before all that a step makes."""

_FICLONE = 0x40049409
_PIECE = 1 << 20
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def reflinks_work(trial: Path) -> bool:
    """Whether files in the folder `trial` can share their contents."""
    with (trial / "one").open("w+b") as one, (trial / "two").open("w+b") as two:
        one.write(bytes(_PIECE))
        one.flush()
        with contextlib.suppress(OSError):
            fcntl.ioctl(two, _FICLONE, one.fileno())
            return True
    return False


def copy_contents(source: int, target: int, size: int, reflink: bool = False, go_on: Callable[[], None] = lambda: None) -> None:
    """Fill an empty file with the `size` bytes of another. Holes stay holes. `go_on` is asked between pieces, and may raise. Raises OSError."""
    if reflink and _shared(source, target):
        return
    end = 0
    while end < size:
        try:
            at = os.lseek(source, end, os.SEEK_DATA) if size > _PIECE else end
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        end = min(os.lseek(source, at, os.SEEK_HOLE), size) if size > _PIECE else size
        for piece in _pieces(source, at, end):
            if size > _PIECE:
                go_on()
            at = _write(target, piece, at)
    if os.fstat(target).st_size < size:
        os.truncate(target, size)


def copy_checked(source: int, target: int, entry: Entry, reflink: bool, go_on: Callable[[], None]) -> bool:
    """Fill an empty file with another's contents, which others may be changing; whether what it was filled with is what the entry says. Raises
    OSError."""
    if reflink and _shared(source, target):
        return has_contents(target, entry, go_on)
    at = 0
    for digest, size in entry.chunks():
        go_on()
        if digest != ZERO_CHUNK:
            hashed, here = hashlib.sha256(), at
            for piece in _pieces(source, at, at + size):
                hashed.update(piece)
                here = _write(target, piece, here)
            if hashed.digest() != digest:
                return False
        at += size
    os.truncate(target, entry.size)
    return True


def has_contents(opened: int, entry: Entry, go_on: Callable[[], None]) -> bool:
    """Whether a file, which does not change, is what the entry says. Raises OSError."""
    if os.fstat(opened).st_size != entry.size:
        return False
    at = 0
    for digest, size in entry.chunks():
        go_on()
        if not (digest == ZERO_CHUNK and is_hole(opened, at)):
            hashed = hashlib.sha256()
            for piece in _pieces(opened, at, at + size):
                hashed.update(piece)
            if hashed.digest() != digest:
                return False
        at += size
    return True


def is_hole(opened: int, at: int) -> bool:
    """Whether there is nothing in the chunk that begins there. Raises OSError."""
    try:
        return os.lseek(opened, at, os.SEEK_DATA) >= at + CHUNK
    except OSError as error:
        if error.errno == errno.ENXIO:
            return True
        raise


def copy_tree(source: Path, target: Path, reflink: bool, go_on: Callable[[], None]) -> None:
    """A folder's contents into another, modes and times too; what is there already is written over, but never through a link. Hard links become files
    of their own. `go_on` is asked often, and may raise. Raises ArchiveRefused naming what is in the way, or can not be copied; OSError."""
    target.mkdir(parents=True, exist_ok=True)
    waiting, folders = [(source, target)], []
    while waiting:
        folder, into = waiting.pop()
        folders.append((folder, into))
        go_on()
        with os.scandir(folder) as listing:
            found = list(listing)
        for entry in found:
            path, there = Path(entry.path), into / entry.name
            if path == target:
                continue
            if there.is_symlink():
                raise ArchiveRefused(os.fsencode(there.relative_to(target)), "is a link, and in the way")
            if entry.is_dir(follow_symlinks=False):
                there.mkdir(exist_ok=True)
                waiting.append((path, there))
                continue
            go_on()
            there.unlink(missing_ok=True)
            if entry.is_symlink():
                there.symlink_to(path.readlink())
            elif entry.is_file():
                _copy_file(path, there, reflink, go_on)
            else:
                raise ArchiveRefused(os.fsencode(path.relative_to(source)), "is neither a file, a folder nor a link")
            shutil.copystat(path, there, follow_symlinks=False)
    for folder, into in reversed(folders):
        shutil.copystat(folder, into, follow_symlinks=False)


def _copy_file(path: Path, there: Path, reflink: bool, go_on: Callable[[], None]) -> None:
    source = os.open(path, _FILE)
    try:
        target = os.open(there, _NEW_FILE, 0o600)
        try:
            copy_contents(source, target, os.fstat(source).st_size, reflink, go_on)
        finally:
            os.close(target)
    finally:
        os.close(source)


def _shared(source: int, target: int) -> bool:
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return True
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL):
            raise
        return False


def _pieces(source: int, at: int, end: int) -> Iterator[bytes]:
    while at < end:
        piece = os.pread(source, min(_PIECE, end - at), at)
        if not piece:
            raise OSError(errno.EIO, "a file is shorter than it was")
        at += len(piece)
        yield piece


def _write(target: int, piece: bytes, at: int) -> int:
    """Where it ends."""
    rest = memoryview(piece)
    while rest:
        written = os.pwrite(target, rest, at)
        rest, at = rest[written:], at + written
    return at
