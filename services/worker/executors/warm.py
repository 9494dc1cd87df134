"""Containers that are started before anybody wants them, in folders of their own. Nothing has ever run in one but what waits there for its step, and
each becomes one step's: what is saved is the time that the engine takes to start it."""

import asyncio
import contextlib
import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import structlog
from aiodocker.containers import DockerContainer
from aiodocker.stream import Stream as Attached

from services.worker.executors.engine import Engine
from services.worker.executors.executor import CannotRun
from services.worker.executors.hardened import Bind, shape_of, waiting_of
from services.worker.executors.owned import Owned
from services.worker.executors.sandboxes import Folders
from services.worker.executors.waiter import program
from services.worker.folders import FolderPool, remove_tree

logger = structlog.get_logger()

IDLE_SECONDS = 300.0
"""For a container to be wanted."""
_WAITS_FOR = "penstock.waits-for"
"""Labels never change: one that has become a step's says so by its name, as any other."""


class Waiting(NamedTuple):
    """A container that waits, since when (monotonic), and what it can become: `key` is how a step asks for it, `shape` what it truly is."""

    key: str
    shape: bytes
    name: str
    container: DockerContainer
    stream: Attached
    folders: Folders
    since: float


class WarmContainers:
    """At most `most`, one for each kind of step that ran here last; `prefix` begins their names."""

    def __init__(self, engine: Engine, folder: Path, most: int, prefix: str, owned: Owned) -> None:
        """`folder` is the worker's. Raises OSError."""
        self._engine = engine
        self._pool = FolderPool(folder / "work", "warm")
        self._prefix = prefix
        self._owned = owned
        self._numbers = itertools.count(1)
        self._idle: dict[str, Waiting] = {}
        self._taken: dict[Path, Waiting] = {}
        self._making: dict[str, asyncio.Task[None]] = {}
        self._waiter = folder / "waiter"
        self._init = shutil.which("docker-init")
        code = program()
        self._most = most if code and self._init else 0
        if code:
            self._waiter.unlink(missing_ok=True)
            self._waiter.write_bytes(code)
            self._waiter.chmod(0o555)

    def __len__(self) -> int:
        return len(self._idle)

    def take(self, key: str) -> Folders | None:
        """The folders of one that such a step can have; they are the asker's now, who will `claim` the container or `release` it."""
        if (waiting := self._idle.pop(key, None)) is None:
            return None
        self._taken[waiting.folders.root] = waiting
        return waiting.folders

    def claim(self, folders: Folders) -> Waiting | None:
        """The container that waits in these folders; it is the asker's to remove."""
        return self._taken.pop(folders.root, None)

    async def release(self, folders: Folders) -> None:
        """Nothing will begin in these folders any more: nothing of a container holds them when this is done."""
        if waiting := self.claim(folders):
            await self.end(waiting)

    async def end(self, waiting: Waiting) -> None:
        """It is not wanted, or is no good."""
        await self._end(waiting.name, waiting.stream, waiting.container.id)

    def keep(self, key: str, image: str, binds: list[Bind], wanted: Callable[[Folders], dict[str, Any]]) -> None:
        """A step of this kind has run: have a container ready for the next. `image` is for people."""
        if len(self._making) >= self._most or key in self._idle or key in self._making:
            return
        task = asyncio.get_running_loop().create_task(self._make(key, image, binds, wanted))
        self._making[key] = task
        task.add_done_callback(lambda _: self._making.pop(key, None))

    async def expire(self, seconds: float = IDLE_SECONDS) -> None:
        """Remove those that nobody has wanted for so long."""
        for waiting in [each for each in self._idle.values() if time.monotonic() - each.since >= seconds]:
            await self._discard(self._idle.pop(waiting.key))

    async def close(self) -> None:
        self._most = 0
        if self._making:
            await asyncio.wait(self._making.values())
        await self.expire(0.0)

    async def _make(self, key: str, image: str, binds: list[Bind], wanted: Callable[[Folders], dict[str, Any]]) -> None:
        while len(self._idle) + len(self._making) > self._most and self._idle:
            await self._discard(self._idle.pop(next(iter(self._idle))))
        name = f"{self._prefix}-{next(self._numbers)}"
        try:
            folders = self._pool.take()
        except OSError as error:
            logger.warning("no container is kept ready", error=str(error))
            return
        made, stream = False, None
        try:
            for bind in binds:
                (folders.workspace / bind.path).mkdir(parents=True, exist_ok=True)
            body = wanted(folders)
            labels = self._owned.labelled({_WAITS_FOR: image})
            container = await self._owned.create(name, waiting_of(body, labels, str(self._waiter), str(self._init)))
            with self._engine.translated():
                stream = await container.attach(stdin=True, stdout=True, stderr=True).__aenter__()
                await container.start()
            self._idle[key] = Waiting(key, shape_of(body), name, container, stream, folders, time.monotonic())
            made = True
        except (CannotRun, OSError) as error:
            logger.warning("no container is kept ready", error=str(error))
        finally:
            if not made:
                await self._end(name, stream)
                remove_tree(folders.root)

    async def _end(self, name: str, stream: Attached | None, container: str = "") -> None:
        if stream is not None:
            with contextlib.suppress(Exception):
                await stream.close()
        await self._owned.gone(name, container)

    async def _discard(self, waiting: Waiting) -> None:
        await self.end(waiting)
        remove_tree(waiting.folders.root)
