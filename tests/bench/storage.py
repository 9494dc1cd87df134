"""The log by itself, on a durable Postgres of the bench's own: appends, a projection built anew, the relay."""

import asyncio
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from libs.bus.accounts import callout_keys, server_config
from libs.bus.jetstream import connect_jetstream
from libs.embedded.nats import EmbeddedNats
from libs.embedded.postgres import EmbeddedPostgres
from libs.eventlog.checkpoints import RelayCheckpoints
from libs.eventlog.leadership import Leadership
from libs.eventlog.log import NO_STREAM, Appended, NewEvent, Write
from libs.eventlog.migrate import migrate, role_of
from libs.eventlog.postgres import PostgresLog, open_pool, open_postgres_log
from libs.eventlog.projections import StoredProjection
from libs.runtime.relay import Relay
from libs.runtime.service import collect_seldom
from libs.tokens import new_seed, public_key
from proto.catalogue import SERVICES
from proto.topology import CONSUMERS, STREAMS
from services.gateway import projection as gateway
from tests.bench.figures import Figure, at_least
from tests.bench.history import EVENTS_A_BUILD, history

SEEDS = {service: new_seed() for service in SERVICES}
PASSWORDS = {service: f"{service}-secret" for service in SERVICES}
SINGLE = b'{"stage":"main","attempt":1,"step":"task","worker":"local","sandbox":"none","timeout":86400,"report":1}'


async def storage(builds: int, singles: int) -> list[Figure]:
    """`builds` make the history that is appended in groups, projected and relayed; `singles` are appended one at a time.

    Garbage is collected as in the services. The goal of single appends is what was measured with 8 connections."""
    collect_seldom()
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        folder = Path(name)
        postgres = EmbeddedPostgres(folder / "pg", 0, folder / "postgres.log", "secret")
        nats = _nats(folder)
        try:
            postgres.start()
            nats.start()
            await migrate(postgres.dsn(), PASSWORDS)
            figures = await _grouped(postgres, builds)
            figures += await _projected(postgres, builds)
            figures += await _relayed(postgres, nats, builds * EVENTS_A_BUILD)
            return figures + await _single(postgres, singles)
        finally:
            nats.stop()
            postgres.stop()


def _dsn(postgres: EmbeddedPostgres, service: str) -> str:
    return postgres.dsn(role_of(service), PASSWORDS[service])


def _nats(folder: Path) -> EmbeddedNats:
    config, listening = folder / "nats.conf", folder / "listening"
    services = {service: public_key(seed) for service, seed in SEEDS.items()}
    callout = callout_keys(new_seed())
    config.write_text(server_config(port=-1, store_dir=folder / "nats", services=services, callout=callout, ports_file_dir=listening))
    return EmbeddedNats(config, listening, folder / "nats.log")


async def _grouped(postgres: EmbeddedPostgres, builds: int) -> list[Figure]:
    """The superuser may append to every category, so one connection writes what all services would."""
    seconds, rows = 0.0, 0
    async with open_postgres_log(postgres.dsn()) as log:
        for writes in history(builds, group=200):
            began = time.monotonic()
            outcomes = await log.append(writes)
            seconds += time.monotonic() - began
            assert all(isinstance(outcome, Appended) for outcome in outcomes)
            rows += sum(len(write.events) for write in writes)
        assert await log.head() == rows == builds * EVENTS_A_BUILD
    return [Figure("append, groups of 200 writes, one connection", rows / seconds, "rows/s", at_least(50_000))]


async def _projected(postgres: EmbeddedPostgres, builds: int) -> list[Figure]:
    events = builds * EVENTS_A_BUILD
    tables = Path(gateway.__file__).with_name("tables.sql").read_text()
    async with open_pool(_dsn(postgres, "gateway")) as pool:
        stored = StoredProjection(pool, gateway.gateway_projection(tables))
        cpu, began = _cpu(), time.monotonic()
        position = 0
        while position < events:
            position = await stored.advance()
        seconds, cpu = time.monotonic() - began, _cpu() - cpu
        async with pool.acquire() as connection:
            assert await connection.fetchval("SELECT count(*) FROM builds WHERE status = 'succeeded'") == builds
    return [
        Figure(f"the gateway's projection built anew ({events:,} events)", events / seconds, "events/s", at_least(150_000)),
        Figure("  of that, its own CPU", cpu / events * 1e6, "µs/event"),
    ]


async def _relayed(postgres: EmbeddedPostgres, nats: EmbeddedNats, events: int) -> list[Figure]:
    async with open_postgres_log(_dsn(postgres, "builds")) as log, connect_jetstream(nats.url, SEEDS["builds"], "builds") as bus:
        await bus.ensure(STREAMS, CONSUMERS)
        office = Leadership(log.pool, "relay", "bench")
        await office.campaign()
        relay = Relay(log, bus, RelayCheckpoints(log.pool), office)
        cpu, began = _cpu(), time.monotonic()
        tasks = [asyncio.create_task(relay.run()), asyncio.create_task(office.run())]
        try:
            while (state := await bus.stream_state("EVENTS")) is None or state.last_sequence < events:
                await asyncio.sleep(0.02)
            seconds, cpu = time.monotonic() - began, _cpu() - cpu
            assert state.messages == events, state
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
    return [Figure("relay", seconds / events * 1e6, "µs/event"), Figure("  of that, its own CPU", cpu / events * 1e6, "µs/event")]


async def _single(postgres: EmbeddedPostgres, count: int) -> list[Figure]:
    figures: list[Figure] = []
    for tasks in (1, 8):
        async with open_postgres_log(_dsn(postgres, "builds"), size=tasks) as log:
            await _append_singly(log, iter(range(8)), f"warm{tasks}")
            numbers = iter(range(count))
            began = time.monotonic()
            await asyncio.gather(*(_append_singly(log, numbers, f"single{tasks}") for _ in range(tasks)))
            rate = count / (time.monotonic() - began)
        who = "one connection" if tasks == 1 else f"{tasks} connections"
        figures.append(Figure(f"append, one guarded event at a time, {who}", rate, "rows/s", at_least(2300) if tasks == 8 else None))
    return figures


async def _append_singly(log: PostgresLog, numbers: Iterator[int], prefix: str) -> None:
    for number in numbers:
        event = NewEvent(f"{prefix}-{number}", "step.started", SINGLE)
        write = Write(
            stream=f"build-{prefix}_{number}", expected=NO_STREAM, events=[event], team="main", correlation_id="c", causation_id="c", actor="bench"
        )
        assert isinstance((await log.append([write]))[0], Appended)


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
