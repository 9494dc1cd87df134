"""Decide and record: the command loop with group commit (DESIGN.md §4).

Everything that waits is decided together and appended in one round trip; while that is under way the next batch gathers, so under load the
batches grow by themselves and an idle system waits for nothing. One command that is refused or conflicts fails (or tries again) alone.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import msgspec
import structlog

from libs.eventlog.log import NO_STREAM, Appended, Conflict, EventLog, LogUnavailable, NewEvent, Write
from libs.runtime.decisions import Cause as Cause
from libs.runtime.decisions import Decider as Decider
from libs.runtime.decisions import Early as Early
from libs.runtime.decisions import Refused as Refused
from proto.catalogue import TAGS, decode, encode
from proto.events.base import Event
from proto.topology import MAX_EVENT

logger = structlog.get_logger()

C = TypeVar("C")
S = TypeVar("S")


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a command: its events, the position and version after them (position 0: it was already so), and the state."""

    events: Sequence[Event]
    position: int
    version: int
    state: Any


class _Waiting(Generic[C]):
    __slots__ = ("cause", "command", "conflicts", "future", "stream")

    def __init__(self, command: C, cause: Cause, stream: str, future: "asyncio.Future[Outcome]") -> None:
        self.command = command
        self.cause = cause
        self.stream = stream
        self.future = future
        self.conflicts = 0


class CommandLoop(Generic[C, S]):
    """Runs one decider over a log. One `run()` at a time; any number of callers.

    Keeps states in an LRU by (stream, version): the expected version of the append is what makes a stale one harmless."""

    MAX_CONFLICTS = 20

    def __init__(
        self,
        log: EventLog,
        decider: Decider[C, S],
        ids: Callable[[], str],
        creates: Callable[[C], bool] = lambda _: False,
        batch: int = 256,
        cached: int = 20_000,
    ) -> None:
        """`creates` tells commands that most likely begin their stream: it is then presumed empty, which saves a read; a conflict corrects it."""
        self._log = log
        self._decider = decider
        self._ids = ids
        self._creates = creates
        self._batch = batch
        self._cached = cached
        self._states: OrderedDict[str, tuple[int, S]] = OrderedDict()
        self._waiting: deque[_Waiting[C]] = deque()
        self._arrived = asyncio.Event()

    def submit(self, command: C, cause: Cause) -> "asyncio.Future[Outcome]":
        """Queue a command; the future raises Refused, Early or LogUnavailable (then nothing is known: ask again, a repeat decides nothing)."""
        future: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(command, cause, self._decider.stream(command), future))
        self._arrived.set()
        return future

    async def execute(self, command: C, cause: Cause) -> Outcome:
        """Submit and wait."""
        return await self.submit(command, cause)

    async def run(self) -> None:
        """Decide what arrives, for ever. When cancelled, whoever still waits is told that nothing is known."""
        try:
            while True:
                await self._arrived.wait()
                batch = self._take()
                try:
                    await self._decide_and_append(batch)
                except BaseException as error:
                    known = isinstance(error, Exception)
                    self._fail(batch, error if known else LogUnavailable("the service is stopping"))
                    if not isinstance(error, LogUnavailable):
                        raise
        finally:
            self._fail(self._waiting, LogUnavailable("the service is stopping"))
            self._waiting.clear()

    def _take(self) -> list[_Waiting[C]]:
        """The next batch: at most one command a stream, so that each is decided on recorded state and keeps its own cause."""
        taken: dict[str, _Waiting[C]] = {}
        later: list[_Waiting[C]] = []
        while self._waiting and len(taken) < self._batch:
            waiting = self._waiting.popleft()
            if waiting.future.cancelled():
                continue
            if waiting.stream in taken:
                later.append(waiting)
            else:
                taken[waiting.stream] = waiting
        self._waiting.extendleft(reversed(later))
        if not self._waiting:
            self._arrived.clear()
        return list(taken.values())

    async def _decide_and_append(self, batch: Sequence[_Waiting[C]]) -> None:
        unknown = [w for w in batch if w.stream not in self._states]
        for waiting in unknown:
            if waiting.conflicts == 0 and self._creates(waiting.command):
                self._states[waiting.stream] = (NO_STREAM, self._decider.initial)
        await self._load([w.stream for w in unknown if w.stream not in self._states])
        writes: list[Write] = []
        deciding: list[tuple[_Waiting[C], Sequence[Event]]] = []
        for waiting in batch:
            version, state = self._states[waiting.stream]
            self._states.move_to_end(waiting.stream)
            try:
                events = self._decider.decide(waiting.command, state)
                new = [NewEvent(event_id=self._ids(), type=TAGS[type(event)], data=encode(event)) for event in events]
                for one in new:
                    if len(one.data) > MAX_EVENT:
                        raise Refused("too-large", f"a {one.type} event of {len(one.data)} bytes is over the limit of {MAX_EVENT}")
            except Exception as error:  # whatever a decision raises is its caller's to know, and nobody else's
                if version == NO_STREAM:
                    self._states.pop(waiting.stream, None)
                self._resolve(waiting, error)
                continue
            if not events:
                if version == NO_STREAM:
                    self._states.pop(waiting.stream, None)
                self._resolve(waiting, Outcome(events=(), position=0, version=version, state=state))
                continue
            deciding.append((waiting, events))
            cause = waiting.cause
            writes.append(
                Write(
                    stream=waiting.stream,
                    expected=version,
                    events=new,
                    team=cause.team,
                    correlation_id=cause.correlation_id,
                    causation_id=cause.causation_id,
                    actor=cause.actor,
                )
            )
        if not writes:
            return
        try:
            outcomes = await self._log.append(writes)
        except BaseException:
            for waiting, _ in deciding:
                self._states.pop(waiting.stream, None)
            raise
        for (waiting, events), outcome in zip(deciding, outcomes, strict=True):
            match outcome:
                case Appended():
                    state = self._states[waiting.stream][1]
                    for event in events:
                        state = self._decider.evolve(state, event)
                    self._states[waiting.stream] = (outcome.version, state)
                    self._resolve(waiting, Outcome(events=events, position=outcome.position, version=outcome.version, state=state))
                case Conflict():
                    self._states.pop(waiting.stream, None)
                    waiting.conflicts += 1
                    if waiting.conflicts > self.MAX_CONFLICTS:
                        self._resolve(waiting, LogUnavailable(f"{waiting.stream} is written too often by others"))
                    else:
                        self._waiting.appendleft(waiting)
                        self._arrived.set()
        while len(self._states) > self._cached:
            self._states.popitem(last=False)

    async def _load(self, streams: Sequence[str]) -> None:
        if not streams:
            return
        for stream, history in (await self._log.read_streams(streams)).items():
            state = self._decider.initial
            for recorded in history:
                state = self._decider.evolve(state, decode(recorded.type, recorded.data))
            self._states[stream] = (history[-1].version if history else NO_STREAM, state)

    def _fail(self, batch: Sequence[_Waiting[C]] | deque[_Waiting[C]], error: BaseException) -> None:
        for waiting in batch:
            self._resolve(waiting, error)

    @staticmethod
    def _resolve(waiting: _Waiting[C], result: Outcome | BaseException) -> None:
        if waiting.future.done():
            return
        if isinstance(result, BaseException):
            waiting.future.set_exception(result)
        else:
            waiting.future.set_result(result)
