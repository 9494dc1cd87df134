"""A whole system in a data folder, from its lock to its end."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from libs.bus.accounts import callout_keys, server_config
from libs.embedded.nats import EmbeddedNats
from libs.embedded.postgres import EmbeddedPostgres
from libs.tokens import public_key
from penstock.client.errors import NoTarget
from penstock.client.private import write_private
from penstock.client.targets import Target, Targets, read_targets, write_targets
from penstock.up.datadir import FIRST_TEAM, USUAL_PORT, DataDir, OtherStore, Ports, Run, Secrets
from penstock.up.processes import identify, is_alive, send
from penstock.up.service import ForkedService, ServiceSpec
from penstock.up.signals import Signals
from penstock.up.supervisor import Interrupted, Say, StartFailed, Supervisor
from proto.catalogue import SERVICES

LOCAL_TARGET = "local"
STOPPING = "stopping (once more: at once)"


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What `up` was asked for. `data` and `targets` are absolute paths. `port`: the gateway's, exactly; 0 for a free one; otherwise the
    usual one, or a free one when that is taken. `store`: the URL of the object store; a folder in `data` by default. `restored`: the database is not
    what it was when it was last used."""

    data: str
    targets: str
    port: int | None = None
    slots: int | None = None
    sandbox: str | None = None
    lease_seconds: float | None = None
    store: str | None = None
    restored: bool = False


class AlreadyRunning(Exception):
    """Another supervisor has the data folder."""


class System:
    """Runs once: `serve` returns when the system has ended in order. Raises AlreadyRunning, StartFailed, and Interrupted when it was asked to stop
    before it served; nothing is left running in any case."""

    def __init__(self, request: Request, say: Say, environ: Mapping[str, str]) -> None:
        self._request = request
        self._say = say
        self._environ = environ
        self._data = DataDir(Path(request.data))
        self._began = time.monotonic()

    def serve(self, ready: Say) -> None:
        """`ready` is called once, with the URL, when every service is ready."""
        try:
            self._data.prepare()
            lock = self._data.take()
        except OSError as error:
            raise StartFailed(f"the data folder cannot be used: {error}") from error
        if lock is None:
            raise AlreadyRunning
        try:
            with Signals() as signals:
                self._locked(lock, signals, ready)
        finally:
            os.close(lock)

    def _locked(self, lock: int, signals: Signals, ready: Say) -> None:
        self._bury_the_last()
        try:
            secrets = self._data.secrets()
        except msgspec.DecodeError as error:
            raise StartFailed(f"{self._data.path / 'secrets.json'} is spoilt, and the database does not open without it: {error}") from error
        try:
            store = self._data.store(self._request.store)
        except OtherStore as error:
            raise StartFailed(str(error)) from None
        ports, gateway = self._ports()
        url = f"http://127.0.0.1:{ports.gateway}"
        me = identify(os.getpid())
        assert me is not None
        run = Run(supervisor=me)
        children: dict[str, ForkedService] = {}

        def record() -> None:
            alive = {name: who for name, pid in supervisor.children().items() if (who := identify(pid))}
            status = {name: where for name, where in run.status.items() if name not in supervisor.gone}
            self._data.write_run(msgspec.structs.replace(run, children=alive, status=status))

        def prepare() -> Sequence[ForkedService]:
            migration = self._migrate(signals, lock, postgres, secrets)
            from penstock.up.services import Options, service_specs

            asked = self._request
            options = Options(slots=asked.slots, sandbox=asked.sandbox, lease_seconds=asked.lease_seconds, store=store)
            specs = service_specs(self._data, secrets, ports, options, gateway, self._environ)
            self._await(migration, signals)
            children.update((spec.name, self._fork(spec, specs, signals, lock)) for spec in specs)
            return list(children.values())

        postgres = EmbeddedPostgres(self._data.postgres, ports.postgres, self._data.log("postgres"), secrets.database["postgres"])
        names = ("postgres", "nats", *SERVICES, "worker")
        supervisor = Supervisor(
            servers={"postgres": postgres, "nats": self._nats(ports, secrets)},
            prepare=prepare,
            logs={name: self._data.log(name) for name in (*names, "supervisor")},
            signals=signals,
            say=self._say,
            changed=record,
        )
        self._data.write_run(run)
        self._say(f"starting Postgres, NATS and the services; data in {self._data.path}")
        if not (self._data.postgres / "PG_VERSION").exists():
            self._say("the first start makes the database")
        try:
            supervisor.boot()
            run = msgspec.structs.replace(run, url=url, status={name: child.spec.status for name, child in children.items()})
            record()
            self._announce(Target(url=url, token=secrets.token, team=FIRST_TEAM))
            if self._request.port is None and ports.gateway != USUAL_PORT:
                self._say(f"port {USUAL_PORT} is taken: listening on {ports.gateway} instead")
            self._say(f"ready in {time.monotonic() - self._began:.1f} s")
            ready(url)
            supervisor.watch()
            self._say(STOPPING)
        except Interrupted:
            self._say(STOPPING)
            raise
        finally:
            supervisor.shut_down()
            gateway.close()
            self._data.forget_run()
        self._say("stopped")

    def _bury_the_last(self) -> None:
        """After a kill -9 of the supervisor its children end by themselves; wait for that, and end what does not."""
        last = self._data.run()
        if last is None:
            return
        left = list(last.children.values())
        deadline = time.monotonic() + 10.0
        while left := [child for child in left if is_alive(child)]:
            if time.monotonic() > deadline:
                for child in left:
                    send(child, signal.SIGKILL)
            time.sleep(0.02)
        self._data.forget_run()

    def _announce(self, target: Target) -> None:
        """Name this system `local` in the targets file, where the command line finds it; it becomes the current one if there is none."""
        path = Path(self._request.targets)
        try:
            known = read_targets(path)
            targets = {**known.targets, LOCAL_TARGET: target}
            current = known.current if known.current in targets else LOCAL_TARGET
            write_targets(path, Targets(current=current, targets=targets))
        except (NoTarget, OSError) as error:
            raise StartFailed(f"the command line could not be told of it: {error}") from error

    def _ports(self) -> tuple[Ports, socket.socket]:
        wanted = self._request.port
        ports = self._data.ports(wanted)
        try:
            return ports, socket.create_server(("127.0.0.1", ports.gateway), backlog=1024)
        except OSError as error:
            raise StartFailed(f"the gateway cannot listen on 127.0.0.1:{ports.gateway}: {error.strerror}") from error

    def _nats(self, ports: Ports, secrets: Secrets) -> EmbeddedNats:
        config, listening = self._data.nats / "server.conf", self._data.nats / "ports"
        services = {service: public_key(secrets.bus_keys[service]) for service in SERVICES}
        callout = callout_keys(secrets.callout_key)
        try:
            text = server_config(port=ports.nats, store_dir=self._data.nats / "store", services=services, callout=callout, ports_file_dir=listening)
        except ValueError as error:
            raise StartFailed(f"the data folder cannot be used: {error}") from error
        write_private(config, text.encode())
        return EmbeddedNats(config, listening, self._data.log("nats"))

    def _migrate(self, signals: Signals, lock: int, postgres: EmbeddedPostgres, secrets: Secrets) -> ForkedService:
        """Bring the database up to date in a child, so that this process never runs an event loop, and meanwhile can import."""
        from libs.eventlog.migrate import migrate, raise_epoch

        async def prepare() -> None:
            await migrate(postgres.dsn(), secrets.database)
            if self._request.restored:
                await raise_epoch(postgres.dsn())

        def main(environ: Mapping[str, str], sockets: Mapping[str, socket.socket]) -> None:
            asyncio.run(prepare())

        spec = ServiceSpec(name="migrate", main=main, environ={"HOME": str(self._data.path)}, sockets={}, log=self._data.log("migrate"))
        child = ForkedService(spec, signals, descriptors=[lock])
        child.start()
        return child

    def _await(self, migration: ForkedService, signals: Signals) -> None:
        while migration.running():
            if signals.stops:
                migration.send(signal.SIGKILL)
                raise Interrupted
            signals.wait(1.0)
        if migration.exit_code != 0:
            raise StartFailed(f"the database cannot be brought up to date; see {migration.spec.log}")

    @staticmethod
    def _fork(spec: ServiceSpec, specs: Sequence[ServiceSpec], signals: Signals, lock: int) -> ForkedService:
        others = [sock for other in specs if other is not spec for sock in other.sockets.values()]
        return ForkedService(spec, signals, not_its_own=others, descriptors=[lock])
