"""What is remembered of a folder from one upload to the next: of each file a stamp of its inode and the digest that its contents had then.

A file whose stamp is the same need not be read, as in git's index. What cannot be trusted is left out: a file that changed so shortly before it was
read that another change might bear the same time (git calls it racily clean) is read again the next time. An index that is damaged, from another
machine, of another folder or unwritable is as good as none; it is replaced in one step, so that several may write it at once.
"""

# Paths are bytes here, which pathlib does not have:
# ruff: noqa: PTH105, PTH108, PTH123

import contextlib
import hashlib
import os
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

import msgspec

from penstock.client.tree import BLOCK, Entry

_MAGIC = b"penstock index 1\n"
_STAMP = struct.Struct(">IIQQQqq")
_TICK = 20_000_000
"""Nanoseconds by which a file system's clock may lag: at most two jiffies."""
_COARSE = 2_000_000_000
"""The same where times are whole seconds, or where it cannot be asked for its time."""
_FORGOTTEN = 60 * 86400
"""Seconds after which an index that nobody used is removed."""
_REMEMBERED = 32
"""Uploads that are remembered as known to a server."""


def stamp_of(status: os.stat_result) -> bytes:
    """All of an inode that changes when its contents may have: mode, links, device, number, size, times."""
    return _STAMP.pack(status.st_mode, status.st_nlink, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


class Stamp(msgspec.Struct, frozen=True):
    """A stamp, read."""

    mode: int
    links: int
    device: int
    inode: int
    size: int
    modified: int
    changed: int


def read_stamp(stamp: bytes) -> Stamp:
    return Stamp(*_STAMP.unpack(stamp))


class Index(msgspec.Struct):
    """`stamps` go with `entries`; an empty one is of a folder, or not to be trusted. `listing` is the digest of what the entries were chosen by,
    `tree` the tree's. `path`: where it is kept; None: nowhere."""

    path: Path | None
    root: bytes
    listing: bytes = b""
    tree: bytes = b""
    entries: list[Entry] = []
    stamps: list[bytes] = []


class _Header(msgspec.Struct, array_like=True):
    root: bytes
    machine: str
    listing: bytes
    tree: bytes
    count: int


class _Block(msgspec.Struct, array_like=True):
    entries: list[Entry]
    stamps: list[bytes]


def index_path(root: bytes, options: str, environ: Mapping[str, str]) -> Path | None:
    """Where the index of a folder (its real path) is kept, for one way of choosing from it."""
    cache = environ.get("XDG_CACHE_HOME") or ""
    home = environ.get("HOME") or ""
    base = Path(cache) if cache.startswith("/") else Path(home) / ".cache" if home.startswith("/") else None
    name = hashlib.sha256(b"\0".join([os.fsencode(_machine()), options.encode(), root])).hexdigest()[:32]
    return base / "penstock" / "index" / name if base else None


def read_index(path: Path | None, root: bytes) -> Index:
    """The index that is kept there; an empty one when there is none that can be used."""
    empty = Index(path, root)
    if path is None:
        return empty
    try:
        with open(path, "rb") as file:
            return _read(file.read, empty)
    except (OSError, ValueError, msgspec.MsgspecError):
        return empty


def _read(read: Callable[[int], bytes], empty: Index) -> Index:
    check = hashlib.sha256()

    def block() -> bytes:
        size = read(4)
        data = read(int.from_bytes(size, "big"))
        check.update(data)
        return data

    if read(len(_MAGIC)) != _MAGIC:
        return empty
    header = msgspec.msgpack.decode(block(), type=_Header)
    if header.root != empty.root or header.machine != _machine():
        return empty
    found = Index(empty.path, empty.root, header.listing, header.tree, [], [])
    decode = msgspec.msgpack.Decoder(_Block).decode
    while len(found.entries) < header.count:
        part = decode(block())
        found.entries += part.entries
        found.stamps += part.stamps
    whole = read(32) == check.digest() and not read(1)
    return found if whole and len(found.entries) == len(found.stamps) == header.count else empty


def write_index(index: Index) -> None:
    """Keep it, if that can be done."""
    if index.path is None:
        return
    check = hashlib.sha256()

    def framed(data: bytes) -> bytes:
        check.update(data)
        return len(data).to_bytes(4, "big") + data

    encode = msgspec.msgpack.Encoder().encode
    with contextlib.suppress(OSError):
        new = not index.path.exists()
        index.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _replaced(index.path) as file:
            file.write(_MAGIC + framed(encode(_Header(index.root, _machine(), index.listing, index.tree, len(index.entries)))))
            for start in range(0, len(index.entries), BLOCK):
                file.write(framed(encode(_Block(index.entries[start : start + BLOCK], index.stamps[start : start + BLOCK]))))
            file.write(check.digest())
        if new:
            _forget(index.path.parent)


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[IO[bytes]]:
    """The file's new contents; it is replaced by them when all are written."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".new-")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _forget(folder: Path) -> None:
    """Remove what nobody has used for long."""
    limit = time.time() - _FORGOTTEN
    with os.scandir(folder) as found:
        for item in found:
            with contextlib.suppress(OSError):
                if item.stat().st_mtime < limit:
                    os.unlink(item.path)


def _machine() -> str:
    return os.uname().nodename


# --- which trees a server is known to have had


def is_known(index: Index, server: str, tree: bytes) -> bool:
    """Whether this folder's upload as this tree to this server (and team) has succeeded before."""
    return _key(server, tree) in _sent(index)


def note_known(index: Index, server: str, tree: bytes) -> None:
    """Remember that it has."""
    key = _key(server, tree)
    sent = [key, *(other for other in _sent(index) if other != key)][:_REMEMBERED]
    if index.path is None:
        return
    with contextlib.suppress(OSError), _replaced(index.path.with_suffix(".sent")) as file:
        file.write(b"".join(sent))


def _sent(index: Index) -> list[bytes]:
    try:
        data = index.path.with_suffix(".sent").read_bytes() if index.path else b""
    except OSError:
        return []
    return [data[start : start + 32] for start in range(0, len(data) - 31, 32)]


def _key(server: str, tree: bytes) -> bytes:
    return hashlib.sha256(server.encode() + b"\0" + tree).digest()


# --- time, as the folder's file system has it


def moment(root: bytes) -> int:
    """Nanoseconds: what changed at or after it, by its inode, may change again unseen. Ask before reading. The file system is asked for its own
    time, by a file without a name: its clock may be another machine's."""
    try:
        handle = os.open(root, os.O_TMPFILE | os.O_WRONLY, 0o600)
    except (OSError, AttributeError):
        return time.time_ns() - _COARSE
    try:
        return os.fstat(handle).st_ctime_ns - _TICK
    finally:
        os.close(handle)


def settled(stamp: bytes, asked: int) -> bool:
    """Whether a file with this stamp, read after `asked`, will bear another if it changes again."""
    seen = read_stamp(stamp)
    latest = max(seen.modified, seen.changed)
    return latest < asked - (_COARSE if latest % 1_000_000_000 == 0 else 0)
