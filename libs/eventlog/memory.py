"""The event log in memory, for tests of the runtime and of domain code: the same semantics as Postgres, within one process."""

from collections.abc import Callable, Collection, Sequence, Set
from datetime import UTC, datetime

import msgspec

from libs.eventlog.log import ANY, Appended, Conflict, LogUnavailable, NotOwner, Wakeup, Write, check_writes
from proto.catalogue import OWNERS, category_of
from proto.envelope import Recorded


class _Records:
    """What all views of one log share."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self.now = now
        self.events: list[Recorded] = []
        self.streams: dict[str, list[Recorded]] = {}
        self.ids: dict[str, Recorded] = {}
        self.wakeups: set[Wakeup] = set()
        self.epoch = 1
        self.available = True


class MemoryLog:
    """An EventLog. `service` limits what may be appended to that service's categories; "" may append to all.

    `available = False` makes every call raise LogUnavailable, `raise_epoch()` acts as a restore does."""

    def __init__(self, service: str = "", now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._service = service
        self._records = _Records(now)

    def acting_as(self, service: str) -> "MemoryLog":
        """The same log, as another service sees it."""
        other = MemoryLog(service)
        other._records = self._records
        return other

    @property
    def available(self) -> bool:
        return self._records.available

    @available.setter
    def available(self, value: bool) -> None:
        self._records.available = value

    def raise_epoch(self) -> None:
        self._records.epoch += 1

    async def append(self, writes: Sequence[Write]) -> list[Appended | Conflict]:
        self._require()
        check_writes(writes)
        for write in writes:
            if self._service and OWNERS.get(category_of(write.stream)) != self._service:
                raise NotOwner(f"{self._service} does not own {write.stream}")
            for event in write.events:
                msgspec.json.decode(event.data)
                known = self._records.ids.get(event.event_id)
                if known is not None and known.stream != write.stream:
                    raise ValueError(f"event {event.event_id} is recorded in {known.stream}")
        before = len(self._records.events)
        outcomes = [self._write(write) for write in writes]
        if len(self._records.events) > before:
            for wakeup in self._records.wakeups:
                wakeup.ring({category_of(write.stream) for write in writes})
        return outcomes

    def _write(self, write: Write) -> Appended | Conflict:
        records = self._records
        stream = records.streams.get(write.stream, [])
        known = [records.ids[event.event_id] for event in write.events if event.event_id in records.ids]
        if len(known) == len(write.events):
            last = max(known, key=lambda recorded: recorded.version)
            return Appended(write.stream, last.version, last.position, last.recorded_at)
        if known or write.expected not in (ANY, len(stream)):
            return Conflict(write.stream, len(stream))
        recorded_at = records.now()
        for event in write.events:
            recorded = Recorded(
                position=len(records.events) + 1,
                stream=write.stream,
                version=len(stream) + 1,
                event_id=event.event_id,
                type=event.type,
                data=event.data,
                team=write.team,
                correlation_id=write.correlation_id,
                causation_id=write.causation_id,
                actor=write.actor,
                recorded_at=recorded_at,
            )
            records.streams.setdefault(write.stream, stream).append(recorded)
            records.events.append(recorded)
            records.ids[event.event_id] = recorded
        return Appended(write.stream, len(stream), len(records.events), recorded_at)

    async def read_streams(self, streams: Sequence[str]) -> dict[str, list[Recorded]]:
        self._require()
        return {stream: list(self._records.streams.get(stream, ())) for stream in streams}

    async def read(self, after: int, limit: int, categories: Collection[str] | None = None) -> list[Recorded]:
        self._require()
        found: list[Recorded] = []
        for recorded in self._records.events[max(after, 0) :]:
            if len(found) == limit:
                break
            if categories is None or category_of(recorded.stream) in categories:
                found.append(recorded)
        return found

    async def absent(self, streams: Collection[str]) -> set[str]:
        self._require()
        return {stream for stream in streams if stream not in self._records.streams}

    async def head(self) -> int:
        self._require()
        return len(self._records.events)

    async def epoch(self) -> int:
        self._require()
        return self._records.epoch

    def wakeup(self, urgent: Set[str] | None = None, linger: float = 0.0) -> Wakeup:
        wakeup = Wakeup(self._records.wakeups.discard, urgent, linger)
        self._records.wakeups.add(wakeup)
        return wakeup

    def _require(self) -> None:
        if not self._records.available:
            raise LogUnavailable("made unavailable")
