"""Attempts' folders: used again when a step left them as it found them, removed otherwise, whatever a step did to them.

Making and removing four folders costs a journalling file system more than running `true` in them.
"""

import asyncio
import contextlib
import errno
import fcntl
import itertools
import os
import secrets
import shutil
import stat
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import structlog

from libs.runtime.service import GivenUp
from services.worker.durable import write_durably
from services.worker.executors.sandboxes import Folders

logger = structlog.get_logger()

LOST = 74
"""The exit code of a worker whose folder is gone: to start it again is of use."""
_MODES = (0o700, 0o755, 0o700, 0o700)
_DEEP = 8


class Taken(Exception):
    """Another worker runs in the folder."""


@contextlib.asynccontextmanager
async def alone_in(folder: Path) -> AsyncIterator[Callable[[], bool]]:
    """A worker's folder is its own while this lasts: what begins in one takes all that runs there for left behind. Gives what tells whether it is
    there, and that very one, which raises OSError. Raises Taken, OSError."""
    file = folder / "lock"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def there() -> bool:
        return file.exists() and os.path.samestat(os.fstat(descriptor), file.stat())

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield there
    except BlockingIOError:
        raise Taken(f"another worker runs in {folder}") from None
    finally:
        os.close(descriptor)


def lost(folder: Path) -> GivenUp:
    """What a worker says whose folder was removed, or put aside, while it ran."""
    todo = "start it again; if worker.json was in there, with --register - --server URL"
    return GivenUp(f"{folder} was removed while the worker ran, and what ran is lost: {todo}", LOST)


def next_boot(folder: Path, now: float) -> int:
    """When this boot begins: `now` (unix seconds) in milliseconds, or more, so that it is more than at any boot before in the folder, whatever the
    clock said then. On a full disk it is not remembered: what waits in the spool goes before that."""
    file = folder / "boot"
    last = file.read_text() if file.exists() else ""
    since = max(int(now * 1000), int(last) + 1 if last.isdecimal() else 0)
    try:
        write_durably(file, str(since).encode())
    except OSError as error:
        logger.warning("when this boot began is not remembered", why=str(error))
    return since


class FolderPool:
    """Folders below `work`. `prefix` tells this life's from others'. `mounted` are the empty folders, below an attempt's, that its sandbox makes to
    mount on."""

    def __init__(self, work: Path, prefix: str, mounted: Sequence[Path] = ()) -> None:
        self._work = work
        self._prefix = prefix
        self._mounted = mounted
        self._numbers = itertools.count(1)
        self._clean: list[Folders] = []

    def take(self) -> Folders:
        """Empty folders, for one attempt. Raises OSError (the disk may be full)."""
        if self._clean:
            return self._clean.pop()
        folders = Folders.below(self._work / f"{self._prefix}-{next(self._numbers)}")
        try:
            for path, mode in zip(_all(folders), _MODES, strict=True):
                path.mkdir()
                path.chmod(mode)
        except OSError:
            remove_tree(folders.root)
            raise
        return folders

    async def give_back(self, folders: Folders) -> None:
        """The attempt is over, and its processes are gone."""
        for path in self._mounted:
            _remove_empty(folders.root, path)
        if _is_clean(folders):
            self._clean.append(folders)
        else:
            await asyncio.to_thread(remove_tree, folders.root)


def _all(folders: Folders) -> tuple[Path, Path, Path, Path]:
    return folders.root, folders.workspace, folders.home, folders.temp


def _remove_empty(root: Path, path: Path) -> None:
    """A folder, and those above it up to one of the attempt's own, if nothing else is in them. No link of a step's is followed."""
    made = [root.joinpath(*path.parts[:depth]) for depth in range(2, len(path.parts) + 1)]
    if not any(folder.is_symlink() for folder in made):
        with contextlib.suppress(OSError):
            for folder in reversed(made):
                folder.rmdir()


def _is_clean(folders: Folders) -> bool:
    try:
        for path, mode in zip(_all(folders), _MODES, strict=True):
            found = os.lstat(path)
            if found.st_mode != stat.S_IFDIR | mode or _is_marked(path):
                return False
            with os.scandir(path) as entries:
                if sum(1 for _ in entries) != (3 if path is folders.root else 0):
                    return False
    except OSError:
        return False
    return True


def _is_marked(folder: Path) -> bool:
    """Whether a step left attributes on it: a default ACL would reach into what the next step makes."""
    try:
        return any(not name.startswith("security.") for name in os.listxattr(folder, follow_symlinks=False))
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            return False
        raise


def remove_tree(root: Path) -> None:
    """Everything below, folders without permissions and at any depth too; what cannot be removed stays."""
    for _ in range(3):
        # A process that has just been killed may still have written.
        with contextlib.suppress(RecursionError):
            shutil.rmtree(root, onerror=_once_more)
        if not root.exists():
            return
        with contextlib.suppress(OSError):
            _flatten(root)


def _flatten(root: Path) -> None:
    """Bring what lies deep up to the top: the way to it may be longer than a path, a stack or the number of open files may be."""
    waiting = [(root, 0)]
    while waiting:
        folder, depth = waiting.pop()
        folder.chmod(0o700)
        for found in folder.iterdir():
            if stat.S_ISDIR(found.lstat().st_mode):
                if depth == _DEEP:
                    found.chmod(0o700)
                    found = found.rename(root / secrets.token_hex(8))
                waiting.append((found, depth % _DEEP + 1))


def _once_more(remove_it: Callable[..., Any], path: str, _: Any) -> None:
    try:
        for each in (Path(path).parent, Path(path)):
            if stat.S_ISDIR(each.lstat().st_mode):
                each.chmod(0o700)
        if remove_it in (os.unlink, os.rmdir):
            remove_it(path)
        else:
            shutil.rmtree(path, ignore_errors=True)
    except OSError:
        return
