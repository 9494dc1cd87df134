"""Where the lines of a build are: on JetStream before the archive, in the archive after, by the same numbers."""

import asyncio
import base64
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


def shown(data: bytes) -> tuple[str, str | None]:
    """What a step wrote as text; and in base64, where that is not all that it wrote."""
    try:
        return data.decode(), None
    except UnicodeDecodeError:
        return data.decode(errors="replace"), base64.b64encode(data).decode()


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


def gap(line: int) -> Line:
    """The mark of lines that never came; it bears the number of the first of them."""
    return _mark(line, f"log lines from {line} on are missing")


def last_word(log: AttemptLog, line: int) -> Line | None:
    """What is to be said at number `line`, where the archive has no more, unless nothing can be missing there. (After it, it has been said.)"""
    if log.archived is None or line > log.archived:
        return None
    if line < log.archived:
        return gap(line)
    lost = bool(log.worker) and log.chunks is None
    return _mark(line, "the worker was lost here, and what was written last may be, too") if lost else None


def _mark(line: int, text: str) -> Line:
    return line, Segment("", "stderr", 0, f"[penstock: {text}]\n".encode())


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
        """The lines from `first` on, and marks where some are missing. Before it ends it tells `ended` whether the log is complete. Raises
        BusUnavailable, ArchiveUnavailable."""
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
                if kept[0] > first:
                    yield gap(first)
                yield kept
                first = kept[0] + count_lines(kept[1].data)
        if (mark := last_word(log, first)) is not None:
            yield mark
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
