"""The queue: attempts that wait for a worker, by what they require and whose they are, oldest first; and which of them is next.

Attempts with the same requirements are one class; a team's share of a class is a group. Within a class the groups are ranked by what their team has
running and by how long they have had nothing. An operation costs the logarithm of the groups of one class at most, whatever else waits."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from proto.events.base import ArtifactRef
from proto.messages import Attempt
from proto.plan import Requirements
from services.scheduler.needs import wanted

AGING = 60.0
"""Seconds without a lease that put a group ahead as far as one lease fewer of its team would: nothing starves."""


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


READABLE = "a plan that can be read"
"""What those need that are set aside: no worker offers it."""
Rank = tuple[float, int, str]
"""A group's place among those of its class, the lowest first: `rank`, its oldest attempt's position, its team."""


def rank(running: int, since: float) -> float:
    """Leases of the team, and the time since which the group has had none. That all compare at one moment cancels the moment out, so a rank holds
    until the group or its team gets or loses a lease: nobody's clock matters, and nothing is ever ranked again only because time passes."""
    return running + since / AGING


class Group:
    """A team's attempts of one class, oldest first. `served` is when the last of them got a lease."""

    def __init__(self) -> None:
        self.members: OrderedDict[Attempt, Queued] = OrderedDict()
        self.served = 0.0
        self.rank: Rank | None = None

    @property
    def oldest(self) -> Queued:
        return next(iter(self.members.values()))

    @property
    def since(self) -> float:
        """Since when it has had nothing."""
        return max(self.oldest.queued_at, self.served)


class Line:
    """A class: its groups by team and in order; where it is parked while no worker can take it; what its attempts were told (`reason`) and which
    of them were not yet (`unsaid`). That without `requirements` is of those that are set aside."""

    def __init__(self, requirements: Requirements | None, ticks: int) -> None:
        self.requirements = requirements
        self.needs = wanted(requirements) if requirements is not None else (READABLE,)
        self.groups: dict[str, Group] = {}
        self.order: list[Rank] = []
        self.ticks = ticks
        self.parked = ""
        self.reason = ""
        self.unsaid: OrderedDict[Attempt, None] = OrderedDict()


class Queue:
    """`running` counts each team's leases; `lines` are the classes that wait. Those that a free worker might take are in `awake`, the others are
    parked; those that nobody has looked at since the fleet or they themselves changed are in `unexplained`."""

    def __init__(self) -> None:
        self._line_of: dict[Attempt, tuple[Line, Group]] = {}
        self._parked: dict[str, dict[Line, None]] = {}
        self._changed: OrderedDict[str, int] = OrderedDict()
        """When the number of a team's leases last changed, in ticks; the latest last."""
        self._ticks = 0
        self._generation: object = None
        self.running: dict[str, int] = {}
        self.lines: dict[Requirements | None, Line] = {}
        self.awake: OrderedDict[Line, None] = OrderedDict()
        self.unexplained: OrderedDict[Line, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._line_of)

    def __contains__(self, attempt: Attempt) -> bool:
        return attempt in self._line_of

    def all(self) -> Iterator[Queued]:
        for line in self.lines.values():
            for group in line.groups.values():
                yield from group.members.values()

    def get(self, attempt: Attempt) -> Queued | None:
        found = self._line_of.get(attempt)
        return found[1].members[attempt] if found else None

    def line(self, attempt: Attempt) -> Line:
        """The class of one that waits."""
        return self._line_of[attempt][0]

    def team(self, attempt: Attempt) -> str:
        """Whose one that waits is."""
        return self._line_of[attempt][1].members[attempt].team

    def add(self, queued: Queued) -> None:
        """Add one that is younger than all others, or replace it in its place."""
        found = self._line_of.get(queued.attempt)
        if found is not None:
            found[1].members[queued.attempt] = queued
        else:
            self._enter(queued, queued.requirements)

    def set_aside(self, attempt: Attempt) -> None:
        """What it runs cannot be read: it waits, in a class that no worker can take, until it is brought back."""
        queued = self.remove(attempt)
        if queued is not None:
            self._enter(queued, None)

    def bring_back(self) -> None:
        """What was set aside is tried once more."""
        line = self.lines.get(None)
        for queued in [queued for group in line.groups.values() for queued in group.members.values()] if line else []:
            self.remove(queued.attempt)
            self._enter(queued, queued.requirements)

    def _enter(self, queued: Queued, requirements: Requirements | None) -> None:
        line = self.lines.get(requirements)
        if line is None:
            line = self.lines[requirements] = Line(requirements, self._ticks)
            self.awake[line] = None
        group = line.groups.setdefault(queued.team, Group())
        group.members[queued.attempt] = queued
        self._line_of[queued.attempt] = (line, group)
        if len(group.members) == 1:
            self._rank(line, queued.team)
        line.unsaid[queued.attempt] = None
        self.unexplained[line] = None

    def remove(self, attempt: Attempt, leased_at: float | None = None) -> Queued | None:
        """Take an attempt out, for a lease or for good; None if it does not wait."""
        found = self._line_of.pop(attempt, None)
        if found is None:
            return None
        line, group = found
        queued = group.members.pop(attempt)
        line.unsaid.pop(attempt, None)
        if leased_at is not None:
            group.served = leased_at
        self._rank(line, queued.team)
        if not line.groups:
            del self.lines[line.requirements]
            self.awake.pop(line, None)
            self.unexplained.pop(line, None)
            self._unpark(line)
        return queued

    def count(self, team: str, leases: int) -> None:
        """A team has so many leases more, or fewer."""
        running = self.running.get(team, 0) + leases
        if running > 0:
            self.running[team] = running
        else:
            self.running.pop(team, None)
        self._ticks += 1
        self._changed[team] = self._ticks
        self._changed.move_to_end(team)

    def ranked(self, line: Line) -> Sequence[Rank]:
        """A class's groups, the next one first. Teams' counts reach a class only when it is looked at: a class nobody can take costs nothing."""
        for team, tick in reversed(self._changed.items()):
            if tick <= line.ticks:
                break
            if team in line.groups:
                self._rank(line, team)
        line.ticks = self._ticks
        return line.order

    def _rank(self, line: Line, team: str) -> None:
        group = line.groups[team]
        if group.rank is not None:
            del line.order[bisect_left(line.order, group.rank)]
            group.rank = None
        if group.members:
            oldest = group.oldest
            group.rank = (rank(self.running.get(team, 0), group.since), oldest.position, team)
            insort(line.order, group.rank)
        else:
            del line.groups[team]

    # --- which classes are worth a look --------------------------------------------------------------------------------------------------

    def park(self, line: Line, word: str) -> None:
        """No free worker can take it. One that can will offer `word`."""
        self.awake.pop(line, None)
        line.parked = word
        self._parked.setdefault(word, {})[line] = None

    def wake(self, words: Iterable[str]) -> None:
        """Workers that offer these words are free."""
        for word in words:
            for line in self._parked.pop(word, ()):
                line.parked = ""
                self.awake[line] = None

    def _unpark(self, line: Line) -> None:
        parked = self._parked.get(line.parked)
        if parked is not None:
            parked.pop(line, None)
            if not parked:
                del self._parked[line.parked]

    def reconsider(self, generation: object) -> None:
        """What was said may be untrue of another generation of the fleet."""
        if generation is not self._generation:
            self._generation = generation
            self.unexplained.update(dict.fromkeys(self.lines.values()))
