"""Steps in containers of a Docker engine, one for each, which may have been started before its step was known. Only this worker's own containers are
ever touched: they carry its owner's mark."""

import asyncio
import contextlib
import hashlib
import os
import re
import stat
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import structlog
from aiodocker.containers import DockerContainer

from libs.archives.pump import in_thread
from proto.plan import RunStep
from services.worker.durable import write_durably
from services.worker.executors.commands import NotRunnable
from services.worker.executors.container import Container
from services.worker.executors.engine import Engine, EngineGone, Refused
from services.worker.executors.executor import CannotRun, Job, Running
from services.worker.executors.hardened import Bind, Limits, binds_of, can_wait, command_of, container_of, name_of, shape_of
from services.worker.executors.images import Guarded, Image, Images, named_by
from services.worker.executors.sandboxes import Folders
from services.worker.executors.waiter import message
from services.worker.executors.warm import WarmContainers

logger = structlog.get_logger()

SWEEP_SECONDS = 30.0
RETRY_SECONDS = 2.0
"""Between two looks for an engine that is gone."""
_OWNER = "penstock.owner"
_NOWHERE = Folders.below(Path("/"))
_INIT_FAILED = re.compile(rb"\[FATAL tini \(\d+\)\] exec (.*) failed: (.*)")


class DockerExecutor:
    """`owner` marks this worker's containers, through all its lives, and nobody else's. `labels` are for people. As root a step may be anybody in
    its container; else it is who the worker is, as it could not work in the worker's folders otherwise. At most `warm` containers wait, in
    `folder`, the worker's."""

    name = "docker"
    wraps = True

    def __init__(
        self, engine: Engine, images: Images, owner: str, labels: dict[str, str], limits: Limits, privileged: bool, warm: int, folder: Path
    ) -> None:
        """Raises OSError."""
        self._engine = engine
        self._images = images
        self._owner = owner
        self._labels = labels
        self._limits = limits
        self._privileged = privileged
        self._current: set[str] = set()
        self._running: dict[str, Container] = {}
        self._dropping: set[asyncio.Task[None]] = set()
        mark = f"penstock-warm-{hashlib.sha256(owner.encode()).hexdigest()[:12]}"
        self._warm = WarmContainers(engine, folder, warm, mark, {**labels, _OWNER: owner}, self._create, self._gone)

    @property
    def trouble(self) -> str:
        """Why no container can be run now, "" when it can."""
        return self._engine.trouble

    @property
    def waiting(self) -> int:
        """How many containers wait for a step."""
        return len(self._warm)

    @contextlib.asynccontextmanager
    async def kept(self) -> AsyncIterator[int]:
        """What an earlier life left is removed first (its number is given), and what this one loses while it lasts. Raises CannotRun."""
        removed = await self.sweep()
        loop = asyncio.get_running_loop()
        parts = [loop.create_task(self._keep(), name="containers"), loop.create_task(self._listen(), name="engine's events")]
        try:
            yield removed
        finally:
            for part in parts:
                part.cancel()
            await self._warm.close()
            await asyncio.wait([*parts, *self._dropping])

    async def sweep(self) -> int:
        """Remove every container of this worker that belongs to no current step. Their number. Raises CannotRun."""
        found = await self._engine.containers({_OWNER: self._owner})
        # One that runs may have had another name when it was looked for: what it was called while it waited.
        others = [each for each in found if each.id not in self._running]
        stray = [each.id for each in others if not self._current & {name.removeprefix("/") for name in each["Names"] or ()}]
        for container in stray:
            await self._engine.remove(container)
        return len(stray)

    def folders_for(self, step: RunStep) -> Folders | None:
        return self._warm.take(key) if (key := self._kind_of(step)) else None

    async def release(self, folders: Folders) -> None:
        await self._warm.release(folders)

    async def start(self, job: Job) -> Running:
        attempt, step = job.attempt, job.step
        if step.privileged and not self._privileged:
            raise CannotRun("this worker runs no privileged steps")
        image = await self._images.ready(step.config, job.team, attempt.build, job.say)
        binds = _checked(job)
        user = step.config.run.user or ""
        if os.geteuid() != 0:
            user = f"{os.geteuid()}:{os.getegid()}"
        elif (user or image.user).partition(":")[0] not in ("", "0", "root"):
            await in_thread(lambda: _open_to_all(job, binds))
        name = name_of(attempt, step)
        labels = {
            **self._labels,
            _OWNER: self._owner,
            "penstock.team": job.team,
            "penstock.build": attempt.build,
            "penstock.stage": attempt.stage,
            "penstock.step": step.name,
            "penstock.attempt": str(attempt.number),
        }

        def wanted(folders: Folders) -> dict[str, Any]:
            return container_of(step, image.id, user, folders, binds, labels, self._limits)

        def over(container: str) -> None:
            self._running.pop(container, None)
            self._drop(name)
            if job.fresh and (key := self._kind_of(step)):
                self._warm.keep(key, binds, wanted)

        def running(made: DockerContainer) -> Container:
            return Container(self._engine, made, image, self._limits.memory_of(step.config), job, lambda: over(made.id))

        self._current.add(name)
        try:
            return await self._begun(name, wanted(job.folders), image, job.folders, running) or await self._started(
                name, wanted(job.folders), running
            )
        except BaseException:
            self._current.discard(name)
            raise

    async def _started(self, name: str, wanted: dict[str, Any], running: Callable[[DockerContainer], Container]) -> Container:
        making = asyncio.get_running_loop().create_task(self._create(name, wanted))
        try:
            made = await asyncio.shield(making)
            self._running[made.id] = found = running(made)
            await found.start()
        except BaseException:
            # Nobody may use its folders again before it is gone; and what is asked for may yet be made.
            await asyncio.wait([making])
            if making.exception() is None:
                self._running.pop(making.result().id, None)
                await self._gone(name)
            raise
        return found

    async def _begun(
        self, name: str, wanted: dict[str, Any], image: Image, folders: Folders, running: Callable[[DockerContainer], Container]
    ) -> Container | None:
        """In the container that waits in these folders. None when there is none, or it would be another one than is wanted: the image's name may
        mean another image by now."""
        if (waiting := self._warm.claim(folders)) is None:
            return None
        container, begun = waiting.container, False
        found = self._running[container.id] = running(container)
        try:
            said = message(*command_of(wanted, image.environment, container.id))
            if said is not None and waiting.shape == shape_of(wanted):
                with contextlib.suppress(Refused):
                    with self._engine.translated():
                        await container.rename(name)
                    begun = await found.begin(waiting.stream, said)
            return found if begun else None
        finally:
            if not begun:
                self._running.pop(container.id, None)
                await self._warm.end(waiting)
            self._current.discard(waiting.name)

    def _kind_of(self, step: RunStep) -> str:
        """What two steps have in common that could be each other's containers, as far as can be told now; "" for one that no container waits for."""
        config = step.config
        binds = binds_of(config)
        try:
            if step.privileged or not can_wait(config, binds):
                return ""
            image = str(named_by(config)[0])
        except CannotRun:
            return ""
        return shape_of(container_of(step, image, config.run.user or "", _NOWHERE, binds, {}, self._limits)).decode()

    def complaint(self, code: int, stderr: bytes) -> str:
        if code in (126, 127) and (match := _INIT_FAILED.match(stderr)):
            path, why = (part.decode(errors="replace").strip() for part in match.groups())
            return f"run.path: `{path}` cannot be run in its image: {why}"
        return ""

    async def _create(self, name: str, wanted: dict[str, Any]) -> DockerContainer:
        """A container of ours that has the name is from an earlier life, and in the way."""
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

    async def _gone(self, name: str) -> None:
        """However often whoever waits for it is cancelled."""
        await asyncio.wait([self._drop(name)])

    def _drop(self, name: str) -> asyncio.Task[None]:
        """What cannot be removed now is swept later."""

        async def remove() -> None:
            try:
                await self._engine.remove(name)
            except CannotRun as error:
                logger.warning("a container stays for now", container=name, error=str(error))
            finally:
                self._current.discard(name)

        task = asyncio.get_running_loop().create_task(remove())
        self._dropping.add(task)
        task.add_done_callback(self._dropping.discard)
        return task

    async def _listen(self) -> None:
        """Who else ends containers of ours, the engine itself for one when it is restarted."""
        while True:
            async for container in self._engine.signalled({_OWNER: self._owner}):
                if container in self._running:
                    self._running[container].on_signalled()
            await asyncio.sleep(RETRY_SECONDS)

    async def _keep(self) -> None:
        swept = time.monotonic()
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            if not self.trouble and time.monotonic() - swept < SWEEP_SECONDS:
                continue
            swept = time.monotonic()
            await self._warm.expire()
            try:
                if removed := await self.sweep():
                    logger.info("stray containers removed", number=removed)
            except CannotRun as error:
                logger.warning("containers cannot be looked after", error=str(error))


@contextlib.asynccontextmanager
async def containers_here(
    url: str, owner: str, labels: dict[str, str], limits: Limits, *, privileged: bool, pull_seconds: float, warm: int, folder: Path
) -> AsyncIterator[DockerExecutor]:
    """An executor on the engine at `url`; what an earlier life of this owner left there is gone. `folder` is the worker's, for
    which see DockerExecutor; whose images are on the engine is noted there, too. Raises CannotRun when none answers, OSError."""
    engine = Engine(url)
    try:
        if not await engine.probe():
            raise EngineGone(f"the container engine does not answer at {url}")
        images = Images(engine, pull_seconds, Guarded(engine, folder / "guarded-images"))
        executor = DockerExecutor(engine, images, owner, labels, limits, privileged, warm, folder)
        async with executor.kept() as removed:
            logger.info("containers can be run", engine=url, orphans_removed=removed)
            yield executor
    finally:
        await engine.close()


def owner_of(folder: Path, new: Callable[[], str]) -> str:
    """The mark of the worker whose folder this is, made by `new` when it has none: a name may be anybody's, a folder is one's. Raises OSError."""
    file = folder / "owner"
    try:
        return file.read_text()
    except FileNotFoundError:
        write_durably(file, new().encode())
        return file.read_text()


def _checked(job: Job) -> list[Bind]:
    """What is to be mounted is there, and no link leads out of the workspace: the engine would follow it. Raises CannotRun, NotRunnable."""
    config = job.step.config
    binds = [bind for bind in binds_of(config) if (job.folders.workspace / bind.path).exists() or bind.writable]
    for bind in binds:
        if link := job.link_in(bind.path):
            raise CannotRun(f"the folder `{bind.path}` leads through a link, `{link}`")
    directory = config.run.dir or "."
    if not job.link_in(directory) and not (job.folders.workspace / directory).is_dir():
        raise NotRunnable(f"run.dir: the folder `{config.run.dir}` does not exist")
    if any("\0" in part for part in (config.run.path, *config.run.args)):
        raise NotRunnable("run: a command line cannot hold a NUL")
    return binds


def _open_to_all(job: Job, binds: list[Bind]) -> None:
    """The step runs as somebody else than who made its folders: it may write where it should. What it can only read is left as it is."""
    for folder in (job.folders.workspace, job.folders.home):
        folder.chmod(0o777)
    read_only = [job.folders.workspace / bind.path for bind in binds if not bind.writable]
    for root, folders, files in os.walk(job.folders.workspace):
        folders[:] = [each for each in folders if Path(root, each) not in read_only]
        for path in (Path(root, each) for each in (*folders, *files)):
            seen = path.lstat().st_mode
            if stat.S_ISDIR(seen):
                path.chmod(0o777)
            elif stat.S_ISREG(seen):
                path.chmod(0o777 if seen & 0o111 else 0o666)
