"""What the worker keeps for one team.

`files/<team>/` holds contents, each under its name (`name_of`), with the mode that it has in trees; `trees/<team>/<digest>/` holds a tree's manifest
and, once it was used so, its layers: folders of hard links to the files that lie below overlays. Nothing here is ever written to by a step: an
overlay only reads what lies below, and everywhere else contents are copied. Nor was any of it ever open to one: its inodes are the worker's own.

What is here is whole: it is made in `new/` and renamed; a tree's manifest is checked before. There is no index beside the file system: a file's
number of links says whether a tree holds it, so that only what nothing holds takes room by itself. What another run of the machine left waits in
`doubtful/<team>/`.
"""

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from libs.archives.place import place_checked
from libs.archives.tree import FILE_MODE, PROGRAM_MODE, Entry, InvalidManifest
from services.worker.copying import MTIME_NS, copy_contents, has_contents
from services.worker.trees import MANIFEST, KnownTree, Names, Survey, name_of, pieces_in

logger = structlog.get_logger()

_FOLDER_BYTES = 4096


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class CachedFile(msgspec.Struct, gc=False):
    """`used_at` in ns."""

    folder: Path
    name: str
    bytes: int
    links: int
    used_at: int

    @property
    def path(self) -> Path:
        return self.folder / self.name


class Whole(Protocol):
    """The cache of all teams."""

    limit: int

    def room(self) -> int: ...
    def trim(self, to: int | None = None) -> None: ...
    def count(self, more: int) -> None: ...
    def note(self, team: str, digest: str, known: bool) -> None: ...
    def new_path(self) -> Path: ...


class TeamCache:
    """A part of the cache."""

    def __init__(self, cache: Whole, root: Path, team: str) -> None:
        """Raises OSError."""
        self.all = cache
        self.name = team
        self._files = root / "files" / team
        self._trees = root / "trees" / team
        self._doubtful = root / "doubtful" / team
        for each in (self._files, self._trees):
            each.mkdir(parents=True, exist_ok=True)
        self._doubts = self._doubtful.exists()
        self._lock = threading.Lock()
        self._pins: list[Names] = []
        self._folder = os.open(self._files, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def take_up(self, restarted: bool) -> None:
        """What an earlier life left; `restarted`: in an earlier run of the machine. Raises OSError."""
        damaged = False
        with os.scandir(self._files) as listing:
            found = [(entry.stat(follow_symlinks=False), entry.name) for entry in listing]
        for seen, name in sorted(found, key=lambda each: each[0].st_ctime_ns):
            if _size_in(name) != seen.st_size:
                damaged = True
                (self._files / name).unlink()
            elif restarted and "~" in name:
                (self._files / name).unlink()
            elif restarted:
                self._doubtful.mkdir(exist_ok=True)
                self._doubts = True
                (self._files / name).rename(self._doubtful / name)
        if damaged:
            logger.warning("the cache was damaged: its trees are made anew", team=self.name)
        for tree in self._trees.iterdir():
            if damaged or not (tree / MANIFEST).is_file():
                shutil.rmtree(tree)
            elif restarted:
                last = used_at(tree)
                for layer in tree.iterdir():
                    if layer.name != MANIFEST:
                        shutil.rmtree(layer)
                os.utime(tree, ns=(last, last))

    def close(self) -> None:
        os.close(self._folder)

    @contextlib.contextmanager
    def pinned(self, names: Names) -> Iterator[None]:
        """Keep files (by name) and trees (by digest) while they are used, if they are there."""
        with self._lock:
            self._pins.append(names)
        try:
            yield
        finally:
            with self._lock:
                self._pins.remove(names)

    def tree(self, digest: str) -> KnownTree | None:
        """A tree that is known."""
        folder = self._trees / digest
        manifest = folder / MANIFEST
        survey = Survey()
        try:
            with manifest.open("rb") as file:
                for piece in pieces_in(file):
                    survey.feed(piece)
            tree = survey.finish(digest, manifest)
            os.utime(folder)
            self.all.note(self.name, digest, known=True)
            return tree
        except FileNotFoundError:
            return None
        except InvalidManifest:
            pass
        self.all.note(self.name, digest, known=False)
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def has(self, entry: Entry) -> bool:
        """Whether the file's contents are here, and as many as there should be."""
        return next(self.missing([entry]), None) is None

    def missing(self, entries: Iterable[Entry], go_on: Callable[[], None] = lambda: None) -> Iterator[tuple[str, Entry]]:
        """Those files of a tree, with their names, whose contents are not here, or not as many as there should be, at the time when each is drawn.
        `go_on` is asked while files are read, and may raise."""
        look, folder = os.stat, self._folder
        for entry in entries:
            if entry.kind != "file":
                continue
            name = name_of(entry)
            try:
                if look(name, dir_fd=folder, follow_symlinks=False).st_size == entry.size:
                    continue
                os.unlink(name, dir_fd=folder)
            except FileNotFoundError:
                pass
            if not self._doubts or not self._proven(name, entry, go_on):
                yield name, entry

    def _proven(self, name: str, entry: Entry, go_on: Callable[[], None]) -> bool:
        """Take a file out of doubt."""
        doubtful = self._doubtful / name
        try:
            opened = os.open(doubtful, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                right = stat.S_IMODE(os.fstat(opened).st_mode) == entry.mode and has_contents(opened, entry, go_on)
            finally:
                os.close(opened)
            if right:
                os.utime(doubtful, ns=(MTIME_NS, MTIME_NS))
                doubtful.rename(self._files / name)
            else:
                logger.warning("a file in the cache was damaged", team=self.name, file=name)
                doubtful.unlink()
        except FileNotFoundError:
            return False
        return right

    def new_path(self) -> Path:
        """Where something may be made that is then added."""
        return self.all.new_path()

    def add(self, name: str, made: Path) -> None:
        """Take over a file of the worker's own making, on this file system, with its mode; it is known to be what its name says. All have one time,
        so that it tells nothing. Raises OSError."""
        os.utime(made, ns=(MTIME_NS, MTIME_NS))
        found = made.lstat()
        made.rename(self._files / name)
        self.all.count(found.st_blocks * 512)

    def open_file(self, entry: Entry) -> int:
        """A descriptor to read a file's contents from. Raises FileNotFoundError."""
        opened = os.open(name_of(entry), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._folder)
        # The change time says when it was used last, as it does when a layer links it.
        os.utime(opened, ns=(MTIME_NS, MTIME_NS))
        return opened

    def layer(self, tree: KnownTree, path: bytes, others: Sequence[Names]) -> Path:
        """A folder that holds the tree, but for its hard links, at `path` (b"": it is the tree), as links to its files, which are here, as it is,
        and pinned.

        No two files in it share an inode, nor do they with the other layers, whose files are `others`: a step's tools would take the two for one file
        under two names. So a second file with equal contents gets an inode of its own. Raises OSError."""
        elsewhere = tree.names.counted(others)
        plain = (name_of(entry) for entry in tree if entry.kind == "file") if elsewhere else ()
        shared = {name: elsewhere[hash(name)] for name in plain if hash(name) in elsewhere}
        folders = tree.folders + path.count(b"/") + 2
        tag = hashlib.sha256(msgspec.msgpack.encode((path, sorted(shared.items())))).hexdigest()[:16]
        layer = self._trees / tree.digest / f"{tag}-{folders}"
        if not layer.is_dir():
            try:
                self._link(tree, layer, path, shared)
            except OSError as error:
                if not is_full(error):
                    raise
                self.all.trim(0)
                self._link(tree, layer, path, shared)
        return layer

    def _link(self, tree: KnownTree, layer: Path, path: bytes, shared: Mapping[str, int]) -> None:
        """`shared` is how many files in other layers have the same contents, by name."""
        numbers, again, link, folder = dict(shared), tree.names.repeated() | set(map(hash, shared)), os.link, self._folder

        def put(entry: Entry, parent: int, name: bytes) -> None:
            of, number = name_of(entry), 0
            if again and hash(of) in again:
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
            place_checked(tree.unlinked(), root, put)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise
        for each in (root, *(made / parent for parent in Path(os.fsdecode(path)).parents)):
            each.chmod(0o755)
        self.publish(made, layer)

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

    def publish(self, made: Path, target: Path) -> None:
        try:
            made.rename(target)
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            return  # another attempt was first
        self.all.count(weight_of(target) if target.parent == self._trees else _part_weight(target))

    def take(self, path: Path) -> Path | None:
        """Out of the cache with a file or a tree, unless it is pinned; where it is now."""
        taken = self.new_path()
        with self._lock:
            name = path.name.partition("~")[0]
            if any(name in pinned for pinned in self._pins):
                return None
            try:
                path.rename(taken)
            except FileNotFoundError:
                return None
        return taken

    def folder_of(self, digest: str) -> Path:
        return self._trees / digest

    def files(self) -> Iterator[tuple[int, CachedFile]]:
        """All files, in doubt or not, with their inodes."""
        for folder in (self._files, self._doubtful) if self._doubts else (self._files,):
            with os.scandir(folder) as found:
                for entry in found:
                    with contextlib.suppress(FileNotFoundError):
                        seen = entry.stat(follow_symlinks=False)
                        yield seen.st_ino, CachedFile(folder, entry.name, seen.st_blocks * 512, seen.st_nlink, seen.st_ctime_ns)

    def trees(self) -> list[Path]:
        return list(self._trees.iterdir())


def used_at(tree: Path) -> int:
    return tree.stat().st_mtime_ns


def weight_of(tree: Path) -> int:
    """Bytes that a tree takes beside its files."""
    return sum(_part_weight(each) for each in tree.iterdir())


def _part_weight(part: Path) -> int:
    """A layer's name ends in its number of folders."""
    return part.stat().st_blocks * 512 if part.name == MANIFEST else int(part.name.rpartition("-")[2]) * _FOLDER_BYTES


def _size_in(name: str) -> int:
    try:
        return int(name.partition(".")[2].partition("~")[0].rstrip("x"))
    except ValueError:
        return -1


def inodes_in(folder: Path) -> Iterator[int]:
    waiting = [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as found:
            for entry in found:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                else:
                    yield entry.inode()
