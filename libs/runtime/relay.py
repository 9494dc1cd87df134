"""The relay: the only publisher of log events. The log is the outbox; EVENTS is a copy of it that may vanish.

Invariants: it publishes in position order; the checkpoint covers only what JetStream acknowledged, in order and without a gap, but for events that
it names (see leftout.py); so whatever is after the checkpoint may be published twice, and nothing is forgotten. Two relays at once are harmless: a
message id is an event's, and followers skip what they know.
"""

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple, Protocol

import msgspec
import structlog
from prometheus_client import CollectorRegistry, Gauge

from libs.bus.bus import Ack, Bus, BusUnavailable, StreamState
from libs.eventlog.checkpoints import RelayCheckpoint
from libs.eventlog.log import EventLog, LogUnavailable, Wakeup, is_full
from libs.runtime.leftout import FINAL, LeftOut, TooMany
from libs.runtime.saving import SAVE_EVERY, Checkpoints, Deposed, Saving
from proto.envelope import Recorded, cloud_event, decode_cloud_event, subject_of
from proto.topology import STREAMS

BATCH = 500
URGENT = frozenset({"request"})
"""What somebody waits for: everything else is published LINGER seconds later, in larger batches."""
LINGER = 0.02
WINDOW = 4 * BATCH
"""How many events may wait for their ack."""
EXAMINE_EVERY = 5.0
LOOK_EVERY = 1.0
"""How soon a new connection is noticed when nothing is appended."""
SETTLE = 0.02
"""How soon acks are looked at when nothing else happens."""
RETRY = 0.2
LAST_SAVE = 1.0

_EVENTS = next(stream for stream in STREAMS if stream.name == "EVENTS")


class Office(Protocol):
    """libs.eventlog.leadership.Leadership: `term` is None for all but the leader."""

    @property
    def term(self) -> int | None: ...
    async def wait(self) -> int: ...


class _Lost(Exception):
    """JetStream gave out a sequence for the second time: it has forgotten what it acknowledged."""


class _Offered(NamedTuple):
    position: int
    event: str
    ack: asyncio.Future[Ack]


async def _from_the_start() -> int:
    return 0


class Relay:
    """`problem` says why it stands still (None: it does not, or another instance leads); `position` is how far JetStream has acknowledged, but for
    what is `left_out`.

    `floor` gives the position below which no service needs an event any more: a lost EVENTS is refilled from there.
    """

    def __init__(
        self,
        log: EventLog,
        bus: Bus,
        checkpoints: Checkpoints,
        leadership: Office,
        *,
        floor: Callable[[], Awaitable[int]] = _from_the_start,
        clock: Callable[[], float] = time.monotonic,
        fresh: Callable[[], str] = lambda: secrets.token_hex(4),
    ) -> None:
        self.problem: str | None = None
        self.position = 0
        self.left_out = LeftOut()
        self._log = log
        self._bus = bus
        self._leadership = leadership
        self._floor = floor
        self._clock = clock
        self._saving = Saving(checkpoints, clock)
        self._fresh = fresh
        self._logger = structlog.get_logger("relay")
        self._term = 0
        self._epoch = 0
        self._created = ""
        self._sequence = 0
        self._published = 0
        self._suffix = ""
        self._in_flight: deque[_Offered] = deque()
        self._connections = 0
        self._examined_at = float("-inf")
        self._offered_again_at = float("-inf")

    def measure(self, registry: CollectorRegistry) -> None:
        """How far it is, and the alarm of what it leaves out."""
        Gauge("penstock_relay_position", "The last event that the bus has acknowledged", registry=registry).set_function(lambda: self.position)
        Gauge("penstock_relay_left_out", "Events that the bus does not take", registry=registry).set_function(lambda: len(self.left_out))

    @property
    def unpublished(self) -> LeftOut | None:
        """What stands in the log and is not on the bus, if anything."""
        return self.left_out if len(self.left_out) else None

    async def run(self) -> None:
        """Lead whenever this instance is the leader, for ever."""
        wakeup = self._log.wakeup(URGENT, LINGER)
        try:
            while True:
                if self._leadership.term != self._term:
                    self._retire()
                self._term = await self._leadership.wait()
                try:
                    await self._lead(wakeup)
                except asyncio.CancelledError:
                    await self._save_last()
                    raise
                except Deposed:
                    self._retire()
                except _Lost as lost:
                    await self._forget(str(lost))
                except (BusUnavailable, LogUnavailable, TooMany) as error:
                    await self._pause(str(error) or type(error).__name__)
                finally:
                    await self._drop()
        finally:
            wakeup.close()

    async def _lead(self, wakeup: Wakeup) -> None:
        self._created = ""  # nothing is known, and nothing to save
        saved = await self._saving.load() or RelayCheckpoint(stream_created="", sequence=0, position=0, term=0)
        self._created, self._sequence, self.position = saved.stream_created, saved.sequence, saved.position
        self.left_out.restore(saved.left_out)
        self._published = self.position
        await self._examine()
        rung = True
        while True:
            self._settle()
            if self._bus.connections != self._connections or self._clock() > self._examined_at + EXAMINE_EVERY:
                await self._acknowledged(0)
                await self._examine()
                rung = True
            if self._clock() > self._offered_again_at + EXAMINE_EVERY and len(self.left_out):
                await self._acknowledged(0)
                await self._offer_again()
            more = rung and await self._publish()
            await self._acknowledged(WINDOW)
            await self._saving.save(self._checkpoint())
            self.problem = None
            if not more:
                rung = await wakeup.wait(SETTLE if self._in_flight else SAVE_EVERY if self._saving.lacks(self._checkpoint()) else LOOK_EVERY)
            if self._leadership.term != self._term:
                raise Deposed

    async def _publish(self) -> bool:
        """The next batch. True: there may be more of it."""
        batch = await self._log.read(self._published, BATCH)
        if not self._may_add():
            return True
        for recorded in batch:
            self._in_flight.append(self._offer(recorded))
            self._published = recorded.position
        return is_full(batch, BATCH)

    def _may_add(self) -> bool:
        """What the stream still has must be known before anything is added to it, or its last sequence tells nothing."""
        return self._bus.connections == self._connections and self._leadership.term == self._term

    def _offer(self, recorded: Recorded) -> _Offered:
        message_id = f"{recorded.event_id}.{self._suffix}" if self._suffix else recorded.event_id
        try:
            ack = self._bus.publish(subject_of(recorded), cloud_event(recorded, self._epoch), message_id)
        except FINAL as error:
            ack = asyncio.get_running_loop().create_future()
            ack.set_exception(error)
            ack.exception()  # it may never be asked for
        return _Offered(recorded.position, f"{recorded.type} on {recorded.stream}", ack)

    async def _offer_again(self) -> None:
        """What was left out: the bus may take larger ones by now, or somebody has mended the log. Nothing else may be in flight."""
        self._offered_again_at = self._clock()
        for position in self.left_out.positions:
            found = await self._log.read(position - 1, 1)
            if not self._may_add():
                return
            if not found or found[0].position != position:
                self.left_out.remove(position, "it is not in the log any more")
                continue
            offered = self._offer(found[0])
            await asyncio.wait([offered.ack])
            if sequence := self._taken(offered):
                self.left_out.taken(position, sequence)

    async def _acknowledged(self, at_most: int) -> None:
        """Until no more than so many wait for their ack."""
        while len(self._in_flight) > at_most:
            await asyncio.wait([self._in_flight[0].ack])
            self._settle()

    def _settle(self) -> None:
        while self._in_flight and self._in_flight[0].ack.done():
            self._taken(self._in_flight[0])
            self.position = self._in_flight.popleft().position

    def _taken(self, offered: _Offered) -> int:
        """Its sequence in the stream; 0: JetStream will never take it, and it is left out. Raises _Lost, TooMany, BusUnavailable."""
        try:
            ack = offered.ack.result()
        except FINAL as error:
            self.left_out.add(offered.position, offered.event, error)
            return 0
        if ack.sequence <= self._sequence and not ack.duplicate:
            raise _Lost(f"sequence {ack.sequence} was given out again")
        self._sequence = max(self._sequence, ack.sequence)
        return ack.sequence

    async def _examine(self) -> None:
        """Does the stream still have what it acknowledged, and of this epoch? If not, go back."""
        connections = self._bus.connections
        state = await self._bus.stream_state(_EVENTS.name)
        if state is None:
            await self._bus.ensure([_EVENTS], [])
            state = await self._bus.stream_state(_EVENTS.name)
            if state is None:
                raise BusUnavailable(f"there is no stream {_EVENTS.name}")
        epoch = await self._log.epoch()
        if state.created != self._created:
            await self._rewind(
                await self._floor(), state, "EVENTS is not the stream that was filled" if self._created else "nothing was published yet"
            )
        elif state.last_sequence < self._sequence:
            position, of_epoch = await self._end_of_stream()
            await self._rewind(position if of_epoch == epoch else await self._floor(), state, "EVENTS has lost its end")
        elif epoch != self._epoch and (await self._end_of_stream())[1] not in (0, epoch):
            await self._rewind(await self._floor(), state, "the log's epoch was raised")
        self.left_out.forget_aged(state.first_sequence)
        self._epoch = epoch
        self._connections = connections
        self._examined_at = self._clock()

    async def _end_of_stream(self) -> tuple[int, int]:
        """Position and epoch of the last message: all before that position are in the stream but for what is named as left out. (0, 0): none."""
        last = await self._bus.last(_EVENTS.name, "events.>")
        if last is None:
            return 0, 0
        try:
            event = decode_cloud_event(last.data)
        except msgspec.MsgspecError:
            return 0, 0
        return event.position, event.epoch

    async def _rewind(self, position: int, state: StreamState, why: str) -> None:
        """Saved at once: should this leader end before it is through, the next must not go on where the lost stream was."""
        self._logger.warning("the relay starts again", after=position, was_at=self.position, why=why)
        head = await self._log.head()
        self.left_out.rewind(min(position, head), state.last_sequence if state.created == self._created else 0)
        self._created, self._sequence = state.created, state.last_sequence
        self.position = self._published = min(position, head)
        # A message that was purged or lost may still count as a duplicate for a while.
        self._suffix = self._fresh()
        await self._saving.write(self._checkpoint())

    async def _forget(self, why: str) -> None:
        """Make the next look at the stream find it another than the one that was filled. Not given up: once more is published, nothing tells it."""
        self._logger.warning("EVENTS has forgotten what it acknowledged", why=why)
        while True:
            try:
                return await self._saving.write(
                    RelayCheckpoint(stream_created="", sequence=0, position=0, term=self._term, left_out=self.left_out.named)
                )
            except Deposed:
                return self._retire()
            except LogUnavailable as error:
                await self._pause(str(error))

    def _retire(self) -> None:
        """Another leads, and says how it is."""
        self.problem = None
        self.left_out.restore(())

    def _checkpoint(self) -> RelayCheckpoint:
        return RelayCheckpoint(
            stream_created=self._created, sequence=self._sequence, position=self.position, term=self._term, left_out=self.left_out.named
        )

    async def _save_last(self) -> None:
        """So that a successor repeats nothing. Best effort."""
        with suppress(Exception):
            self._settle()
            async with asyncio.timeout(LAST_SAVE):
                await self._saving.finish()
                if self._created and self._saving.lacks(self._checkpoint()):
                    await self._saving.write(self._checkpoint())

    async def _pause(self, why: str) -> None:
        if self.problem is None:
            self._logger.warning("the relay stands still", why=why)
        self.problem = why
        await asyncio.sleep(RETRY)

    async def _drop(self) -> None:
        """What is in flight will be published again, with the same ids."""
        self._in_flight.clear()
        await self._saving.drop()
