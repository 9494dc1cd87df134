"""The five services as `up` runs them: the settings each one gets, and what they are forked with.

Imported when the servers are up already, because it imports everything that the services need.
"""

import hashlib
import os
import socket
from collections.abc import Mapping

import msgspec

import services.artifacts.__main__
import services.builds.__main__
import services.gateway.__main__
import services.scheduler.__main__
import services.worker.__main__
from libs.eventlog.migrate import role_of
from libs.tokens import public_key
from penstock.up.datadir import FIRST_TEAM, LOCAL_WORKER, DataDir, Ports, Secrets
from penstock.up.service import Main, ServiceSpec


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What `up` can be told about the services; None leaves it to them."""

    slots: int | None = None
    sandbox: str | None = None
    lease_seconds: float | None = None
    store: str


_STORE_ACCESS = ("AWS_", "GOOGLE_", "AZURE_")
"""Variables that say how to reach a store by URL, in the words of those stores."""


def service_specs(
    data: DataDir, secrets: Secrets, ports: Ports, options: Options, gateway: socket.socket, environ: Mapping[str, str]
) -> list[ServiceSpec]:
    """In the order in which they start. `gateway` is its bound socket; `environ` is the caller's, of which little is handed on."""
    base = {
        # The data folder stands in for a home: what libraries look for there (`~/.postgresql`, `~/.netrc`) must not depend on who calls.
        "HOME": str(data.path),
        "PATH": environ.get("PATH", os.defpath),
        "LANG": "C.UTF-8",
        **{name: environ[name] for name in ("TMPDIR", "TZ") if name in environ},
    }
    # The supervisor never runs two of a kind, so whoever is started again may take its predecessor for dead.
    only = {"PENSTOCK_INSTANCE": "local"}
    artifacts_url = f"http://127.0.0.1:{ports.artifacts}"

    nats_url = f"nats://127.0.0.1:{ports.nats}"

    def bus(service: str) -> dict[str, str]:
        return {"PENSTOCK_NATS_URL": nats_url, "PENSTOCK_NATS_SEED": secrets.bus_keys[service]}

    def database(service: str) -> dict[str, str]:
        # Generated passwords are base64url: nothing in them needs quoting.
        return {"PENSTOCK_DATABASE_URL": f"postgresql://{role_of(service)}:{secrets.database[service]}@127.0.0.1:{ports.postgres}/postgres"}

    def spec(name: str, main: Main, settings: Mapping[str, str], spare: bool = False, **sockets: socket.socket) -> ServiceSpec:
        sockets["status"] = socket.create_server(("127.0.0.1", 0), backlog=64)
        return ServiceSpec(name=name, main=main, environ={**base, **settings}, sockets=sockets, log=data.log(name), spare=spare)

    return [
        spec(
            "gateway",
            services.gateway.__main__.main,
            {
                **bus("gateway"),
                **database("gateway"),
                "PENSTOCK_ARTIFACTS_URL": artifacts_url,
                "PENSTOCK_ARTIFACTS_PUBLIC_URL": artifacts_url,
                "PENSTOCK_GRANT_KEY": secrets.grant_key,
                "PENSTOCK_BOOTSTRAP_TEAM": FIRST_TEAM,
                "PENSTOCK_BOOTSTRAP_TOKEN_SHA256": hashlib.sha256(secrets.token.encode()).hexdigest(),
                "PENSTOCK_BOOTSTRAP_WORKERS": f"{LOCAL_WORKER}={public_key(secrets.worker_key)}",
                "PENSTOCK_SERVER_PUBLIC_KEY": public_key(secrets.server_key),
            },
            http=gateway,
        ),
        spec("builds", services.builds.__main__.main, {**bus("builds"), **database("builds"), **only}),
        spec(
            "scheduler",
            services.scheduler.__main__.main,
            {
                **bus("scheduler"),
                **database("scheduler"),
                **only,
                "PENSTOCK_ARTIFACTS_URL": artifacts_url,
                "PENSTOCK_SERVER_KEY": secrets.server_key,
                "PENSTOCK_CALLOUT_SEED": secrets.callout_key,
                "PENSTOCK_SECRET_KEYS_FILE": str(data.master_keys),
                **_given("PENSTOCK_LEASE_SECONDS", options.lease_seconds),
            },
        ),
        spec(
            "artifacts",
            services.artifacts.__main__.main,
            {
                **bus("artifacts"),
                **database("artifacts"),
                **only,
                "PENSTOCK_STORE_URL": options.store,
                **_store_access(options.store, environ),
                "PENSTOCK_GRANT_PUBLIC_KEY": public_key(secrets.grant_key),
                "PENSTOCK_SERVER_PUBLIC_KEY": public_key(secrets.server_key),
            },
            http=socket.create_server(("127.0.0.1", ports.artifacts), backlog=1024),
        ),
        spec(
            "worker",
            services.worker.__main__.main,
            {
                "PENSTOCK_NATS_URL": nats_url,
                "PENSTOCK_WORKER_NAME": LOCAL_WORKER,
                "PENSTOCK_WORKER_KEY": secrets.worker_key,
                "PENSTOCK_SERVER_PUBLIC_KEY": public_key(secrets.server_key),
                "PENSTOCK_GATEWAY_PUBLIC_KEY": public_key(secrets.grant_key),
                "PENSTOCK_SERVER_URL": f"http://127.0.0.1:{ports.gateway}",
                "PENSTOCK_WORKER_DIR": str(data.workers / LOCAL_WORKER),
                "PENSTOCK_WORKER_BUILD_LIMIT": str(options.slots or max(8, 4 * (os.cpu_count() or 1))),
                **_given("PENSTOCK_WORKER_SANDBOX", options.sandbox),
                **_given("PENSTOCK_WORKER_DOCKER_URL", environ.get("DOCKER_HOST")),
            },
            spare=True,  # it may have been revoked, and others do the work
        ),
    ]


def _store_access(url: str, environ: Mapping[str, str]) -> dict[str, str]:
    return {} if url.startswith("file:") else {name: value for name, value in environ.items() if name.startswith(_STORE_ACCESS)}


def _given(name: str, value: object) -> dict[str, str]:
    return {} if value is None else {name: f"{value:g}" if isinstance(value, float) else str(value)}
