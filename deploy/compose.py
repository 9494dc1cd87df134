"""What docker-compose.yml needs beside itself.

`python deploy/compose.py prepare` writes `deploy/generated/`: keys, the database's passwords, the NATS configuration, and one env file for each
service, so that each container is given only what is its own. Run it once; it never overwrites. `python deploy/compose.py migrate` brings the
database up to date; the compose file runs it in a container. `migrate --restored` also tells everyone that the database is not what it was: after a
restore, or a failover that may have lost a tail. `python deploy/compose.py worker` is a worker's container.
"""

import asyncio
import hashlib
import os
import secrets
import signal
import sys
from pathlib import Path

from libs.bus.accounts import callout_keys, server_config
from libs.eventlog.migrate import migrate, raise_epoch, role_of
from libs.tokens import new_seed, public_key
from proto.catalogue import SERVICES

WORKERS = ("worker-1", "worker-2")
GENERATED = Path(__file__).parent / "generated"


def prepare(folder: Path) -> str:
    """Write everything into `folder`, which must not exist; gives the first team's token."""
    folder.mkdir(mode=0o700)
    database = {user: secrets.token_urlsafe(24) for user in ("postgres", *SERVICES)}
    bus = {service: new_seed() for service in SERVICES}
    store = {"key": secrets.token_hex(10), "secret": secrets.token_urlsafe(30)}
    grant, server, callout = new_seed(), new_seed(), new_seed()
    worker_keys = {worker: new_seed() for worker in WORKERS}
    token = f"pst_{secrets.token_urlsafe(32)}"

    def write(name: str, **settings: str) -> None:
        path = folder / name
        path.touch(mode=0o600)
        path.write_text("".join(f"{key}={value}\n" for key, value in settings.items()))

    def service(name: str, **settings: str) -> None:
        url = f"postgresql://{role_of(name)}:{database[name]}@postgres:5432/postgres"
        write(f"{name}.env", PENSTOCK_DATABASE_URL=url, PENSTOCK_NATS_SEED=bus[name], **settings)

    write("postgres.env", POSTGRES_PASSWORD=database["postgres"])
    write("migrate.env", **{f"PASSWORD_{user.upper()}": password for user, password in database.items()})
    write("store.env", MINIO_ROOT_USER=store["key"], MINIO_ROOT_PASSWORD=store["secret"])
    service(
        "gateway",
        PENSTOCK_GRANT_KEY=grant,
        PENSTOCK_SERVER_PUBLIC_KEY=public_key(server),
        PENSTOCK_BOOTSTRAP_TOKEN_SHA256=hashlib.sha256(token.encode()).hexdigest(),
        PENSTOCK_BOOTSTRAP_WORKERS=",".join(f"{worker}={public_key(seed)}" for worker, seed in worker_keys.items()),
    )
    service("builds")
    service(
        "scheduler",
        PENSTOCK_SERVER_KEY=server,
        PENSTOCK_CALLOUT_SEED=callout,
        PENSTOCK_SECRET_KEYS=f"k1:{new_seed()}",
    )
    service(
        "artifacts",
        PENSTOCK_GRANT_PUBLIC_KEY=public_key(grant),
        PENSTOCK_SERVER_PUBLIC_KEY=public_key(server),
        AWS_ACCESS_KEY_ID=store["key"],
        AWS_SECRET_ACCESS_KEY=store["secret"],
    )
    for worker, seed in worker_keys.items():
        write(
            f"{worker}.env",
            PENSTOCK_WORKER_NAME=worker,
            PENSTOCK_WORKER_KEY=seed,
            PENSTOCK_SERVER_PUBLIC_KEY=public_key(server),
            PENSTOCK_GATEWAY_PUBLIC_KEY=public_key(grant),
        )
    config = folder / "nats.conf"
    config.touch(mode=0o600)
    config.write_text(
        server_config(
            port=4222,
            listen_host="0.0.0.0",  # noqa: S104  the container's own network
            store_dir=Path("/data"),
            services={name: public_key(seed) for name, seed in bus.items()},
            callout=callout_keys(callout),
        )
    )
    return token


async def bring_up_to_date(restored: bool) -> None:
    """Migrate the database; when it was put back as it was some time ago, begin a new epoch."""
    passwords = {user: os.environ[f"PASSWORD_{user.upper()}"] for user in ("postgres", *SERVICES)}
    dsn = f"postgresql://postgres:{passwords.pop('postgres')}@postgres:5432/postgres"
    await migrate(dsn, passwords)
    if restored:
        await raise_epoch(dsn)


def work() -> None:
    """Be a worker. One that was revoked or removed stays until it is stopped, and is unhealthy: Docker would start it again for ever."""
    from proto.introduction import EXPELLED
    from services.worker.__main__ import main

    try:
        main(os.environ, {})
    except SystemExit as end:
        if end.code != EXPELLED:
            raise
        stops = {signal.SIGTERM, signal.SIGINT}
        signal.pthread_sigmask(signal.SIG_BLOCK, stops)
        print("this container waits to be stopped: to start it again is of no use", file=sys.stderr, flush=True)
        signal.sigwait(stops)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["prepare"] if GENERATED.exists():
            sys.exit(f"{GENERATED} is there already: it holds the keys of what runs with it")
        case ["prepare"]:
            print(f"The first token, for `penstock login --url http://localhost:7420`: {prepare(GENERATED)}")
        case ["migrate"]:
            asyncio.run(bring_up_to_date(restored=False))
        case ["migrate", "--restored"]:
            asyncio.run(bring_up_to_date(restored=True))
        case ["worker"]:
            work()
        case _:
            sys.exit("usage: compose.py prepare | migrate [--restored] | worker")
