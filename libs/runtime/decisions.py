"""What a pure decision needs of the runtime: its shape, its refusals, its cause."""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import msgspec

from proto.events.base import Event

S = TypeVar("S")
C_contra = TypeVar("C_contra", contravariant=True)


class Refused(Exception):
    """A command that the state does not allow: a domain error, final for this command. `kind` is for programs, the text for people."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


class Early(Exception):
    """A command that cannot be decided yet: something before it has not arrived. Try again soon."""


class Decider(Protocol[C_contra, S]):
    """A pure aggregate. `decide` returns only the events still needed, so a repeat yields none; it raises Refused or Early."""

    @property
    def initial(self) -> S: ...

    def stream(self, command: C_contra, /) -> str: ...

    def decide(self, command: C_contra, state: S, /) -> Sequence[Event]: ...

    def evolve(self, state: S, event: Event, /) -> S: ...


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """Why a command is executed: kept with the events that come of it."""

    team: str
    correlation_id: str
    causation_id: str
    actor: str
