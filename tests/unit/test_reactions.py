"""What becomes of a message that a reaction cannot handle."""

import asyncio
from contextlib import suppress

import msgspec
import pytest
from prometheus_client import CollectorRegistry

from libs.bus.memory import MemoryBus
from libs.eventlog.memory import MemoryLog
from libs.runtime.commands import CommandLoop
from libs.runtime.reactions import PARK_AFTER, ReactionConsumer
from proto.catalogue import UnknownEvent
from proto.messages import Attempt, Reports
from proto.plan import StageName
from proto.topology import Consumer, Stream
from services.builds.reactions import on_report
from services.scheduler.decider import SchedulerDecider
from tests.controls import counter

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
