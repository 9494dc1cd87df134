"""The event log as its users see it: append under expected versions, read in order, be woken.

Invariants: positions rise in commit order, so a reader that goes on after the last position it has seen skips nothing; a stream's versions
count from 1 without gaps; an `event_id` is recorded once.
"""

import asyncio
import re
from collections.abc import Callable, Collection, Sequence, Set
from contextlib import suppress
from datetime import datetime
from typing import Protocol

from msgspec import Struct

from proto.envelope import Recorded
from proto.topology import MAX_EVENT, MAX_NAME

NO_STREAM = 0
"""Expected version of a stream that must not exist yet."""
ANY = -1
"""Expected version of a stream that may be anywhere."""

_STREAM = re.compile(r"[^\s.*>\x00-\x1f\x7f-]+-[^\s.*>\x00-\x1f\x7f]+")
_TEAM = re.compile(r"[^\s.*>\x00-\x1f\x7f]+")
_TYPE = re.compile(r"[a-z0-9_]+(?:\.[a-z0-9_]+)?")
_ID = re.compile(r"[\x21-\x7e]+")


class NewEvent(Struct, frozen=True):
    """An event to append. `data` is JSON, kept byte for byte, at most MAX_EVENT bytes."""

    event_id: str
    type: str
    data: bytes


class Write(Struct, frozen=True, kw_only=True):
    """Events for one stream, recorded all or none, if the stream is at version `expected` (or ANY)."""

    stream: str
    expected: int
    events: Sequence[NewEvent]
    team: str
    correlation_id: str
    causation_id: str
    actor: str


class Appended(Struct, frozen=True):
    """Where the write's last event is; also the answer when the same event ids are seen again."""

    stream: str
    version: int
    position: int
    recorded_at: datetime


class Conflict(Struct, frozen=True):
    """Nothing of the write was recorded: the stream is at version `actual`."""

    stream: str
    actual: int


class LogUnavailable(Exception):
    """No connection, a timeout, a full disk: nothing is known to be recorded. Retry with the same event ids."""


class NotOwner(Exception):
    """The service may not append to this category. Nothing of the call was recorded."""


class EventTooLarge(Exception):
    """An event is over MAX_EVENT bytes. Nothing of the call was recorded."""


class Wakeup:
    """One follower's bell: rung by every append, by anyone, and whenever appends may have gone unheard.

    Events of `urgent` categories (None: all) ring at once, the others `linger` seconds later. Waits that follow one another closely are paced, so
    that a busy log is read in large batches while an idle one is read at once."""

    PACE = 100.0
    """Waits that may return in a second, on and on."""
    BURST = 8.0
    """Waits that may return at once after a rest: as many as a build has events."""

    def __init__(self, on_close: Callable[["Wakeup"], None], urgent: Set[str] | None = None, linger: float = 0.0) -> None:
        self._loop = asyncio.get_running_loop()
        self._rung = asyncio.Event()
        self._on_close = on_close
        self._urgent = urgent
        self._linger = linger
        self.unheard = False
        """Whether the database was out of reach since whoever waits last cleared this: what it had not synced, it may have forgotten."""
        self._later: asyncio.TimerHandle | None = None
        self._credit = self.BURST
        self._credited = self._loop.time()

    def ring(self, categories: Collection[str] = ()) -> None:
        """Something was appended to these categories; none: nobody knows to which."""
        self.unheard = self.unheard or not categories
        if self._rung.is_set():
            return
        if not categories or self._urgent is None or any(category in self._urgent for category in categories):
            self._rung.set()
        elif self._later is None:
            self._later = self._loop.call_later(self._linger, self._rung.set)

    async def wait(self, timeout: float) -> bool:
        """Return at once if it rang since the last wait returned (or since it was made), else when it rings, or after `timeout` seconds.
        Whether it rang, or was about to."""
        if not self._rung.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._rung.wait()
        now = self._loop.time()
        self._credit = min(self.BURST, self._credit + (now - self._credited) * self.PACE)
        self._credited = now
        if self._credit < 1:
            await asyncio.sleep((1 - self._credit) / self.PACE)
        self._credit -= 1
        rung = self._rung.is_set() or self._later is not None
        self._quiet()
        return rung

    def close(self) -> None:
        self._quiet()
        self._on_close(self)

    def _quiet(self) -> None:
        if self._later is not None:
            self._later.cancel()
            self._later = None
        self._rung.clear()


class EventLog(Protocol):
    """Every method may raise LogUnavailable."""

    async def append(self, writes: Sequence[Write]) -> list[Appended | Conflict]:
        """One round trip, one outcome a write, in order. Writes are independent of one another, and name a stream once each.
        Raises NotOwner or EventTooLarge for the call as a whole, and ValueError for what is malformed."""
        ...

    async def read_streams(self, streams: Sequence[str]) -> dict[str, list[Recorded]]:
        """Every named stream is a key; its events in version order."""
        ...

    async def read(self, after: int, limit: int, categories: Collection[str] | None = None) -> list[Recorded]:
        """The first `limit` events after a position, in position order, or fewer if they are large (see `is_full`).
        A follower of few categories that gets nothing may go on after the head it asked for before."""
        ...

    async def absent(self, streams: Collection[str]) -> set[str]:
        """Those of the streams that have no event."""
        ...

    async def head(self) -> int:
        """The last position; 0 when empty."""
        ...

    async def epoch(self) -> int:
        """Raised when the log has lost a tail (a restore, a failover): what followed it starts over."""
        ...

    def wakeup(self, urgent: Set[str] | None = None, linger: float = 0.0) -> Wakeup:
        """One for each follower; made before its first read, it misses nothing. See Wakeup for `urgent` and `linger`."""
        ...


PAGE_BYTES = 4 << 20
"""A read ends early, after the event that brings what is stored to this size."""


def is_full(rows: Sequence[Recorded], limit: int) -> bool:
    """Whether a read of `limit` was cut off, by the limit or by its size: there is likely more."""
    return len(rows) >= limit or sum(len(row.data) for row in rows) >= PAGE_BYTES * 0.9


def check_writes(writes: Sequence[Write]) -> None:
    """What every log refuses before it records anything; with it all that the bus would not carry. Raises EventTooLarge or ValueError."""
    streams: set[str] = set()
    ids: set[str] = set()
    for write in writes:
        if not _STREAM.fullmatch(write.stream):
            raise ValueError(f"{write.stream!r} is not <category>-<id>, two words of a subject")
        if not _TEAM.fullmatch(write.team):
            raise ValueError(f"{write.team!r} is no word of a subject")
        _check_lengths(write.stream, write.team, write.correlation_id, write.causation_id, write.actor)
        if write.stream in streams:
            raise ValueError(f"{write.stream} is named twice in one call")
        streams.add(write.stream)
        if not write.events:
            raise ValueError(f"no events for {write.stream}")
        if write.expected < ANY:
            raise ValueError(f"no version {write.expected} of {write.stream}")
        for event in write.events:
            if len(event.data) > MAX_EVENT:
                raise EventTooLarge(f"{event.type} for {write.stream} has {len(event.data)} bytes, over {MAX_EVENT}")
            if not _TYPE.fullmatch(event.type) or not _ID.fullmatch(event.event_id):
                raise ValueError(f"{event.type!r} is no type, or {event.event_id!r} no id")
            _check_lengths(event.type, event.event_id)
            if event.event_id in ids:
                raise ValueError(f"event id {event.event_id} is given twice")
            ids.add(event.event_id)


def _check_lengths(*names: str) -> None:
    for name in names:
        if len(name) > MAX_NAME or (not name.isascii() and len(name.encode()) > MAX_NAME):
            raise ValueError(f"{name[:40]!r}… is over {MAX_NAME} bytes")
