"""When an attempt has ended, its log moves from the bus into the store (FAULTS.md, Logs).

A log is archived when all its chunks are there, or patience is over: then gaps are listed. Only afterwards is it purged from LOGS. Everything may be
repeated: what is archived is not archived again.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter

from libs.blobstore.store import StoreUnavailable
from libs.bus.bus import Bus, BusUnavailable, Message
from libs.eventlog.log import EventLog, LogUnavailable
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause
from libs.runtime.reactions import PARK_AFTER, UNKNOWN_AGAIN
from proto.catalogue import UnknownEvent
from proto.events.artifact import LogGap
from proto.messages import LogChunk
from proto.topology import ARTIFACTS_ARCHIVE, MAX_CHUNK
from services.artifacts.commands import ArchiveLog, Command
from services.artifacts.decider import State, log_stream
from services.artifacts.log_archive import LogArchiveWriter
from services.artifacts.logs import Logs
from services.artifacts.reactions import EndedLog, on_event

logger = structlog.get_logger()

ACTOR = "artifacts"
PATIENCE = 20.0
"""Seconds to wait for chunks that were counted and have not come."""
QUIET = 2.0
"""Seconds without a chunk after which a log whose extent nobody knows is taken to be over."""
_LARGEST = 128 << 20
_UNKNOWN = 8 << 20
"""What a log is taken to hold when nobody knows."""
_IN_FLIGHT = 128 << 20
_CHUNK = msgspec.msgpack.Decoder(LogChunk)


class Chunks:
    """The chunks of one attempt as they come, in any order and repeated: passes them on in order, each once."""

    def __init__(self, ended: EndedLog, take: Callable[[LogChunk], None]) -> None:
        self._ended = ended
        self._take = take
        self._held: dict[int, LogChunk] = {}
        self._next = 1
        self._bytes = 0
        self.count = 0
        self.gaps: list[LogGap] = []

    @property
    def complete(self) -> bool:
        return 0 <= self._ended.chunks < self._next

    def offer(self, subject: str, data: bytes) -> None:
        """What is not of the attempt, or not from the worker that held it, is passed over."""
        ended = self._ended
        if ended.worker and subject.split(".")[1] != ended.worker:
            return
        try:
            chunk = _CHUNK.decode(data)
        except msgspec.DecodeError:
            return
        attempt = chunk.attempt
        expected = (attempt.build, attempt.stage, attempt.number) == (ended.build, ended.stage, ended.attempt)
        if not expected or chunk.number < self._next or chunk.number in self._held or chunk.number > ended.chunks >= 0:
            return
        self._bytes += len(data)
        if self._bytes > _LARGEST:
            return
        self._held[chunk.number] = chunk
        while (ready := self._held.pop(self._next, None)) is not None:
            self._pass_on(ready)

    def give_up(self) -> None:
        """What is missing stays missing: pass on what waits behind it, and list the gaps."""
        for number in sorted(self._held):
            if number > self._next:
                self.gaps.append(LogGap(first=self._next, last=number - 1))
            self._pass_on(self._held.pop(number))
        if self._next <= self._ended.chunks:
            self.gaps.append(LogGap(first=self._next, last=self._ended.chunks))

    def _pass_on(self, chunk: LogChunk) -> None:
        self._take(chunk)
        self.count += 1
        self._next = chunk.number + 1


class Archivist:
    """Consumes the ends of attempts and archives their logs, many at once within a budget of memory."""

    def __init__(
        self,
        bus: Bus,
        log: EventLog,
        commands: CommandLoop[Command, State],
        logs: Logs,
        registry: CollectorRegistry,
        patience: float = PATIENCE,
        quiet: float = QUIET,
    ) -> None:
        self._bus = bus
        self._log = log
        self._commands = commands
        self._logs = logs
        self._patience = patience
        self._quiet = quiet
        self._budget = _Budget(_IN_FLIGHT)
        self._handled = Counter(
            "penstock_artifacts_archive_messages", "Ends of attempts handled, by what came of them", ["outcome"], registry=registry
        )

    async def run(self) -> None:
        """Archive for ever."""
        async with asyncio.TaskGroup() as tasks, self._bus.consume(ARTIFACTS_ARCHIVE) as batches:
            async for batch in batches:
                logs: list[tuple[Message, EndedLog]] = []
                for message in batch:
                    try:
                        ended = on_event(message.data)
                    except UnknownEvent as error:  # not poison, but newer than this code
                        logger.error("an event that this version does not know waits for one that does", subject=message.subject, tag=str(error))
                        message.nak(UNKNOWN_AGAIN)
                        continue
                    except Exception as error:  # a poison message must not stop the others
                        self._failed(message, error)
                        continue
                    if ended is None:
                        message.ack()
                    else:
                        logs.append((message, ended))
                for message, ended in logs:
                    tasks.create_task(self._handle(message, ended))

    async def _handle(self, message: Message, ended: EndedLog) -> None:
        try:
            async with self._budget.taken(ended.bytes + MAX_CHUNK if ended.chunks > 0 else _UNKNOWN):
                if not await self._is_archived(ended):
                    await self._archive(ended)
            await self._bus.purge("LOGS", ended.subject)
        except (BusUnavailable, LogUnavailable, StoreUnavailable) as error:
            logger.warning("a log waits to be archived", build=ended.build, stage=ended.stage, attempt=ended.attempt, why=str(error))
            self._handled.labels("unavailable").inc()
            message.nak(1.0)
        except Exception as error:
            self._failed(message, error)
        else:
            self._handled.labels("done").inc()
            message.ack()

    async def _is_archived(self, ended: EndedLog) -> bool:
        stream = log_stream(ended.build, ended.stage, ended.attempt)
        return bool((await self._log.read_streams([stream]))[stream])

    async def _archive(self, ended: EndedLog) -> None:
        writer = LogArchiveWriter()
        chunks = Chunks(ended, writer.add)
        await self._gather(ended, chunks)
        chunks.give_up()
        digest = await self._logs.keep(ended.team, log_stream(ended.build, ended.stage, ended.attempt), writer.close())
        command = ArchiveLog(
            build=ended.build,
            stage=ended.stage,
            attempt=ended.attempt,
            digest=digest,
            chunks=chunks.count,
            lines=max(writer.lines, ended.lines),
            bytes=writer.bytes,
            gaps=chunks.gaps,
        )
        cause = Cause(team=ended.team, correlation_id=ended.correlation_id, causation_id=ended.event_id, actor=ACTOR)
        await self._commands.execute(command, cause)

    async def _gather(self, ended: EndedLog, chunks: Chunks) -> None:
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._patience
        async with self._bus.tail("LOGS", ended.subject) as batches:
            while not chunks.complete:
                until = deadline if ended.chunks >= 0 else min(deadline, clock() + self._quiet)
                try:
                    async with asyncio.timeout_at(until):
                        batch = await anext(batches)
                except TimeoutError:
                    return
                for message in batch:
                    chunks.offer(message.subject, message.data)

    def _failed(self, message: Message, error: Exception) -> None:
        park = message.deliveries >= PARK_AFTER
        logger.error("a log cannot be archived", subject=message.subject, deliveries=message.deliveries, parked=park, exc_info=error)
        self._handled.labels("parked" if park else "failed").inc()
        if park:
            message.term()
        else:
            message.nak(0.2 * 2**message.deliveries)


class _Budget:
    """Bytes that may be in memory at once; whoever wants more than all of it is alone."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free = size
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def taken(self, size: int) -> AsyncIterator[None]:
        size = min(size, self._size)
        async with self._changed:
            await self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            async with self._changed:
                self._free += size
                self._changed.notify_all()
