"""One attempt of a stage, from its package to its last report."""

import asyncio
import contextlib
import errno
import os
import signal
import traceback
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

import msgspec
import structlog

from libs.archives.pump import in_thread, to_its_end
from proto.events.base import ArtifactRef, Status
from proto.messages import Package, ReportBody, ReportStageFinished, ReportStepFinished, ReportStepProgressed, ReportStepStarted
from proto.plan import RunStep, image_type
from services.worker.artifacts import Artifacts, Unobtainable
from services.worker.cache import Cache
from services.worker.executors.commands import NotRunnable
from services.worker.executors.executor import CannotRun, Executor, Executors, Job, Running, Stream
from services.worker.executors.orphans import Orphans
from services.worker.executors.sandboxes import Folders
from services.worker.folders import FolderPool
from services.worker.logs import AttemptLog
from services.worker.masking import Texts, masked
from services.worker.outbox import Outbox
from services.worker.placing import Means
from services.worker.progress import Progress
from services.worker.secrets import NoSecret, filled_in
from services.worker.workspace import Unplaceable, Workspace

logger = structlog.get_logger()

T = TypeVar("T")

LOW_DISK_BYTES = 1 << 20


class Tools(NamedTuple):
    """What every attempt of a worker uses. `grace` in seconds, `log_limit` in bytes."""

    worker: str
    executors: Executors
    orphans: Orphans
    folders: FolderPool
    outbox: Outbox
    artifacts: Artifacts
    cache: Cache
    means: Means
    grace: float
    log_limit: int


class Stop(NamedTuple):
    """Why the attempt must end before its time, and as what."""

    status: Status
    error: str
    at_once: bool = False


class _Stopped(Exception):
    """A stop came while something else was awaited."""


class StageRun:
    """Runs the steps of a package in one workspace. Every way it can end is reported; when its task is cancelled, nothing is."""

    def __init__(self, package: Package, tools: Tools, on_reported: Callable[[int], None]) -> None:
        self.package = package
        self._tools = tools
        self._on_reported = on_reported
        self._images = any(image_type(step.config) for step in package.stage.steps)
        named = tools.executors.containers or tools.executors.process if self._images else tools.executors.process
        self._secrets: Texts | None = None
        preamble = f"worker {tools.worker}, sandbox {named.name}"
        self._log = AttemptLog(package.attempt, tools.outbox.log, tools.log_limit, preamble)
        self._process: Running | None = None
        self._stop: Stop | None = None
        self._stopped = asyncio.Event()

    async def run(self) -> Status:
        """Until the stage is over and its folders are gone. When cancelled: everything is killed, nothing more is said."""
        folders: Folders | None = None
        workspace: Workspace | None = None
        try:
            try:
                if self.package.secrets:  # many take seconds, and the worker has other work
                    self._secrets = self._log.secrets = await in_thread(lambda: Texts(self.package.secrets.values()))
                folders = self._folders = self._tools.executors.folders_for(self.package.stage.steps[0]) or self._tools.folders.take()
                # The engine mounts a workspace from outside: it would not see what is mounted in there, in the worker's own namespace.
                means = self._tools.means._replace(overlays=None) if self._images else self._tools.means
                workspace = self._workspace = Workspace(folders, self.package, self._tools.artifacts, self._tools.cache, means)
                ended, error = await self._steps()
            except OSError as failure:
                ended, error = [], _words(failure)
            except Exception as failure:  # unsaid, the attempt would count as running for as long as the worker lives
                trace = self._masked("".join(traceback.format_exception(failure)))
                logger.error("an attempt broke the worker's own code", attempt=self.package.attempt, exception=trace)
                ended, error = [], f"worker: {type(failure).__name__}"
            status: Status = ended[-1].status if ended else self._stop.status if self._stop else "errored"
            self._log.close(self.package.stage.steps[-1].name)
            log = self._log
            self._report(
                *ended,
                ReportStageFinished(status=status, error=error, chunks=log.chunks, lines=log.lines, bytes=log.bytes, dropped=log.dropped),
            )
            if workspace is not None:
                await workspace.keep()
            return status
        finally:
            # It may be cancelled for being over: what it leaves goes all the same.
            await to_its_end(asyncio.create_task(self._clean_up(workspace, folders)))

    async def _clean_up(self, workspace: Workspace | None, folders: Folders | None) -> None:
        if self._process is not None and not self._process.ended.done():
            self._process.kill()
            await asyncio.wait([self._process.ended])
        if workspace is not None:
            await workspace.close()
        if folders is not None:
            await self._tools.executors.release(folders)
            await self._tools.folders.give_back(folders)

    def stop(self, stop: Stop) -> None:
        """End soon: SIGTERM, a grace period, SIGKILL of everything; or at once. The first word counts."""
        if self._stop is not None:
            return
        self._stop = stop
        self._stopped.set()
        if self._process is not None:
            self._log.say(self._step, f"interrupted: {stop.error or stop.status}")
            if stop.at_once:
                self._process.kill()
            else:
                self._process.interrupt(self._tools.grace)

    def on_window(self) -> None:
        """More log may be written."""
        if self._process is not None:
            self._process.resume()

    async def _steps(self) -> tuple[list[ReportStepFinished], str]:
        """The last step's end (its report goes out together with the stage's) and the stage's error."""
        finished: ReportStepFinished | None = None
        for step in self.package.stage.steps:
            if finished is not None:
                self._report(finished)
            self._step = step.name
            finished = await self._run_step(step)
            if finished.status != "succeeded":
                break
        assert finished is not None
        error = finished.error
        if finished.status == "failed" and not error:
            error = f"step `{finished.step}` failed with exit code {finished.exit_code}"
        elif finished.status != "succeeded" and error:
            error = f"step `{finished.step}`: {error}"
        return [finished], error

    async def _run_step(self, step: RunStep) -> ReportStepFinished:
        finished = await self._ended(step)
        return msgspec.structs.replace(finished, error=self._masked(finished.error)) if finished.error else finished

    def _masked(self, text: str) -> str:
        return masked(self._secrets, text) if self._secrets is not None else text

    async def _ended(self, step: RunStep) -> ReportStepFinished:
        try:
            return await self._unless_stopped(filled_in(step, self.package.secrets, self.package.unreadable))
        except _Stopped:
            assert self._stop is not None
            return ReportStepFinished(step=step.name, status=self._stop.status, error=self._stop.error)
        except (CannotRun, Unplaceable, NotRunnable, NoSecret) as error:
            return ReportStepFinished(step=step.name, status="errored", error=str(error))
        except OSError as error:
            return ReportStepFinished(step=step.name, status="errored", error=_words(error))

    async def _unless_stopped(self, step: RunStep) -> ReportStepFinished:
        config = step.config
        if config.inputs:
            await self._or_stopped(self._workspace.place_inputs(config.inputs))
        self._workspace.begin_step(config)
        if self._stop is not None:
            raise _Stopped
        progress = Progress(lambda percent: self._report(ReportStepProgressed(step=step.name, percent=percent)))
        executor = self._tools.executors.of(config)
        try:
            code, why = await self._run_command(step, executor, progress)
        finally:
            self._log.end_step(step.name)
        percent = progress.untold()
        if percent is not None:
            self._report(ReportStepProgressed(step=step.name, percent=percent))
        if self._stop is not None:
            ours = code in (-signal.SIGTERM, -signal.SIGKILL) or (executor.wraps and code in (128 + signal.SIGTERM, 128 + signal.SIGKILL))
            exit_code = None if ours else _exit_code(code)
            return ReportStepFinished(step=step.name, status=self._stop.status, exit_code=exit_code, error=self._stop.error)
        status, error = self._judge(code)
        if status == "failed" and why:
            error = why
        outputs, problem = await self._take_outputs(step) if config.outputs else ({}, None)
        if problem is not None and status == "succeeded":
            status, error = problem
        return ReportStepFinished(step=step.name, status=status, exit_code=_exit_code(code), error=error, outputs=outputs)

    async def _run_command(self, step: RunStep, executor: Executor, progress: Progress) -> tuple[int, str]:
        """How it ended: its code, and why, where the code does not tell."""
        outbox, attempt = self._tools.outbox, self.package.attempt

        def on_output(stream: Stream, data: bytes) -> bool:
            for lines in self._log.write(step.name, stream, data):
                if stream == "stdout":
                    progress.on_lines(lines)
            return not outbox.is_full(attempt)

        fresh = step.name == self.package.stage.steps[0].name
        job = Job(
            attempt, self.package.team, step, self._folders, on_output, lambda text: self._log.say(step.name, text), self._workspace.link_in, fresh
        )
        process = await self._or_stopped(self._begin(executor, job))
        self._report(ReportStepStarted(step=step.name, sandbox=executor.name, image=process.image, reference=process.reference))
        stop = Stop("failed", f"interrupted: its timeout of {step.timeout} s is up")
        timeout = asyncio.get_running_loop().call_later(step.timeout, self.stop, stop)
        try:
            return await asyncio.shield(process.ended), process.error
        finally:
            timeout.cancel()
            if process.ended.done():
                self._process = None

    async def _begin(self, executor: Executor, job: Job) -> Running:
        """Whoever cancels this finds what has begun, if anything has."""
        self._process = await executor.start(job)
        return self._process

    def _judge(self, code: int) -> tuple[Status, str]:
        if code == 0:
            return "succeeded", ""
        disk = os.statvfs(self._folders.root)
        if disk.f_bavail * disk.f_frsize < LOW_DISK_BYTES:
            return "errored", f"worker's disk is full: {disk.f_bavail * disk.f_frsize} bytes left"
        number = -code if code < 0 else code - 128
        if code < 0 or code > 128:
            with contextlib.suppress(ValueError):
                return "failed", f"killed by {signal.Signals(number).name}"
        return "failed", ""

    async def _take_outputs(self, step: RunStep) -> tuple[dict[str, ArtifactRef], tuple[Status, str] | None]:
        outputs: dict[str, ArtifactRef] = {}
        problem: tuple[Status, str] | None = None
        for output in step.config.outputs:
            path = output.path or output.name
            folder = self._folders.workspace / path
            if (link := self._workspace.link_in(path)) or not folder.is_dir():
                what = f"leads through a link, `{link}`" if link else "is not a folder" if folder.exists() else "is gone"
                problem = problem or ("failed", f"output `{output.name}`: the folder `{path}` {what}")
                continue
            try:
                outputs[output.name] = await self._or_stopped(self._workspace.store(step.name, output.name, path))
            except Unobtainable as error:
                problem = problem or ("errored", f"output `{output.name}` could not be stored: {error}")
            except OSError as error:
                problem = problem or ("errored", f"output `{output.name}` could not be read: {_words(error)}")
        return outputs, problem

    async def _or_stopped(self, work: Awaitable[T]) -> T:
        """Await it, unless a stop comes first: then it is cancelled."""
        task = asyncio.ensure_future(work)
        stopped = asyncio.ensure_future(self._stopped.wait())
        try:
            await asyncio.wait([task, stopped], return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise _Stopped
        finally:
            stopped.cancel()
            task.cancel()
            await asyncio.wait([task])

    def _report(self, *bodies: ReportBody) -> None:
        self._on_reported(self._tools.outbox.report(self.package.attempt, list(bodies)))


def _exit_code(code: int) -> int:
    return code if code >= 0 else 128 - code


def _words(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"worker's disk is full: {error.strerror}"
    return f"worker: {error.strerror or error}"
