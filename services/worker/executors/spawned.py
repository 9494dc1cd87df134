"""One running command: its pipes, its end.

No thread and no task for each process: pipes and a pidfd on the loop. The order at the end is always: the command has exited, everything
that it left is killed, the pipes are read to their end (what still holds one gets a second), `ended` resolves.
"""

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence

from services.worker.executors.executor import CannotRun, Stream
from services.worker.executors.orphans import Orphans
from services.worker.executors.processes import send_group
from services.worker.executors.sandboxes import Folders, Sandbox

READ = 1 << 18
BIG_PIPE = 1 << 20
LINGER_SECONDS = 1.0
_WORDS = 512
"""Bytes of what a sandbox says when it cannot run a command, at most."""


class Spawned:
    """A command that runs. `ended` resolves with the exit code, or minus the number of the signal that ended it; or with CannotRun, if its sandbox
    did not come up.

    Raises OSError when it cannot be spawned."""

    image = ""
    reference = ""
    error = ""

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        directory: str,
        folders: Folders,
        sandbox: Sandbox,
        orphans: Orphans,
        on_output: Callable[[Stream, bytes], bool],
    ) -> None:
        """`on_output` says whether it will take more now; if not, call `resume` when it will."""
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[int] = self._loop.create_future()
        self._sandbox = sandbox
        self._orphans = orphans
        self._on_output = on_output
        self._code: int | None = None
        self._began = False
        self._paused = False
        self._signalled: asyncio.TimerHandle | None = None
        self._linger: asyncio.TimerHandle | None = None
        self._big: set[int] = set()
        self._said = b""
        """How its stderr began."""
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as childs:

            def piped() -> tuple[int, int]:
                read, write = os.pipe()
                ours.callback(os.close, read)
                childs.callback(os.close, write)
                return read, write

            (out, out_child), (err, err_child), (self._told, tell) = piped(), piped(), piped()
            line, place = sandbox.command(argv, folders, directory, (self._told, tell))
            self._process = subprocess.Popen(
                line,
                stdin=tell if sandbox.tells_on == "stdin" else subprocess.DEVNULL,
                stdout=out_child,
                stderr=err_child,
                pass_fds=(self._told, tell) if sandbox.tells_on == "descriptor" else (),
                cwd=place,
                env=environment,
                start_new_session=True,
            )
            ours.pop_all()
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        orphans.on_started(self.pid, folders.root)
        self._pipes: dict[int, Stream] = {out: "stdout", err: "stderr"}
        os.set_blocking(self._told, False)
        for pipe in self._pipes:
            os.set_blocking(pipe, False)
            self._loop.add_reader(pipe, self._read, pipe)
        self._loop.add_reader(self._pidfd, self._exited)

    def interrupt(self, grace: float) -> None:
        """SIGTERM that reaches the task; SIGKILL for everything when that has not ended it within `grace` seconds."""
        if self._code is None and self._signalled is None:
            self._sandbox.terminate(self.pid)
            self._signalled = self._loop.call_later(grace, self.kill)

    def kill(self) -> None:
        """SIGKILL for everything."""
        if self._code is None:
            send_group(self.pid, signal.SIGKILL)

    def resume(self) -> None:
        """Read on, after `on_output` had enough."""
        if self._paused:
            self._paused = False
            for pipe in self._pipes:
                self._loop.add_reader(pipe, self._read, pipe)

    def _read(self, pipe: int) -> None:
        data = self._read_once(pipe)
        if data:
            more = self._on_output(self._pipes[pipe], data)
            if not more and not self._paused and self._code is None:
                self._paused = True
                for each in self._pipes:
                    self._loop.remove_reader(each)
        elif self._code is not None and not self._pipes:
            self._finish()

    def _read_once(self, pipe: int) -> bytes | None:
        """What is there; None when nothing is; b"" at the end, and then the pipe is closed."""
        try:
            data = os.read(pipe, READ)
        except BlockingIOError:
            return None
        if self._pipes[pipe] == "stderr" and len(self._said) < _WORDS:
            self._said = (self._said + data)[:_WORDS]
        if not data:
            self._close(pipe)
        elif len(data) >= 1 << 16 and pipe not in self._big:
            # Worth it only for those who write much: fewer, larger reads.
            self._big.add(pipe)
            with contextlib.suppress(OSError):
                fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, BIG_PIPE)
        return data

    def _close(self, pipe: int) -> None:
        self._loop.remove_reader(pipe)
        del self._pipes[pipe]
        os.close(pipe)

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        # While the leader is a zombie its pid, and so the group's number, is nobody else's.
        send_group(self.pid, signal.SIGKILL)
        self._code = self._process.wait()
        told = b""
        with contextlib.suppress(BlockingIOError):
            told = os.read(self._told, READ)
        os.close(self._told)
        self._began = self._sandbox.began(told)
        if self._signalled is not None:
            self._signalled.cancel()
        self._orphans.on_ended(self.pid)
        for pipe in list(self._pipes):
            # A pipe's worth was written before the end: it is read even when `on_output` had enough.
            total = 0
            while total < BIG_PIPE and (data := self._read_once(pipe)):
                total += len(data)
                self._on_output(self._pipes[pipe], data)
        if not self._pipes:
            self._finish()
            return
        self._paused = False
        for pipe in self._pipes:
            self._loop.add_reader(pipe, self._read, pipe)
        self._linger = self._loop.call_later(LINGER_SECONDS, self._finish)

    def _finish(self) -> None:
        if self._linger is not None:
            self._linger.cancel()
        for pipe in list(self._pipes):
            self._close(pipe)
        if not self.ended.done():
            assert self._code is not None
            if self._code > 0 and not self._began:
                self.ended.set_exception(CannotRun(f"the sandbox could not run it: {self._said.decode(errors='replace').strip()}"))
                self.ended.exception()  # it need not be asked for
            else:
                self.ended.set_result(self._code)
