"""The artifacts service killed, or put to sleep, before each of the steps of an upload: it goes on after a restart, nothing is sealed that is not
whole, and nothing is left over."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import aiohttp
import pytest

from libs.archives.tree import CHUNK
from libs.eventlog.postgres import PostgresLog, open_postgres_log
from tests.artifacts_fixture import Answer, Api, blob_stream, missing, running, serving, tar
from tests.controls import eventually
from tests.nats_fixture import NatsServer
from tests.postgres_fixture import Database

FILES = {"a": b"alpha", "big": os.urandom(CHUNK + 1000), "d/b": b"beta"}
MOST = 60
"""More steps than an upload has."""


@pytest.fixture
async def log(database: Database) -> AsyncIterator[PostgresLog]:
    async with open_postgres_log(database.url("postgres")) as log:
        yield log


async def by_manifest(api: Api, artifact: str) -> Answer:
    answer = await api.send_manifest(FILES, artifact)
    while answer.status in (200, 202):
        answer = await api.send_blobs(artifact, blob_stream(missing(FILES, answer.json)[:2]))
    return answer


async def by_tar(api: Api, artifact: str) -> Answer:
    return await api.upload(tar(FILES), artifact)


async def all_gone(log: PostgresLog, api: Api) -> None:
    """After everything was deleted, or lapsed."""
    await log.pool.execute("UPDATE artifacts.upload SET seen_at = seen_at - 7200")
    await eventually(lambda: api.stored() == [], timeout=20)
    for table in ("pack", "hold", "upload", "artifact"):
        assert await log.pool.fetchval(f"SELECT count(*) FROM artifacts.{table}") == 0, table


@pytest.mark.timeout(400)
@pytest.mark.parametrize("upload", [by_manifest, by_tar])
async def test_an_upload_goes_on_after_the_service_was_killed_at_any_step(
    upload, database: Database, nats_server: NatsServer, tmp_path: Path, log: PostgresLog
) -> None:
    """FAULTS 32"""
    store, begun, killed = tmp_path / "store", "", 0
    for step in range(1, MOST):
        async with running(database, nats_server, store, "one", step) as service:
            if begun:  # what the last one did not end
                answer = await upload(service.api, begun)
                assert answer.status == 201, answer.body
                await service.api.reads_back(begun, FILES)
                assert (await service.api.of(begun, "change", "DELETE")).status == 204
            begun = str(uuid4())
            service.count()
            try:
                answer = await upload(service.api, begun)
            except aiohttp.ClientError:
                assert await service.process.wait() == -signal.SIGKILL
                killed += 1
                continue
            assert answer.status == 201
            break
    assert killed > 5
    async with serving(database, nats_server, store, PENSTOCK_INSTANCE="one") as api:
        assert (await api.of(begun, "change", "DELETE")).status == 204
        await all_gone(log, api)


@pytest.mark.timeout(400)
async def test_an_upload_that_sleeps_through_its_lapse_is_not_sealed(
    database: Database, nats_server: NatsServer, tmp_path: Path, log: PostgresLog
) -> None:
    """The service is stopped before each step, an hour passes, another tidies up; then it goes on."""
    store, outcomes = tmp_path / "store", []
    async with serving(database, nats_server, store, PENSTOCK_INSTANCE="two") as other:
        for step in range(1, MOST):
            async with running(database, nats_server, store, "one", step, signal.SIGSTOP) as service:
                artifact = str(uuid4())
                service.count()
                uploading = asyncio.create_task(by_manifest(service.api, artifact))
                stopped = asyncio.create_task(is_stopped(service.process.pid))
                await asyncio.wait([uploading, stopped], return_when=asyncio.FIRST_COMPLETED)
                if not uploading.done():
                    await log.pool.execute("UPDATE artifacts.upload SET seen_at = seen_at - 7200")

                    await eventually(lambda: tidied(log), timeout=20)
                    service.process.send_signal(signal.SIGCONT)
                stopped.cancel()
                answer = await uploading
                outcomes.append(answer.status)
                if answer.status == 201:
                    await other.reads_back(artifact, FILES)
                    assert (await other.of(artifact, "change", "DELETE")).status == 204
                else:
                    assert answer.status in (404, 503), answer.body
                    assert (await other.get(artifact)).status == 404
            if stopped.cancelled():
                break
        assert {201, 404} <= set(outcomes), outcomes
        await all_gone(log, other)


async def tidied(log: PostgresLog) -> bool:
    """No upload is left, nor anything that none of the artifacts holds."""
    return not await log.pool.fetchval("""
        SELECT (SELECT count(*) FROM artifacts.upload)
            + (SELECT count(*) FROM artifacts.hold WHERE NOT EXISTS (SELECT FROM artifacts.artifact a WHERE 'upload:' || a.upload = holder))
            + (SELECT count(*) FROM artifacts.pack p WHERE NOT EXISTS (SELECT FROM artifacts.hold WHERE pack = p.id))
    """)


async def is_stopped(pid: int) -> None:
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "T":
        await asyncio.sleep(0.01)
