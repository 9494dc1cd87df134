"""The files and trees that this worker has had, so that what comes again is neither fetched nor written again.

All is kept by team, under one limit: what lies below an overlay shows its number of links and its times, which would tell one team what another has.
`files/<team>/` holds contents, each under its name (`name_of`), with the mode that it has in trees; `trees/<team>/<digest>/` holds a tree's manifest
and, once it was used so, its layers: folders of hard links to the files that lie below overlays. Nothing here is ever written to by a step: an
overlay only reads what lies below, and everywhere else contents are copied. Nor was any of it ever open to one: its inodes are the worker's own.

What is here is whole: it is made in `new/` and renamed; a tree's manifest is checked before. There is no index beside the file system: a file's
number of links says whether a tree holds it, so that only what nothing holds takes room by itself.

Nothing is synced. So what an earlier run of the machine left may be damaged: it waits in `doubtful/<team>/` until it is wanted, and is read first.
"""

import contextlib
import errno
import hashlib
import heapq
import itertools
import os
import shutil
import stat
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import msgspec
import structlog

from libs.archives.place import place
from libs.archives.rules import Limits
from libs.archives.tree import DIGEST, FILE_MODE, PROGRAM_MODE, Entry, InvalidManifest, TreeCheck, read_manifest, root_of
from proto.messages import MAX_HINTS, TREE_HINT
from services.worker.copying import MTIME_NS, copy_contents, has_contents

logger = structlog.get_logger()

SANE = Limits(max_members=2_000_000, max_bytes=4 << 40, max_names=512 << 20)
"""What a tree takes of the worker's memory is bounded, in or out. What it may hold is for the service to say."""

_FOLDER_BYTES = 4096
_MANIFEST = "manifest"
_MACHINE = Path("/proc/sys/kernel/random/boot_id")


def name_of(entry: Entry) -> str:
    """What a file is called here. Its size is part of it so that what a crash of the machine cut short is found out."""
    digest = entry.digest
    contents = digest.hex() if len(digest) == DIGEST else entry.file_id
    return f"{contents}.{entry.size}x" if entry.mode == PROGRAM_MODE else f"{contents}.{entry.size}"


def is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class _File(msgspec.Struct):
    path: Path
    bytes: int
    links: int
    used_at: int


class Cache:
    """Of all teams. All methods block, and may be called in several threads at once. `limit` in bytes; 0: only what is being used is kept."""

    def __init__(self, root: Path, limit: int) -> None:
        self.limit = limit
        self.bytes = 0
        self._root = root
        self._new = root / "new"
        self._lock = threading.Lock()
        self._trimming = threading.Lock()
        self._teams: dict[str, TeamCache] = {}
        self._known: dict[tuple[str, str], None] = {}
        self._hints: tuple[str, ...] | None = None
        self._numbers = itertools.count(1)

    def open(self) -> None:
        """Take up what an earlier life left, less what is damaged. Raises OSError."""
        shutil.rmtree(self._new, ignore_errors=True)
        folders = [self._root / each for each in ("files", "trees", "doubtful")]
        for each in (*folders, self._new):
            each.mkdir(parents=True, exist_ok=True)
        machine, seen = _machine(), self._root / "machine"
        restarted = not machine or not seen.exists() or seen.read_text() != machine
        for folder in folders:
            for left in folder.iterdir():
                # `files` has each team; what else is here is another version's
                if not left.is_dir() or not (folders[0] / left.name).is_dir():
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
        for left in folders[0].iterdir():
            self.of(left.name).take_up(restarted)
        seen.write_text(machine)
        self.bytes = sum(file.bytes for file in self._scan().values())
        trees = [tree for team in self._teams.values() for tree in team.trees()]
        self.bytes += sum(map(_weight, trees))
        self._known = dict.fromkeys((tree.parent.name, tree.name) for tree in sorted(trees, key=_used_at))
        self.trim()

    def close(self) -> None:
        for team in self._teams.values():
            team.close()
        self._teams.clear()

    def of(self, team: str) -> "TeamCache":
        """What is kept for a team. Raises OSError."""
        if (found := self._teams.get(team)) is None:
            if not team or "/" in team or team in (".", ".."):
                raise ValueError(f"no name of a team: {team}")
            found = self._teams.setdefault(team, TeamCache(self, self._root, team))
        return found

    def hints(self) -> tuple[str, ...]:
        """The trees that are known, the latest first, as heartbeats name them. The same object as before when there is nothing new to say."""
        with self._lock:
            if self._hints is None:
                trees = dict.fromkeys(digest[:TREE_HINT] for _, digest in reversed(self._known))
                self._hints = tuple(islice(trees, MAX_HINTS))
            return self._hints

    def note(self, team: str, digest: str, known: bool) -> None:
        """The tree was used, or is gone."""
        with self._lock:
            self._known.pop((team, digest), None)
            if known:
                self._known[team, digest] = None
            # Their order is news to nobody unless it decides which are named.
            if self._hints is not None and known != (digest[:TREE_HINT] in self._hints):
                self._hints = None

    def count(self, more: int) -> None:
        """So many bytes have come."""
        with self._lock:
            self.bytes += more

    def new_path(self) -> Path:
        """Where something may be made that is then added."""
        return self._new / str(next(self._numbers))

    def trim(self, to: int | None = None) -> None:
        """When there is more than the limit allows (or than `to` bytes): remove what was used longest ago, and a tenth more so that this is seldom
        done. What a running attempt uses stays."""
        room = self.room() if to is None else to
        if self.bytes <= room:
            return
        goal = room * 9 // 10 if to is None else to
        with self._trimming:
            files = self._scan()
            trees = {tree: _weight(tree) for team in list(self._teams.values()) for tree in team.trees()}
            total = sum(file.bytes for file in files.values()) + sum(trees.values())
            oldest = [(file.used_at, "", inode) for inode, file in files.items() if file.links == 1]
            oldest += [(_used_at(tree), str(tree), 0) for tree in trees]
            heapq.heapify(oldest)
            while total > goal and oldest:
                used_at, tree, inode = heapq.heappop(oldest)
                path = Path(tree) if tree else files[inode].path
                if (taken := self._teams[path.parent.name].take(path)) is None:
                    continue
                if not tree:
                    total -= files[inode].bytes
                    taken.unlink()
                    continue
                total -= trees[path]
                self.note(path.parent.name, path.name, known=False)
                for inode in _inodes(taken):
                    if (file := files.get(inode)) is not None:
                        file.links -= 1
                        if file.links == 1:
                            heapq.heappush(oldest, (used_at, "", inode))
                shutil.rmtree(taken, ignore_errors=True)
            with self._lock:
                self.bytes = total

    def room(self) -> int:
        """The limit, but never more than stays free on the disk: steps need it too."""
        disk = os.statvfs(self._root)
        return min(self.limit, (self.bytes + disk.f_bavail * disk.f_frsize) // 2)

    def _scan(self) -> dict[int, _File]:
        """The files, by inode."""
        return {inode: file for team in list(self._teams.values()) for inode, file in team.files()}


class TeamCache:
    """A part of a Cache."""

    def __init__(self, cache: Cache, root: Path, team: str) -> None:
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
        self._pins: Counter[str] = Counter()
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
            if damaged or not (tree / _MANIFEST).is_file():
                shutil.rmtree(tree)
            elif restarted:
                used_at = _used_at(tree)
                for layer in tree.iterdir():
                    if layer.name != _MANIFEST:
                        shutil.rmtree(layer)
                os.utime(tree, ns=(used_at, used_at))

    def close(self) -> None:
        os.close(self._folder)

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

    def tree(self, digest: str) -> Sequence[Entry] | None:
        """The entries of a tree that is known; they were checked."""
        folder = self._trees / digest
        try:
            manifest = (folder / _MANIFEST).read_bytes()
            if root_of(manifest).digest.hex() == digest:
                entries = read_manifest(manifest)
                os.utime(folder)
                self.all.note(self.name, digest, known=True)
                return entries
        except FileNotFoundError:
            return None
        except InvalidManifest:
            pass
        self.all.note(self.name, digest, known=False)
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def add_tree(self, digest: str, manifest: Iterable[bytes]) -> Sequence[Entry]:
        """Remember a tree, whose manifest has this digest; its entries. Raises InvalidManifest, ArchiveRefused for what is none, OSError."""
        whole = b"".join(manifest)
        entries = read_manifest(whole)
        check = TreeCheck(SANE)
        for entry in entries:
            check.add(entry)
        check.finish(b"")
        made = self.new_path()
        made.mkdir()
        (made / _MANIFEST).write_bytes(whole)
        self._publish(made, self._trees / digest)
        self.all.note(self.name, digest, known=True)
        return entries

    def has(self, entry: Entry) -> bool:
        """Whether the file's contents are here, and as many as there should be."""
        return not self.missing({name_of(entry): entry})

    def missing(self, files: Mapping[str, Entry], go_on: Callable[[], None] = lambda: None) -> list[Entry]:
        """Those of the files, given by name, whose contents are not here, or not as many as there should be. `go_on` is asked while they are read,
        and may raise."""
        missing, look, folder = [], os.stat, self._folder
        for name, entry in files.items():
            try:
                if look(name, dir_fd=folder, follow_symlinks=False).st_size == entry.size:
                    continue
                os.unlink(name, dir_fd=folder)
            except FileNotFoundError:
                pass
            if not self._doubts or not self._proven(name, entry, go_on):
                missing.append(entry)
        return missing

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
                self.all.trim(0)
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
            place(entries, root, put, SANE)
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
        self.all.count(_weight(target) if target.parent == self._trees else _weight_of(target))

    def take(self, path: Path) -> Path | None:
        """Out of the cache with a file or a tree, unless it is pinned; where it is now."""
        taken = self.new_path()
        with self._lock:
            if path.name.partition("~")[0] in self._pins:
                return None
            try:
                path.rename(taken)
            except FileNotFoundError:
                return None
        return taken

    def files(self) -> Iterator[tuple[int, _File]]:
        """All files, in doubt or not, with their inodes."""
        for folder in (self._files, self._doubtful) if self._doubts else (self._files,):
            with os.scandir(folder) as found:
                for entry in found:
                    with contextlib.suppress(FileNotFoundError):
                        seen = entry.stat(follow_symlinks=False)
                        yield seen.st_ino, _File(Path(entry.path), seen.st_blocks * 512, seen.st_nlink, seen.st_ctime_ns)

    def trees(self) -> list[Path]:
        return list(self._trees.iterdir())


def _used_at(tree: Path) -> int:
    return tree.stat().st_mtime_ns


def _weight(tree: Path) -> int:
    """Bytes that a tree takes beside its files."""
    return sum(_weight_of(each) for each in tree.iterdir())


def _weight_of(part: Path) -> int:
    """A layer's name ends in its number of folders."""
    return part.stat().st_blocks * 512 if part.name == _MANIFEST else int(part.name.rpartition("-")[2]) * _FOLDER_BYTES


def _machine() -> str:
    """Which run of the machine this is; "" when it does not say."""
    try:
        return _MACHINE.read_text().strip()
    except OSError:
        return ""


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
