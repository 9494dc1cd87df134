"""Whose turn it is: the order in which those that wait get leases. Pure."""

from collections.abc import Iterator
from heapq import heappop, heappush

from services.scheduler.queue import Line, Queue, Queued, Rank, rank


class Contest:
    """Who is next, over all classes that compete, while leases are handed out that the queue does not know of yet.

    Such leases only ever put a group back, so a rank that was right once is the best that the group can have now: what comes up is ranked again, and
    goes back where it belongs if that has changed."""

    def __init__(self, queue: Queue, now: float) -> None:
        self._queue = queue
        self._now = now
        self._heap: list[tuple[Rank, int, Line, int]] = []
        """Rank, number of the entry, class, and which of the class's order it is (-1: it came back)."""
        self._entries = 0
        self._left: set[Line] = set()
        self._more: dict[str, int] = {}
        self._going: dict[tuple[Line, str], tuple[Iterator[Queued], Queued | None]] = {}

    def enter(self, line: Line) -> None:
        """The class competes: with its first group, and with each other one once those before it have come up."""
        self._push(self._queue.ranked(line)[0], line, 0)

    def leave(self, line: Line) -> None:
        """The class's workers are all taken."""
        self._left.add(line)

    def following(self) -> tuple[Line, Queued] | None:
        """The next one, and its class. It is out of the contest until it is leased."""
        while self._heap:
            told, _, line, nth = heappop(self._heap)
            if line in self._left:
                continue
            if 0 <= nth < len(line.order) - 1:
                self._push(line.order[nth + 1], line, nth + 1)
            queued, true = self._now_of(line, told[2])
            if queued is not None and true <= told:
                return line, queued
            if queued is not None:
                self._push(true, line, -1)
        return None

    def lease(self, line: Line, queued: Queued) -> None:
        """It got a lease: its group goes on with the next oldest."""
        group = line, queued.team
        self._more[queued.team] = self._more.get(queued.team, 0) + 1
        if group not in self._going:
            members = iter(line.groups[queued.team].members.values())
            self._going[group] = members, next(members)
        members, _ = self._going[group]
        self._going[group] = members, next(members, None)
        following, true = self._now_of(line, queued.team)
        if following is not None:
            self._push(true, line, -1)

    def _now_of(self, line: Line, team: str) -> tuple[Queued | None, Rank]:
        """A group's oldest that was not leased yet, and its rank."""
        going = self._going.get((line, team))
        if going is None:
            oldest, since = line.groups[team].oldest, line.groups[team].since
        elif going[1] is None:
            return None, (0.0, 0, team)
        else:
            oldest = going[1]
            since = max(oldest.queued_at, self._now)
        running = self._queue.running.get(team, 0) + self._more.get(team, 0)
        return oldest, (rank(running, since), oldest.position, team)

    def _push(self, told: Rank, line: Line, nth: int) -> None:
        self._entries += 1
        heappush(self._heap, (told, self._entries, line, nth))
