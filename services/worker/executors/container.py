"""One container that runs. What it writes is read from the engine's stream, never from a log that the engine would keep."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from aiodocker.containers import DockerContainer
from aiodocker.stream import Message
from aiodocker.stream import Stream as Attached

from services.worker.executors.engine import Engine, EngineGone
from services.worker.executors.executor import CannotRun, Job
from services.worker.executors.images import Image
from services.worker.executors.waiter import BEGUN

LINGER_SECONDS = 5.0
"""For what was written before the end to arrive after it."""
DEAF_SECONDS = 10.0
"""An engine that has not ended a container so long after it was told to is not waited for."""
HEARSAY_SECONDS = 1.0
"""For the engine's word that it sent the signal which a step seems to have died of."""
BEGIN_SECONDS = 5.0
"""For a container that waits to begin."""
STOPPED = "the container engine stopped the step, as it restarts or was told to by somebody else"
WENT = "the container engine went away while the step ran"
_SIGNALLED = (128 + signal.SIGTERM, 128 + signal.SIGKILL)
_STDERR = 2


class Container:
    """Once `start` has returned it runs, and `ended` resolves in any case, the engine's death included. `on_ended` is called before."""

    error = ""

    def __init__(self, engine: Engine, container: DockerContainer, image: Image, memory: int, job: Job, on_ended: Callable[[], object]) -> None:
        """`memory`: its limit, in bytes."""
        self.image = image.exact
        self.reference = image.reference
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[int] = self._loop.create_future()
        self._engine = engine
        self._container = container
        self._memory = memory
        self._job = job
        self._on_ended = on_ended
        self._stream: Attached | None = None
        self._early: list[Message] = []
        """What came while we listened for something else."""
        self._more = asyncio.Event()
        self._over = False
        self._stopped = asyncio.Event()
        """By somebody else than us."""
        self._pid = 0
        self._timer: asyncio.TimerHandle | None = None
        self._following: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Attached first: nothing that it writes is lost. Raises CannotRun."""
        try:
            with self._engine.translated():
                self._stream = await self._container.attach(stdout=True, stderr=True).__aenter__()
                await self._container.start()
        except BaseException:
            await self._close()
            raise
        self._following = self._do(self._follow())

    async def begin(self, stream: Attached, message: bytes) -> bool:
        """Instead of `start`, if it waits: tell it what to run. False: it is good for nothing, and nothing of the step has run. Raises CannotRun
        when something may have."""
        self._stream = stream
        try:
            async with asyncio.timeout(BEGIN_SECONDS):
                try:
                    with self._engine.translated():
                        await stream.write_in(message)
                except (CannotRun, AssertionError, RuntimeError):  # aiodocker asserts that it is connected
                    return False
                begun = await self._begins(stream)
        except TimeoutError:
            begun = False
            await self._never_began(stream)
        if begun:
            self._following = self._do(self._follow())
        return begun

    async def _begins(self, stream: Attached) -> bool:
        """Read until it says that it begins, or says nothing any more."""
        with self._engine.translated():
            while (said := await stream.read_out()) is not None:
                if said.stream != _STDERR and said.data.startswith(BEGUN):
                    if rest := said.data.removeprefix(BEGUN):
                        self._early.append(Message(said.stream, rest))
                    return True
                self._early.append(said)
        return False

    async def _never_began(self, stream: Attached) -> None:
        """It, or the engine, or this process was too slow, and it may begin yet: once it is gone, all that it said can be read. Raises CannotRun."""
        await self._engine.remove(self._container.id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                if not await self._begins(stream):
                    return
        raise CannotRun("the container engine was too slow: the step may have begun")

    def interrupt(self, grace: float) -> None:
        if self._timer is None and not self.ended.done():
            self._do(self._signal("SIGTERM"))
            self._timer = self._loop.call_later(grace, self.kill)

    def kill(self) -> None:
        if not self.ended.done():
            self._do(self._signal("SIGKILL"))
            self._cancel_timer()
            self._timer = self._loop.call_later(DEAF_SECONDS, self._give_up)

    def resume(self) -> None:
        self._more.set()

    def on_signalled(self) -> None:
        """The engine says that it sent a signal. If we did not ask for it, what the step ends with is not its own doing."""
        if self._timer is None:
            self._stopped.set()

    def _do(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _follow(self) -> None:
        reading = self._loop.create_task(self._read())
        reading.add_done_callback(self._on_read)
        try:
            with self._engine.translated():
                waiting = self._loop.create_task(self._container.wait())
                try:
                    self._pid = (await self._container.show())["State"]["Pid"]
                    code = int((await waiting)["StatusCode"])
                finally:
                    waiting.cancel()
                self._over = True
                self._more.set()
                await asyncio.wait([reading], timeout=LINGER_SECONDS)
                if code:
                    await self._explain()
            lost = _failure(reading)
            if lost is not None:
                self._finish(0, CannotRun(f"what the step wrote was lost: {type(lost).__name__}"))
            else:
                self._finish(code, CannotRun(STOPPED) if await self._was_stopped(code) else None)
        except EngineGone:
            self._kill_here()
            self._finish(0, CannotRun(STOPPED) if self._stopped.is_set() else EngineGone(WENT))
        except CannotRun as error:
            self._finish(0, error)
        except Exception as error:
            self._finish(0, CannotRun(f"worker: {type(error).__name__}"))
            raise
        finally:
            reading.cancel()
            await asyncio.wait([reading])
            await self._close()

    async def _read(self) -> None:
        assert self._stream is not None
        early, self._early = self._early, []
        while (message := early.pop(0) if early else await self._stream.read_out()) is not None:
            more = self._job.on_output("stderr" if message.stream == _STDERR else "stdout", message.data)
            if not more and not self._over:
                self._more.clear()
                await self._more.wait()

    def _on_read(self, reading: "asyncio.Task[None]") -> None:
        """A step that nobody reads would write for nobody, or wait for ever."""
        if _failure(reading) is not None:
            self.kill()

    async def _explain(self) -> None:
        state = (await self._container.show())["State"]
        if state.get("OOMKilled"):
            self.error = f"out of memory (limit {self._memory >> 20} MiB)"

    async def _was_stopped(self, code: int) -> bool:
        """What the engine says of a signal, or of memory that is used up, may come after the end."""
        if self._timer is None and not self.error and code in _SIGNALLED:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(HEARSAY_SECONDS):
                    await self._stopped.wait()
            if not self._stopped.is_set():
                await self._explain()
                if not self.error and code == 128 + signal.SIGKILL:  # the engine may have missed it: the group was gone before it looked
                    self.error = f"killed by SIGKILL, by itself or for want of memory (limit {self._memory >> 20} MiB)"
        return self._stopped.is_set()

    async def _signal(self, name: str) -> None:
        # It may have ended meanwhile; and whether an engine is gone is seen by who waits for the end.
        with contextlib.suppress(CannotRun), self._engine.translated():
            await self._container.kill(signal=name)

    def _give_up(self) -> None:
        self._kill_here()
        self._finish(0, EngineGone("the container engine did not end the step"))
        if self._following is not None:
            self._following.cancel()

    def _kill_here(self) -> None:
        """Without the engine: by the process, if it is one of this machine, and ours to kill."""
        with contextlib.suppress(OSError):
            if self._pid and self._container.id in Path(f"/proc/{self._pid}/cgroup").read_text():
                os.kill(self._pid, signal.SIGKILL)

    def _finish(self, code: int, error: CannotRun | None) -> None:
        self._cancel_timer()
        if self.ended.done():
            return
        self._on_ended()
        if error is None:
            self.ended.set_result(code)
        else:
            self.ended.set_exception(error)
            self.ended.exception()  # it need not be asked for

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def _close(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            with contextlib.suppress(Exception):
                await stream.close()


def _failure(task: "asyncio.Task[None]") -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None
