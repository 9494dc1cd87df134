"""Who may say and hear what, asked of a real server: FAULTS 63 and finding 3."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from nats.aio.client import Client
from nats.aio.msg import Msg

from libs.bus.accounts import callout_seeds, inbox_prefix
from libs.bus.callout import GROUP, connect_doorkeeper
from libs.bus.jetstream import JetStreamBus, connect_jetstream
from libs.runtime.service import Service
from libs.tokens import new_seed, public_key
from proto.topology import STREAMS
from tests.controls import eventually
from tests.nats_fixture import CALLOUT, SEEDS, NatsServer, admitting, bare_client

W1, W2 = new_seed(), new_seed()
KEYS = {"w1": public_key(W1), "w2": public_key(W2)}

OWN = ("reports.w1.build", "logs.w1.build.stage.1", "presence.w1")
FOREIGN = (
    "reports.w2.build",
    "logs.w2.build.stage.1",
    "presence.w2",
    "presence.w1.more",
    "reports.w1",
    "control.w1",
    "control.w2",
    "execute_build_package.w2",
    "events.build.main.1.BuildFinished",
    "_INBOX_w2.x",
    "_INBOX.x",
    "_R_.x.y",
    "_INBOX_w10.x",
    "secrets.main",
    "why.main.b1",
    "$KV.bucket.key",
    "$O.bucket.C.x",
    "$JS.API.INFO",
    "$JS.API.STREAM.CREATE.MINE",
    "$JS.API.STREAM.MSG.GET.EVENTS",
    "$JS.API.DIRECT.GET.REPORTS",
    "$JS.API.CONSUMER.CREATE.REPORTS",
    "$JS.API.CONSUMER.MSG.NEXT.REPORTS.builds-reports",
    "$JS.FC.REPORTS.x.y",
    "$SYS.REQ.USER.AUTH",
    "$SYS.REQ.SERVER.PING.CONNZ",
    "$SYS.REQ.ACCOUNT.PING.CONNZ",
    "$SYS._INBOX.x",
    "$JS.API.STREAM.PURGE.EVENTS",
    "$JS.ACK.REPORTS.builds-reports.1.1.1.1.1",
    "$SYS.REQ.SERVER.PING",
)
ALL_OVER = (
    "reports.w2.>",
    "control.w2",
    "control.*",
    "control.>",
    "execute_build_package.*",
    "presence.*",
    "reports.>",
    "_INBOX.>",
    "_INBOX_w2.>",
    "_R_.>",
    "$JS.>",
    "$KV.>",
    "$O.>",
    "$SYS.>",
    "$SYS.REQ.USER.AUTH",
    "events.>",
    "logs.>",
    "secrets.>",
    "why.>",
    "execute_build_package.w2",
    "*",
    ">",
)


class Stage:
    """An honest service, an honest worker w2 with all it may hear, and w1 as an attacker with a bare client."""

    def __init__(self, core: JetStreamBus, w2: JetStreamBus, attacker: Client) -> None:
        self.core = core
        self.w2 = w2
        self.attacker = attacker
        self.presence: list[tuple[str, bytes]] = []
        self.heard_by_w2: list[tuple[str, bytes]] = []
        self.refusals: list[str] = []

    async def sequences(self) -> dict[str, int]:
        states = {s.name: await self.core.stream_state(s.name) for s in STREAMS}
        return {name: state.last_sequence for name, state in states.items() if state is not None}

    async def settle(self) -> None:
        """All that was said has arrived wherever it may go."""
        await flushed(self.attacker)
        await self.w2._connection.flush()
        await self.core._connection.flush()


async def flushed(client: Client) -> None:
    """nats-py's ping may overtake what was said just before it; the second one cannot."""
    await client.flush()
    await client.flush()


@pytest.fixture
async def stage(fresh_nats: NatsServer) -> AsyncIterator[Stage]:
    refusals: list[str] = []

    async def refused(error: Exception) -> None:
        refusals.append(str(error))

    async with AsyncExitStack() as stack:
        core = await stack.enter_async_context(connect_jetstream(fresh_nats.url, SEEDS["scheduler"], "scheduler"))
        await core.ensure(STREAMS, [])
        await stack.enter_async_context(admitting(fresh_nats, KEYS))
        w2 = await stack.enter_async_context(connect_jetstream(fresh_nats.url, W2, "w2", inbox_prefix("w2")))
        attacker = await bare_client(fresh_nats.url, W1, "w1", inbox_prefix=inbox_prefix("w1"), error_cb=refused)
        stack.push_async_callback(attacker.close)
        stage = Stage(core, w2, attacker)
        stage.refusals = refusals

        core._connection.subscribe("presence.*", lambda subject, reply, data, headers: stage.presence.append((subject.decode(), data)))
        for subject in ("control.w2", "execute_build_package.w2", "_INBOX_w2.guess"):
            w2._connection.subscribe(subject, lambda subject, reply, data, headers: stage.heard_by_w2.append((subject.decode(), data)))
        await stage.settle()
        yield stage


async def test_a_worker_s_reports_and_logs_are_acknowledged_through_the_border(stage: Stage) -> None:
    report = await stage.w2.publish("reports.w2.build", b"report")
    chunk = await stage.w2.publish("logs.w2.build.stage.1", b"chunk")
    assert (report.stream, report.sequence) == ("REPORTS", 1)
    assert (chunk.stream, chunk.sequence) == ("LOGS", 1)
    stored = await stage.core.last("REPORTS", "reports.w2.>")
    assert stored is not None
    assert (stored.subject, stored.data) == ("reports.w2.build", b"report")


async def test_presence_names_its_true_worker_and_reaches_every_scheduler(stage: Stage, fresh_nats: NatsServer) -> None:
    async with connect_jetstream(fresh_nats.url, SEEDS["scheduler"], "another") as other, other.listen("presence.*") as heard:
        await stage.w2.send("presence.w2", b"two")
        await stage.attacker.publish("presence.w1", b"one")
        await eventually(lambda: len(stage.presence) == 2)
        first, second = await anext(heard), await anext(heard)
    assert sorted(stage.presence) == [("presence.w1", b"one"), ("presence.w2", b"two")]
    assert {(first.subject, first.data), (second.subject, second.data)} == set(stage.presence)


async def test_control_and_packages_reach_only_their_worker(stage: Stage) -> None:
    heard_by_w1: list[tuple[str, bytes]] = []

    async def heard(message: Msg) -> None:
        heard_by_w1.append((message.subject, message.data))

    for subject in ("control.w1", "execute_build_package.w1"):
        await stage.attacker.subscribe(subject, cb=heard)
    await flushed(stage.attacker)
    for subject in ("control.w1", "execute_build_package.w1", "control.w2", "execute_build_package.w2"):
        await stage.core.send(subject, subject.encode())
    await eventually(lambda: len(heard_by_w1) == 2 and len(stage.heard_by_w2) == 2)
    assert sorted(heard_by_w1) == [("control.w1", b"control.w1"), ("execute_build_package.w1", b"execute_build_package.w1")]
    assert sorted(stage.heard_by_w2) == [("control.w2", b"control.w2"), ("execute_build_package.w2", b"execute_build_package.w2")]


async def test_a_worker_cannot_say_what_is_another_s(stage: Stage) -> None:
    before = await stage.sequences()
    for subject in FOREIGN:
        await stage.attacker.publish(subject, b"evil")
    await stage.settle()
    assert await stage.sequences() == before
    assert stage.presence == []
    assert stage.heard_by_w2 == []
    assert len(stage.refusals) == len(FOREIGN)


async def test_a_worker_cannot_hear_what_is_another_s(stage: Stage) -> None:
    overheard: list[str] = []

    async def heard(message: Msg) -> None:
        overheard.append(message.subject)

    for subject in ALL_OVER:
        await stage.attacker.subscribe(subject, cb=heard)
    await flushed(stage.attacker)
    await stage.core.send("control.w2", b"secret")
    await stage.core.send("execute_build_package.w2", b"secret")
    await stage.w2.send("presence.w2", b"secret")
    await stage.w2.publish("reports.w2.build", b"secret")
    await stage.settle()
    assert overheard == []
    assert len(stage.refusals) == len(ALL_OVER)


@pytest.mark.parametrize("own", OWN)
async def test_a_reply_subject_lands_nothing_where_its_sender_may_not_write(stage: Stage, own: str) -> None:
    """FAULTS 63: the stream's ack, or a service's answer, is sent to the attacker's choice of subject."""
    for reply in FOREIGN:
        before = await stage.sequences()
        await stage.attacker.publish(own, b"evil", reply=reply)
        await stage.settle()
        after = await stage.sequences()
        grown = {name for name in after if after[name] != before[name]}
        assert grown <= {own.partition(".")[0].upper()}, reply
        for stream in ("REPORTS", "LOGS"):
            last = await stage.core.last(stream, ">")
            assert last is None or last.subject == own
    assert {subject for subject, _ in stage.presence} <= {"presence.w1"}
    # What is left is noise: the text of an ack where another worker listens, which is not signed and answers no question of its own.
    for subject, data in stage.heard_by_w2:
        assert subject in ("control.w2", "execute_build_package.w2", "_INBOX_w2.x")
        assert json.loads(data).keys() == {"stream", "seq"}


@pytest.mark.parametrize(
    "headers",
    [
        {"Nats-Trace-Dest": "events.build.main.1.x"},
        {"Nats-Trace-Dest": "reports.w2.x"},
        {"Nats-Trace-Dest": "control.w2", "Nats-Trace-Only": "true"},
        {"Nats-Rollup": "all"},
        {"Nats-Rollup": "sub"},
        {"Nats-TTL": "1"},
        {"Nats-Schedule": "@at 2020-01-01T00:00:00Z", "Nats-Schedule-Target": "reports.w2.x"},
        {"Nats-Batch-Id": "x", "Nats-Batch-Sequence": "1"},
        {"Nats-Stream-Source": "EVENTS 1 > >"},
        {"Nats-Subject": "events.build.main.1.x"},
    ],
    ids=str,
)
async def test_a_header_changes_nothing_but_its_own_message(stage: Stage, headers: dict[str, str]) -> None:
    """JetStream takes orders from headers: none may remove, move or redirect what is another's."""
    await stage.w2.publish("reports.w2.build", b"kept")
    for subject in OWN:
        await stage.attacker.publish(subject, b"evil", headers=headers)
    await stage.settle()
    assert (await stage.sequences())["EVENTS"] == 0
    kept = await stage.core.last("REPORTS", "reports.w2.>")
    assert kept is not None
    assert (kept.subject, kept.data, kept.sequence) == ("reports.w2.build", b"kept", 1)
    assert {subject for subject, _ in stage.presence} <= {"presence.w1"}
    assert stage.heard_by_w2 == []


@pytest.mark.parametrize(
    ("seed", "name"),
    [
        (W1, "w2"),  # FAULTS 79
        (new_seed(), "w1"),
        (new_seed(), "unknown"),
        (W1, ""),
        (W1, "w1.>"),
        (new_seed(), "builds"),
        (CALLOUT, "callout"),
    ],
    ids=["another worker's name", "another key", "a stranger", "no name", "a pattern", "a service's name", "the seed that others are made of"],
)
async def test_who_is_not_who_it_says_gets_nowhere(fresh_nats: NatsServer, seed: str, name: str) -> None:
    async with admitting(fresh_nats, KEYS), connect_jetstream(fresh_nats.url, seed, name, patience=0.5) as bus:
        assert not bus.connected
        assert bus.connections == 0


async def test_without_anybody_who_knows_workers_they_wait_and_services_do_not(fresh_nats: NatsServer) -> None:
    async with connect_jetstream(fresh_nats.url, W1, "w1", inbox_prefix("w1"), patience=0.1) as worker:
        async with connect_jetstream(fresh_nats.url, SEEDS["builds"], "builds") as service:
            assert service.connected and not worker.connected
        async with admitting(fresh_nats, KEYS):
            await eventually(lambda: worker.connected)


async def test_a_worker_that_was_expelled_is_cut_off_at_once_and_does_not_come_back(fresh_nats: NatsServer) -> None:
    keys = dict(KEYS)
    async with (
        admitting(fresh_nats, keys) as door,
        connect_jetstream(fresh_nats.url, W1, "w1", inbox_prefix("w1")) as expelled,
        connect_jetstream(fresh_nats.url, W2, "w2", inbox_prefix("w2")) as other,
    ):
        await eventually(lambda: expelled.connected and other.connected)
        del keys["w1"]
        door.cut("w1", KEYS["w1"])
        await eventually(lambda: not expelled.connected, timeout=2)
        await other._connection.flush()
        assert (expelled.connections, other.connections) == (1, 1)
        keys["w1"] = KEYS["w1"]
        await eventually(lambda: expelled.connected)


async def test_an_admission_lapses_and_whoever_renews_it_in_time_loses_nothing(fresh_nats: NatsServer) -> None:
    async with (
        admitting(fresh_nats, KEYS, seconds=2.0),
        connect_jetstream(fresh_nats.url, SEEDS["scheduler"], "scheduler") as core,
        connect_jetstream(fresh_nats.url, W1, "w1", inbox_prefix("w1")) as careless,
        connect_jetstream(fresh_nats.url, W2, "w2", inbox_prefix("w2"), renew=0.3) as careful,
    ):
        await core.ensure(STREAMS, [])
        await eventually(lambda: careless.connected and careful.connected)
        said = 0
        while careless.connections < 3:
            assert (await careful.publish("reports.w2.b", b"%d" % said, str(said))).sequence == said + 1
            said += 1
        assert careful.connections == 1 and said > 10


async def test_what_is_answered_while_a_connection_is_renewed_is_heard(fresh_nats: NatsServer) -> None:
    async with (
        admitting(fresh_nats, KEYS),
        connect_jetstream(fresh_nats.url, SEEDS["scheduler"], "scheduler") as core,
        connect_jetstream(fresh_nats.url, W1, "w1", inbox_prefix("w1"), renew=0.01) as worker,
    ):
        await core.ensure(STREAMS, [])
        await eventually(lambda: worker.connected)

        async def say(who: int) -> None:
            for number in range(500):
                await worker.publish("reports.w1.b", b"said", f"{who}.{number}")

        await asyncio.gather(*map(say, range(8)))
        assert worker.connections == 1


async def test_whoever_is_connected_and_is_no_worker_any_more_is_found_by_a_sweep(fresh_nats: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever deleted it is dead, and its successor was never told of it; there are more connections than one answer lists."""
    monkeypatch.setattr("libs.bus.callout._PAGE", 2)
    keys = dict(KEYS)
    async with AsyncExitStack() as stack:
        others = {f"other{n}": new_seed() for n in range(4)}
        keys |= {name: public_key(seed) for name, seed in others.items()}
        admitted = await stack.enter_async_context(AsyncExitStack())
        await admitted.enter_async_context(admitting(fresh_nats, keys))
        honest = [await stack.enter_async_context(connect_jetstream(fresh_nats.url, seed, name, inbox_prefix(name))) for name, seed in others.items()]
        deleted = await stack.enter_async_context(connect_jetstream(fresh_nats.url, W1, "w1", inbox_prefix("w1")))
        await eventually(lambda: all(bus.connected for bus in (deleted, *honest)))
        await admitted.aclose()
        del keys["w1"]
        door = await stack.enter_async_context(admitting(fresh_nats, keys))
        door.sweep()
        await eventually(lambda: not deleted.connected)
        assert all(bus.connected and bus.connections == 1 for bus in honest)


async def test_a_key_has_two_connections_at_most_and_the_newest_win(fresh_nats: NatsServer) -> None:
    """Also those that were there before the scheduler that counts them."""
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(AsyncExitStack())
        await first.enter_async_context(admitting(fresh_nats, KEYS))
        clients = []

        async def another() -> None:
            clients.append(await bare_client(fresh_nats.url, W1, "w1"))
            stack.push_async_callback(clients[-1].close)

        for _ in range(5):
            await another()
        other = await bare_client(fresh_nats.url, W2, "w2")
        stack.push_async_callback(other.close)
        await eventually(lambda: [client.is_connected for client in clients] == [False] * 3 + [True] * 2)
        await first.aclose()
        await stack.enter_async_context(admitting(fresh_nats, KEYS))
        await another()
        await eventually(lambda: [client.is_connected for client in clients] == [False] * 4 + [True] * 2)
        assert other.is_connected


async def test_the_newest_win_in_whatever_order_they_are_heard_of(fresh_nats: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection that tells of them was lost, and the list of those who are there comes later than the word of who came since."""
    async with AsyncExitStack() as stack:
        door = await stack.enter_async_context(admitting(fresh_nats, KEYS))
        clients = []

        async def another() -> None:
            clients.append(await bare_client(fresh_nats.url, W1, "w1"))
            stack.push_async_callback(clients[-1].close)

        await another()
        await another()
        asked, ask = [], door._list
        monkeypatch.setattr(door, "_list", lambda *page: asked.append(page))
        assert door._system._wire is not None
        door._system._wire.ended.set()
        await eventually(lambda: asked)
        await another()
        await eventually(lambda: door._held)
        ask(*asked[0])
        await eventually(lambda: [client.is_connected for client in clients] != [True] * 3)
        await clients[2].flush()
        assert [client.is_connected for client in clients] == [False, True, True]


async def test_a_question_that_cannot_be_answered_keeps_nobody_else_out(fresh_nats: NatsServer) -> None:
    class Troubled(dict[str, str]):
        def get(self, name: str, default: object = None) -> Any:
            if name == "w1":
                raise RuntimeError("nobody expected this")
            return super().get(name, default)

    async with admitting(fresh_nats, Troubled(KEYS)):
        asker = await bare_client(fresh_nats.url, callout_seeds(CALLOUT).asked, "callout")
        for question in (b"", b"x", b"a.b.c", b"e30.e30.e30", b"\xff.\xff.\xff"):
            await asker.publish("$SYS.REQ.USER.AUTH", question, reply="nobody")
        await asker.flush()
        await asker.close()
        assert not await let_in(fresh_nats)
        await (await bare_client(fresh_nats.url, W2, "w2")).close()


async def test_whoever_keeps_the_door_lives_as_long_as_its_service(fresh_nats: NatsServer) -> None:
    """Its death is the service's: nobody would be admitted any more, and nothing would say so."""

    def knows() -> bool:
        raise RuntimeError("nobody expected this")

    service = Service("scheduler")
    try:
        door = await service.enter(connect_doorkeeper(fresh_nats.url, callout_seeds(CALLOUT), KEYS.get, 600.0, knows))
        service.spawn("door", door.keep())
        with pytest.raises(RuntimeError, match="nobody expected this"):
            await service.until_told()
    finally:
        await service.aclose()


async def test_who_does_not_know_any_more_who_is_a_worker_is_not_asked(fresh_nats: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lost the database: it would admit whom the log has revoked meanwhile. It admits nobody; another who knows does. Once it knows again,
    and is told to look, it is asked at once."""
    monkeypatch.setattr("libs.bus.callout.LOOK", 600.0)
    known = True
    async with admitting(fresh_nats, KEYS, knows=lambda: known) as stale:
        assert await let_in(fresh_nats)
        known = False
        assert not await let_in(fresh_nats)
        await eventually(lambda: stale._asked._subscriptions.keys() and GROUP not in {s.group for s in stale._asked._subscriptions.values()})
        async with admitting(fresh_nats, {"w2": KEYS["w2"]}):
            for _ in range(5):
                await (await bare_client(fresh_nats.url, W2, "w2")).close()
            assert not await let_in(fresh_nats)
        known = True
        stale.look()
        await eventually(lambda: GROUP in {s.group for s in stale._asked._subscriptions.values()})
        await stale._asked.flush()
        assert await let_in(fresh_nats)


async def let_in(server: NatsServer) -> bool:
    async with connect_jetstream(server.url, W1, "w1", patience=0.5) as bus:
        return bus.connected
