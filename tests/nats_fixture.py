"""A real nats-server for tests: one a session (and xdist worker), on a free port, with the accounts that `penstock up` gives it."""

import asyncio
import base64
import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client

from libs.bus.accounts import callout_keys, callout_seeds, server_config
from libs.bus.callout import Doorkeeper, connect_doorkeeper
from libs.bus.nkeys import nkey
from libs.tokens import new_seed, public_key, raw_signature

SERVICES = ("gateway", "builds", "scheduler", "artifacts")
SEEDS = {service: new_seed() for service in SERVICES}
CALLOUT = new_seed()
_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


class NatsServer:
    """`url` for every user; `seed` of a service. Its life is the test's to command; the port stays the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / "jetstream"
        self.seed = SEEDS["builds"]
        self.port = -1
        self._spawner = ThreadPoolExecutor(1)
        """What a thread spawned dies with that thread, and a test may start the server from one that ends with the test."""
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "nats.log").read_text(errors="replace")

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        assert not self.running
        config = self.folder / "nats.conf"
        config.write_text(
            server_config(
                port=self.port,
                store_dir=self.store,
                services={service: public_key(seed) for service, seed in SEEDS.items()},
                callout=callout_keys(CALLOUT),
                ports_file_dir=self.folder,
                log_file=self.folder / "nats.log",
            )
        )
        binary = Path(sysconfig.get_path("scripts")) / "nats-server"

        def spawn() -> "subprocess.Popen[bytes]":
            return subprocess.Popen(
                [binary, "-c", config],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

        self._process = self._spawner.submit(spawn).result()
        self._wait_ready(self._process)

    def kill(self) -> None:
        """kill -9."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def restart(self) -> None:
        """Killed and started again, on the same port with the same folder."""
        self.kill()
        self.start()

    def wipe(self) -> None:
        """Empty the JetStream folder of a server that is not running."""
        assert not self.running
        shutil.rmtree(self.store, ignore_errors=True)

    def pause(self) -> None:
        """It is there, and says nothing more, until `resume`."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def fresh(self) -> None:
        """Running, with no stream in it."""
        if self.running and not any(self.store.glob("jetstream/*/streams/*")):
            return
        self.kill()
        self.wipe()
        self.start()

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            if how != signal.SIGKILL:
                self._process.send_signal(signal.SIGCONT)
            self._process.send_signal(how)
            self._process.wait(20)
            self._process = None

    def _wait_ready(self, process: "subprocess.Popen[bytes]") -> None:
        ports = self.folder / f"nats-server_{process.pid}.ports"
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:
            assert process.poll() is None, f"nats-server ended at its start:\n{self.log}"
            try:
                if self.port == -1:
                    self.port = int(json.loads(ports.read_text())["nats"][0].rpartition(":")[2])
                with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                    if connection.recv(4) == b"INFO":
                        return
            except (OSError, ValueError):
                time.sleep(0.005)
        raise AssertionError(f"nats-server is not ready:\n{self.log}")


def _die_with_parent() -> None:
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A running server; whatever earlier tests left may still be in it. `fresh_nats` gives it empty."""
    server = NatsServer(tmp_path_factory.mktemp("nats"))
    server.start()
    yield server
    server.kill()


@pytest.fixture
def fresh_nats(nats_server: NatsServer) -> NatsServer:
    """The session's server, running, without any stream. A test may kill it: the next one finds it up again."""
    nats_server.fresh()
    return nats_server


@contextlib.asynccontextmanager
async def admitting(
    server: NatsServer, keys: Mapping[str, str], seconds: float = 600.0, knows: Callable[[], bool] = lambda: True
) -> AsyncIterator[Doorkeeper]:
    """What a scheduler does for those who are workers (public keys by name)."""
    async with connect_doorkeeper(server.url, callout_seeds(CALLOUT), keys.get, seconds, knows) as door:
        keeping = asyncio.create_task(door.keep(), name="door")
        try:
            yield door
        finally:
            keeping.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeping


async def bare_client(url: str, seed: str, name: str, **more: Any) -> Client:
    """A connection of nats-py's own, as whoever has this key, once."""
    client = Client()
    client._public_nkey, client._auth_configured = nkey(public_key(seed)), True

    def signed(nonce: str) -> bytes:
        return base64.urlsafe_b64encode(raw_signature(seed, nonce.encode())).rstrip(b"=")

    async def ignored(error: Exception) -> None: ...

    settings = {"allow_reconnect": False, "max_reconnect_attempts": 1, "connect_timeout": 5, "error_cb": ignored, **more}
    await client.connect(url, signature_cb=signed, name=name, **settings)
    return client
