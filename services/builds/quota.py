"""Room on the bus for everybody (FAULTS 67): the streams that workers fill refuse everyone's messages when they are full.

Looked at is the stream as a whole, which costs next to nothing. Only of one that is nearly full the holders are counted; whoever holds far more
than it should loses what it has there, and may add nothing for a while: the schedulers, who admit workers to the bus, are told. Nothing of an honest
worker's is lost: it has kept all of it, and sends it again until it is recorded. What a liar does not send again is a gap in its log's archive.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge

from libs.bus.bus import BusUnavailable, StreamState
from libs.eventlog.leadership import Leadership
from proto.messages import Withheld, Withhold
from proto.topology import Consumer, Stream

logger = structlog.get_logger()

EVERY = 1.0
"""Seconds between two looks at each stream."""
CALM = 4.0
"""The same, while it is nearly empty."""
REST = 30.0
"""And once nobody was found to hold too much of a full one."""
NEARLY_EMPTY = 0.05
"""What share of its room is used then, at most."""
FULL = 0.75
"""What share of a stream's room may be used before it is asked by whom."""
BACKLOG = 100_000
"""So many messages that wait for a stream's consumer are asked about, too: what comes after them waits as well."""
TOO_MUCH = 0.25
"""What share of it nobody may hold then."""
WITHHELD_SECONDS = 300.0
"""How long whoever held too much may write nothing there."""

_encode = msgspec.msgpack.Encoder().encode


class Watched(NamedTuple):
    """A stream of `kind.<worker>.…`, and the consumer after which nobody needs what is in it, if there is one."""

    stream: Stream
    kind: Withheld
    consumer: Consumer | None = None


class Streams(Protocol):
    """What is asked of the bus; libs/bus/bus.py and jetstream.py say what each does."""

    async def stream_state(self, stream: str) -> StreamState | None: ...
    async def settled(self, consumer: Consumer) -> int: ...
    async def holders(self, stream: str, enough: int) -> dict[str, int]: ...
    async def purge(self, stream: str, subject: str, last: int | None = None) -> None: ...
    async def send(self, subject: str, data: bytes) -> None: ...


class Quota:
    """Watches streams, while this instance leads."""

    def __init__(self, bus: Streams, watched: Sequence[Watched], leadership: Leadership, registry: CollectorRegistry) -> None:
        self._bus = bus
        self._watched = watched
        self._leadership = leadership
        self._used = Gauge("penstock_stream_used", "What share of a stream's room is used", ["stream"], registry=registry)
        self._locked = Counter("penstock_stream_floods", "Workers that filled a stream and were silenced there", ["stream"], registry=registry)

    async def run(self) -> None:
        """Watch for ever."""
        async with asyncio.TaskGroup() as tasks:
            for watched in self._watched:
                tasks.create_task(self._watch(watched), name=f"quota {watched.stream.name}")

    async def _watch(self, watched: Watched) -> None:
        while True:
            await self._leadership.wait()
            try:
                pause = await self.look(watched)
            except BusUnavailable:
                pause = EVERY
            await asyncio.sleep(pause)

    async def look(self, watched: Watched) -> float:
        """Once. In how many seconds it is time for the next look. Raises BusUnavailable."""
        stream, kind, consumer = watched
        used, state = await self._state(watched)
        if state is not None and consumer is not None:
            await self._bus.purge(stream.name, ">", await self._bus.settled(consumer))
            used, state = await self._state(watched)
        if state is None:
            return CALM if used <= NEARLY_EMPTY else EVERY
        too_much = TOO_MUCH * state.bytes
        held = await self._bus.holders(stream.name, int(too_much))
        worker = max(held, key=lambda name: held[name], default="")
        if not worker or held[worker] < too_much:
            logger.warning("a stream is nearly full, and nobody holds much more than others", stream=stream.name, workers=len(held))
            return REST
        logger.error(
            "a worker fills a stream: what it has there is removed, and it may add nothing for a while",
            worker=worker,
            stream=stream.name,
            bytes=held[worker],
            seconds=WITHHELD_SECONDS,
        )
        self._locked.labels(stream.name).inc()
        await self._bus.send(f"withhold.{worker}", _encode(Withhold(kind=kind, seconds=WITHHELD_SECONDS)))
        await self._bus.purge(stream.name, f"{kind}.{worker}.>")
        return EVERY

    async def _state(self, watched: Watched) -> tuple[float, StreamState | None]:
        """What share of its room a stream uses, and its state if it is crowded."""
        state = await self._bus.stream_state(watched.stream.name)
        if state is None:
            return 0.0, None
        used = state.bytes / watched.stream.max_bytes
        self._used.labels(watched.stream.name).set(used)
        return used, state if used >= FULL or (watched.consumer is not None and state.messages >= BACKLOG) else None
