"""One attempt's workspace: inputs come into it, outputs are taken from it, and at the end nothing of it is left.

The inputs of the first step lie below one overlay, which is the whole workspace, so that to a step they are folders like any others: it may rename
them, remove them, link from one into the other. What comes later, and everything where overlays do not work, is copied from the cache.
"""

import asyncio
import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import structlog

from libs.archives.place import OpenFolders
from libs.archives.pump import in_thread
from libs.archives.rules import ArchiveRefused, shown
from libs.archives.tree import CHUNK, FOLDER_MODE, ZERO_CHUNK, Entry
from proto.events.base import ArtifactRef
from proto.messages import Package
from proto.plan import TaskConfig, TaskInput
from services.worker.artifacts import Artifacts, Unobtainable
from services.worker.cache import Cache
from services.worker.capture import Captured, FileChanged, capture
from services.worker.copying import copy_checked, copy_tree
from services.worker.executors.sandboxes import Folders
from services.worker.folders import remove_tree
from services.worker.mounts import unmount
from services.worker.newtree import add_tree
from services.worker.placing import Copies, Means
from services.worker.stamps import ByInode, Stamp
from services.worker.teamcache import is_full
from services.worker.trees import KnownTree, Names, name_of

logger = structlog.get_logger()

T = TypeVar("T")

_KEEPING_SECONDS = 5.0
"""What an attempt's slot may wait for its outputs to be cached."""
_SIZES = (0, 64 << 10, CHUNK, 1 << 63)
"""Small, larger, largest."""
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


class Unplaceable(Exception):
    """An input cannot be where it is wanted; the text names it."""


class _GivenUp(Exception):
    """Nobody waits for it any more."""


class Workspace:
    """`close` it when its processes are gone."""

    def __init__(self, folders: Folders, package: Package, artifacts: Artifacts, cache: Cache, means: Means) -> None:
        self.folder = folders.workspace
        self._overlay = folders.root / "overlay"
        self._package = package
        self._artifacts = artifacts
        self._cache = cache.of(package.team)
        self._overlays = means.overlays
        self._reflinks = means.reflinks
        self._given_up = threading.Event()
        self._go_on = partial(_go_on, self._given_up)
        self._copies = Copies(self._cache, means.reflinks, self._go_on)
        self._pins = ExitStack()
        self._placed: dict[str, Path] = {}
        self._upper = self.folder
        self._layers: list[tuple[Path, KnownTree]] = []
        self._lower: ByInode | None = None
        self._fresh = True
        self._stored: list[tuple[bytes, Captured]] = []
        self._used = False

    async def place_inputs(self, inputs: Sequence[TaskInput]) -> None:
        """What a step wants, from the package or from an earlier step's folders, shallow paths first. Raises Unplaceable, OSError."""
        wanted = sorted(inputs, key=lambda each: _path(each).count("/") + (_path(each) != "."))
        new = [each for each in wanted if each.name not in self._placed and each.name in self._package.inputs]
        with ExitStack() as pins:
            trees = await self._fetched(new, pins)
            if new and self._fresh and self._overlays is not None:
                await in_thread(lambda: self._mount(new, trees))
            for each in wanted:
                await self._place(each, trees.get(each.name))

    def begin_step(self, config: TaskConfig) -> None:
        """Its inputs are placed: make the folders that it expects. Raises Unplaceable, OSError."""
        self._fresh = False
        for output in config.outputs:
            self._placed[output.name] = self.folder / (output.path or output.name)
        for path in [*(output.path or output.name for output in config.outputs), *(cache.path for cache in config.caches)]:
            if link := self.link_in(path):
                raise Unplaceable(f"the folder `{path}` leads through a link, `{link}`")
            (self.folder / path).mkdir(parents=True, exist_ok=True)

    async def store(self, step: str, output: str, path: str) -> ArtifactRef:
        """Keep a folder as an output. Raises Unobtainable, OSError."""
        folder, upper = self.folder / path, self._upper / path
        self._used = True
        try:
            captured = await self._in_thread(lambda: capture(os.fsencode(folder), os.fsencode(upper), self._known, self._go_on))
        except (ArchiveRefused, FileChanged) as error:
            raise Unobtainable(str(error)) from error
        ref = await self._artifacts.store(self._package, step, output, captured)
        if self._cache.all.limit:
            await in_thread(lambda: self._note(captured, ref, upper))
        return ref

    def link_in(self, path: str | Path) -> Path | None:
        """The first link on the way to a folder of the workspace. A step makes it for its own side of the sandbox; followed by the worker, it would
        lead to what the step may not see. Nothing of a step runs any more when the worker looks."""
        here = self.folder
        for part in (self.folder / path).relative_to(self.folder).parts:
            here /= part
            if here.is_symlink():
                return here.relative_to(self.folder)
        return None

    async def keep(self) -> None:
        """Nothing of a step runs any more: copy to the cache, in a few seconds, what was stored of this workspace. Never the files themselves: a
        process may have sent another build's, through a socket, what it takes to write to them."""
        if self._stored and not self._given_up.is_set():
            try:
                await self._in_thread(self._keep)
            except OSError as error:
                logger.warning("what an attempt made was not cached", error=str(error))

    async def close(self) -> None:
        """Whatever happened: take the mount away."""
        if self._used:
            await in_thread(self._close)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        """As `in_thread`; when it is cancelled, the work is told to end."""
        working = asyncio.ensure_future(in_thread(work))
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            self._given_up.set()
            await asyncio.wait([working])
            working.exception()
            raise

    async def _fetched(self, inputs: Sequence[TaskInput], pins: ExitStack) -> dict[str, KnownTree]:
        """The trees by their inputs' names, several at once."""

        async def one(name: str) -> KnownTree:
            self._pins.enter_context(self._cache.pinned(Names.of(self._package.inputs[name].digest)))
            try:
                return await self._artifacts.fetch(self._package, name, pins, self._go_on)
            except Unobtainable as error:
                raise Unplaceable(f"input `{name}`: {error}") from error

        if not inputs:
            return {}
        self._used = True
        tasks = {each.name: asyncio.ensure_future(one(each.name)) for each in inputs}
        try:
            await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_EXCEPTION)
            # When one has failed the rest need not be waited for.
            return {name: task.result() for name, task in sorted(tasks.items(), key=lambda each: not each[1].done())}
        except asyncio.CancelledError:
            self._given_up.set()
            raise
        finally:
            for task in tasks.values():
                task.cancel()
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    def _mount(self, inputs: Sequence[TaskInput], trees: dict[str, KnownTree]) -> None:
        """All of them below one overlay. Where it cannot be mounted, nothing is done. Raises Unplaceable, OSError."""
        assert self._overlays is not None
        layers: list[Path] = []
        for number, each in enumerate(inputs):
            path, tree = _path(each), trees[each.name]
            for other in inputs[:number]:
                _refuse_what_is_there(each, _inside(path, _path(other)), trees[other.name])
            inside = b"" if path == "." else os.fsencode(path)
            with _naming(each):
                layers.append(self._cache.layer(tree, inside, [trees[other.name].names for other in inputs[:number]]))
        upper, work = self._overlay / "upper", self._overlay / "work"
        for folder in (self._overlay, upper, work):
            folder.mkdir()
        upper.chmod(FOLDER_MODE)
        try:
            self._overlays.mount(self.folder, layers, upper, work)
        except OSError as error:
            logger.warning("no overlay: the inputs are copied", error=str(error))
            return
        self._upper = upper
        for each, layer in zip(inputs, layers, strict=True):
            self._layers.append((layer / _path(each), trees[each.name]))
            self._copies.put_linked(trees[each.name].linked_files(), self.folder / _path(each))
            self._placed[each.name] = self.folder / _path(each)

    async def _place(self, each: TaskInput, tree: KnownTree | None) -> None:
        into = self.folder / _path(each)
        held = self._placed.get(each.name)
        if held == into:
            return
        for path in (into, held or into):
            if link := self.link_in(path):
                raise Unplaceable(f"input `{each.name}`: its folder `{path.relative_to(self.folder)}` leads through a link, `{link}`")
        if held is None and tree is None:
            if each.optional:
                return
            raise Unplaceable(f"input `{each.name}` is missing")
        into.parent.mkdir(parents=True, exist_ok=True)
        try:
            if held is not None:
                source = held
                with _naming(each):
                    await self._in_thread(lambda: copy_tree(source, into, self._reflinks, self._go_on))
            elif tree is not None:
                with _naming(each):
                    await self._in_thread(lambda: self._copy(tree, into))
        except FileExistsError as error:
            raise Unplaceable(f"input `{each.name}`: its folder `{_path(each)}` is there already") from error
        self._placed[each.name] = into

    def _copy(self, tree: KnownTree, into: Path) -> None:
        try:
            self._copies.place(tree, into)
        except OSError as error:
            if not is_full(error):
                raise
            self._cache.all.trim(0)
            self._copies.place(tree, into)

    def _known(self, stamp: Stamp, new: bool) -> bytes | None:
        if new:
            return self._copies.digest_of(stamp)
        if self._lower is None:
            # Below one overlay every file has an inode of its own, which is seen through it.
            self._lower = ByInode()
            for layer, tree in self._layers:
                for entry in tree.unlinked():
                    if entry.kind == "file":
                        self._lower.add(os.lstat(os.fsencode(layer) + b"/" + entry.path).st_ino, entry.digest)
        return next(self._lower.find(stamp.inode), None)

    def _note(self, captured: Captured, ref: ArtifactRef, upper: Path) -> None:
        """What is stored may become the cache's at the end."""
        if ref.digest == captured.digest:
            add_tree(self._cache, captured.digest, captured.manifest)
        self._stored.append((os.fsencode(upper.relative_to(self._upper)), captured))

    def _keep(self) -> None:
        """Small files first, as long as there is time and room for them."""
        deadline, room = time.monotonic() + _KEEPING_SECONDS, self._cache.all.room()
        folders = OpenFolders(self._upper)
        try:
            for least, most in pairwise(_SIZES):
                for folder, captured in self._stored:
                    for entry, file in captured.files():
                        if not file.new or not least <= entry.size < most:
                            continue
                        room -= sum(size for digest, size in entry.chunks() if digest != ZERO_CHUNK)
                        if room < 0 or time.monotonic() > deadline:
                            return
                        self._go_on()
                        if not self._cache.has(entry):
                            self._keep_file(folders, entry.path if folder == b"." else folder + b"/" + entry.path, entry)
        finally:
            folders.close()

    def _keep_file(self, folders: OpenFolders, path: bytes, entry: Entry) -> None:
        """A file, if it is still what was stored. A later step may have put anything in its place. Raises OSError."""
        folder, _, name = path.rpartition(b"/")
        made = self._cache.new_path()
        try:
            source = os.open(name, _FILE, dir_fd=folders.at(folder))
        except OSError:
            return
        try:
            if not stat.S_ISREG(os.fstat(source).st_mode):
                return
            with made.open("x+b") as file:
                os.fchmod(file.fileno(), entry.mode)
                same = copy_checked(source, file.fileno(), entry, self._reflinks, self._go_on)
            if same:
                self._cache.add(name_of(entry), made)
        finally:
            os.close(source)
            made.unlink(missing_ok=True)

    def _close(self) -> None:
        try:
            if self._upper != self.folder:
                unmount(self.folder)
        except OSError as error:
            logger.warning("a workspace stays mounted", error=str(error))
        self._pins.close()
        # Whoever still knows this workspace keeps no large trees with it.
        self._stored, self._layers, self._lower = [], [], None
        if self._overlay.exists():
            remove_tree(self._overlay)
        self._cache.all.trim()


def _go_on(given_up: threading.Event) -> None:
    if given_up.is_set():
        raise _GivenUp


@contextlib.contextmanager
def _naming(each: TaskInput) -> Iterator[None]:
    try:
        yield
    except ArchiveRefused as error:
        raise Unplaceable(f"input `{each.name}`: {error}") from error


def _path(each: TaskInput) -> str:
    return each.path or each.name


def _inside(path: str, folder: str) -> bytes | None:
    """What a path is from a folder, if it lies in it."""
    there = Path(path)
    return os.fsencode(there.relative_to(folder)) if there.is_relative_to(folder) else None


def _refuse_what_is_there(each: TaskInput, path: bytes | None, tree: Iterable[Entry]) -> None:
    """An input may lie at `path` of another one's tree if there is nothing, or an empty folder. Raises Unplaceable."""
    if path is None:
        return
    for entry in tree:
        if path == entry.path or path.startswith(entry.path + b"/"):
            if entry.kind == "link":
                raise Unplaceable(f"input `{each.name}`: its folder `{_path(each)}` leads through a link, `{shown(entry.path)}`")
            if entry.kind == "folder":
                continue
        elif path != b"." and not entry.path.startswith(path + b"/"):
            continue
        raise Unplaceable(f"input `{each.name}`: its folder `{_path(each)}` is there already")
