"""The queue: attempts that wait for a worker, by what they require and whose they are, oldest first. Every operation is O(1) or O(groups)."""

from collections.abc import Iterator

import msgspec

from proto.events.base import ArtifactRef
from proto.messages import Attempt
from proto.plan import Requirements


class Queued(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt that waits. `position` is its place in the log (its age), `queued_at` unix seconds, `deferred` the reason last recorded."""

    attempt: Attempt
    team: str
    requirements: Requirements
    position: int
    queued_at: float
    correlation_id: str
    event_id: str
    inputs: dict[str, ArtifactRef] = {}
    deferred: str = ""


Group = tuple[Requirements, str]
"""What a group of waiting attempts shares: requirements and team."""


class Queue:
    """Waiting attempts in groups; within a group in the order of the log."""

    def __init__(self) -> None:
        self._groups: dict[Group, dict[Attempt, Queued]] = {}
        self._group_of: dict[Attempt, Group] = {}

    def __len__(self) -> int:
        return len(self._group_of)

    def __contains__(self, attempt: Attempt) -> bool:
        return attempt in self._group_of

    def add(self, queued: Queued) -> None:
        """Add, or replace in place."""
        group = (queued.requirements, queued.team)
        self._groups.setdefault(group, {})[queued.attempt] = queued
        self._group_of[queued.attempt] = group

    def get(self, attempt: Attempt) -> Queued | None:
        group = self._group_of.get(attempt)
        return self._groups[group][attempt] if group else None

    def remove(self, attempt: Attempt) -> Queued | None:
        """Take an attempt out; None if it does not wait."""
        group = self._group_of.pop(attempt, None)
        if group is None:
            return None
        members = self._groups[group]
        queued = members.pop(attempt)
        if not members:
            del self._groups[group]
        return queued

    def groups(self) -> Iterator[tuple[Group, Iterator[Queued]]]:
        """Each group with its attempts, oldest first."""
        for group, members in self._groups.items():
            yield group, iter(members.values())

    def newest_first(self, group: Group) -> Iterator[Queued]:
        """A group's attempts, youngest first."""
        return reversed(self._groups.get(group, {}).values())

    def all(self) -> Iterator[Queued]:
        for members in self._groups.values():
            yield from members.values()
