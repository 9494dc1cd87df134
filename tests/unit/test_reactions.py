"""What becomes of a message that a reaction cannot handle."""

import asyncio
from contextlib import suppress
from datetime import UTC, datetime

import msgspec
import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from libs.bus.memory import MemoryBus
from libs.eventlog.memory import MemoryLog
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Refused
from libs.runtime.reactions import PARK_AFTER, ReactionConsumer
from proto.catalogue import TAGS, UnknownEvent, encode
from proto.envelope import Recorded, cloud_event
from proto.events.request import BuildAbortRequested
from proto.messages import Attempt, Reports
from proto.plan import StageName
from proto.topology import Consumer, Stream
from services.builds.commands import AbortBuild
from services.builds.reactions import on_event, on_report
from services.scheduler.decider import SchedulerDecider
from tests.controls import counter, eventually

STREAM = Stream("S", ("s.>",), max_age=60.0, max_bytes=1 << 20, full="old")
CONSUMER = Consumer("tests-s", "S", ("s.>",))


async def outcomes(error):
    """How often a message that `react` fails on with `error` had an outcome, and its deliveries."""
    bus, registry, seen = MemoryBus(), CollectorRegistry(), []
    await bus.ensure([STREAM], [CONSUMER])

    def react(message):
        seen.append(message.deliveries)
        message.nak = lambda _: type(message).nak(message, 0.001)
        raise error

    consumer = ReactionConsumer(bus, CONSUMER, react, CommandLoop(MemoryLog(), SchedulerDecider(), counter()), registry)
    running = asyncio.create_task(consumer.run())
    await bus.publish("s.1", b"")

    def counted(outcome):
        return registry.get_sample_value("penstock_tests_s_messages_total", {"outcome": outcome})

    async with asyncio.timeout(20.0):
        while len(seen) <= 2 * PARK_AFTER and not counted("parked"):
            await asyncio.sleep(0.001)
    running.cancel()
    with suppress(asyncio.CancelledError):
        await running
    return counted, seen


async def test_a_message_that_fails_by_itself_is_parked():
    # FAULTS 62
    counted, seen = await outcomes(ValueError("poison"))
    assert counted("parked") == 1 and seen == [1, 2, 3, 4, 5]


async def test_what_is_no_message_is_not_read_again():
    # FAULTS 62, 67: thousands of them must not wait in the place of others
    counted, seen = await outcomes(msgspec.DecodeError("poison"))
    assert counted("parked") == 1 and seen == [1]


@pytest.mark.parametrize(
    "body", [{"exit_code": 2**64 - 1}, {"exit_code": -(2**31) - 1}, {"outputs": {"o": ["x", "y"]}}, {"outputs": {"a\0": {"id": "x", "digest": "y"}}}]
)
def test_numbers_and_names_that_no_projection_could_keep_are_poison(body):
    # FAULTS 48
    report = {"type": "step.finished", "step": "task", "status": "succeeded", **body}
    data = msgspec.msgpack.encode({"attempt": ["x", "main", 1], "first": 1, "bodies": [report]})
    with pytest.raises(msgspec.ValidationError):
        on_report("reports.w1.x", data, lambda _: None)


async def test_an_event_that_is_not_known_yet_is_never_parked():
    counted, seen = await outcomes(UnknownEvent("request.unheard_of"))
    assert counted("parked") is None and len(seen) > PARK_AFTER


def test_a_report_whose_names_fit_no_stream_is_poison_and_asks_nothing_of_the_log():
    for attempt in (Attempt("x\0", "main", 1), Attempt("x", "main\n", 1), Attempt("", "main", 1)):
        with pytest.raises(msgspec.ValidationError):
            on_report("reports.w1.x", msgspec.msgpack.encode(Reports(attempt=attempt, first=1, bodies=[])), lambda _: None)
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'"main\\n"', type=StageName)


def test_an_event_of_an_earlier_epoch_tells_nothing():
    """FAULTS 73: it may never have been; if it is still so, it is published again."""
    event = BuildAbortRequested(build="b")
    recorded = Recorded(
        position=7,
        stream="request-abort-b",
        version=1,
        event_id="e",
        type=TAGS[type(event)],
        data=encode(event),
        team="main",
        correlation_id="b",
        causation_id="b",
        actor="a",
        recorded_at=datetime(2026, 1, 1, tzinfo=UTC),
    )
    assert on_event(cloud_event(recorded, 1), 2) == []
    [(command, _)] = on_event(cloud_event(recorded, 2), 2)
    assert command == AbortBuild(build="b")


@pytest.mark.parametrize(("kind", "outcome"), [("foreign", "foreign"), ("stale", "refused")])
async def test_what_is_not_the_senders_to_say_is_counted_by_itself(kind, outcome):
    """FAULTS 48: the alarm; the refusal's text names the worker."""

    class Refusing:
        def submit(self, command, cause):
            future = asyncio.get_running_loop().create_future()
            future.set_exception(Refused(kind, "a report by w1"))
            return future

    bus, registry = MemoryBus(), CollectorRegistry()
    await bus.ensure([STREAM], [CONSUMER])
    running = asyncio.create_task(ReactionConsumer(bus, CONSUMER, lambda _: [(None, None)], Refusing(), registry).run())
    with capture_logs() as said:
        await bus.publish("s.1", b"")
        await eventually(lambda: registry.get_sample_value("penstock_tests_s_messages_total", {"outcome": outcome}))
    running.cancel()
    await asyncio.wait([running])
    [line] = [line for line in said if line["event"] == "refused"]
    assert (line["log_level"], line["why"]) == ("warning" if kind == "foreign" else "info", "a report by w1")
