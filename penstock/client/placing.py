"""Writing below a folder, so that nothing is ever written outside it and no file is seen half.

Every path is walked from the folder's descriptor, a component at a time, without following links; a file is written under another name and renamed. A
file of many chunks is gathered in a hidden file beside it, which stays when the download is given up: the next one goes on with it. Two downloads
never gather in one file (see Parts).
"""

# Everything is relative to a descriptor here, which pathlib does not know:

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from penstock.client.errors import Damaged, PenstockError, Unwritable
from penstock.client.scan import is_hole, read_chunk
from penstock.client.selection import PART
from penstock.client.tree import CHUNK, DIGEST, FILE_MODE, PROGRAM_MODE, ZERO_CHUNK, Entry
from penstock.client.treecheck import shown

_BLOCK = 64 << 10
_ZEROS = bytes(_BLOCK)
_SIGN = b"at-work"
_GIT = re.compile(rb"(?:^|/)\.git(?=/|$)")


class Parts:
    """What one download into a folder gathers big files in; a context manager, for all its threads.

    The first download of a folder locks it, and its files have names that the next one finds again. Another at the same time puts a token of its own
    into the names, and removes at its end what it did not finish; a file of that token, which it locks, says that it is at work. Who is the first
    also removes what earlier downloads left of a path that is now whole. A lock that cannot be had for another reason (a file system without locks)
    makes nobody the first: nothing is gone on with there, and nothing is wrong."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._token = b""
        self._made: set[bytes] = set()
        self._left: dict[bytes, dict[bytes, list[bytes]]] = {}
        self._folder = self._sign = -1

    def __enter__(self) -> "Parts":
        with Place(self._root, _no_check) as place:
            self._folder = os.dup(place.folder(b""))
            try:
                if not _locked(self._folder):
                    self._take_token()
            except OSError as error:
                os.close(self._folder)
                raise place.fault(error) from error
        return self

    def _take_token(self) -> None:
        while True:
            token = secrets.token_hex(8).encode()
            handle = os.open(_sign_name(token), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._folder)
            _locked(handle)
            if os.fstat(handle).st_nlink:  # else somebody took it for a dead one's before it was locked
                self._token, self._sign = token, handle
                return
            os.close(handle)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if self._token:
                with contextlib.suppress(OSError, PenstockError), Place(self._root, _no_check) as place:
                    for path in self._made:
                        place.remove(path)
                    place.remove(_sign_name(self._token))
            for name in self._left.get(b"", {}).get(_SIGN, ()):
                self._is_dead(name[len(_sign_name(b"")) - len(PART[1]) : -len(PART[1])])
        finally:
            for handle in (self._sign, self._folder):
                if handle >= 0:
                    os.close(handle)

    def name(self, entry: Entry) -> bytes:
        """The file that a big one is gathered in."""
        name = _named(entry.path) + b"-" + hashlib.sha256(entry.digest).hexdigest()[:16].encode()
        return PART[0] + name + (b"-" + self._token if self._token else b"") + PART[1]

    def made(self, entry: Entry) -> None:
        """It is being gathered."""
        if self._token:
            self._made.add(entry.path.rpartition(b"/")[0] + b"/" + self.name(entry))

    def look(self, parent: int, folder: bytes) -> None:
        """Find what earlier downloads left in a folder."""
        if self._token or folder in self._left:
            return
        found: dict[bytes, list[bytes]] = {}
        for text in os.listdir(parent):
            if text.startswith(".penstock-"):
                name = os.fsencode(text)
                path, dash, _ = name[len(PART[0]) : -len(PART[1])].partition(b"-")
                if dash and name.endswith(PART[1]):
                    found.setdefault(_SIGN if name.startswith(_sign_name(b"")[: -len(PART[1])]) else path, []).append(name)
        self._left[folder] = found

    def done(self, parent: int, path: bytes) -> None:
        """The file is whole: what else was gathered of it goes."""
        found = self._left.get(path.rpartition(b"/")[0])
        for name in found.pop(_named(path), ()) if found else ():
            token = name[len(PART[0]) : -len(PART[1])].split(b"-")[2:]
            if not token or self._is_dead(token[0]):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=parent)

    def _is_dead(self, token: bytes) -> bool:
        """Whether nobody works with the token; its sign is then removed."""
        try:
            with _Opened(_sign_name(token), self._folder, os.O_RDWR) as handle:
                dead = _locked(handle)
                if dead:
                    os.unlink(_sign_name(token), dir_fd=self._folder)
                return dead
        except OSError as error:
            return error.errno == errno.ENOENT


class Place:
    """The folder, for one thread; a context manager. Paths are relative to it. Raises Damaged for what is in the way, Unwritable for what the file
    system refuses."""

    def __init__(self, root: Path, check: Callable[[], None], parts: Parts | None = None) -> None:
        self._root = root
        self._check = check  # called often while something takes long; may raise
        self._parts = parts or Parts(root)
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
        self._parts.look(parent, entry.path.rpartition(b"/")[0])
        same: list[int] = []
        if found is not None and (found.st_size == entry.size or len(entry.digest) > DIGEST):
            with _Opened(name, parent, os.O_RDONLY) as handle:
                same = self._same(handle, entry, os.fstat(handle).st_size)
                if len(same) * DIGEST == len(entry.digest) and found.st_size == entry.size:
                    _set_executable(handle, entry)
                    self._parts.done(parent, entry.path)
                    return None
                if len(entry.digest) > DIGEST:
                    return self._continued(parent, entry, handle, same)
        return self._continued(parent, entry, -1, []) if len(entry.digest) > DIGEST else []

    def _continued(self, parent: int, entry: Entry, old: int, same: list[int]) -> list[int]:
        """The hidden file of a big one: what an earlier download left, and what the old version has in common."""
        self._parts.made(entry)
        with _Opened(self._parts.name(entry), parent, os.O_RDWR | os.O_CREAT) as handle:
            size = os.fstat(handle).st_size
            if size != entry.size:
                os.ftruncate(handle, entry.size)
            there = set(self._same(handle, entry, min(size, entry.size)))
            for chunk, (digest, length) in enumerate(entry.chunks()):
                if digest == ZERO_CHUNK and chunk not in there:
                    if chunk * CHUNK < size:
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

    def write(self, entry: Entry, contents: bytes | bytearray) -> None:
        """A file of one chunk, or an empty one."""
        parent, name = self._at(entry.path)
        new = _new_name()
        try:
            with _Opened(new, parent, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as handle:
                _write(handle, contents, 0)
                os.fchmod(handle, entry.mode)
            self._put(parent, new, name, entry)
            self._parts.done(parent, entry.path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new, dir_fd=parent)
            raise

    def write_chunk(self, entry: Entry, chunk: int, contents: bytes | bytearray) -> None:
        """A chunk of a big file."""
        parent, _ = self._at(entry.path)
        with contextlib.suppress(FileNotFoundError), _Opened(self._parts.name(entry), parent, os.O_WRONLY) as handle:
            _write(handle, contents, chunk * CHUNK, over=not is_hole(handle, chunk, entry.size))

    def complete(self, entry: Entry) -> None:
        """All chunks of a big file are there: it takes its name."""
        parent, name = self._at(entry.path)
        try:
            with _Opened(self._parts.name(entry), parent, os.O_WRONLY) as handle:
                os.fchmod(handle, entry.mode)
            self._put(parent, self._parts.name(entry), name, entry)
            self._parts.done(parent, entry.path)
        except FileNotFoundError:  # somebody removed it
            if self.had(entry) is not None:
                raise Unwritable(f"something else writes to {self._root / os.fsdecode(entry.path)}: try again when it is done") from None

    def remove(self, path: bytes) -> None:
        """A file, if it is there."""
        parent, name = self._at(path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=parent)

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


def _write(handle: int, contents: bytes | bytearray, start: int, over: bool = False) -> None:
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


def _write_all(handle: int, data: bytes | bytearray | memoryview, start: int) -> None:
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


def _named(path: bytes) -> bytes:
    return hashlib.sha256(path).hexdigest()[:16].encode()


def _sign_name(token: bytes) -> bytes:
    return PART[0] + _SIGN + b"-" + token + PART[1]


def _locked(handle: int) -> bool:
    """Whether it is locked now: until it is closed, by whoever dies, too."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _no_check() -> None:
    pass


def refuse_git(into: Path, entries: Iterable[Entry]) -> None:
    """Raises Damaged for a tree with a `.git` (in any case) that would come into a work tree of git, or over a repository: git runs what is in it. A
    folder that is empty, or not there yet, may get one."""
    tops: dict[bytes, None] = {}
    for entry in entries:
        if b".git" in (lower := entry.path.lower()) and (match := _GIT.search(lower)):
            tops[entry.path[: match.end()]] = None
    try:
        if not tops or not into.exists() or not any(into.iterdir()):
            return
        real = into.resolve()
        within = next((folder for folder in (real, *real.parents) if os.path.lexists(folder / ".git")), None)
    except OSError as error:
        raise Unwritable(f"cannot look at {into}: {error.strerror}") from error
    over = None if within else next((top for top in tops if os.path.lexists(into / os.fsdecode(top))), None)
    if within or over:
        where = f"{within} is a git work tree" if within else f"{into} has one"
        top = shown(over or next(iter(tops)))
        raise Damaged(f"the artifact holds `{top}`, and {where}: nothing is written, since git runs what is in it; choose an empty folder")
