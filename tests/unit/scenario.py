"""given(events).when(command).then(events): domain tests without I/O."""

from collections.abc import Sequence
from typing import Any

import pytest

from libs.runtime.decisions import Early, Refused
from proto.catalogue import TAGS, decode, encode
from proto.events.base import Event


class Scenario:
    """A history for one decider. Every event that a decision yields is encoded and decoded before it is folded."""

    def __init__(self, decider: Any, *events: Event) -> None:
        self.decider = decider
        self.events: list[Event] = []
        self.state = decider.initial
        self.new: Sequence[Event] = ()
        self._fold(events)

    def _fold(self, events: Sequence[Event]) -> None:
        for event in events:
            event = decode(TAGS[type(event)], encode(event))
            self.state = self.decider.evolve(self.state, event)
            self.events.append(event)

    def when(self, *commands: Any) -> "Scenario":
        for command in commands:
            self.new = self.decider.decide(command, self.state)
            self._fold(self.new)
        return self

    def then(self, *events: Event) -> "Scenario":
        assert list(self.new) == list(events)
        return self

    def refuses(self, command: Any, kind: str) -> "Scenario":
        with pytest.raises(Refused) as caught:
            self.decider.decide(command, self.state)
        assert caught.value.kind == kind
        return self

    def is_early_for(self, command: Any) -> "Scenario":
        with pytest.raises(Early):
            self.decider.decide(command, self.state)
        return self
