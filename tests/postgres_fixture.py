"""A real Postgres for tests: one cluster for each test process, one database for each test, cloned from a migrated template."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import asyncpg
import pytest

from libs.embedded.postgres import EmbeddedPostgres
from libs.eventlog.migrate import migrate, role_of
from proto.catalogue import SERVICES

PASSWORDS: Mapping[str, str] = {service: f"{service}-secret" for service in SERVICES}
TEMPLATE = "template_penstock"
FAST: Mapping[str, str] = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
"""For a cluster whose loss in a power cut hurts nobody."""


class Database:
    """A migrated, empty database of one test."""

    def __init__(self, cluster: EmbeddedPostgres, name: str) -> None:
        self.cluster = cluster
        self.name = name

    def url(self, role: str) -> str:
        """For a service's name, that service's role; for "postgres" the superuser."""
        if role == "postgres":
            return self.cluster.dsn(db=self.name)
        return self.cluster.dsn(role_of(role), PASSWORDS[role], self.name)


@contextmanager
def postgres_cluster(settings: Mapping[str, str] = FAST) -> Iterator[EmbeddedPostgres]:
    """A cluster of one's own, for a test that stops it; `settings={}` for a durable one."""
    folder = Path(tempfile.mkdtemp(prefix="penstock-postgres-"))
    cluster = EmbeddedPostgres(folder / "pg", 0, folder / "log", uuid4().hex, settings)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


async def make_template(cluster: EmbeddedPostgres) -> None:
    connection = await asyncpg.connect(cluster.dsn())
    try:
        await connection.execute(f"CREATE DATABASE {TEMPLATE}")
    finally:
        await connection.close()
    await migrate(cluster.dsn(db=TEMPLATE), PASSWORDS)


@pytest.fixture(scope="session")
def postgres() -> Iterator[EmbeddedPostgres]:
    """The cluster of this test process; `postgres.dsn()` is the superuser's. Not to be stopped: take `postgres_cluster` for that."""
    with postgres_cluster() as cluster:
        asyncio.run(make_template(cluster))
        yield cluster


@pytest.fixture
async def database(postgres: EmbeddedPostgres) -> AsyncIterator[Database]:
    name = f"test_{uuid4().hex}"
    connection = await asyncpg.connect(postgres.dsn())
    try:
        # a third of the work of the usual way, which writes every page of it to the log
        await connection.execute(f"CREATE DATABASE {name} TEMPLATE {TEMPLATE} STRATEGY FILE_COPY")
        yield Database(postgres, name)
        await connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await connection.close()
