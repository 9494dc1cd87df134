"""FAULTS 67: one worker floods a stream that all of them fill, on a real server with its own credentials. The others go on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import NamedTuple

import pytest
from prometheus_client import CollectorRegistry

from libs.bus.accounts import inbox_prefix
from libs.bus.bus import StreamFull
from libs.bus.callout import Doorkeeper
from libs.bus.jetstream import JetStreamBus, connect_jetstream
from libs.eventlog.leadership import Leadership
from libs.tokens import new_seed, public_key
from proto.topology import BUILDS_REPORTS, LOGS, REPORTS
from services.builds.quota import CALM, EVERY, REST, TOO_MUCH, Quota, Watched
from services.scheduler.withholding import heed_quotas
from tests.controls import eventually
from tests.nats_fixture import SEEDS, NatsServer, admitting, bare_client

LIAR, HONEST = new_seed(), new_seed()
KEYS = {"liar": public_key(LIAR), "honest": public_key(HONEST)}
ROOM = 4 << 20
SMALL_LOGS = LOGS._replace(max_bytes=ROOM)
SMALL_REPORTS = REPORTS._replace(max_bytes=ROOM)
OF_LOGS, OF_REPORTS = Watched(SMALL_LOGS, "logs"), Watched(SMALL_REPORTS, "reports", BUILDS_REPORTS)


class Nobody(Leadership):
    """`look` asks for no office."""

    def __init__(self) -> None: ...


class Scene(NamedTuple):
    core: JetStreamBus
    liar: JetStreamBus
    honest: JetStreamBus
    door: Doorkeeper
    quota: Quota
    registry: CollectorRegistry

    async def flood(self, subject: str, size: int = 64 << 10) -> None:
        """Until the stream takes no more of it."""
        with pytest.raises(StreamFull):
            for _ in range(2 * ROOM // size):
                await self.liar.publish(subject, bytes(size))

    def floods(self, stream: str) -> float:
        return self.registry.get_sample_value("penstock_stream_floods_total", {"stream": stream}) or 0.0


@pytest.fixture
async def scene(fresh_nats: NatsServer) -> AsyncIterator[Scene]:
    async with AsyncExitStack() as stack:
        core = await stack.enter_async_context(connect_jetstream(fresh_nats.url, SEEDS["builds"], "builds"))
        await core.ensure([SMALL_LOGS, SMALL_REPORTS], [BUILDS_REPORTS])
        door = await stack.enter_async_context(admitting(fresh_nats, KEYS))
        heeding = asyncio.create_task(heed_quotas(core, door))
        stack.callback(heeding.cancel)
        liar = await stack.enter_async_context(connect_jetstream(fresh_nats.url, LIAR, "liar", inbox_prefix("liar")))
        honest = await stack.enter_async_context(connect_jetstream(fresh_nats.url, HONEST, "honest", inbox_prefix("honest")))
        await eventually(lambda: liar.connected and honest.connected)
        registry = CollectorRegistry()
        yield Scene(core, liar, honest, door, Quota(core, [OF_LOGS, OF_REPORTS], Nobody(), registry), registry)


async def test_who_fills_the_logs_loses_its_part_and_says_no_more_there_and_the_others_go_on(scene: Scene) -> None:
    await scene.honest.publish("logs.honest.b.s.1", b"kept")
    await scene.flood("logs.liar.b.s.1")
    with pytest.raises(StreamFull):  # what the flood is for
        await scene.honest.publish("logs.honest.b.s.1", bytes(64 << 10))

    assert await scene.quota.look(OF_LOGS) == EVERY
    await scene.honest.publish("logs.honest.b.s.1", bytes(64 << 10))
    assert await scene.core.last("LOGS", "logs.liar.>") is None
    state = await scene.core.stream_state("LOGS")
    assert state is not None and state.messages == 2, "what the honest one had there stays"
    assert scene.floods("LOGS") == 1

    await eventually(lambda: scene.liar.connections == 2 and scene.liar.connected)
    said = scene.liar.publish("logs.liar.b.s.1", b"more")
    await scene.liar.publish("reports.liar.b", b"it may say all else")
    assert await scene.core.last("LOGS", "logs.liar.>") is None
    said.cancel()
    assert scene.honest.connections == 1
    assert await scene.quota.look(OF_LOGS) == CALM
    assert scene.floods("LOGS") == 1


async def test_a_ban_ends_by_itself(scene: Scene) -> None:
    scene.door.withhold("liar", "logs", 1.5)
    await eventually(lambda: scene.liar.connections == 2 and scene.liar.connected)
    said = scene.liar.publish("logs.liar.b.s.1", b"more")
    await scene.liar._connection.flush()
    assert await scene.core.last("LOGS", "logs.liar.>") is None
    said.cancel()
    await eventually(lambda: scene.liar.connections == 3 and scene.liar.connected)
    assert (await scene.liar.publish("logs.liar.b.s.1", b"more")).sequence == 1


async def test_what_was_dealt_with_makes_room_before_anybody_is_accused(scene: Scene) -> None:
    await scene.flood("reports.liar.b")
    async with scene.core.consume(BUILDS_REPORTS) as batches:
        got = 0
        async for batch in batches:
            for message in batch:
                message.ack()
            got = batch[-1].sequence
            if (await scene.core.stream_state("REPORTS")).last_sequence == got:  # type: ignore[union-attr]
                break
    assert await scene.quota.look(OF_REPORTS) == CALM
    assert (await scene.honest.publish("reports.honest.b", bytes(64 << 10))).sequence == got + 1
    assert scene.floods("REPORTS") == 0
    assert await scene.quota.look(OF_REPORTS) == CALM
    assert scene.liar.connections == 1


async def test_a_backlog_of_reports_is_its_sender_s_own(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.builds.quota.BACKLOG", 1000)
    await scene.honest.publish("reports.honest.b", b"first")
    await asyncio.gather(*(scene.liar.publish(f"reports.liar.b{n}", b"lie") for n in range(1000)))
    assert await scene.quota.look(OF_REPORTS) == EVERY
    assert scene.floods("REPORTS") == 1
    async with scene.core.consume(BUILDS_REPORTS) as batches:
        assert [message.subject for message in await anext(batches)] == ["reports.honest.b"]


async def test_whoever_hides_its_flood_in_headers_is_found(scene: Scene, fresh_nats: NatsServer) -> None:
    liar = await bare_client(fresh_nats.url, LIAR, "liar", inbox_prefix=inbox_prefix("liar"))
    for n in range(48):
        headers = {"Nats-Msg-Size": "0", "X": "x" * (1 << 10)} if n % 2 else {"X": "x" * (128 << 10)}
        await liar.publish("logs.liar.b.s.1", bytes(64 << 10) if n % 2 else b"", headers=headers)
    await liar.flush()
    await liar.close()
    await scene.honest.publish("logs.honest.b.s.1", bytes(1 << 10))
    held = await scene.core.holders("LOGS", 1 << 40)
    state = await scene.core.stream_state("LOGS")
    assert state is not None
    assert sum(held.values()) == pytest.approx(state.bytes, rel=0.02)
    assert held["honest"] < held["liar"] / 100


async def test_nobody_is_accused_when_all_hold_alike(scene: Scene) -> None:
    for n in range(50):
        await scene.core.publish(f"logs.worker{n % 8}.b.s.1", bytes(64 << 10))
    assert TOO_MUCH > 1 / 8
    assert await scene.quota.look(OF_LOGS) == REST
    assert scene.floods("LOGS") == 0
    state = await scene.core.stream_state("LOGS")
    assert state is not None and state.messages == 50
