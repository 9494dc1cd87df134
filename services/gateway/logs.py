"""Where the lines of a build are: on JetStream before the archive, in the archive after, by the same numbers."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec

from libs.bus.bus import Bus, Message
from proto.messages import LogChunk, Segment, count_lines
from services.gateway.artifacts import ArtifactsClient
from services.gateway.projection import AttemptLog, BuildRow, attempt_key

STREAM = "LOGS"
PATIENCE = 3.0
"""Seconds to wait for a chunk that was there a moment ago: it may have been purged since."""
_CHUNK = msgspec.msgpack.Decoder(LogChunk)

Line = tuple[int, Segment]
"""A segment and the number of its first line."""


def chunk_of(message: Message, build: BuildRow) -> LogChunk | None:
    """The chunk in a message, or None when it is none of the build's: whoever sent it must be the worker that holds the attempt's lease. The
    sender is read from the subject, `logs.<worker>.<build>.<stage>.<attempt>`."""
    words = message.subject.split(".")
    try:
        chunk = _CHUNK.decode(message.data)
    except msgspec.DecodeError:
        return None
    attempt = chunk.attempt
    if len(words) != 5 or words[2:4] != [build.id, attempt.stage] or attempt.build != build.id:
        return None
    holder = build.logs.get(attempt_key(attempt.stage, attempt.number))
    return chunk if holder is not None and holder.worker == words[1] else None


def subject_of_build(build: str) -> str:
    return f"logs.*.{build}.>"


def lines_from(first: int, chunk: LogChunk) -> list[Line]:
    """The chunk's segments from line `first` on."""
    found: list[Line] = []
    line = chunk.first_line
    for segment in chunk.segments:
        kept = cut(line, segment, first)
        if kept is not None:
            found.append(kept)
        line += count_lines(segment.data)
    return found


def cut(line: int, segment: Segment, first: int) -> Line | None:
    """What of a segment, whose first line is number `line`, is at or after line `first`; None when nothing is."""
    skip = first - line
    if skip <= 0:
        return line, segment
    if skip >= count_lines(segment.data):
        return None
    rest = segment.data.split(b"\n", skip)[skip]
    return first, Segment(segment.step, segment.stream, segment.at, rest)


class ChunkOrder:
    """Puts the chunks of one attempt in order, each once: they may come repeated, or with gaps that a later delivery fills."""

    HELD = 256

    def __init__(self) -> None:
        self.next = 1
        self._held: dict[int, LogChunk] = {}

    def take(self, chunk: LogChunk) -> list[LogChunk]:
        """The chunks that are now in turn."""
        if chunk.number > self.next:
            if len(self._held) < self.HELD:
                self._held[chunk.number] = chunk
            return []
        if chunk.number < self.next:
            return []
        ready = [chunk]
        self.next += 1
        while self.next in self._held:
            ready.append(self._held.pop(self.next))
            self.next += 1
        return ready

    def rest(self) -> list[LogChunk]:
        """What waits behind a gap, in order: for when the gap is known to stay."""
        held = [self._held[number] for number in sorted(self._held)]
        self._held.clear()
        if held:
            self.next = held[-1].number + 1
        return held


def complete(log: AttemptLog, seen: int) -> bool:
    """Whether the chunks before number `seen` are all that an attempt wrote."""
    return log.over and log.chunks is not None and seen > log.chunks


class LogReader:
    """Reads one attempt's log as it is now. `row` is the build as it is now."""

    def __init__(self, bus: Bus, artifacts: ArtifactsClient, row: Callable[[str], Awaitable[BuildRow | None]]) -> None:
        self._bus = bus
        self._artifacts = artifacts
        self._row = row

    async def lines(self, build: BuildRow, stage: str, attempt: int, first: int, ended: Callable[[bool], None]) -> AsyncGenerator[Line, None]:
        """The lines from `first` on. Before it ends it tells `ended` whether the log is complete. Raises BusUnavailable, ArchiveUnavailable."""
        log = build.logs.get(attempt_key(stage, attempt), AttemptLog())
        if log.archived is None:
            order = ChunkOrder()
            async for chunk in self._chunks(build, stage, attempt):
                for ready in order.take(chunk):
                    for line, segment in lines_from(first, ready):
                        yield line, segment
                        first = line + count_lines(segment.data)
            if complete(log, order.next):
                ended(True)
                return
            # It may have been archived meanwhile, and so have gone from the bus.
            now = await self._row(build.id) or build
            log = now.logs.get(attempt_key(stage, attempt), log)
            if log.archived is None:
                ended(False)
                return
        async for line, segment in self._artifacts.archive(build.team, build.id, stage, attempt, first):
            kept = cut(line, segment, first)
            if kept is not None:
                yield kept
        ended(True)

    async def _chunks(self, build: BuildRow, stage: str, attempt: int) -> AsyncGenerator[LogChunk, None]:
        subject = f"logs.*.{build.id}.{stage}.{attempt}"
        last = await self._bus.last(STREAM, subject)
        if last is None:
            return
        async with self._bus.tail(STREAM, subject) as batches:
            while True:
                try:
                    batch = await asyncio.wait_for(anext(batches), PATIENCE)
                except TimeoutError:
                    return
                for message in batch:
                    chunk = chunk_of(message, build)
                    if chunk is not None and chunk.attempt.number == attempt:
                        yield chunk
                if batch[-1].sequence >= last.sequence:
                    return
