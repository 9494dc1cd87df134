"""The log as it grows, read once for everyone in this process who watches it.

It reads only while someone watches. Whoever watches is told of every event after the position at which the watch began: nothing is skipped.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import takewhile

import msgspec
import structlog

from libs.eventlog.log import EventLog, LogUnavailable, is_full
from proto.catalogue import category_of
from proto.envelope import Recorded, cloud_event

logger = structlog.get_logger()

KEPT = 4096
"""Recent events kept in memory; who lags further reads the log."""
BATCH = 1000
IDLE = 5.0
"""Seconds after which the log is looked at without being woken."""
LINGER = 0.002


class _ArchivedLog(msgspec.Struct, frozen=True):
    build: str


class Watch:
    """Someone who wants to know. `position` is the last one of interest so far."""

    def __init__(self, position: int) -> None:
        self.position = position
        self._news = asyncio.Event()

    def tell(self, position: int) -> None:
        self.position = position
        self._news.set()

    async def wait(self) -> int:
        """The position of the newest event of interest, once there is one that no earlier wait has returned."""
        await self._news.wait()
        self._news.clear()
        return self.position


class LogFeed:
    """One follower of the log for all watches. `run()` it once."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._recent: deque[tuple[Recorded, bytes]] = deque(maxlen=KEPT)
        self._builds: dict[str, set[Watch]] = {}
        self._all: set[Watch] = set()
        self._wanted = asyncio.Event()
        self._position: int | None = None
        self._started = asyncio.Event()
        self._epoch = 0

    async def run(self) -> None:
        """Follow the log whenever anyone watches, for ever."""
        wakeup = self._log.wakeup(frozenset(), LINGER)
        try:
            while True:
                await self._wanted.wait()
                try:
                    if self._position is None:
                        self._epoch = await self._log.epoch()
                        self._position = await self._log.head()
                        self._started.set()
                    batch = await self._log.read(self._position, BATCH)
                except LogUnavailable as error:
                    logger.warning("the feed waits", why=str(error))
                    await asyncio.sleep(0.5)
                    continue
                if batch:
                    self._tell(batch)
                if is_full(batch, BATCH):
                    continue
                if not batch and not (self._builds or self._all):
                    self._wanted.clear()
                    self._started.clear()
                    self._position = None
                    self._recent.clear()
                else:
                    await wakeup.wait(IDLE)
        finally:
            wakeup.close()

    def _tell(self, batch: Sequence[Recorded]) -> None:
        for recorded in batch:
            if self._all:
                self._recent.append((recorded, cloud_event(recorded, self._epoch)))
            if self._builds:
                for watch in self._builds.get(build_of(recorded), ()):
                    watch.tell(recorded.position)
        self._position = batch[-1].position
        for watch in self._all:
            watch.tell(self._position)

    async def _start(self) -> int:
        self._wanted.set()
        await self._started.wait()
        assert self._position is not None
        return self._position

    @asynccontextmanager
    async def build(self, build: str) -> AsyncIterator[Watch]:
        """A watch told of each event about a build after `watch.position`."""
        watch = Watch(0)
        self._builds.setdefault(build, set()).add(watch)
        try:
            watch.position = max(watch.position, await self._start())
            yield watch
        finally:
            self._builds[build].discard(watch)
            if not self._builds[build]:
                del self._builds[build]

    @asynccontextmanager
    async def everything(self) -> AsyncIterator[Watch]:
        """A watch told of each event after `watch.position`."""
        watch = Watch(0)
        self._all.add(watch)
        try:
            watch.position = max(watch.position, await self._start())
            yield watch
        finally:
            self._all.discard(watch)
            if not self._all:
                self._recent.clear()  # it would have a hole when the next one comes

    async def events(
        self, after: int | None, wanted: Callable[[Recorded], bool], categories: Collection[str] | None
    ) -> AsyncGenerator[list[tuple[Recorded, bytes]], None]:
        """The wanted events after a position (None: from now on), each with its CloudEvents message, for ever.
        Raises LogUnavailable."""
        async with self.everything() as watch:
            position = watch.position if after is None else after
            while True:
                if self._recent and self._recent[0][0].position <= position + 1:
                    news = list(takewhile(lambda pair: pair[0].position > position, reversed(self._recent)))[::-1]  # noqa: B023  used at once
                    seen = news[-1][0].position if news else position
                else:
                    head = watch.position
                    batch = await self._log.read(position, BATCH, categories)
                    news = [(recorded, cloud_event(recorded, self._epoch)) for recorded in batch]
                    seen = batch[-1].position if batch else max(position, head)
                found = [pair for pair in news if wanted(pair[0])]
                if found:
                    yield found
                if seen == position:
                    await watch.wait()
                position = seen


def build_of(recorded: Recorded) -> str:
    """The id of the build that an event is about; "" for others."""
    category = category_of(recorded.stream)
    if category in ("build", "lease"):
        return recorded.stream.partition("-")[2]
    if recorded.type == "log.archived":
        with suppress(msgspec.MsgspecError):  # the projection is who says so
            return msgspec.json.decode(recorded.data, type=_ArchivedLog).build
    return ""
