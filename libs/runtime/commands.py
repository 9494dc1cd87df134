"""Decide and record: the command loop with group commit.

Everything that waits is decided together and appended in one round trip; while that is under way the next batch gathers, so under load the
batches grow by themselves and an idle system waits for nothing. One command that is refused or conflicts fails (or tries again) alone.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import chain
from typing import Any, Generic, TypeVar

import msgspec
import structlog

from libs.eventlog.log import NO_STREAM, Appended, Conflict, EventLog, LogUnavailable, NewEvent, Write
from libs.runtime.decisions import Cause, Decider, Refused
from proto.catalogue import TAGS, encode
from proto.envelope import facts
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


APPEND_BYTES = 8 << 20
"""Data in one append, a single write aside: what is over waits for the next."""

_Result = tuple[Sequence[Event] | Exception, S, int]
"""What a decision gave, and the state and version after it."""


class CommandLoop(Generic[C, S]):
    """Runs one decider over a log. One `run()` at a time; any number of callers.

    Keeps states in an LRU by (stream, version). A stale one is harmless: an append expects its version, and what appends nothing is decided on a
    state that was loaded for it."""

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
        """Queue a command; the future raises Refused, Early, UnreadableEvent (the stream holds one), or LogUnavailable (then
        nothing is known: ask again, a repeat decides nothing)."""
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
                except LogUnavailable as error:
                    self._states.clear()  # a log that was away may have lost its tail
                    self._fail(chain.from_iterable(batch), error)
                except Exception as error:  # one of them is to blame, and must not take the others with it
                    logger.warning("a batch failed and is tried one by one", size=len(batch), exc_info=error)
                    await self._one_by_one(batch)
                except BaseException:
                    self._fail(chain.from_iterable(batch), LogUnavailable("the service is stopping"))
                    raise
        finally:
            self._fail(self._waiting, LogUnavailable("the service is stopping"))
            self._waiting.clear()

    async def _one_by_one(self, batch: Sequence[list[_Waiting[C]]]) -> None:
        for group in batch:
            try:
                await self._decide_and_append([group])
            except Exception as error:  # its caller's to know
                self._fail(group, error)

    def _take(self) -> list[list[_Waiting[C]]]:
        """The next batch, by stream in order of arrival. Commands on one stream go together if they have one cause: their events share a write."""
        taken: dict[str, list[_Waiting[C]]] = {}
        closed: set[str] = set()
        later: list[_Waiting[C]] = []
        while self._waiting and len(taken) < self._batch:
            waiting = self._waiting.popleft()
            group = taken.setdefault(waiting.stream, [])
            if waiting.stream not in closed and (not group or group[0].cause == waiting.cause):
                group.append(waiting)
            else:
                closed.add(waiting.stream)
                later.append(waiting)
        self._waiting.extendleft(reversed(later))
        if not self._waiting:
            self._arrived.clear()
        return list(taken.values())

    async def _decide_and_append(self, batch: Sequence[list[_Waiting[C]]]) -> None:
        unknown = [group[0] for group in batch if group[0].stream not in self._states]
        for waiting in unknown:
            if waiting.conflicts == 0 and self._creates(waiting.command):
                self._states[waiting.stream] = (NO_STREAM, self._decider.initial)
        loaded = {w.stream for w in unknown if w.stream not in self._states}
        await self._load(loaded)
        decided = [(group, *self._decide(group)) for group in batch]
        # An append checks the state that it rests on. Where there is none, another may have written since: the log is asked before anybody is told.
        doubtful = {group[0].stream for group, _, write in decided if write is None} - loaded
        await self._load(doubtful)
        decided = [(one[0], *self._decide(one[0])) if one[0][0].stream in doubtful else one for one in decided]
        writing: list[tuple[list[_Waiting[C]], list[_Result[S]], Write]] = []
        size = 0
        for group, results, write in decided:
            if write is None:
                self._settle(group, results, 0)
                continue
            size += sum(len(event.data) for event in write.events)
            if size > APPEND_BYTES and writing:
                self._states.pop(write.stream, None)
                self._put_back(group)
            else:
                writing.append((group, results, write))
        if not writing:
            return
        try:
            outcomes = await self._log.append([write for _, _, write in writing])
        except BaseException:
            for group, _, _ in writing:
                self._states.pop(group[0].stream, None)
            raise
        for (group, results, _), outcome in zip(writing, outcomes, strict=True):
            stream = group[0].stream
            match outcome:
                case Appended():
                    self._states[stream] = (outcome.version, results[-1][1])
                    self._settle(group, results, outcome.position - outcome.version)
                case Conflict():
                    self._states.pop(stream, None)
                    self._again(group)
        while len(self._states) > self._cached:
            self._states.popitem(last=False)

    def _decide(self, group: Sequence[_Waiting[C]]) -> tuple[list[_Result[S]], Write | None]:
        """What comes of each command, decided one after another on what the earlier ones make of the state, and the one write that records it."""
        stream, cause = group[0].stream, group[0].cause
        version, state = self._states[stream]
        self._states.move_to_end(stream)
        expected = version
        new: list[NewEvent] = []
        results: list[_Result[S]] = []
        for waiting in group:
            try:
                events = self._decider.decide(waiting.command, state)
                encoded = [NewEvent(event_id=self._ids(), type=TAGS[type(event)], data=encode(event)) for event in events]
                for one in encoded:
                    if len(one.data) > MAX_EVENT:
                        raise Refused("too-large", f"a {one.type} event of {len(one.data)} bytes is over the limit of {MAX_EVENT}")
                after = state
                for event in events:
                    after = self._decider.evolve(after, event)
            except Exception as error:  # whatever a decision raises is its caller's to know, and nobody else's
                results.append((error, state, version))
                continue
            new += encoded
            state, version = after, version + len(events)
            results.append((events, state, version))
        if not new:
            if expected == NO_STREAM:
                del self._states[stream]
            return results, None
        return results, Write(
            stream=stream,
            expected=expected,
            events=new,
            team=cause.team,
            correlation_id=cause.correlation_id,
            causation_id=cause.causation_id,
            actor=cause.actor,
        )

    def _settle(self, group: Sequence[_Waiting[C]], results: Sequence[_Result[S]], offset: int) -> None:
        """Tell each caller, now that all that was decided before its command is recorded. A write's positions are as dense as its versions."""
        for waiting, (result, state, version) in zip(group, results, strict=True):
            if isinstance(result, Exception):
                self._resolve(waiting, result)
            else:
                position = version + offset if result else 0
                self._resolve(waiting, Outcome(events=result, position=position, version=version, state=state))

    def _again(self, group: Sequence[_Waiting[C]]) -> None:
        """Another has written the stream: load it and decide again."""
        for waiting in group:
            waiting.conflicts += 1
            if waiting.conflicts > self.MAX_CONFLICTS:
                self._resolve(waiting, LogUnavailable(f"{waiting.stream} is written too often by others"))
        self._put_back([waiting for waiting in group if waiting.conflicts <= self.MAX_CONFLICTS])

    def _put_back(self, group: Sequence[_Waiting[C]]) -> None:
        self._waiting.extendleft(reversed(group))
        self._arrived.set()

    async def _load(self, streams: Collection[str]) -> None:
        if not streams:
            return
        for stream, history in (await self._log.read_streams(list(streams))).items():
            state = self._decider.initial
            for fact in facts(history):
                state = self._decider.evolve(state, fact.event)
            self._states[stream] = (history[-1].version if history else NO_STREAM, state)

    def _fail(self, batch: Iterable[_Waiting[C]], error: BaseException) -> None:
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
