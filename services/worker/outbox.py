"""What the worker has said and must be able to say again: reports until they are events, log chunks until they are archived.

Everything is written to the spool, then published; publishing does not wait for the disk's sync. What is not acked is sent again on the next
connection at once, and like what is acked and then not recorded with a growing pause. A full disk loses nothing that the bus takes: the record is
then kept in memory, and the attempt is told.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from itertools import count, takewhile
from typing import Literal

import msgspec
import structlog

from libs.bus.bus import Ack, Bus
from proto.messages import ArchivedLog, Attempt, LogChunk, ReportBody, Reports, ReportStageFinished
from services.worker.spool import Place, Spool

logger = structlog.get_logger()

WINDOW_BYTES = 2 << 20
"""Log bytes of one attempt that may be on their way; past it, its output is not read."""
RESEND_REPORTS = (3.0, 15.0)
RESEND_REFUSED = (0.5, 15.0)
RESEND_LOGS = (10.0, 300.0)
"""Seconds until what was sent is sent again: at first, and at most (it doubles)."""
LISTED = 1000
"""Logs that a heartbeat asks about, which must fit the bus however long nothing is archived."""
TURN = 50
"""By so many the next heartbeat begins further on, so that each comes first in its turn: the schedulers look up no more at once of those they do not
know."""
FRESH_AFTER = 3
"""From this repeat on a message gets an id of its own: a purged or lost message is still a duplicate inside the dedup window."""

_Record = tuple[Literal["reports", "chunk", "reports-done", "log-done"], Attempt, bytes]
_encode = msgspec.msgpack.Encoder().encode
_decode_record = msgspec.msgpack.Decoder(_Record).decode
_decode_reports = msgspec.msgpack.Decoder(Reports).decode
_decode_chunk = msgspec.msgpack.Decoder(LogChunk).decode


class _Pause:
    """When to send again: doubling from the first to the longest."""

    def __init__(self, bounds: tuple[float, float], now: float) -> None:
        self._next, self._longest = bounds
        self.due = now + self._next
        self.repeats = 0

    def passed(self, now: float) -> None:
        self._next = min(self._longest, self._next * 2)
        self.due = now + self._next
        self.repeats += 1


class _Said:
    """One attempt's reports (number n is `bodies[n - 1]`) and chunks (by number: where, or what if the disk would not take it).

    Of the chunks that are not acked those are `refused` that are not on their way either."""

    def __init__(self) -> None:
        self.bodies: list[ReportBody] = []
        self.reports: list[Place] = []
        self.journaled = 0
        """So many reports are in the journal, from the first one on."""
        self.recorded = 0
        self.ended = False
        self.reports_pause: _Pause | None = None
        self.chunks: dict[int, Place | bytes] = {}
        self.unacked: dict[int, int] = {}
        self.refused: set[int] = set()
        self.refused_pause: _Pause | None = None
        self.log_pause: _Pause | None = None
        """Set when the log is whole and waits to be archived."""
        self.archived: ArchivedLog | None = None
        self.on_window: Callable[[], None] = lambda: None

    def window(self) -> int:
        return sum(self.unacked.values())


class Outbox:
    """`clock` gives monotonic seconds; `on_disk_full(attempt, error)` is told when something could not be spooled."""

    def __init__(
        self, worker: str, boot: str, bus: Bus, spool: Spool, clock: Callable[[], float], on_disk_full: Callable[[Attempt, OSError], None]
    ) -> None:
        self._worker = worker
        self._boot = boot
        self._bus = bus
        self._spool = spool
        self._clock = clock
        self._on_disk_full = on_disk_full
        self._said: dict[Attempt, _Said] = {}
        self._connections = bus.connections
        self._in_flight: set[asyncio.Future[Ack]] = set()
        self._resending: asyncio.Task[None] | None = None
        self._turn = 0

    @property
    def logs(self) -> list[Attempt]:
        """Ended attempts whose log waits to be archived."""
        return [attempt for attempt, said in self._said.items() if said.log_pause is not None]

    def logs_in_turn(self) -> list[Attempt]:
        """As many of them as can be asked about at once, each time from another place on."""
        waiting = self.logs
        first = self._turn % max(1, len(waiting))
        self._turn = first + TURN
        return [*waiting[first:], *waiting[:first]][:LISTED]

    def replay(self) -> dict[Attempt, int]:
        """Read the spool of earlier lives. Gives the attempts that had ended, with their last report.

        Of what had not ended, as far as the journal tells without a gap, the reports are forgotten: its lease is void. Its log is kept until an
        archive has it or nobody will make one: after a power cut the end may be an event and only the journal's last words missing."""
        bodies: dict[Attempt, dict[int, ReportBody]] = {}
        for place, record in self._spool.replay():
            try:
                kind, attempt, body = _decode_record(record)
            except msgspec.DecodeError:
                self._spool.release(place)
                continue
            said = self._said.setdefault(attempt, _Said())
            if kind == "reports":
                said.reports.append(place)
                reports = _decode_reports(body)
                bodies.setdefault(attempt, {}).update(enumerate(reports.bodies, reports.first))
            elif kind == "chunk":
                said.chunks[_decode_chunk(body).number] = place
            else:
                self._spool.release(place)
                if kind == "reports-done":
                    bodies.pop(attempt, None)
                    self._release_reports(said)
                else:
                    self._release_log(said)
        now = self._clock()
        for attempt, said in list(self._said.items()):
            said.bodies = _from_the_first(bodies.get(attempt, {}))
            if not said.bodies or not isinstance(said.bodies[-1], ReportStageFinished):
                self._release_reports(said)
            said.ended = True
            said.reports_pause = _Pause(RESEND_REPORTS, now - RESEND_REPORTS[0]) if said.bodies else None
            said.log_pause = _Pause(RESEND_LOGS, now) if said.chunks else None
            self._drop_if_done(attempt)
        self._spool.tidy()
        return {attempt: len(said.bodies) for attempt, said in self._said.items() if said.bodies}

    def open(self, attempt: Attempt, on_window: Callable[[], None]) -> None:
        """An attempt begins; `on_window` is called when it may write log again."""
        said = self._said[attempt] = _Said()
        said.on_window = on_window

    def report(self, attempt: Attempt, bodies: list[ReportBody]) -> int:
        """Say it. Gives the number of the last. What the disk refused before is written with it: a report's number is its place in the journal."""
        said = self._said.get(attempt)
        if said is None:
            return 0
        first = len(said.bodies) + 1
        said.bodies += bodies
        body = _encode(Reports(attempt=attempt, first=first, bodies=bodies))
        unwritten = body
        if said.journaled < first - 1:
            unwritten = _encode(Reports(attempt=attempt, first=said.journaled + 1, bodies=said.bodies[said.journaled :]))
        place = self._write("reports", attempt, unwritten)
        if place is not None:
            said.reports.append(place)
            said.journaled = len(said.bodies)
        now = self._clock()
        if said.reports_pause is None:
            said.reports_pause = _Pause(RESEND_REPORTS, now)
        if isinstance(bodies[-1], ReportStageFinished):
            said.ended = True
            said.log_pause = _Pause(RESEND_LOGS, now) if said.chunks else None
        self._publish_reports(attempt, first, len(said.bodies), body, 0)
        return len(said.bodies)

    def log(self, chunk: LogChunk) -> None:
        """Keep and publish a chunk."""
        attempt = chunk.attempt
        said = self._said.get(attempt)
        if said is None:
            return
        body = _encode(chunk)
        said.chunks[chunk.number] = self._write("chunk", attempt, body) or body
        said.unacked[chunk.number] = len(body)
        self._publish_chunk(attempt, said, chunk.number, body, 0)

    def is_full(self, attempt: Attempt) -> bool:
        """Whether so much log is on its way that no more should be read."""
        said = self._said.get(attempt)
        return said is not None and said.window() >= WINDOW_BYTES

    def on_recorded(self, attempt: Attempt, number: int) -> None:
        """Reports up to `number` are events; fewer than there were, after the log has lost its tail."""
        said = self._said.get(attempt)
        if said is not None and number != said.recorded:
            said.recorded = number
            said.reports_pause = _Pause(RESEND_REPORTS, self._clock())
            if number >= len(said.bodies) and said.ended:
                self.forget(attempt)

    def forget(self, attempt: Attempt) -> None:
        """Nobody waits for the attempt's reports; of one that has not ended, nor for its log."""
        said = self._said.get(attempt)
        if said is None:
            return
        if said.reports:
            self._mark("reports-done", attempt)
        self._release_reports(said)
        if not said.ended:
            self._forget_log(attempt, said)
        self._drop_if_done(attempt)

    def forget_log(self, log: ArchivedLog) -> None:
        """So much of the log is archived; what is not is sent again at once, when that is news."""
        said = self._said.get(log.attempt)
        if said is None or not said.ended:
            return
        kept = {number: where for number, where in said.chunks.items() if not log.holds(number)}
        if not kept:
            self._forget_log(log.attempt, said)
            self._drop_if_done(log.attempt)
        elif log != said.archived:
            said.archived = log
            self._release(where for number, where in said.chunks.items() if number not in kept)
            said.chunks, said.unacked = kept, {number: size for number, size in said.unacked.items() if number in kept}
            said.refused &= kept.keys()
            said.log_pause = _Pause(RESEND_LOGS, self._clock() - RESEND_LOGS[0])
            said.log_pause.repeats = FRESH_AFTER - 1

    def on_time(self) -> None:
        """Send again what is due, unless that is still going on, and tidy the spool."""
        if self._bus.connections != self._connections:
            self._connections = self._bus.connections
            self._hasten()
        if self._bus.connected and (self._resending is None or self._resending.done()):
            due = [attempt for attempt, said in self._said.items() if self._is_due(said)]
            if due:
                self._resending = asyncio.get_running_loop().create_task(self._resend(due), name="outbox-resend")
        self._compact()

    async def settle(self, timeout: float) -> None:
        """Wait until all that was published is acked or refused, at most so many seconds."""
        if self._in_flight:
            await asyncio.wait(list(self._in_flight), timeout=timeout)

    async def close(self) -> None:
        if self._resending is not None:
            self._resending.cancel()
            await asyncio.wait([self._resending])
        await self._spool.close()

    def _hasten(self) -> None:
        """After a reconnection anything may have been lost."""
        now = self._clock()
        for said in self._said.values():
            if said.reports_pause is not None:
                said.reports_pause = _Pause(RESEND_REPORTS, now - RESEND_REPORTS[0] + 0.5)
            if said.refused:
                said.refused_pause = _Pause(RESEND_REFUSED, now - RESEND_REFUSED[0])
            if said.log_pause is not None:
                said.log_pause = _Pause(RESEND_LOGS, now - RESEND_LOGS[0] + 0.5)

    def _is_due(self, said: _Said) -> bool:
        now = self._clock()
        reports = said.reports_pause is not None and said.recorded < len(said.bodies) and said.reports_pause.due <= now
        refused = said.refused_pause is not None and said.refused_pause.due <= now
        return reports or refused or (said.log_pause is not None and said.log_pause.due <= now)

    async def _resend(self, attempts: list[Attempt]) -> None:
        for attempt in attempts:
            said = self._said.get(attempt)
            if said is None:
                continue
            now = self._clock()
            if said.reports_pause is not None and said.recorded < len(said.bodies) and said.reports_pause.due <= now:
                said.reports_pause.passed(now)
                first = said.recorded + 1
                body = _encode(Reports(attempt=attempt, first=first, bodies=said.bodies[first - 1 :]))
                self._publish_reports(attempt, first, len(said.bodies), body, said.reports_pause.repeats)
                await self.settle(5.0)
            if said.refused_pause is not None and said.refused_pause.due <= now:
                said.refused_pause.passed(now)
                await self._resend_chunks(attempt, said, sorted(said.refused), 0)
            if said.log_pause is not None and said.log_pause.due <= now:
                said.log_pause.passed(now)
                await self._resend_chunks(attempt, said, list(said.chunks), said.log_pause.repeats)

    async def _resend_chunks(self, attempt: Attempt, said: _Said, numbers: list[int], repeats: int) -> None:
        for number in numbers:
            if not self._bus.connected:
                return
            kept = said.chunks.get(number)
            if kept is None:
                continue
            try:
                body = kept if isinstance(kept, bytes) else _decode_record(self._spool.read(kept))[2]
            except (OSError, msgspec.DecodeError) as error:
                logger.error("a chunk cannot be read back", attempt=attempt, chunk=number, exc_info=error)
                continue
            self._publish_chunk(attempt, said, number, body, repeats)
            if number % 16 == 0:
                await self.settle(5.0)

    def _publish_reports(self, attempt: Attempt, first: int, last: int, body: bytes, repeats: int) -> None:
        subject = f"reports.{self._worker}.{attempt.build}"
        self._publish(subject, body, f"{attempt.build}/{attempt.stage}/{attempt.number}/r{first}-{last}", repeats)

    def _publish_chunk(self, attempt: Attempt, said: _Said, number: int, body: bytes, repeats: int) -> None:
        subject = f"logs.{self._worker}.{attempt.build}.{attempt.stage}.{attempt.number}"
        said.refused.discard(number)

        def answered(done: asyncio.Future[Ack]) -> None:
            if done.cancelled() or done.exception() is not None:
                if number in said.unacked:
                    said.refused.add(number)
                    said.refused_pause = said.refused_pause or _Pause(RESEND_REFUSED, self._clock())
                return
            was_full = said.window() >= WINDOW_BYTES
            said.unacked.pop(number, None)
            said.refused.discard(number)
            if not said.refused:
                said.refused_pause = None
            if was_full and said.window() < WINDOW_BYTES:
                said.on_window()

        self._publish(subject, body, f"{attempt.build}/{attempt.stage}/{attempt.number}/c{number}", repeats).add_done_callback(answered)

    def _publish(self, subject: str, body: bytes, msg_id: str, repeats: int) -> asyncio.Future[Ack]:
        # The boot's name is random: another worker cannot guess the id and use it up first, for a stream's dedup window is everybody's.
        msg_id = f"{self._boot}/{msg_id}"
        future = self._bus.publish(subject, body, f"{msg_id}#{repeats}" if repeats >= FRESH_AFTER else msg_id)
        self._in_flight.add(future)
        future.add_done_callback(self._published)
        return future

    def _published(self, done: asyncio.Future[Ack]) -> None:
        self._in_flight.discard(done)
        if not done.cancelled() and (error := done.exception()) is not None:
            logger.debug("not published now", error=repr(error))

    def _write(self, kind: Literal["reports", "chunk", "reports-done", "log-done"], attempt: Attempt, body: bytes) -> Place | None:
        try:
            return self._spool.append(_encode((kind, attempt, body)))
        except OSError as error:
            self._on_disk_full(attempt, error)
            return None

    def _mark(self, kind: Literal["reports-done", "log-done"], attempt: Attempt) -> None:
        """A note that saves repeats after a restart; one that is lost only costs them."""
        try:
            self._spool.release(self._spool.append(_encode((kind, attempt, b""))))
        except OSError:
            return

    def _release_reports(self, said: _Said) -> None:
        for place in said.reports:
            self._spool.release(place)
        said.reports, said.bodies, said.reports_pause = [], [], None

    def _release_log(self, said: _Said) -> None:
        self._release(said.chunks.values())
        said.chunks, said.log_pause = {}, None
        said.unacked.clear()
        said.refused.clear()
        said.refused_pause = None

    def _release(self, chunks: Iterable[Place | bytes]) -> None:
        for kept in chunks:
            if isinstance(kept, Place):
                self._spool.release(kept)

    def _forget_log(self, attempt: Attempt, said: _Said) -> None:
        if said.chunks:
            self._mark("log-done", attempt)
        self._release_log(said)

    def _drop_if_done(self, attempt: Attempt) -> None:
        said = self._said[attempt]
        if not said.bodies and not said.chunks:
            del self._said[attempt]

    def _compact(self) -> None:
        oldest = self._spool.refuse()
        if oldest is None:
            return
        try:
            for said in self._said.values():
                for i, place in enumerate(said.reports):
                    if place.file == oldest:
                        said.reports[i] = self._moved(place)
                for number, kept in said.chunks.items():
                    if isinstance(kept, Place) and kept.file == oldest:
                        said.chunks[number] = self._moved(kept)
        except OSError as error:
            logger.warning("the spool cannot be tidied now", error=str(error))

    def _moved(self, place: Place) -> Place:
        record = self._spool.read(place)
        moved = self._spool.append(record)
        self._spool.release(place)
        return moved


def _from_the_first(bodies: Mapping[int, ReportBody]) -> list[ReportBody]:
    """Up to the first gap."""
    return [bodies[number] for number in takewhile(bodies.__contains__, count(1))]
