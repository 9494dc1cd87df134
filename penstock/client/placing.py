"""Writing below a folder, so that nothing is ever written outside it and no file is seen half.

Every path is walked from the folder's descriptor, a component at a time, without following links; a file is written under another name and renamed. A
file of many chunks is gathered in a hidden file beside it, which stays when the download is given up: the next one goes on with it.
"""

# Everything is relative to a descriptor here, which pathlib does not know:

import contextlib
import errno
import hashlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from penstock.client.errors import Damaged, PenstockError, Unwritable
from penstock.client.scan import is_hole, read_chunk
from penstock.client.tree import CHUNK, DIGEST, FILE_MODE, PROGRAM_MODE, ZERO_CHUNK, Entry
from penstock.client.treecheck import shown

_BLOCK = 64 << 10
_ZEROS = bytes(_BLOCK)


class Place:
    """The folder, for one thread; a context manager. Paths are relative to it. Raises Damaged for what is in the way, Unwritable for what the file
    system refuses."""

    def __init__(self, root: Path, check: Callable[[], None]) -> None:
        self._root = root
        self._check = check  # called often while something takes long; may raise
        self._path = b""
        self._open: list[tuple[bytes, int]] = []

    def __enter__(self) -> "Place":
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            self._open = [(b"", os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))]
        except OSError as error:
            raise self.fault(error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for _, handle in self._open:
            os.close(handle)
        self._open = []
        if isinstance(error, OSError):
            raise self.fault(error) from error

    def fault(self, error: OSError) -> PenstockError:
        """What the file system says, for people."""
        where = self._root / os.fsdecode(self._path)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return Unwritable(f"cannot write {where}: {error.strerror}; make {where.parent} writable, or choose another folder")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return Unwritable(f"cannot write {where}: {error.strerror}; make room and try again, what is there is not fetched again")
        return Unwritable(f"cannot write {where}: {error.strerror or error}")

    def folder(self, path: bytes) -> int:
        """The descriptor of a folder, made where absent. A link on the way is refused."""
        while self._open[-1][0] and path != self._open[-1][0] and not path.startswith(self._open[-1][0] + b"/"):
            os.close(self._open.pop()[1])
        here, handle = self._open[-1]
        for part in path[len(here) :].split(b"/"):
            if part:
                here = here + b"/" + part if here else part
                self._path = here
                handle = self._step(handle, part, here)
                self._open.append((here, handle))
        return handle

    def _step(self, parent: int, name: bytes, path: bytes) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(name, flags, dir_fd=parent)
        except FileNotFoundError:
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, 0o755, dir_fd=parent)
            return os.open(name, flags, dir_fd=parent)
        except OSError as error:
            if error.errno in (errno.ENOTDIR, errno.ELOOP):
                raise Damaged(f"`{shown(path)}` is already there and is not a folder: nothing is written through it") from error
            raise

    def _at(self, path: bytes) -> tuple[int, bytes]:
        parent, _, name = path.rpartition(b"/")
        handle = self.folder(parent)
        self._path = path
        return handle, name

    # --- what is there

    def had(self, entry: Entry) -> list[int] | None:
        """Which chunks of the file are there already: None: it is there whole. Raises Damaged when something else is in its place."""
        parent, name = self._at(entry.path)
        found = _regular(parent, name, entry.path)
        same: list[int] = []
        if found is not None and (found.st_size == entry.size or len(entry.digest) > DIGEST):
            with _Opened(name, parent, os.O_RDONLY) as handle:
                same = self._same(handle, entry, os.fstat(handle).st_size)
                if len(same) * DIGEST == len(entry.digest) and found.st_size == entry.size:
                    _set_executable(handle, entry)
                    return None
                if len(entry.digest) > DIGEST:
                    return self._continued(parent, entry, handle, same)
        return self._continued(parent, entry, -1, []) if len(entry.digest) > DIGEST else []

    def _continued(self, parent: int, entry: Entry, old: int, same: list[int]) -> list[int]:
        """The hidden file of a big one: what an earlier download left, and what the old version has in common."""
        with _Opened(_part_name(entry), parent, os.O_RDWR | os.O_CREAT) as handle:
            size = os.fstat(handle).st_size
            there = set(self._same(handle, entry, size)) if size == entry.size else set()
            if size != entry.size:
                os.ftruncate(handle, 0)
                os.ftruncate(handle, entry.size)
            for chunk, (digest, length) in enumerate(entry.chunks()):
                if digest == ZERO_CHUNK and chunk not in there:
                    if size == entry.size:
                        _write(handle, bytes(length), chunk * CHUNK, over=True)
                    there.add(chunk)
            for chunk in same:
                self._check()
                if chunk not in there:
                    contents = read_chunk(old, chunk, min(CHUNK, entry.size - chunk * CHUNK))
                    if hashlib.sha256(contents).digest() == entry.digest[chunk * DIGEST : (chunk + 1) * DIGEST]:
                        _write(handle, contents, chunk * CHUNK, over=True)
                        there.add(chunk)
        return sorted(there)

    def _same(self, handle: int, entry: Entry, size: int) -> list[int]:
        """The chunks that the file has where the entry has them."""
        same: list[int] = []
        for chunk, (digest, length) in enumerate(entry.chunks()):
            self._check()
            if chunk * CHUNK + length > size:
                break
            hole = is_hole(handle, chunk, size)
            if (ZERO_CHUNK if hole else hashlib.sha256(read_chunk(handle, chunk, length)).digest()) == digest:
                same.append(chunk)
        return same

    # --- what is written

    def write(self, entry: Entry, contents: bytes) -> None:
        """A file of one chunk, or an empty one."""
        parent, name = self._at(entry.path)
        new = _new_name()
        try:
            with _Opened(new, parent, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as handle:
                _write(handle, contents, 0)
                os.fchmod(handle, entry.mode)
            self._put(parent, new, name, entry)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new, dir_fd=parent)
            raise

    def write_chunk(self, entry: Entry, chunk: int, contents: bytes) -> None:
        """A chunk of a big file."""
        parent, _ = self._at(entry.path)
        with contextlib.suppress(FileNotFoundError), _Opened(_part_name(entry), parent, os.O_WRONLY) as handle:
            _write(handle, contents, chunk * CHUNK, over=not is_hole(handle, chunk, entry.size))

    def complete(self, entry: Entry) -> None:
        """All chunks of a big file are there: it takes its name."""
        parent, name = self._at(entry.path)
        try:
            with _Opened(_part_name(entry), parent, os.O_WRONLY) as handle:
                os.fchmod(handle, entry.mode)
            self._put(parent, _part_name(entry), name, entry)
        except FileNotFoundError:  # another download of the same was faster
            if self.had(entry) is not None:
                raise Unwritable(f"something else writes to {self._root / os.fsdecode(entry.path)}: try again when it is done") from None

    def hard_link(self, entry: Entry) -> None:
        """Another name for a file that is there."""
        source, original = self._at(entry.target)
        source = os.dup(source)  # the next step may close it
        try:
            parent, name = self._at(entry.path)
            found = _regular(parent, name, entry.path)
            first = os.stat(original, dir_fd=source, follow_symlinks=False)
            if found is not None and (found.st_dev, found.st_ino) == (first.st_dev, first.st_ino):
                return
            new = _new_name()
            try:
                try:
                    os.link(original, new, src_dir_fd=source, dst_dir_fd=parent, follow_symlinks=False)
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.EXDEV):
                        raise
                    _copy(source, original, parent, new, entry)
                self._put(parent, new, name, entry)
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(new, dir_fd=parent)
                raise
        finally:
            os.close(source)

    def link(self, entry: Entry) -> None:
        """A symbolic link."""
        parent, name = self._at(entry.path)
        with contextlib.suppress(OSError):
            if os.readlink(name, dir_fd=parent) == entry.target:
                return
        new = _new_name()
        os.symlink(entry.target, new, dir_fd=parent)
        try:
            self._put(parent, new, name, entry)
        except BaseException:
            os.unlink(new, dir_fd=parent)
            raise

    def _put(self, parent: int, new: bytes, name: bytes, entry: Entry) -> None:
        try:
            os.replace(new, name, src_dir_fd=parent, dst_dir_fd=parent)
        except IsADirectoryError:
            raise _is_folder(entry.path, "link" if entry.kind == "link" else "file") from None


class _Opened:
    """A file in a folder, never through a link."""

    def __init__(self, name: bytes, parent: int, flags: int) -> None:
        self._handle = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=parent)

    def __enter__(self) -> int:
        return self._handle

    def __exit__(self, *error: object) -> None:
        os.close(self._handle)


def _regular(parent: int, name: bytes, path: bytes) -> os.stat_result | None:
    """The file that is there; None when there is none. What is a link is replaced like nothing. Raises Damaged for a folder."""
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(found.st_mode):
        raise _is_folder(path, "file")
    return found if stat.S_ISREG(found.st_mode) else None


def _is_folder(path: bytes, kind: str) -> Damaged:
    return Damaged(f"`{shown(path)}` is a folder here and a {kind} in the artifact: remove it first")


def _set_executable(handle: int, entry: Entry) -> None:
    mode = stat.S_IMODE(os.fstat(handle).st_mode)
    if bool(mode & 0o100) != entry.executable:
        os.fchmod(handle, PROGRAM_MODE if entry.executable else FILE_MODE)


def _write(handle: int, contents: bytes, start: int, over: bool = False) -> None:
    """Write at a place; blocks of zeros are left as holes, unless something may be there already (`over`)."""
    if over or len(contents) < _BLOCK:
        _write_all(handle, contents, start)
        return
    begin = 0
    for at in range(0, len(contents), _BLOCK):
        if contents.startswith(_ZEROS, at):
            _write_all(handle, memoryview(contents)[begin:at], start + begin)
            begin = at + _BLOCK
    _write_all(handle, memoryview(contents)[begin:], start + begin)
    if begin >= len(contents):
        os.ftruncate(handle, max(os.fstat(handle).st_size, start + len(contents)))


def _write_all(handle: int, data: bytes | memoryview, start: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, start)
        view, start = view[done:], start + done


def _copy(source: int, original: bytes, parent: int, new: bytes, entry: Entry) -> None:
    with (
        _Opened(original, source, os.O_RDONLY) as reading,
        _Opened(new, parent, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as writing,
    ):
        os.ftruncate(writing, entry.size)
        for chunk, (digest, size) in enumerate(entry.chunks()):
            if digest != ZERO_CHUNK:
                _write(writing, read_chunk(reading, chunk, size), chunk * CHUNK)
        os.fchmod(writing, entry.mode)


def _new_name() -> bytes:
    return b".penstock-" + secrets.token_hex(8).encode() + b".part"


def _part_name(entry: Entry) -> bytes:
    return b".penstock-" + hashlib.sha256(entry.path + b"\0" + entry.digest).hexdigest()[:32].encode() + b".part"
