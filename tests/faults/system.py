"""A whole Penstock of a test's own: `penstock up` in a folder, its processes to be hurt, and nothing of it left in the end."""

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
from nats.aio.client import Client as NatsClient

from libs.eventlog.migrate import role_of
from penstock.client import Client
from penstock.client.targets import read_targets
from penstock.up.datadir import DataDir, Ports, Run
from penstock.up.processes import Identity, identify, is_alive, send
from penstock.up.service import why_unready
from proto.catalogue import decode
from proto.envelope import Fact
from tests.controls import eventually
from tests.faults.clocks import environment
from tests.faults.processes import Process, concerned, descendants
from tests.nats_fixture import bare_client

SERVICES = ("gateway", "builds", "scheduler", "artifacts", "worker")
LEASE_SECONDS = 2.0
BACK_SECONDS = 30.0
"""Within this, whatever is killed is back and ready, on a machine that has other things to do."""


class System:
    """`home` holds the data folder and the targets. `mark` is in the environment of every step, so that none can hide. `wrapped` is a command that
    `up` is run by. `edges`: the folder from which the services' edges are controlled (`tests.faults.edges`). `engine`: a Docker engine's URL.
    `clocks`: by how many seconds the clock of each service's machine is ahead.
    `host`: the address of ours at which the bus and the artifacts service listen."""

    def __init__(
        self,
        home: Path,
        *,
        sandbox: str | None = None,
        slots: int = 4,
        wrapped: Sequence[str] = (),
        edges: Path | None = None,
        engine: str = "",
        clocks: Mapping[str, float] | None = None,
        host: str = "127.0.0.1",
        lease: float = LEASE_SECONDS,
    ) -> None:
        self.home = home
        self.data = DataDir(home / "data")
        self.mark = f"mark-{secrets.token_hex(8)}"
        self.environ = {
            "PATH": os.environ.get("PATH", os.defpath),
            "HOME": str(home),
            "LANG": "C.UTF-8",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PENSTOCK_DATA": str(self.data.path),
            "PENSTOCK_TARGETS": str(home / "targets.json"),
        }
        self._host = host
        if engine:
            self.environ["DOCKER_HOST"] = engine
        if edges is not None or host != "127.0.0.1":
            # What Python imports at its start from the folder `start` changes what the supervisor runs.
            self.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent / "start"), *sys.path])
            self.environ |= {"PENSTOCK_TEST_HOST": host, **({"PENSTOCK_TEST_EDGES": str(edges)} if edges else {})}
        self.environ |= environment(clocks) if clocks else {}
        self._options = ["--port", "0", "--slots", str(slots), "--lease-seconds", f"{lease:g}"]
        self._options += ["--sandbox", sandbox] if sandbox else []
        self.wrapped = list(wrapped)

    # --- the system as a whole

    def up(self, *options: str) -> None:
        said = self._penstock("up", "--detach", *self._options, *options, wrapped=self.wrapped)
        assert said.returncode == 0, f"{said.stderr}\n{self.last_words()}"
        target = read_targets(self.home / "targets.json").targets["local"]
        self.url, self.token, self.team = target.url, target.token, target.team

    def down(self) -> None:
        said = self._penstock("down")
        assert said.returncode == 0, f"{said.stderr}\n{self.last_words()}"

    def _penstock(self, *words: str, wrapped: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
        command = [*wrapped, sys.executable, "-P", "-m", "penstock", *words]
        return subprocess.run(command, env=self.environ, cwd=self.home, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=110)

    def last_words(self, size: int = 3000) -> str:
        """The ends of all its logs."""
        return "".join(f"\n--- {log.name}\n{log.read_text('utf-8', 'replace')[-size:]}" for log in sorted(self.data.logs.glob("*.log")))

    def broken_services(self) -> list[str]:
        """What ended although nobody killed it: no fault of another part may do that to a service. One that hears of a new epoch may, and says so."""
        ends = Counter(re.findall(r"(\S+) exited with (\d+)", self.data.log("supervisor").read_text()))
        for name in {name for name, code in ends if code == "0"}:
            ends[name, "0"] -= self.data.log(name).read_text().count("the log's epoch was raised")
        return [f"{name} exited with {code}" for name, code in ends.elements()]

    # --- its processes

    def run(self) -> Run:
        run = self.data.run()
        assert run is not None
        return run

    def process(self, name: str) -> Identity:
        return self.run().supervisor if name == "supervisor" else self.run().children[name]

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> Identity:
        """Signal a service, `nats`, `postgres` or the `supervisor`, just started again perhaps; who was hit."""
        process = self.process(name)
        assert send(process, number), f"{name} does not run"
        return process

    async def back(self, name: str, before: Identity) -> None:
        """Until another process does the work and all is ready."""
        await eventually(lambda: self.run().children.get(name, before) != before, timeout=BACK_SECONDS)
        await self.ready()

    async def ready(self) -> None:
        await eventually(lambda: [why for status in self.run().status.values() if (why := why_unready(status))] == [], timeout=BACK_SECONDS)

    def unready(self, name: str) -> str | None:
        """Why a service is not ready."""
        return why_unready(self.run().status[name])

    @contextmanager
    def stopped(self, name: str) -> Iterator[None]:
        """SIGSTOP, and in the end SIGCONT, for the process that has the name now."""
        process = self.kill(name, signal.SIGSTOP)
        try:
            yield
        finally:
            send(process, signal.SIGCONT)

    @contextmanager
    def hanging(self, name: str) -> Iterator[None]:
        """As `stopped`, with everything that descends from it."""
        family = [process for pid in descendants(self.process(name).pid) if (process := identify(pid))]
        for process in family:
            send(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in family:
                send(process, signal.SIGCONT)

    @contextmanager
    def without(self, name: str) -> Iterator[None]:
        """Killed, and not started again before the end."""
        with self.stopped("supervisor"):
            process = self.kill(name)
            while is_alive(process):
                pass
            yield

    def steps(self) -> list[Process]:
        """What runs of the builds."""
        return concerned(self.mark)

    def leftovers(self) -> list[Process]:
        """Everything that runs of this system, services and steps."""
        found = {process.pid: process for words in (str(self.home), self.mark) for process in concerned(words)}
        return list(found.values())

    # --- ways in

    def client(self, patience: float = 60.0) -> Client:
        return Client(self.url, self.token, self.team, patience=patience)

    async def database(self, role: str = "postgres") -> "asyncpg.Connection[Any]":
        """A connection as the superuser, or as a service's role."""
        password = self.data.secrets().database[role]
        user = role if role == "postgres" else role_of(role)
        return await asyncpg.connect(host="127.0.0.1", port=self.ports.postgres, user=user, password=password, database="postgres", ssl=False)

    async def log(self, category: str = "") -> list[Fact]:
        """The event log itself, in order: all of it, or one category."""
        connection = await self.database()
        try:
            rows = await connection.fetch("SELECT * FROM eventlog.event WHERE stream LIKE $1 ORDER BY position", f"{category}%")
        finally:
            await connection.close()
        return [_fact(row) for row in rows]

    @asynccontextmanager
    async def bus(self) -> AsyncIterator[NatsClient]:
        """A connection with the rights of the builds service."""
        connection = await bare_client(self.bus_url(), self.data.secrets().bus_keys["builds"], "test")
        try:
            yield connection
        finally:
            await connection.close()

    def bus_url(self) -> str:
        return f"nats://{self._host}:{self.ports.nats}"

    @property
    def ports(self) -> Ports:
        return msgspec.json.decode((self.data.path / "ports.json").read_bytes(), type=Ports)


def _fact(row: Mapping[str, Any]) -> Fact:
    named = {
        name: row[name] for name in ("position", "stream", "version", "event_id", "team", "correlation_id", "causation_id", "actor", "recorded_at")
    }
    return Fact(**named, event=decode(row["type"], row["data"].encode()))


@contextmanager
def running(template: Path, **options: Any) -> Iterator[System]:
    """A system that runs; in the end it is stopped, and must have left nothing. `template` is a data folder that was used before: a first start
    without its longest part."""
    home = Path(tempfile.mkdtemp(prefix="penstock-faults-"))
    system = System(home, **options)
    try:
        shutil.copytree(template, system.data.path, symlinks=True)
        (system.data.path / "ports.json").unlink()
        system.up()
        yield system
        system.down()
        assert (left := system.leftovers()) == [], "\n".join(map(str, left))
        assert (broken := system.broken_services()) == [], broken
    finally:
        system._penstock("down")
        for process in system.leftovers():
            os.kill(process.pid, signal.SIGKILL)
        if "PENSTOCK_FAULTS_KEEP" not in os.environ:
            shutil.rmtree(home)
