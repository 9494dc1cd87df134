"""When an attempt has ended, its log moves from the bus into the store.

A log is archived when all its chunks are there, or patience is over: then gaps are listed. Only afterwards is it purged from LOGS. What comes then
makes another archive (late_logs.py looks for it), and the worker keeps a chunk until an archive holds it. Everything may be repeated: what is
archived is not archived again.
"""

import asyncio
from collections import Counter as Counts
from collections import deque
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager

import structlog
from prometheus_client import CollectorRegistry, Counter

from libs.blobstore.store import StoreUnavailable
from libs.bus.bus import Bus, BusUnavailable, Message
from libs.eventlog.log import EventLog, LogUnavailable
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause
from libs.runtime.reactions import PARK_AFTER, UNKNOWN_AGAIN
from proto.catalogue import UnknownEvent
from proto.envelope import facts
from proto.events.artifact import LogArchived, LogGap
from proto.topology import ARTIFACTS_ARCHIVE, MAX_CHUNK
from services.artifacts.chunks import Chunks, LateChunks
from services.artifacts.commands import ArchiveLog, Command
from services.artifacts.decider import State, log_stream
from services.artifacts.log_archive import LogArchiveWriter, unpacked
from services.artifacts.logs import Logs
from services.artifacts.reactions import EndedLog, on_event

logger = structlog.get_logger()

ACTOR = "artifacts"
PATIENCE = 20.0
"""Seconds to wait for chunks that were counted and have not come."""
QUIET = 2.0
"""Seconds without a chunk after which a log whose extent nobody knows is taken to be over."""
_UNKNOWN = 8 << 20
"""What a log is taken to hold when nobody knows."""
_IN_FLIGHT = 128 << 20


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
        self._in_hand: Counts[str] = Counts()
        self._handled = Counter(
            "penstock_artifacts_archive_messages", "Ends of attempts handled, by what came of them", ["outcome"], registry=registry
        )

    async def run(self) -> None:
        """Archive for ever."""
        async with asyncio.TaskGroup() as tasks, self._bus.consume(ARTIFACTS_ARCHIVE) as batches:
            async for batch in batches:
                logs: list[tuple[Message, EndedLog]] = []
                try:
                    epoch = await self._log.epoch()
                except LogUnavailable:
                    for message in batch:
                        message.nak(1.0)
                    continue
                for message in batch:
                    try:
                        ended = on_event(message.data, epoch)
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
            await self.archive(ended)
        except (BusUnavailable, LogUnavailable, StoreUnavailable) as error:
            logger.warning("a log waits to be archived", build=ended.build, stage=ended.stage, attempt=ended.attempt, why=str(error))
            self._handled.labels("unavailable").inc()
            message.nak(1.0)
        except Exception as error:
            self._failed(message, error)
        else:
            self._handled.labels("done").inc()
            message.ack()

    def has_in_hand(self, ended: EndedLog) -> bool:
        return ended.subject in self._in_hand

    async def archive(self, ended: EndedLog) -> None:
        """Bring all that is on the bus of a log into an archive; chunks that come later, into another, which has the former's, too. Raises
        BusUnavailable, LogUnavailable, StoreUnavailable, BlobDamaged, BlobMissing."""
        self._in_hand[ended.subject] += 1
        try:
            async with self._budget.taken(ended.bytes + MAX_CHUNK if ended.chunks > 0 else _UNKNOWN):
                archived = await self._archived(ended)
                whole = archived is not None and archived.chunks == ended.chunks
                if whole:
                    await self._bus.purge("LOGS", ended.subject)
                elif last := await (self._first(ended) if archived is None else self._another(ended, archived)):
                    await self._bus.purge("LOGS", ended.subject, last)  # not what has come since
        finally:
            self._in_hand[ended.subject] -= 1
            self._in_hand += Counts()  # those at zero go

    async def _archived(self, ended: EndedLog) -> LogArchived | None:
        stream = log_stream(ended.build, ended.stage, ended.attempt)
        history = (await self._log.read_streams([stream]))[stream]
        last = [fact.event for fact in facts(history[-1:])]
        return last[0] if last and isinstance(last[0], LogArchived) else None

    async def _first(self, ended: EndedLog) -> int:
        """The last sequence on the bus that is not needed any more, or 0; as `_another`."""
        writer = LogArchiveWriter()
        chunks = Chunks(ended, writer.add)
        last = await self._gather(ended, chunks, None if ended.chunks >= 0 else self._quiet)
        chunks.give_up()
        return last if await self._keep(ended, writer, chunks.count, chunks.gaps, None) else 0

    async def _another(self, ended: EndedLog, archived: LogArchived) -> int:
        late = LateChunks(ended, archived)
        last = await self._gather(ended, late, self._quiet)
        if not late.count:
            return last
        writer, new = LogArchiveWriter(), deque(late.segments())
        async with aclosing(await self._logs.read(ended.team, archived.digest, 0, None)) as pieces:
            async for piece in pieces:
                for line, segment, _ in unpacked(piece):
                    while new and new[0][0] < line:
                        writer.put(*new.popleft())
                    writer.put(line, segment)
        while new:
            writer.put(*new.popleft())
        logger.info("late chunks of a log", build=ended.build, stage=ended.stage, attempt=ended.attempt, chunks=late.count)
        return last if await self._keep(ended, writer, archived.chunks + late.count, late.gaps, archived) else 0

    async def _keep(self, ended: EndedLog, writer: LogArchiveWriter, chunks: int, gaps: list[LogGap], former: LogArchived | None) -> bool:
        """Whether nothing on the bus is needed any more: another may have made an archive meanwhile, of less than this."""
        stream = log_stream(ended.build, ended.stage, ended.attempt)
        digest = await self._logs.keep(ended.team, stream, writer.close())
        command = ArchiveLog(
            build=ended.build,
            stage=ended.stage,
            attempt=ended.attempt,
            digest=digest,
            chunks=chunks,
            lines=max(writer.lines, ended.lines),
            bytes=writer.bytes,
            gaps=gaps,
            replaces=former.archive if former else 0,
        )
        cause = Cause(team=ended.team, correlation_id=ended.correlation_id, causation_id=ended.event_id, actor=ACTOR)
        state = (await self._commands.execute(command, cause)).state
        assert isinstance(state, LogArchived)
        if former is not None and state.digest != former.digest:
            await self._logs.forget(ended.team, stream, former.digest)
        return state.digest == digest or state.chunks == ended.chunks

    async def _gather(self, ended: EndedLog, chunks: Chunks | LateChunks, quiet: float | None) -> int:
        """Until they are complete, patience is over, or none has come for `quiet` seconds. The sequence of the last that was seen, or 0."""
        last = 0
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._patience
        async with self._bus.tail("LOGS", ended.subject) as batches:
            while not chunks.complete:
                until = deadline if quiet is None else min(deadline, clock() + quiet)
                try:
                    async with asyncio.timeout_at(until):
                        batch = await anext(batches)
                except TimeoutError:
                    break
                last = batch[-1].sequence
                for message in batch:
                    chunks.offer(message.subject, message.data)
        return last

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
