"""One build, watched live: its status at each change and its log, from wherever the log is.

A watch is made once and shared by all who watch the build from the same place on (`Hub`).
"""

import asyncio
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress

import msgspec
import structlog

from libs.bus.bus import Bus, BusUnavailable, Message
from libs.eventlog.log import LogUnavailable
from libs.runtime.http import Problem
from proto.api.builds import Build
from proto.api.logs import LogEvent
from proto.messages import count_lines
from services.gateway.artifacts import ArchiveUnavailable, ArtifactsClient
from services.gateway.broadcast import Broadcast
from services.gateway.feed import LogFeed
from services.gateway.logs import STREAM, ChunkOrder, Line, chunk_of, complete, cut, gap, last_word, lines_from, shown, subject_of_build
from services.gateway.projection import AttemptLog, BuildRow
from services.gateway.sse import bad_token, message

logger = structlog.get_logger()

_TOKEN = re.compile(r"(\d{1,18})((?:\.\d{1,4}-\d{1,4}-\d{1,12})*)")


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """`buffer`: bytes of a build's messages kept in memory; `stall`: seconds a reader may take nothing while it is full; `late`: seconds to wait for
    the rest of a finished attempt's log."""

    buffer: int = 8 << 20
    stall: float = 15.0
    late: float = 20.0


class Resume(msgspec.Struct, frozen=True):
    """Where a watcher was: the build's position, and for each (stage index, attempt) the lines it has."""

    position: int = 0
    lines: dict[tuple[int, int], int] = {}

    def token(self) -> str:
        return f"{self.position}" + "".join(f".{stage}-{attempt}-{lines}" for (stage, attempt), lines in self.lines.items())


def resume(token: str) -> Resume:
    """Raises Problem 400."""
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise bad_token()
    parts = [part.split("-") for part in match[2].split(".") if part]
    return Resume(int(match[1]), {(int(stage), int(attempt)): int(lines) for stage, attempt, lines in parts})


class Sources(msgspec.Struct, frozen=True):
    """Where a watch finds things out. `passed` waits until the read models have a position."""

    row: Callable[[str], Awaitable[BuildRow | None]]
    passed: Callable[[int], Awaitable[bool]]
    view: Callable[[BuildRow], Build]
    feed: LogFeed
    bus: Bus
    artifacts: ArtifactsClient


class _Attempt:
    """How far the log of one attempt has been delivered."""

    def __init__(self, index: int, stage: str, number: int, lines: int) -> None:
        self.index = index
        self.stage = stage
        self.number = number
        self.lines = lines
        self.order = ChunkOrder()
        self.done = False
        self.waiting_since: float | None = None

    @property
    def key(self) -> tuple[int, int]:
        return self.index, self.number


class BuildWatch:
    """Makes the messages of one build, from `start` on, into a Broadcast."""

    def __init__(self, row: BuildRow, start: Resume, sources: Sources, limits: Limits) -> None:
        self.broadcast = Broadcast(limits.buffer, limits.stall)
        self._sources = sources
        self._limits = limits
        self._row = row
        self._lines = dict(start.lines)
        self._attempts: dict[tuple[int, int], _Attempt] = {}
        self._index = {stage.name: index for index, stage in enumerate(row.stages)}
        self._changed = asyncio.Event()
        self._chunks: asyncio.Queue[Sequence[Message]] = asyncio.Queue(maxsize=4)
        self._clock = asyncio.get_running_loop().time

    async def run(self) -> None:
        """Until the build has ended and its log is delivered; the broadcast then ends."""
        try:
            async with self._sources.feed.build(self._row.id) as watch, asyncio.TaskGroup() as group:
                await self._sources.passed(watch.position)
                self._row = await self._sources.row(self._row.id) or self._row
                await self._say_status()
                following = [group.create_task(self._follow_status(watch.wait))]
                tailing: asyncio.Task[None] | None = None
                while not await self._settle():
                    if tailing is None and self._needs_tail():
                        tailing = group.create_task(self._follow_log())
                        following.append(tailing)
                    await self._next()
                for task in following:
                    task.cancel()
                await self._say("end", msgspec.json.encode(self._sources.view(self._row)))
        except* (LogUnavailable, ArchiveUnavailable) as errors:
            first = errors.exceptions[0]
            logger.warning("a watch ends early", build=self._row.id, why=str(first.__cause__ or first))
            why = "; ".join(str(error) for error in errors.exceptions if isinstance(error, ArchiveUnavailable))
            failure = Problem(503, "unavailable", "The rest cannot be read now", f"{why}; come back with Last-Event-ID".removeprefix("; "))
            await self._say("error", msgspec.json.encode(failure.body))
        finally:
            self.broadcast.end()

    # --- status ----------------------------------------------------------------------------------------------------------------------

    async def _follow_status(self, news: Callable[[], Awaitable[int]]) -> None:
        while True:
            position = await news()
            while not await self._sources.passed(position):
                pass
            try:
                row = await self._sources.row(self._row.id)
            except LogUnavailable:
                await asyncio.sleep(0.5)
                row = await self._sources.row(self._row.id)
            if row is not None and row.position > self._row.position:
                before, self._row = self._row, row
                if self._sources.view(before) != self._sources.view(row):
                    await self._say_status()
                self._changed.set()

    async def _say_status(self) -> None:
        await self._say("status", msgspec.json.encode(self._sources.view(self._row)))

    async def _say(self, event: str, data: bytes) -> None:
        token = Resume(self._row.position, self._lines).token()
        await self.broadcast.append(token, message(event, token, data))

    # --- log -------------------------------------------------------------------------------------------------------------------------

    async def _follow_log(self) -> None:
        while True:
            with suppress(BusUnavailable):
                async with self._sources.bus.tail(STREAM, subject_of_build(self._row.id)) as batches:
                    async for batch in batches:
                        await self._chunks.put(batch)
            await asyncio.sleep(0.5)

    async def _next(self) -> None:
        """Wait for chunks or a change, and deliver what is in turn. While a finished attempt is incomplete, wait no longer than it may."""
        timeout = min((0.25 for attempt in self._attempts.values() if attempt.waiting_since is not None), default=None)
        taking = asyncio.ensure_future(self._chunks.get())
        changing = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait([taking, changing], timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            self._changed.clear()
            if taking.done():
                for delivered in taking.result():
                    await self._take(delivered)
        finally:
            for task in (taking, changing):
                task.cancel()

    async def _take(self, delivered: Message) -> None:
        chunk = chunk_of(delivered, self._row)
        if chunk is None or chunk.attempt.stage not in self._index:
            return
        attempt = self._attempt(chunk.attempt.stage, chunk.attempt.number)
        if attempt.done:
            return
        if attempt.waiting_since is not None:
            attempt.waiting_since = self._clock()
        for ready in attempt.order.take(chunk):
            for line in lines_from(attempt.lines, ready):
                await self._say_line(attempt, line)

    def _attempt(self, stage: str, number: int) -> _Attempt:
        key = (self._index[stage], number)
        attempt = self._attempts.get(key)
        if attempt is None:
            attempt = self._attempts[key] = _Attempt(key[0], stage, number, self._lines.get(key, 0))
        return attempt

    async def _say_line(self, attempt: _Attempt, line: Line, following: int | None = None) -> None:
        """`following`: the next line's number, unless it is the next."""
        number, segment = line
        attempt.lines = self._lines[attempt.key] = number + count_lines(segment.data) if following is None else following
        text, exactly = shown(segment.data)
        event = LogEvent(
            stage=attempt.stage,
            attempt=attempt.number,
            step=segment.step,
            stream=segment.stream,
            line=number,
            at=segment.at,
            text=text,
            text_base64=exactly,
        )
        await self._say("log", msgspec.json.encode(event))

    def _finished_logs(self) -> list[tuple[_Attempt, AttemptLog]]:
        found = []
        for key, log in self._row.logs.items():
            stage, _, number = key.rpartition("/")
            if log.over and stage in self._index:
                found.append((self._attempt(stage, int(number)), log))
        return sorted(found, key=lambda pair: pair[0].key)

    def _needs_tail(self) -> bool:
        running = self._row.finished_at is None
        return running or any(not attempt.done and log.archived is None for attempt, log in self._finished_logs())

    async def _settle(self) -> bool:
        """Bring every finished attempt's log to its end where that can be done now. True when the build has ended and nothing is missing."""
        waiting = False
        for attempt, log in self._finished_logs():
            if not attempt.done:
                attempt.done = complete(log, attempt.order.next) or (log.archived is not None and await self._from_archive(attempt, log))
            if not attempt.done:
                attempt.done = await self._given_up(attempt, log)
            waiting = waiting or not attempt.done
        return self._row.finished_at is not None and not waiting

    async def _from_archive(self, attempt: _Attempt, log: AttemptLog) -> bool:
        row = self._row
        try:
            async with aclosing(self._sources.artifacts.archive(row.team, row.id, attempt.stage, attempt.number, attempt.lines)) as archive:
                async for line, segment in archive:
                    kept = cut(line, segment, attempt.lines)
                    if kept is None:
                        continue
                    if kept[0] > attempt.lines:
                        await self._say_missing(attempt, kept[0])
                    await self._say_line(attempt, kept)
            if (mark := last_word(log, attempt.lines)) is not None:
                await self._say_line(attempt, mark, (log.archived or 0) + 1)
        except ArchiveUnavailable:
            if self._late(attempt, self._limits.late):
                raise
            return False
        return True

    async def _given_up(self, attempt: _Attempt, log: AttemptLog) -> bool:
        """Whether what is missing of a finished attempt's log has been waited for long enough; then it is marked."""
        if not log.worker and log.archived is None:
            return True  # it was never placed
        if log.archived is not None or not self._late(attempt, self._limits.late):
            return False
        for chunk in attempt.order.rest():
            for line in lines_from(attempt.lines, chunk):
                if line[0] > attempt.lines:
                    await self._say_missing(attempt, line[0])
                await self._say_line(attempt, line)
        if log.chunks is not None and not complete(log, attempt.order.next):
            await self._say_missing(attempt, attempt.lines + 1)
        return True

    def _late(self, attempt: _Attempt, seconds: float) -> bool:
        if attempt.waiting_since is None:
            attempt.waiting_since = self._clock()
        return self._clock() - attempt.waiting_since >= seconds

    async def _say_missing(self, attempt: _Attempt, until: int) -> None:
        """Mark lines that never came."""
        await self._say_line(attempt, gap(attempt.lines), until)


class Hub:
    """The watches of all builds. Whoever comes shares one that still has the place to start from, or starts another."""

    def __init__(self, sources: Sources, limits: Limits) -> None:
        self._sources = sources
        self._limits = limits
        self._watches: dict[str, dict[BuildWatch, asyncio.Task[None]]] = {}

    async def messages(self, row: BuildRow, token: str | None, drop: Callable[[], None]) -> AsyncGenerator[bytes, None]:
        """The messages of a build after the one that `token` names, until the end. `drop` is called when the reader is too slow."""
        start = resume(token) if token is not None else Resume()
        watches = self._watches.setdefault(row.id, {})
        found = next(((watch, place) for watch in watches if (place := watch.broadcast.place_after(token)) is not None), None)
        if found is None:
            watch, place = BuildWatch(row, start, self._sources, self._limits), 0
            watches[watch] = asyncio.create_task(watch.run(), name=f"watch-{row.id}")
        else:
            watch, place = found
        reader = watch.broadcast.join(place, drop)
        try:
            async with aclosing(watch.broadcast.read(reader)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            watch.broadcast.leave(reader)
            if not watch.broadcast.readers:
                task = watches.pop(watch, None)
                if not watches:
                    self._watches.pop(row.id, None)
                if task is not None:
                    task.cancel()
                    with suppress(asyncio.CancelledError):
                        await task
