"""What the worker keeps of a log until it is archived."""

import errno
import os
from pathlib import Path

import msgspec
import pytest

from libs.bus.memory import MemoryBus
from proto.messages import ArchivedLog, Attempt, LogChunk, Reports, ReportStageFinished, ReportStepProgressed, Segment
from proto.topology import CONSUMERS, STREAMS
from services.worker.outbox import LISTED, RESEND_LOGS, RESEND_REPORTS, TURN, Outbox
from services.worker.spool import Spool

ATTEMPT = Attempt("b", "s", 1)


class Worker:
    """An outbox whose attempt has ended after five chunks."""

    def __init__(self, folder: Path, bus: MemoryBus, boot: str = "boot") -> None:
        self.bus = bus
        self.now = 0.0
        self.spool = Spool(folder)
        self.outbox = Outbox("w1", boot, bus, self.spool, lambda: self.now, lambda *_: None)

    async def end(self) -> None:
        self.outbox.open(ATTEMPT, lambda: None)
        self.write(1, 2, 3, 4, 5)
        self.outbox.report(ATTEMPT, [ReportStageFinished(status="succeeded", chunks=5)])
        await self.outbox.settle(5)

    def write(self, *numbers: int) -> None:
        for number in numbers:
            self.outbox.log(LogChunk(attempt=ATTEMPT, number=number, first_line=number, segments=[Segment("step", "stdout", 1, b"line\n")]))

    async def sent(self) -> list[int]:
        """The chunks that were sent since they were asked for last."""
        await self.outbox.settle(5)
        found: list[int] = []
        while (message := await self.bus.last("LOGS", "logs.>")) is not None:
            async with self.bus.tail("LOGS", "logs.>") as batches:
                async for batch in batches:
                    found += [msgspec.msgpack.decode(each.data, type=LogChunk).number for each in batch]
                    if batch[-1].sequence >= message.sequence:
                        break
            await self.bus.purge("LOGS", "logs.>")
        return sorted(found)

    async def pass_time(self, seconds: float) -> list[int]:
        self.now += seconds
        self.outbox.on_time()
        if self.outbox._resending is not None:
            await self.outbox._resending
        return await self.sent()


async def test_what_an_archive_lacks_is_kept_and_sent_again(tmp_path: Path) -> None:
    bus = MemoryBus()
    await bus.ensure(STREAMS, CONSUMERS)
    worker = Worker(tmp_path, bus)
    await worker.end()
    assert await worker.sent() == [1, 2, 3, 4, 5]
    partly = ArchivedLog("b", "s", 1, 4, [(2, 2)])
    worker.outbox.forget_log(partly)
    assert await worker.pass_time(0) == [2, 5], "at once, and not taken for what came before"
    worker.outbox.forget_log(partly)
    assert await worker.pass_time(1) == [], "the same again is no news"
    assert worker.outbox.logs == [ATTEMPT]
    worker.outbox.forget_log(ArchivedLog("b", "s", 1, 5))
    assert worker.outbox.logs == []
    assert await worker.pass_time(RESEND_LOGS[1]) == []
    await worker.outbox.close()


async def test_a_log_that_nobody_will_archive_is_forgotten_whole(tmp_path: Path) -> None:
    bus = MemoryBus()
    await bus.ensure(STREAMS, CONSUMERS)
    worker = Worker(tmp_path, bus)
    await worker.end()
    worker.outbox.forget_log(ArchivedLog("b", "s", 1, 0))
    assert worker.outbox.logs == [ATTEMPT], "an archive without a chunk"
    worker.outbox.forget_log(ArchivedLog("b", "s", 1))
    assert worker.outbox.logs == []
    await worker.outbox.close()


async def test_a_log_outlives_the_journals_last_words(tmp_path: Path) -> None:
    """FAULTS 58: the power was cut before the attempt's end was synced, which is an event all the same; what the bus had is gone, too."""
    bus = MemoryBus()
    await bus.ensure(STREAMS, CONSUMERS)
    worker = Worker(tmp_path, bus)
    await worker.end()
    assert await worker.sent() == [1, 2, 3, 4, 5]
    await worker.outbox.close()
    (journal,) = tmp_path.glob("*.journal")
    os.truncate(journal, journal.stat().st_size - 1)
    again = Worker(tmp_path, bus, "another boot")
    assert again.outbox.replay() == {}, "its reports are void, or recorded"
    assert again.outbox.logs == [ATTEMPT]
    assert await again.pass_time(RESEND_LOGS[0]) == [1, 2, 3, 4, 5]
    again.outbox.forget_log(ArchivedLog("b", "s", 1))
    assert again.outbox.logs == []
    await again.outbox.close()


async def test_what_the_bus_did_not_take_is_sent_on_the_next_connection_at_once(tmp_path: Path) -> None:
    """FAULTS 57: and whether its attempt ends meanwhile changes nothing."""
    bus = MemoryBus()
    await bus.ensure(STREAMS, CONSUMERS)
    worker = Worker(tmp_path, bus)
    worker.outbox.open(ATTEMPT, lambda: None)
    worker.write(1)
    assert await worker.pass_time(0) == [1]
    bus.connected = False
    worker.write(2, 3)
    await worker.outbox.settle(5)
    bus.connected = True
    worker.write(4)
    worker.outbox.report(ATTEMPT, [ReportStageFinished(status="succeeded", chunks=4)])
    assert await worker.pass_time(0) == [2, 3, 4]
    await worker.outbox.close()


async def test_what_is_refused_is_offered_again_within_a_second(tmp_path: Path) -> None:
    """The streams are not there when the worker is, as after the loss of the bus's disk."""
    bus = MemoryBus()
    worker = Worker(tmp_path, bus)
    worker.outbox.open(ATTEMPT, lambda: None)
    worker.write(1, 2)
    await worker.outbox.settle(5)
    bus.connected = False
    bus.connected = True
    assert await worker.pass_time(0) == []
    await bus.ensure(STREAMS, CONSUMERS)
    assert await worker.pass_time(1) == [1, 2]
    assert await worker.pass_time(RESEND_LOGS[1]) == [], "what is acked is not sent again while the attempt goes on"
    await worker.outbox.close()


async def test_reports_that_a_restored_log_does_not_have_are_sent_again(tmp_path: Path) -> None:
    """FAULTS 73: they were events, and are none any more."""
    bus = MemoryBus()
    await bus.ensure(STREAMS, CONSUMERS)
    worker = Worker(tmp_path, bus)
    worker.outbox.open(ATTEMPT, lambda: None)
    for _ in range(3):
        worker.outbox.report(ATTEMPT, [ReportStepProgressed(step="step", percent=1)])
    worker.outbox.on_recorded(ATTEMPT, 3)
    await worker.pass_time(RESEND_REPORTS[1])
    await bus.purge("REPORTS", "reports.>")
    worker.outbox.on_recorded(ATTEMPT, 1)
    await worker.pass_time(RESEND_REPORTS[0])
    message = await bus.last("REPORTS", "reports.>")
    assert message is not None
    again = msgspec.msgpack.decode(message.data, type=Reports)
    assert (again.first, len(again.bodies)) == (2, 2)
    await worker.outbox.close()


async def test_every_log_that_waits_comes_first_in_its_turn(tmp_path: Path) -> None:
    """However many there are, and however long those before it wait."""
    bus = MemoryBus()
    await bus.ensure(STREAMS, CONSUMERS)
    worker = Worker(tmp_path, bus)
    attempts = {Attempt(f"b{number}", "s", 1) for number in range(LISTED + 2 * TURN + 1)}
    for attempt in attempts:
        worker.outbox.open(attempt, lambda: None)
        worker.outbox.log(LogChunk(attempt=attempt, number=1, first_line=0, segments=[Segment("step", "stdout", 1, b"line\n")]))
        worker.outbox.report(attempt, [ReportStageFinished(status="succeeded", chunks=1)])
    turns = [worker.outbox.logs_in_turn() for _ in range(len(attempts) // TURN + 1)]
    assert {len(turn) for turn in turns} == {LISTED}
    assert {attempt for turn in turns for attempt in turn[:TURN]} == attempts
    for attempt in attempts:
        worker.outbox.forget_log(ArchivedLog(attempt.build, attempt.stage, attempt.number))
    assert worker.outbox.logs_in_turn() == []
    await worker.outbox.close()


async def last_reports(bus: MemoryBus) -> tuple[int, list[str]]:
    """(the number of the first, their kinds) of the message that was sent last."""
    message = await bus.last("REPORTS", "reports.>")
    assert message is not None
    reports = msgspec.msgpack.decode(message.data, type=Reports)
    return reports.first, [body.step if isinstance(body, ReportStepProgressed) else "end" for body in reports.bodies]


async def test_a_report_that_the_disk_refused_keeps_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 53: it is written with the next one, so that no other has its number in the worker's next life."""
    bus = MemoryBus()
    await bus.ensure(STREAMS, CONSUMERS)
    worker = Worker(tmp_path, bus)
    worker.outbox.open(ATTEMPT, lambda: None)
    worker.outbox.report(ATTEMPT, [ReportStepProgressed(step="1", percent=1)])
    with monkeypatch.context() as full:
        full.setattr(worker.spool, "append", _full)
        worker.outbox.report(ATTEMPT, [ReportStepProgressed(step="2", percent=1)])
    worker.outbox.report(ATTEMPT, [ReportStageFinished(status="succeeded", chunks=0)])
    assert await last_reports(bus) == (3, ["end"])
    await worker.outbox.close()
    again = Worker(tmp_path, bus, "another boot")
    assert again.outbox.replay() == {ATTEMPT: 3}
    again.outbox.on_recorded(ATTEMPT, 1)
    await again.pass_time(RESEND_REPORTS[0])
    assert await last_reports(bus) == (2, ["2", "end"])
    await again.outbox.close()


def _full(_: bytes) -> None:
    raise OSError(errno.ENOSPC, "full")


async def test_an_attempt_whose_reports_have_a_gap_in_the_journal_has_not_ended(tmp_path: Path) -> None:
    """What is behind the gap is never given the numbers in it; the log is kept."""
    bus = MemoryBus()
    await bus.ensure(STREAMS, CONSUMERS)
    worker = Worker(tmp_path, bus)
    worker.outbox.open(ATTEMPT, lambda: None)
    worker.write(1)
    for first, body in ((1, ReportStepProgressed(step="1", percent=1)), (3, ReportStageFinished(status="succeeded", chunks=1))):
        reports = msgspec.msgpack.encode(Reports(attempt=ATTEMPT, first=first, bodies=[body]))
        worker.spool.append(msgspec.msgpack.encode(("reports", ATTEMPT, reports)))
    await worker.outbox.close()
    again = Worker(tmp_path, bus, "another boot")
    assert again.outbox.replay() == {}
    assert again.outbox.logs == [ATTEMPT]
    assert await again.pass_time(RESEND_LOGS[0]) == [1, 1], "by the first life, and by this"
    assert await bus.last("REPORTS", "reports.>") is None
    await again.outbox.close()
