"""The read models go back by a moment, as after a crash of the database (their commits are not synced): nobody is told that what is there is not."""

from libs.eventlog.postgres import open_postgres_log
from tests.controls import eventually
from tests.gateway_fixture import Gateway, running_gateway
from tests.nats_fixture import NatsServer
from tests.postgres_fixture import Database


async def test_a_build_that_was_accepted_is_never_unknown(database: Database, nats_server: NatsServer) -> None:
    async with running_gateway(database, nats_server.url) as gateway, open_postgres_log(database.url("postgres")) as log:
        build = (await gateway.submit())["id"]
        await log.pool.execute("DELETE FROM gateway.builds")
        await log.pool.execute("UPDATE gateway.teams SET builds = 0")
        await log.pool.execute("UPDATE gateway.checkpoint SET position = 2 WHERE name = 'gateway'")
        assert await status_of(gateway, build) == 503
        # as when the database comes back: whoever listened has lost the connection
        await log.pool.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")

        async def known() -> bool:
            status = await status_of(gateway, build)
            assert status in (200, 503)
            return status == 200

        await eventually(known)
        assert (await gateway.submit())["number"] == 2


async def status_of(gateway: Gateway, build: str) -> int:
    async with gateway.call("GET", f"/teams/main/builds/{build}") as answer:
        return int(answer.status)
