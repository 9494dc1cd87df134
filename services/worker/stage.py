"""One attempt of a stage, from its package to its last report."""

import asyncio
import contextlib
import errno
import os
import signal
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

import structlog

from proto.events.base import ArtifactRef, Status
from proto.messages import Package, ReportBody, ReportStageFinished, ReportStepFinished, ReportStepProgressed, ReportStepStarted
from proto.plan import RunStep
from services.worker.artifacts import Artifacts, Unobtainable
from services.worker.cache import Cache
from services.worker.executors.commands import Commands, NotRunnable
from services.worker.executors.orphans import Orphans
from services.worker.executors.sandboxes import Folders, Sandbox
from services.worker.executors.spawned import Spawned, Stream
from services.worker.folders import FolderPool
from services.worker.logs import AttemptLog
from services.worker.outbox import Outbox
from services.worker.placing import Means
from services.worker.progress import Progress
from services.worker.workspace import Unplaceable, Workspace

logger = structlog.get_logger()

T = TypeVar("T")

LOW_DISK_BYTES = 1 << 20
_SANDBOX_TOOLS = (b"bwrap: ", b"unshare: ", b"setpriv: ")


class Tools(NamedTuple):
    """What every attempt of a worker uses. `grace` in seconds, `log_limit` in bytes."""

    worker: str
    sandbox: Sandbox
    commands: Commands
    orphans: Orphans
    folders: FolderPool
    outbox: Outbox
    artifacts: Artifacts
    cache: Cache
    means: Means
    path: str
    grace: float
    log_limit: int


class Stop(NamedTuple):
    """Why the attempt must end before its time, and as what."""

    status: Status
    error: str
    at_once: bool = False


class _Errored(Exception):
    """The step could not be run to its end."""


class _Stopped(Exception):
    """A stop came while something else was awaited."""


class StageRun:
    """Runs the steps of a package in one workspace. Every way it can end is reported, but for `kill`, after which nothing is."""

    def __init__(self, package: Package, tools: Tools, on_reported: Callable[[int], None]) -> None:
        self.package = package
        self._tools = tools
        self._on_reported = on_reported
        self._log = AttemptLog(package.attempt, tools.outbox.log, tools.log_limit, f"worker {tools.worker}, sandbox {tools.sandbox.name}")
        self._process: Spawned | None = None
        self._stop: Stop | None = None
        self._stopped = asyncio.Event()
        self._stderr_bytes = 0
        self._last_stderr = b""

    async def run(self) -> Status:
        """Until the stage is over and its folders are gone. When cancelled: everything is killed, nothing more is said."""
        folders: Folders | None = None
        workspace: Workspace | None = None
        try:
            try:
                folders = self._folders = self._tools.folders.take()
                workspace = self._workspace = Workspace(folders, self.package, self._tools.artifacts, self._tools.cache, self._tools.means)
                ended, error = await self._steps()
            except OSError as failure:
                ended, error = [], _words(failure)
            except Exception as failure:  # unsaid, the attempt would count as running for as long as the worker lives
                logger.error("an attempt broke the worker's own code", attempt=self.package.attempt, exc_info=failure)
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
            if self._process is not None and not self._process.ended.done():
                self._process.kill()
                await asyncio.wait([self._process.ended])
            if workspace is not None:
                await workspace.close()
            if folders is not None:
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
        try:
            return await self._unless_stopped(step)
        except _Stopped:
            assert self._stop is not None
            return ReportStepFinished(step=step.name, status=self._stop.status, error=self._stop.error)
        except (_Errored, Unplaceable, NotRunnable) as error:
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
        code = await self._run_command(step, progress)
        self._log.end_step(step.name)
        percent = progress.untold()
        if percent is not None:
            self._report(ReportStepProgressed(step=step.name, percent=percent))
        if self._stop is not None:
            ours = code in (-signal.SIGTERM, -signal.SIGKILL) or (self._tools.sandbox.wraps and code in (128 + signal.SIGTERM, 128 + signal.SIGKILL))
            exit_code = None if ours else _exit_code(code)
            return ReportStepFinished(step=step.name, status=self._stop.status, exit_code=exit_code, error=self._stop.error)
        status, error = self._judge(code)
        outputs, problem = await self._take_outputs(step) if config.outputs else ({}, None)
        if problem is not None and status == "succeeded":
            status, error = problem
        return ReportStepFinished(step=step.name, status=status, exit_code=_exit_code(code), error=error, outputs=outputs)

    async def _run_command(self, step: RunStep, progress: Progress) -> int:
        inside = self._tools.sandbox.inside(self._folders)
        environment = {
            "PATH": self._tools.path,
            "HOME": str(inside.home),
            "TMPDIR": str(inside.temp),
            "LANG": "C.UTF-8",
            **step.config.params,
        }
        command = self._tools.commands.find(step.config.run, environment, self._folders)
        outbox, attempt = self._tools.outbox, self.package.attempt

        def on_output(stream: Stream, data: bytes) -> bool:
            for lines in self._log.write(step.name, stream, data):
                if stream == "stdout":
                    progress.on_lines(lines)
            if stream == "stderr":
                self._stderr_bytes += len(data)
                self._last_stderr = data[-512:]
            return not outbox.is_full(attempt)

        self._stderr_bytes = 0
        try:
            process = self._process = Spawned(
                command.argv, environment, command.directory, self._folders, self._tools.sandbox, self._tools.orphans, on_output
            )
        except OSError as error:
            raise _Errored(f"run.path: `{step.config.run.path}` cannot be run: {error.strerror}") from error
        self._report(ReportStepStarted(step=step.name, sandbox=self._tools.sandbox.name))
        stop = Stop("failed", f"interrupted: its timeout of {step.timeout} s is up")
        timeout = asyncio.get_running_loop().call_later(step.timeout, self.stop, stop)
        try:
            return await asyncio.shield(process.ended)
        finally:
            timeout.cancel()
            if process.ended.done():
                self._process = None

    def _judge(self, code: int) -> tuple[Status, str]:
        if code == 0:
            return "succeeded", ""
        disk = os.statvfs(self._folders.root)
        if disk.f_bavail * disk.f_frsize < LOW_DISK_BYTES:
            return "errored", f"worker's disk is full: {disk.f_bavail * disk.f_frsize} bytes left"
        if self._tools.sandbox.wraps and code == 1 and self._last_stderr.startswith(_SANDBOX_TOOLS) and self._stderr_bytes <= 512:
            return "errored", f"the sandbox could not run it: {self._last_stderr.decode(errors='replace').strip()}"
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
