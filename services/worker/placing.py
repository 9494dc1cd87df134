"""Trees into a workspace: below an overlay, or copied."""

import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from libs.archives.place import OpenFolders, place_checked
from libs.archives.tree import FILE_MODE, PROGRAM_MODE, Entry
from services.worker.copying import MTIME_NS, copy_contents, reflinks_work
from services.worker.folders import remove_tree
from services.worker.mounts import Overlays, overlays_that_work
from services.worker.stamps import STAMP, ByInode, Stamp, stamp_of
from services.worker.teamcache import TeamCache

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
TICK_NS = 20_000_000
"""More than a file's times are coarse."""


class Means(NamedTuple):
    """How this machine lets trees be placed."""

    overlays: Overlays | None
    reflinks: bool

    @property
    def name(self) -> str:
        return "overlay" if self.overlays else "reflink" if self.reflinks else "copy"


def means_here(trial: Path, private: bool) -> Means:
    """Try them in a folder that is made for it; `private` says whether mounts are this process's own."""
    try:
        trial.mkdir(parents=True)
        return Means(overlays_that_work(trial) if private else None, reflinks_work(trial))
    except OSError:
        return Means(None, False)
    finally:
        remove_tree(trial)


class Copies:
    """Files copied out of the cache into one workspace, and known by their stamps until a step changes them."""

    def __init__(self, cache: TeamCache, reflinks: bool, go_on: Callable[[], None]) -> None:
        """`go_on` is asked often, and may raise."""
        self._made: list[tuple[int, ByInode]] = []
        self._go_on = go_on
        self._cache = cache
        self._reflinks = reflinks

    def place(self, tree: Iterable[Entry], into: Path) -> None:
        """A checked tree into a folder that is absent or empty. Blocking. Raises FileExistsError when it is neither, OSError."""
        made = ByInode()

        def put(entry: Entry, parent: int, name: bytes) -> None:
            stamp = self._copy(entry, name, parent)
            made.add(stamp.inode, stamp.packed() + entry.digest)

        place_checked(tree, into, put)
        # What was made just now may yet be changed within the same tick of the file system's clock: it is not known.
        self._made.append((time.time_ns() - TICK_NS, made))

    def digest_of(self, stamp: Stamp) -> bytes | None:
        """The digest of a file that is as it was made."""
        packed = stamp.packed()
        for before, made in self._made:
            if stamp.changed < before:
                for found in made.find(stamp.inode):
                    if found.startswith(packed):
                        return found[STAMP:]
        return None

    def put_linked(self, entries: Iterable[Entry], root: Path) -> None:
        """Hard links, and what they link to, where their folders are placed already. Blocking. Raises OSError."""
        folders = OpenFolders(root)
        try:
            for entry in entries:
                folder, _, name = entry.path.rpartition(b"/")
                if not entry.target:
                    self._copy(entry, name, folders.at(folder))
                    continue
                first_folder, _, first = entry.target.rpartition(b"/")
                source = folders.at(first_folder, keep=folder)
                os.link(first, name, src_dir_fd=source, dst_dir_fd=folders.at(folder, keep=first_folder), follow_symlinks=False)
        finally:
            folders.close()

    def _copy(self, entry: Entry, name: bytes, parent: int) -> Stamp:
        self._go_on()
        source = self._cache.open_file(entry)
        try:
            target = os.open(name, _NEW_FILE, FILE_MODE, dir_fd=parent)
            try:
                os.fchmod(target, PROGRAM_MODE if entry.executable else FILE_MODE)
                copy_contents(source, target, entry.size, self._reflinks, self._go_on)
                os.utime(target, ns=(MTIME_NS, MTIME_NS))
                return stamp_of(os.fstat(target))
            finally:
                os.close(target)
        finally:
            os.close(source)
