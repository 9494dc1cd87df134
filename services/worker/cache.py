"""The files and trees that this worker has had, so that what comes again is neither fetched nor written again.

`files/` holds contents, each under its name (`name_of`), with the mode that it has in trees; `trees/<digest>/` holds a tree's manifest and, once it
was used so, its layers: folders of hard links to `files/` that lie below overlays. Nothing here is ever written to by a step: an overlay only
reads what lies below, and everywhere else contents are copied.

What is here is whole: it is made in `new/` and renamed. There is no index beside the file system: a file's number of links says whether a tree holds
it, so that only what nothing holds takes room by itself.
"""

import contextlib
import errno
import hashlib
import heapq
import itertools
import os
import shutil
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import msgspec
import structlog

from libs.archives.place import place
from libs.archives.tree import DIGEST, FILE_MODE, PROGRAM_MODE, Entry, InvalidManifest, read_manifest, root_of
from proto.messages import MAX_HINTS, TREE_HINT
from services.worker.copying import copy_contents

logger = structlog.get_logger()

_FOLDER_BYTES = 4096
_MANIFEST = "manifest"


def name_of(entry: Entry) -> str:
    """What a file is called here. Its size is part of it so that what a crash of the machine cut short is found out."""
    digest = entry.digest
    contents = digest.hex() if len(digest) == DIGEST else entry.file_id
    return f"{contents}.{entry.size}x" if entry.mode == PROGRAM_MODE else f"{contents}.{entry.size}"


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class _File(msgspec.Struct):
    name: str
    bytes: int
    links: int
    used_at: int


class Cache:
    """All methods block, and may be called in several threads at once. `limit` in bytes; 0: only what is being used is kept."""

    def __init__(self, root: Path, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._files = root / "files"
        self._trees = root / "trees"
        self._new = root / "new"
        self._lock = threading.Lock()
        self._trimming = threading.Lock()
        self._pins: Counter[str] = Counter()
        self._known: dict[str, None] = {}
        self._hints: tuple[str, ...] | None = None
        self._numbers = itertools.count(1)
        self._folder = -1

    def open(self) -> None:
        """Take up what an earlier life left, less what is damaged. Raises OSError."""
        shutil.rmtree(self._new, ignore_errors=True)
        for each in (self._files, self._trees, self._new):
            each.mkdir(parents=True, exist_ok=True)
        self._folder = os.open(self._files, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        damaged = False
        with os.scandir(self._files) as found:
            for entry in found:
                if _size_in(entry.name) != entry.stat(follow_symlinks=False).st_size:
                    damaged = True
                    Path(entry.path).unlink()
        if damaged:
            logger.warning("the cache was damaged: its trees are made anew")
            for tree in self._trees.iterdir():
                shutil.rmtree(tree, ignore_errors=True)
        self.bytes = sum(file.bytes for file in self._scan().values()) + sum(_weight(tree) for tree in self._trees.iterdir())
        self._known = dict.fromkeys(tree.name for tree in sorted(self._trees.iterdir(), key=_used_at))
        self.trim()

    def close(self) -> None:
        if self._folder >= 0:
            os.close(self._folder)
            self._folder = -1

    @contextlib.contextmanager
    def pinned(self, keys: Iterable[str]) -> Iterator[None]:
        """Keep files (by name) and trees (by digest) while they are used, if they are there."""
        kept = list(keys)
        with self._lock:
            self._pins.update(kept)
        try:
            yield
        finally:
            with self._lock:
                pins = self._pins
                for key in kept:
                    left = pins[key] - 1
                    if left:
                        pins[key] = left
                    else:
                        pins.pop(key)

    def hints(self) -> tuple[str, ...]:
        """The trees that are known, the latest first, as heartbeats name them. The same object as before when there is nothing new to say."""
        with self._lock:
            if self._hints is None:
                self._hints = tuple(digest[:TREE_HINT] for digest in islice(reversed(self._known), MAX_HINTS))
            return self._hints

    def _note(self, digest: str, known: bool) -> None:
        """The tree was used, or is gone."""
        with self._lock:
            self._known.pop(digest, None)
            if known:
                self._known[digest] = None
            # Their order is news to nobody unless it decides which are named.
            if self._hints is not None and known != (digest[:TREE_HINT] in self._hints):
                self._hints = None

    def tree(self, digest: str) -> Sequence[Entry] | None:
        """The entries of a tree that is known."""
        folder = self._trees / digest
        try:
            manifest = (folder / _MANIFEST).read_bytes()
            if root_of(manifest).digest.hex() == digest:
                entries = read_manifest(manifest)
                os.utime(folder)
                self._note(digest, known=True)
                return entries
        except FileNotFoundError:
            return None
        except InvalidManifest:
            pass
        self._note(digest, known=False)
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def add_tree(self, digest: str, manifest: Iterable[bytes]) -> None:
        """Remember a tree's manifest, which is whole and right. Raises OSError."""
        made = self.new_path()
        made.mkdir()
        with (made / _MANIFEST).open("xb") as file:
            file.writelines(manifest)
        self._publish(made, self._trees / digest)
        self._note(digest, known=True)

    def has(self, entry: Entry) -> bool:
        """Whether the file's contents are here, and as many as there should be."""
        return not self.missing({name_of(entry): entry})

    def missing(self, files: Mapping[str, Entry]) -> list[Entry]:
        """Those of the files, given by name, whose contents are not here, or not as many as there should be."""
        missing, stat, folder = [], os.stat, self._folder
        for name, entry in files.items():
            try:
                if stat(name, dir_fd=folder, follow_symlinks=False).st_size == entry.size:
                    continue
                os.unlink(name, dir_fd=folder)
            except FileNotFoundError:
                pass
            missing.append(entry)
        return missing

    def new_path(self) -> Path:
        """Where something may be made that is then added."""
        return self._new / str(next(self._numbers))

    def add(self, name: str, made: Path) -> None:
        """Take over a file, on this file system, with its mode; it is known to be what its name says. Raises OSError."""
        found = made.lstat()
        made.rename(self._files / name)
        with self._lock:
            self.bytes += found.st_blocks * 512

    def open_file(self, entry: Entry) -> int:
        """A descriptor to read a file's contents from. Raises FileNotFoundError."""
        opened = os.open(name_of(entry), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._folder)
        # The change time says when it was used last, as it does when a layer links it.
        modified = os.fstat(opened).st_mtime_ns
        os.utime(opened, ns=(modified, modified))
        return opened

    def layer(self, digest: str, entries: Sequence[Entry], path: bytes, used: Counter[str]) -> Path:
        """A folder that holds the tree at `path` (b"": it is the tree), as hard links. The tree and its files are here and pinned.

        No two files in it share an inode, nor do they with the other layers, whose files `used` (updated) counts: a step's tools would take the two
        for one file under two names. So a second file with equal contents gets an inode of its own. Raises OSError."""
        names = [name_of(entry) for entry in entries if entry.kind == "file" and not entry.target]
        shared = sorted((name, used[name]) for name in used.keys() & set(names))
        folders = sum(entry.kind == "folder" for entry in entries) + path.count(b"/") + 2
        tag = hashlib.sha256(msgspec.msgpack.encode((path, shared))).hexdigest()[:16]
        layer = self._trees / digest / f"{tag}-{folders}"
        if not layer.is_dir():
            try:
                self._link(entries, names, layer, path, used)
            except OSError as error:
                if not is_full(error):
                    raise
                self.trim(0)
                self._link(entries, names, layer, path, used)
        used.update(names)
        return layer

    def _link(self, entries: Sequence[Entry], names: Sequence[str], layer: Path, path: bytes, used: Mapping[str, int]) -> None:
        """`names` are those of the plain files, in the order in which they are put."""
        numbers, left, link, folder = dict(used), iter(names), os.link, self._folder

        def put(entry: Entry, parent: int, name: bytes) -> None:
            of = next(left)
            number = numbers.get(of, 0)
            numbers[of] = number + 1
            source = f"{of}~{number}" if number else of
            for _ in range(2):
                try:
                    link(source, name, src_dir_fd=folder, dst_dir_fd=parent, follow_symlinks=False)
                    return
                except OSError as error:
                    # As many links as the file system allows (ext4: 65,000), or contents of its own that are not there yet.
                    if error.errno != errno.EMLINK and not (number and error.errno == errno.ENOENT):
                        raise
                self._copy(entry, source)
            raise OSError(errno.EMLINK, "a file that has just been made has too many links")

        made = self.new_path()
        root = made / os.fsdecode(path)
        try:
            root.parent.mkdir(parents=True, exist_ok=True)
            place(entries, root, put)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        for each in (root, *(made / parent for parent in Path(os.fsdecode(path)).parents)):
            each.chmod(0o755)
        self._publish(made, layer)

    def _copy(self, entry: Entry, name: str) -> None:
        made = self.new_path()
        source = self.open_file(entry)
        try:
            with made.open("xb") as file:
                os.fchmod(file.fileno(), PROGRAM_MODE if entry.executable else FILE_MODE)
                copy_contents(source, file.fileno(), entry.size)
        finally:
            os.close(source)
        self.add(name, made)

    def _publish(self, made: Path, target: Path) -> None:
        try:
            made.rename(target)
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            return  # another attempt was first
        with self._lock:
            self.bytes += _weight(target) if target.parent == self._trees else _weight_of(target)

    def trim(self, to: int | None = None) -> None:
        """When there is more than the limit allows (or than `to` bytes): remove what was used longest ago, and a tenth more so that this is seldom
        done. What a running attempt uses stays."""
        room = self._room() if to is None else to
        if self.bytes <= room:
            return
        goal = room * 9 // 10 if to is None else to
        with self._trimming:
            files = self._scan()
            trees = {tree.name: _weight(tree) for tree in self._trees.iterdir()}
            total = sum(file.bytes for file in files.values()) + sum(trees.values())
            oldest = [(file.used_at, "", inode) for inode, file in files.items() if file.links == 1]
            oldest += [(_used_at(self._trees / name), name, 0) for name in trees]
            heapq.heapify(oldest)
            while total > goal and oldest:
                used_at, tree, inode = heapq.heappop(oldest)
                if not tree:
                    total -= files[inode].bytes if self._take(files[inode].name, self._files) else 0
                elif (taken := self._take(tree, self._trees)) is not None:
                    total -= trees[tree]
                    self._note(tree, known=False)
                    for inode in _inodes(taken):
                        if (file := files.get(inode)) is not None:
                            file.links -= 1
                            if file.links == 1:
                                heapq.heappush(oldest, (used_at, "", inode))
                    shutil.rmtree(taken, ignore_errors=True)
            with self._lock:
                self.bytes = total

    def _room(self) -> int:
        """The limit, but never more than stays free on the disk: steps need it too."""
        disk = os.statvfs(self._files)
        return min(self.limit, (self.bytes + disk.f_bavail * disk.f_frsize) // 2)

    def _take(self, key: str, folder: Path) -> Path | None:
        """Out of the cache with it, unless it is pinned; where it is now."""
        taken = self.new_path()
        with self._lock:
            if key.partition("~")[0] in self._pins:
                return None
            try:
                (folder / key).rename(taken)
            except FileNotFoundError:
                return None
        if folder == self._files:
            taken.unlink()
        return taken

    def _scan(self) -> dict[int, _File]:
        """The files, by inode."""
        files: dict[int, _File] = {}
        with os.scandir(self._files) as found:
            for entry in found:
                with contextlib.suppress(FileNotFoundError):
                    seen = entry.stat(follow_symlinks=False)
                    files[seen.st_ino] = _File(entry.name, seen.st_blocks * 512, seen.st_nlink, seen.st_ctime_ns)
        return files


def _used_at(tree: Path) -> int:
    return tree.stat().st_mtime_ns


def _weight(tree: Path) -> int:
    """Bytes that a tree takes beside its files."""
    return sum(_weight_of(each) for each in tree.iterdir())


def _weight_of(part: Path) -> int:
    """A layer's name ends in its number of folders."""
    return part.stat().st_blocks * 512 if part.name == _MANIFEST else int(part.name.rpartition("-")[2]) * _FOLDER_BYTES


def _size_in(name: str) -> int:
    try:
        return int(name.partition(".")[2].partition("~")[0].rstrip("x"))
    except ValueError:
        return -1


def _inodes(folder: Path) -> Iterator[int]:
    waiting = [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as found:
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    yield entry.inode()
