"""Commands decided at once over a log in memory; what is folded as it goes along must be what a fold from the start gives."""

import random
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from libs.eventlog.log import Appended, LogUnavailable, NewEvent, Write
from libs.eventlog.memory import MemoryLog
from libs.runtime.decisions import Cause, Decider
from proto.catalogue import TAGS, decode, encode
from proto.events.base import Event

C = TypeVar("C")
S = TypeVar("S")
T = TypeVar("T")


def at_once(coroutine: Coroutine[Any, Any, T]) -> T:
    """What a coroutine gives that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise AssertionError("it waits")


class Desk(Generic[C, S]):
    """A decider's command loop, without waiting. `unsure`: how often nobody is told whether a commit went through; it may have."""

    def __init__(self, log: MemoryLog, decider: Decider[C, S], ids: Callable[[], str], chance: random.Random, count: Callable[[], None]) -> None:
        self._log, self._decider, self._ids, self._chance, self._count = log, decider, ids, chance, count
        self._states: dict[str, tuple[int, S]] = {}
        self.unsure = 0.0

    def execute(self, command: C, cause: Cause) -> Sequence[Event]:
        """The events that came of it. Raises Refused, Early, or LogUnavailable before or after it was recorded."""
        self._count()
        lost = self.lost()
        if lost == "before":
            raise LogUnavailable("simulated")
        stream = self._decider.stream(command)
        version, state = self._states.get(stream) or (0, self._decider.initial)
        version, state = self._read_on(stream, version, state)
        events = self._decider.decide(command, state)
        if events:
            new = [NewEvent(self._ids(), TAGS[type(event)], encode(event)) for event in events]
            write = Write(
                stream=stream,
                expected=version,
                events=new,
                team=cause.team,
                correlation_id=cause.correlation_id,
                causation_id=cause.causation_id,
                actor=cause.actor,
            )
            [outcome] = at_once(self._log.append([write]))
            assert isinstance(outcome, Appended), outcome
            version, state = self._read_on(stream, version, state)
        self._states[stream] = version, state
        if lost:
            raise LogUnavailable("simulated")
        return events

    def lost(self) -> str:
        """Whether nobody is told what came of a question ("": it is told), and whether nothing did ("before") or something ("after")."""
        return self._chance.choice(["before", "after"]) if self._chance.random() < self.unsure else ""

    def crash(self) -> None:
        """All that it remembers is gone. Before, it is compared with what the log says."""
        for stream, (version, state) in self._states.items():
            refolded = self._decider.initial
            for recorded in at_once(self._log.read_streams([stream]))[stream][:version]:
                refolded = self._decider.evolve(refolded, decode(recorded.type, recorded.data))
            assert refolded == state, f"{stream}@{version}: {state} was remembered, {refolded} is recorded"
        self._states.clear()

    def _read_on(self, stream: str, version: int, state: S) -> tuple[int, S]:
        for recorded in at_once(self._log.read_streams([stream]))[stream][version:]:
            version, state = recorded.version, self._decider.evolve(state, decode(recorded.type, recorded.data))
        return version, state
