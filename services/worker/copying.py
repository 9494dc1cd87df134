"""Contents from one file into another: shared by the file system until one of them is written to, where it can, and copied otherwise."""

import contextlib
import errno
import fcntl
import os
from pathlib import Path

_FICLONE = 0x40049409
_PIECE = 1 << 20


def reflinks_work(trial: Path) -> bool:
    """Whether files in the folder `trial` can share their contents."""
    with (trial / "one").open("w+b") as one, (trial / "two").open("w+b") as two:
        one.write(bytes(_PIECE))
        one.flush()
        with contextlib.suppress(OSError):
            fcntl.ioctl(two, _FICLONE, one.fileno())
            return True
    return False


def copy_contents(source: int, target: int, size: int, reflink: bool = False) -> None:
    """Fill an empty file with the `size` bytes of another. Holes stay holes. Raises OSError."""
    if reflink:
        try:
            fcntl.ioctl(target, _FICLONE, source)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL):
                raise
    end = 0
    while end < size:
        try:
            at = os.lseek(source, end, os.SEEK_DATA) if size > _PIECE else end
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            break
        end = os.lseek(source, at, os.SEEK_HOLE) if size > _PIECE else size
        while at < end:
            piece = memoryview(os.pread(source, min(_PIECE, end - at), at))
            if not piece:
                raise OSError(errno.EIO, "a file is shorter than it was")
            while piece:
                written = os.pwrite(target, piece, at)
                piece, at = piece[written:], at + written
    if os.fstat(target).st_size < size:
        os.truncate(target, size)
