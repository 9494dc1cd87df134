"""This worker's own containers on the engine: made, removed, and swept up after. They carry its owner's mark, and no others are ever touched."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog
from aiodocker.containers import DockerContainer

from services.worker.durable import write_durably
from services.worker.executors.container import Container
from services.worker.executors.engine import Engine, Refused
from services.worker.executors.executor import CannotRun

logger = structlog.get_logger()

RETRY_SECONDS = 2.0
"""Between two looks for an engine that is gone."""
_OWNER = "penstock.owner"


class Owned:
    """`owner` marks them, through all lives of this worker. `labels` are for people."""

    def __init__(self, engine: Engine, owner: str, labels: dict[str, str]) -> None:
        self._engine = engine
        self._owner = owner
        self._labels = labels
        self._current: set[str] = set()
        """Names of those that somebody wants."""
        self._dropping: set[asyncio.Task[None]] = set()
        self.running: dict[str, Container] = {}
        """Those in which steps run, by id."""

    def labelled(self, more: dict[str, str]) -> dict[str, str]:
        """What one is to be labelled with."""
        return {**self._labels, _OWNER: self._owner, **more}

    async def create(self, name: str, wanted: dict[str, Any]) -> DockerContainer:
        """A container of ours that has the name is from an earlier life, and in the way. Raises CannotRun."""
        self._current.add(name)
        for last in (False, True):
            try:
                with self._engine.translated():
                    return await self._engine.docker.containers.create(wanted, name=name)
            except Refused as refused:
                if refused.status != 409 or last:
                    raise
                if (await self._engine.labels(name)).get(_OWNER) != self._owner:
                    raise CannotRun(f"a container `{name}` is there already, and it is not this worker's") from refused
                await self._engine.remove(name)
        raise AssertionError

    def want(self, name: str) -> None:
        """It is, or will be, one of ours that is no stray."""
        self._current.add(name)

    def forget(self, name: str) -> None:
        """No container has this name, or none that anybody wants."""
        self._current.discard(name)

    async def gone(self, name: str, container: str = "") -> None:
        """However often whoever waits for it is cancelled."""
        await asyncio.wait([self.drop(name, container)])

    def drop(self, name: str, container: str = "") -> asyncio.Task[None]:
        """The one that is called so or, if it may have been renamed, the one with the id `container`. What cannot be removed now is swept later."""

        async def remove() -> None:
            try:
                await self._engine.remove(container or name)
            except CannotRun as error:
                logger.warning("a container stays for now", container=name, error=str(error))
            finally:
                self._current.discard(name)

        task = asyncio.get_running_loop().create_task(remove())
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)
        return task

    async def settled(self) -> None:
        """What is being removed is gone."""
        if self._dropping:
            await asyncio.wait(self._dropping)

    async def sweep(self) -> int:
        """Remove every container of this worker that nobody wants. Their number. Raises CannotRun."""
        found = await self._engine.containers({_OWNER: self._owner})
        # One that runs may have had another name when it was looked for: what it was called while it waited.
        others = [each for each in found if each.id not in self.running]
        stray = [each.id for each in others if not self._current & {name.removeprefix("/") for name in each["Names"] or ()}]
        for container in stray:
            await self._engine.remove(container)
        return len(stray)

    async def listen(self) -> None:
        """Who else ends containers of ours, the engine itself for one when it is restarted."""
        while True:
            async for container in self._engine.signalled({_OWNER: self._owner}):
                if container in self.running:
                    self.running[container].on_signalled()
            await asyncio.sleep(RETRY_SECONDS)


def owner_of(folder: Path, new: Callable[[], str]) -> str:
    """The mark of the worker whose folder this is, made by `new` when it has none: a name may be anybody's, a folder is one's. Raises OSError."""
    file = folder / "owner"
    try:
        return file.read_text()
    except FileNotFoundError:
        write_durably(file, new().encode())
        return file.read_text()
