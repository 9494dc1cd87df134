"""Steps in containers of a Docker engine, one for each, which may have been started before its step was known."""

import asyncio
import contextlib
import hashlib
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import structlog
from aiodocker.containers import DockerContainer

from libs.archives.pump import in_thread
from proto.plan import RunStep
from services.worker.executors.container import Container
from services.worker.executors.engine import Engine, EngineGone, Refused
from services.worker.executors.executor import CannotRun, Job, Running
from services.worker.executors.hardened import Limits, binds_of, can_wait, command_of, container_of, name_of, shape_of
from services.worker.executors.images import Guarded, Image, Images, named_by
from services.worker.executors.owned import RETRY_SECONDS, Owned
from services.worker.executors.programs import Programs
from services.worker.executors.readied import checked, open_to_all
from services.worker.executors.sandboxes import Folders
from services.worker.executors.waiter import message
from services.worker.executors.warm import WarmContainers

logger = structlog.get_logger()

SWEEP_SECONDS = 30.0
_NOWHERE = Folders.below(Path("/"))


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
        self._limits = limits
        self._privileged = privileged
        self._programs = Programs(engine)
        self._owned = Owned(engine, owner, labels)
        mark = f"penstock-warm-{hashlib.sha256(owner.encode()).hexdigest()[:12]}"
        self._warm = WarmContainers(engine, folder, warm, mark, self._owned)

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
        parts = [loop.create_task(self._keep(), name="containers"), loop.create_task(self._owned.listen(), name="engine's events")]
        try:
            yield removed
        finally:
            for part in parts:
                part.cancel()
            await self._warm.close()
            await self._owned.settled()
            await asyncio.wait(parts)

    async def sweep(self) -> int:
        """Remove every container of this worker that belongs to no current step. Their number. Raises CannotRun."""
        return await self._owned.sweep()

    def folders_for(self, step: RunStep) -> Folders | None:
        return self._warm.take(key) if (key := self._kind_of(step)) else None

    async def release(self, folders: Folders) -> None:
        await self._warm.release(folders)

    async def start(self, job: Job) -> Running:
        attempt, step = job.attempt, job.step
        if step.privileged and not self._privileged:
            raise CannotRun("this worker runs no privileged steps")
        image = await self._images.ready(step.config, job.team, attempt.build, job.say)
        binds = checked(job)
        user = step.config.run.user or ""
        if os.geteuid() != 0:
            user = f"{os.geteuid()}:{os.getegid()}"
        elif (user or image.user).partition(":")[0] not in ("", "0", "root"):
            await in_thread(lambda: open_to_all(job, binds))
        name = name_of(attempt, step)
        labels = self._owned.labelled(
            {
                "penstock.team": job.team,
                "penstock.build": attempt.build,
                "penstock.stage": attempt.stage,
                "penstock.step": step.name,
                "penstock.attempt": str(attempt.number),
            }
        )

        def wanted(folders: Folders) -> dict[str, Any]:
            return container_of(step, image.id, user, folders, binds, labels, self._limits)

        def over(container: str) -> None:
            self._owned.running.pop(container, None)
            self._owned.drop(name)
            if job.fresh and (key := self._kind_of(step)):
                self._warm.keep(key, image.reference, binds, wanted)

        def running(made: DockerContainer) -> Container:
            return Container(self._engine, made, image, self._limits.memory_of(step.config), job, lambda: over(made.id))

        self._owned.want(name)
        body = wanted(job.folders)
        try:
            return await self._begun(name, body, image, job, running) or await self._started(name, body, image, job, running)
        except BaseException:
            self._owned.forget(name)
            raise

    async def _started(self, name: str, wanted: dict[str, Any], image: Image, job: Job, running: Callable[[DockerContainer], Container]) -> Container:
        making = asyncio.get_running_loop().create_task(self._owned.create(name, wanted))
        try:
            made = await asyncio.shield(making)
            await self._check(job, made, image, wanted)
            self._owned.running[made.id] = found = running(made)
            await found.start()
        except BaseException:
            # Nobody may use its folders again before it is gone; and what is asked for may yet be made.
            await asyncio.wait([making])
            if making.exception() is None:
                self._owned.running.pop(making.result().id, None)
                await self._owned.gone(name)
            raise
        return found

    async def _begun(
        self, name: str, wanted: dict[str, Any], image: Image, job: Job, running: Callable[[DockerContainer], Container]
    ) -> Container | None:
        """In the container that waits in these folders. None when there is none, or it would be another one than is wanted: the image's name may
        mean another image by now."""
        if (waiting := self._warm.claim(job.folders)) is None:
            return None
        container, begun = waiting.container, False
        found = self._owned.running[container.id] = running(container)
        try:
            said = message(*command_of(wanted, image.environment, container.id))
            if said is not None and waiting.shape == shape_of(wanted):
                with contextlib.suppress(Refused):
                    await self._check(job, container, image, wanted)
                    with self._engine.translated():
                        await container.rename(name)
                    self._owned.forget(waiting.name)
                    begun = await found.begin(waiting.stream, said)
            return found if begun else None
        finally:
            if not begun:
                self._owned.running.pop(container.id, None)
                await self._warm.end(waiting)

    async def _check(self, job: Job, container: DockerContainer, image: Image, wanted: dict[str, Any]) -> None:
        [path], (_, environment, _) = wanted["Entrypoint"], command_of(wanted, image.environment, container.id)
        await self._programs.check(job, container.id, image.id, path, environment)

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
