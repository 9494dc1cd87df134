"""The data folder: what stays between one `up` and the next, and who is using it now."""

import fcntl
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import msgspec

from libs.tokens import new_seed
from penstock.client.private import write_private
from penstock.up.processes import Identity, free_port, is_free
from proto.catalogue import SERVICES
from proto.private import Private

T = TypeVar("T", bound=msgspec.Struct)

FIRST_TEAM = "main"
LOCAL_WORKER = "local"
USUAL_PORT = 7420


class Secrets(Private, frozen=True, kw_only=True):
    """All that must stay unknown to others. Passwords of the database by user; keys as Ed25519 seeds (`bus_keys` by service, `callout_key` the
    schedulers'); `token` is the first team's first owner's."""

    database: dict[str, str]
    bus_keys: dict[str, str]
    callout_key: str
    grant_key: str
    server_key: str
    worker_key: str
    token: str


class Ports(msgspec.Struct, frozen=True, kw_only=True):
    """Where Postgres, NATS, the artifacts service and the gateway listen, on 127.0.0.1."""

    postgres: int
    nats: int
    artifacts: int
    gateway: int


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """The supervisor at work in a data folder. `url` is empty until it serves; `status` is where each service answers `/readyz`."""

    supervisor: Identity
    url: str = ""
    status: dict[str, str] = {}
    children: dict[str, Identity] = {}


class Store(msgspec.Struct, frozen=True):
    """Where artifacts are kept, as chosen at the first start; "" for the folder itself."""

    url: str = ""


class OtherStore(Exception):
    """The log in this folder tells of artifacts that are kept elsewhere than where it was told now."""


class DataDir:
    """One folder that holds everything: `pg nats blobs workers logs`, `secrets.json`, `master-keys`, `store.json`, `ports.json`, `run.json` and
    `lock`."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.postgres = self.path / "pg"
        self.nats = self.path / "nats"
        self.blobs = self.path / "blobs"
        self.workers = self.path / "workers"
        self.logs = self.path / "logs"
        self.master_keys = self.path / "master-keys"
        """Those of the secrets, as the schedulers read them: a file of its own, because others may come before the first one."""
        self._run = self.path / "run.json"

    def prepare(self) -> None:
        """Make what is missing. Raises OSError where the folder cannot be made or written."""
        for folder in (self.path, self.nats, self.blobs, self.workers, self.logs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def take(self) -> int | None:
        """The folder's lock, held until the descriptor is closed or its process ends; None while another has it."""
        descriptor = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        return descriptor

    def run(self) -> Run | None:
        """Who works here, or did when it was last written."""
        return _read(self._run, Run)

    def write_run(self, run: Run) -> None:
        write_private(self._run, msgspec.json.encode(run))

    def forget_run(self) -> None:
        self._run.unlink(missing_ok=True)

    def secrets(self) -> Secrets:
        """What was generated at the first start, a first master key with it. Raises msgspec.DecodeError for a spoilt file: what it held opens
        Postgres, and is not made anew."""
        path = self.path / "secrets.json"
        if path.exists():
            return msgspec.json.decode(path.read_bytes(), type=Secrets)
        made = Secrets(
            database={user: secrets.token_urlsafe(24) for user in ("postgres", *SERVICES)},
            bus_keys={service: new_seed() for service in SERVICES},
            callout_key=new_seed(),
            grant_key=new_seed(),
            server_key=new_seed(),
            worker_key=new_seed(),
            token=f"pst_{secrets.token_urlsafe(32)}",
        )
        write_private(self.master_keys, f"k1:{new_seed()}\n".encode())
        write_private(path, msgspec.json.encode(made))
        return made

    def store(self, wanted: str | None) -> str:
        """The URL of the object store: `wanted` at the first start (None: a folder in here), and that one ever after. Raises OtherStore."""
        path = self.path / "store.json"
        known = _read(path, Store)
        if known is None:
            known = Store(wanted or "")
            write_private(path, msgspec.json.encode(known))
        if wanted is not None and wanted != known.url:
            raise OtherStore(f"the artifacts of {self.path} are in {known.url or self.blobs}, not in {wanted}")
        return known.url or self.blobs.as_uri()

    def ports(self, gateway: int | None) -> Ports:
        """The ports of the last time where they are still free, so that a restart changes nothing. `gateway`: exactly this one, or with 0 any but
        the usual one, or with None the usual one, if it is free."""
        path = self.path / "ports.json"
        known = _read(path, Ports)
        taken: set[int] = {USUAL_PORT} | ({gateway} if gateway else set())

        def choose(*preferred: int | None) -> int:
            port = next((p for p in preferred if p and p not in taken and is_free(p)), None) or free_port(taken)
            taken.add(port)
            return port

        ports = Ports(
            postgres=choose(known.postgres if known else None),
            nats=choose(known.nats if known else None),
            artifacts=choose(known.artifacts if known else None),
            gateway=gateway or (USUAL_PORT if gateway is None and is_free(USUAL_PORT) else choose(known.gateway if known else None)),
        )
        write_private(path, msgspec.json.encode(ports))
        return ports


def data_dir(given: Path | None, environ: Mapping[str, str]) -> DataDir:
    """`--data`, else PENSTOCK_DATA, else the user's own data folder."""
    if given is None and environ.get("PENSTOCK_DATA"):
        given = Path(environ["PENSTOCK_DATA"])
    if given is None:
        home = Path(environ["XDG_DATA_HOME"]) if environ.get("XDG_DATA_HOME") else Path.home() / ".local" / "share"
        given = home / "penstock"
    return DataDir(given)


def _read(path: Path, kind: type[T]) -> T | None:
    """What can be done without: None when it is missing or spoilt."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, msgspec.DecodeError):
        return None
