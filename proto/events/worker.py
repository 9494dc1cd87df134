"""`worker-<worker>-<boot>`: one life of a worker. Owned by the scheduler."""

from proto.events.base import Event
from proto.messages import About, Offers, Rank


class WorkerBooted(Event, frozen=True, kw_only=True):
    """The scheduler's leader, on the first heartbeat of a boot: every lease of the worker's earlier boots is void. `since`: the heartbeat's."""

    worker: str
    boot: str
    since: int
    slots: int
    offers: Offers
    about: About = About()
    term: int = 0

    @property
    def rank(self) -> Rank:
        return self.since, self.boot


class WorkerLost(Event, frozen=True, kw_only=True):
    """The scheduler's leader: nothing was heard of the worker for a lease's term, or it said goodbye (`drained`)."""

    worker: str
    boot: str
    reason: str
    term: int = 0
