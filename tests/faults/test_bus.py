"""The bus forgets, repeats and goes away while builds run: 0 builds lost, 0 doubled."""

import asyncio
import shutil
import time
import urllib.request
from datetime import UTC, datetime

import msgspec
import pytest
from nats.js import JetStreamContext
from nats.js.api import ConsumerConfig, DeliverPolicy

from penstock.client import PenstockError
from proto.catalogue import TAGS, encode
from proto.envelope import Recorded, cloud_event, subject_of
from proto.events.artifact import LogArchived
from proto.events.request import BuildRequested
from proto.plan import Plan
from proto.topology import CONSUMERS, STREAMS
from tests.controls import eventually
from tests.faults.system import System
from tests.faults.traffic import Traffic
from tests.faults.work import INSTANT, sleeping, talking


@pytest.mark.parametrize("stream", [stream.name for stream in STREAMS])
async def test_a_deleted_stream_is_made_again_and_refilled(system: System, stream: str) -> None:
    """FAULTS 59: deleted three times while builds run."""
    async with system.bus() as bus, Traffic(system) as traffic:
        streams = bus.jetstream()
        async with traffic.trickle():
            for _ in range(3):
                await streams.delete_stream(stream)
                await eventually(lambda: exists(streams, stream), timeout=30)
                await traffic.under_way()
        await traffic.verify()


async def exists(streams: JetStreamContext, name: str) -> bool:
    return name in [info.config.name for info in await streams.streams_info()]


async def test_deleted_consumers_are_made_again(system: System) -> None:
    """FAULTS 60: each of them, twice, while builds run."""
    async with system.bus() as bus, Traffic(system) as traffic:
        streams = bus.jetstream()
        async with traffic.trickle():
            for consumer in CONSUMERS * 2:
                await streams.delete_consumer(consumer.stream, consumer.name)
                await traffic.submit(INSTANT)
            await eventually(lambda: all_consumers(streams), timeout=30)
        await traffic.verify()


async def all_consumers(streams: JetStreamContext) -> bool:
    names = {info.name for stream in STREAMS for info in await streams.consumers_info(stream.name)}
    return {consumer.name for consumer in CONSUMERS} <= names


async def test_an_emptied_jetstream_directory_is_filled_again(system: System) -> None:
    """FAULTS 58, 60: while the server is down all that it kept goes, and its streams begin anew, behind every consumer and checkpoint."""
    async with Traffic(system) as traffic:
        async with traffic.trickle():
            for _ in range(2):
                before = system.process("nats")
                with system.without("nats"):
                    shutil.rmtree(system.data.nats / "store")
                await system.back("nats", before)
                await traffic.under_way()
        await traffic.verify()


@pytest.mark.parametrize("how", ["deleted", "emptied"])
async def test_what_a_lost_stream_held_for_one_that_was_away_is_delivered(system: System, how: str) -> None:
    """FAULTS 59, 60: the end of a stage waits on EVENTS for artifacts, and its log on LOGS, when both go; it is archived nevertheless, whole."""
    work = talking(50, 0.001)
    async with Traffic(system) as traffic:
        with system.without("artifacts"):
            await traffic.submit(work)
            await traffic.ended()
            await eventually(lambda: relayed(system))
            if how == "deleted":
                async with system.bus() as bus:
                    for stream in ("EVENTS", "LOGS"):
                        await bus.jetstream().delete_stream(stream)
            else:
                with system.without("nats"):
                    shutil.rmtree(system.data.nats / "store")
        await eventually(lambda: archived(system), timeout=40)
        await traffic.verify()
    archives = [fact.event for fact in await system.log("artifact") if isinstance(fact.event, LogArchived)]
    assert [(archive.gaps, archive.lines) for archive in archives] == [([], 1 + len(work.lines))]


async def relayed(system: System) -> bool:
    """The relay's checkpoint says that all of it is on the bus: only a rewind brings it back."""
    connection = await system.database()
    try:
        done: bool = await connection.fetchval("SELECT position = (SELECT max(position) FROM eventlog.event) FROM builds.relay_checkpoint")
    finally:
        await connection.close()
    return done


async def archived(system: System) -> bool:
    return any(isinstance(fact.event, LogArchived) for fact in await system.log("artifact"))


async def test_while_the_bus_is_down_a_build_is_accepted_and_runs_afterwards(system: System) -> None:
    """FAULTS 16: a 202 is a promise; the bus carries nothing that the log does not have."""
    async with Traffic(system) as traffic:
        before = system.process("nats")
        with system.without("nats"):
            builds = [await traffic.submit(INSTANT) for _ in range(5)]
            assert {(await traffic.client.build(build.id)).status for build in builds} == {"pending"}
            assert "nats" in (system.unready("builds") or "")
        await system.back("nats", before)
        await traffic.verify()


async def test_while_the_bus_hangs_the_api_answers(system: System) -> None:
    """It takes connections and says nothing; builds go on when it does."""
    async with Traffic(system) as traffic:
        await traffic.submit(INSTANT)
        with system.stopped("nats"):
            async with asyncio.timeout(5):
                build = await traffic.submit(sleeping(0.1))
                assert (await traffic.client.build(build.id)).status == "pending"
        await traffic.verify()


async def test_messages_that_come_again_long_after_change_nothing(system: System) -> None:
    """FAULTS 49, 64: all of EVENTS and REPORTS once more, newest first, with ids that the dedup window does not know."""
    async with system.bus() as bus, Traffic(system) as traffic:
        streams = bus.jetstream()
        async with traffic.trickle(at_least=16):
            pass
        await traffic.ended()
        kept = [message for stream in ("EVENTS", "REPORTS") for message in await everything(streams, stream)]
        assert {subject.partition(".")[0] for subject, _ in kept} == {"events", "reports"}
        before = await system.log("build")
        for subject, data in reversed(kept):
            await streams.publish(subject, data)
        await handled(streams)
        assert await system.log("build") == before
        await traffic.verify()


async def everything(streams: JetStreamContext, stream: str) -> list[tuple[str, bytes]]:
    """All messages that a stream holds."""
    count = (await streams.stream_info(stream)).state.messages
    subscription = await streams.subscribe("", stream=stream, ordered_consumer=False, config=ConsumerConfig(deliver_policy=DeliverPolicy.ALL))
    messages = [await subscription.next_msg(timeout=5) for _ in range(count)]
    await subscription.unsubscribe()
    return [(message.subject, message.data) for message in messages]


async def handled(streams: JetStreamContext) -> None:
    """Until the services have seen all that is there."""

    async def nothing_waits() -> bool:
        infos = [await streams.consumer_info(consumer.stream, consumer.name) for consumer in CONSUMERS]
        return all(info.num_pending == 0 and info.num_ack_pending == 0 for info in infos)

    await eventually(nothing_waits, timeout=30)


async def test_a_foreign_message_on_a_subject_of_events_stops_nothing(system: System) -> None:
    """FAULTS 62: no headers, no event; builds before and after it end."""
    async with system.bus() as bus, Traffic(system) as traffic:
        await traffic.submit(INSTANT)
        for subject in ("events.request.main.x.BuildRequested", "events.build.main.x.StageFinished", "events.nonsense"):
            for data in (b"", b"\xff\x00", b"{}", b'{"specversion":"1.0"}'):
                await bus.jetstream().publish(subject, data)
        await traffic.submit(sleeping(0.1))
        await traffic.verify()


async def test_without_its_bus_the_worker_ends_what_it_may_not_run_any_more(system: System) -> None:
    """Nobody renews the lease: the worker kills the step itself, and the next attempt counts."""
    async with Traffic(system) as traffic:
        await traffic.submit(sleeping(3))
        await traffic.under_way()
        before = system.process("nats")
        with system.without("nats"):
            await eventually(lambda: system.steps() == [], timeout=10)
        await system.back("nats", before)
        await traffic.verify()
        assert (await anext(traffic.client.builds())).stages[0].attempt > 1


async def test_an_unknown_build_is_not_found_while_the_bus_is_down(system: System) -> None:
    """What needs no bus goes on without it."""
    async with system.client(patience=0) as client:
        with system.without("nats"), pytest.raises(PenstockError, match="no build `99`"):
            await client.build(99)


POISON = 50


async def test_a_hundred_poison_messages_are_parked_in_a_minute_and_nobody_waits_for_them(system: System) -> None:
    """Half of them are no messages at all; the others are read well, and break what decides on them, each time."""
    stage = {"name": "main", "needs": ["nowhere"], "steps": [{"step": "run", "name": "task", "config": {"run": {"path": "true"}}}]}
    broken = msgspec.convert({"stages": [stage]}, Plan)
    async with system.bus() as bus, Traffic(system) as traffic:
        await traffic.submit(INSTANT)
        await traffic.ended()
        epoch = 2**31 - 1  # of whatever epoch the log is, this is no older
        began = time.monotonic()
        for number in range(POISON):
            await bus.jetstream().publish(f"events.request.main.poison-{number}.BuildRequested", b"\xc1")
            event = BuildRequested(build=f"poison-{number}", plan=broken, inputs={}, name="", body_mac="")
            recorded = Recorded(
                position=1,
                stream=f"request-poison-{number}",
                version=1,
                event_id=f"poison-{number}",
                type=TAGS[BuildRequested],
                data=encode(event),
                team="main",
                correlation_id="c",
                causation_id="c",
                actor="test",
                recorded_at=datetime.now(UTC),
            )
            await bus.jetstream().publish(subject_of(recorded), cloud_event(recorded, epoch))
        await traffic.submit(talking(3, 0.01))
        await traffic.ended()
        await eventually(lambda: parked(system), timeout=60 - (time.monotonic() - began))
        await handled(bus.jetstream())
        await traffic.verify()


async def parked(system: System) -> bool:
    text = (await asyncio.to_thread(urllib.request.urlopen, f"http://{system.run().status['builds']}/metrics")).read().decode()
    return 'penstock_builds_reactions_messages_total{outcome="parked"} ' + f"{2 * POISON}.0\n" in text
