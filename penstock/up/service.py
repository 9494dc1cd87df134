"""One service as a forked child: what it is given, how it is asked whether it is ready, how it ends."""

import http.client
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from penstock.up.processes import die_with_parent, name_process
from penstock.up.signals import Signals
from proto.private import Private

Main = Callable[[Mapping[str, str], Mapping[str, socket.socket]], None]


class ServiceSpec(Private, frozen=True, kw_only=True):
    """`main` runs in the child until it is told to stop, with `environ` as its whole environment. `sockets` are bound and listening, and outlive the
    child, so that whoever calls while it restarts waits instead of being refused; `status` among them answers `/readyz`. `spare`: the system may
    serve without it for a while."""

    name: str
    main: Main
    environ: dict[str, str]
    sockets: dict[str, socket.socket]
    log: Path
    spare: bool = False

    @property
    def status(self) -> str:
        """`host:port` of `/livez`, `/readyz` and `/metrics`."""
        host, port = self.sockets["status"].getsockname()[:2]
        return f"{host}:{port}"


class ForkedService:
    """A service's process. It is forked from a parent that has imported everything, in a session of its own (a terminal's Ctrl-C is the supervisor's
    to handle), and is killed by the kernel if the parent dies."""

    def __init__(self, spec: ServiceSpec, signals: Signals, not_its_own: Iterable[socket.socket] = (), descriptors: Iterable[int] = ()) -> None:
        self.spec = spec
        self._signals = signals
        self._not_its_own = tuple(not_its_own)
        self._descriptors = tuple(descriptors)
        self._pid: int | None = None
        self.exit_code: int | None = None

    @property
    def pid(self) -> int:
        if self._pid is None:
            raise ProcessLookupError(f"{self.spec.name} does not run")
        return self._pid

    def start(self) -> None:
        parent = os.getpid()
        # Whatever arrives between the fork and the child's own handlers must neither be lost in it nor be counted as the parent's.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            pid = os.fork()
            if pid == 0:
                self._child(parent, mask)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._pid, self.exit_code = pid, None

    def _child(self, parent: int, mask: Iterable[int]) -> None:
        code = 70
        try:
            die_with_parent(signal.SIGKILL, parent)
            os.setsid()
            name_process(self.spec.name)
            _become_quiet(self.spec.log)
            self._signals.forget()
            for other in self._not_its_own:
                other.close()
            for descriptor in self._descriptors:
                os.close(descriptor)
            os.environ.clear()
            os.environ.update(self.spec.environ)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self.spec.main(self.spec.environ, self.spec.sockets)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def running(self) -> bool:
        if self._pid is None:
            return False
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid:
            self._pid, self.exit_code = None, os.waitstatus_to_exitcode(status)
        return self._pid is not None

    def send(self, number: signal.Signals) -> None:
        """Signal the process, if it runs."""
        if self.running():
            os.kill(self.pid, number)

    def unready(self, timeout: float = 0.5) -> str | None:
        """Why `/readyz` does not answer 200; None when it does."""
        return why_unready(self.spec.status, timeout)


def why_unready(status: str, timeout: float = 0.5) -> str | None:
    """Ask a service's `/readyz` (`status` is `host:port`): None when it is ready, else what it waits for."""
    host, _, port = status.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=timeout)
    try:
        connection.request("GET", "/readyz", headers={"Connection": "close"})
        response = connection.getresponse()
        body = response.read(65536)
    except (OSError, http.client.HTTPException) as error:
        return f"does not answer ({type(error).__name__})"
    finally:
        connection.close()
    if response.status == 200:
        return None
    try:
        return "; ".join(f"{name} {why}" for name, why in json.loads(body).items())
    except (ValueError, AttributeError):
        return f"answers {response.status}"


def _become_quiet(log: Path) -> None:
    """stdin from nowhere, stdout and stderr appended to the log."""
    nowhere = os.open(os.devnull, os.O_RDONLY)
    written = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(nowhere, 0)
    os.dup2(written, 1)
    os.dup2(written, 2)
    os.close(nowhere)
    os.close(written)
