"""The fleet as its heartbeats tell it: who lives, what it offers, which credits are open. No I/O; `now` is monotonic seconds."""

import sys
from collections.abc import Iterator

import msgspec

from proto.messages import Attempt, Credit, Heartbeat
from services.scheduler.pool import DRAINING, IN_TROUBLE, Pool, WorkerView

COMINGS, COMING_SECONDS = 20, 5.0
"""A worker may come so many times at once, and once more in so many seconds: each time is an event, and a liar comes as often as it can speak."""


class _Comings(msgspec.Struct):
    """How often a worker may still come, as of when."""

    left: float
    at: float

    def take(self, now: float) -> bool:
        self.left, self.at = min(COMINGS, self.left + (now - self.at) / COMING_SECONDS), now
        if self.left < 1:
            return False
        self.left -= 1
        return True


class Worker(msgspec.Struct, kw_only=True):
    """One worker in its present boot. `used` are nonces that a lease has quoted and the worker may not know to be used yet; `cached` what it said
    last of the trees it has; `drained`: it is to get nothing, whether it knows or not."""

    name: str
    heartbeat: Heartbeat
    heard: float
    credits: dict[str, Credit] = {}
    used: set[str] = msgspec.field(default_factory=set)
    cached: tuple[str, ...] = ()
    drained: bool = False

    def view(self) -> WorkerView:
        """As placement sees it."""
        credits = list(self.credits.values())
        return WorkerView(
            worker=self.name,
            boot=self.heartbeat.boot,
            slots=self.heartbeat.slots,
            offers=self.heartbeat.availability.offers,
            credits=credits,
            busy=min(self.heartbeat.slots, self.heartbeat.busy + len(self.used)),
            closed=DRAINING if self.drained or self.heartbeat.draining or self.heartbeat.goodbye else IN_TROUBLE if self.heartbeat.trouble else "",
            cached=self.cached,
        )


class Fleet:
    """Workers by name, and the pool of them that placement reads. Of two with one name the later boot wins, in whatever order they are heard.
    Whoever comes too often is not heard until it may come again."""

    def __init__(self) -> None:
        self.pool = Pool()
        self._workers: dict[str, Worker] = {}
        self._comings: dict[str, _Comings] = {}

    def __iter__(self) -> Iterator[Worker]:
        return iter(self._workers.values())

    def get(self, name: str) -> Worker | None:
        return self._workers.get(name)

    def on_heartbeat(self, name: str, heartbeat: Heartbeat, trusted: bool, now: float) -> Worker | None:
        """Take note of a heartbeat; None when it is old, of a boot that another follows, or of one that comes too often. Its credits count only if it
        quotes a recent challenge (`trusted`)."""
        worker = self._workers.get(name)
        if worker is None or worker.heartbeat.rank < heartbeat.rank:
            if not self._comings.setdefault(name, _Comings(COMINGS, now)).take(now):
                return None
            worker = self._workers[name] = Worker(name=name, heartbeat=heartbeat, heard=now)
        elif worker.heartbeat.rank > heartbeat.rank or heartbeat.number <= worker.heartbeat.number:
            return None
        worker.heartbeat, worker.heard = heartbeat, now
        offered = {credit.nonce: credit for credit in heartbeat.availability.credits} if trusted else {}
        worker.used &= offered.keys()
        worker.credits = {nonce: credit for nonce, credit in offered.items() if nonce not in worker.used}
        if (cached := heartbeat.availability.cached) is not None:
            worker.cached = tuple(map(sys.intern, cached))
        self.pool.put(worker.view())
        return worker

    def use(self, name: str, credit: Credit) -> None:
        """A lease quotes the credit: it is never offered again."""
        worker = self._workers.get(name)
        if worker is not None and worker.credits.pop(credit.nonce, None) is not None:
            worker.used.add(credit.nonce)
            self.pool.put(worker.view())

    def drain(self, name: str, draining: bool) -> None:
        """Known at once, rather than when the worker says it."""
        worker = self._workers.get(name)
        if worker is not None and worker.drained != draining:
            worker.drained = draining
            self.pool.put(worker.view())

    def remove(self, name: str) -> None:
        """Forget a worker that is silent or has left; its next heartbeat brings it back."""
        self._workers.pop(name, None)
        self.pool.remove(name)

    def forget(self, name: str) -> None:
        """It is no worker any more: another that gets its name begins anew."""
        self.remove(name)
        self._comings.pop(name, None)


def unlisted(heartbeat: Heartbeat, attempt: Attempt) -> bool:
    """Whether a worker does not hold an attempt, by its own word."""
    return all(running.attempt != attempt for running in heartbeat.running)
