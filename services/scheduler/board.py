"""The board: queue and leases of the whole system, as a fold of the log. The leader holds it in memory; a snapshot makes a failover quick."""

from collections import OrderedDict, deque

import msgspec
from msgspec.structs import replace

from proto.envelope import Fact
from proto.events.artifact import LogArchived
from proto.events.build import BuildCreated, BuildFinished, StageFinished, StageInterrupted, StageQueued, StepFinished, StepProgressed, StepStarted
from proto.events.fleet import WorkerDeleted, WorkerDrained, WorkerRegistered, WorkerResumed, WorkerRevoked
from proto.events.lease import LeaseExpired, StageDeferred, StageLeased
from proto.events.secret import SealingKeyMade, SecretRemoved, SecretSet
from proto.events.worker import WorkerBooted, WorkerLost
from proto.messages import ArchivedLog, Attempt
from proto.plan import Stage
from services.scheduler.queue import Queue, Queued
from services.scheduler.roster import Member, Roster
from services.scheduler.secret_index import SealingKey, Secret, SecretIndex
from services.scheduler.spooled import archive_of

CATEGORIES = frozenset({"build", "lease", "worker", "fleet", "artifact", "secret"})
CODE_VERSION = "6"
REMEMBERED = 10_000
"""How many archived logs, and plans of builds, are remembered; the log knows the others."""


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's right to run an attempt. `recorded` is the last report that became an event, `interrupted` why it must stop ("" if not);
    `position` is the lease's own place in the log."""

    attempt: Attempt
    team: str
    worker: str
    boot: str
    credit: str
    position: int
    queued: Queued
    recorded: int = 0
    interrupted: str = ""


class _Snapshot(msgspec.Struct, kw_only=True):
    queued: list[Queued]
    leases: list[Lease]
    boots: dict[str, str]
    members: dict[str, Member]
    revoked: set[str]
    secrets: dict[str, dict[str, Secret]]
    sealing: SealingKey | None


class Board:
    """Fold facts with `apply`; read `queue`, `leases`, `held` (the same by worker), `boots`, `roster`, `secrets`.
    Drain `news` for what a worker should hear of early.
    `now` is the log's own clock (unix seconds): when the latest fact was recorded; of a board that was restored, the youngest that waits."""

    def __init__(self) -> None:
        self.position = 0
        self.now = 0.0
        self.queue = Queue()
        self.leases: dict[Attempt, Lease] = {}
        self.held: dict[str, dict[Attempt, Lease]] = {}
        self.boots: dict[str, str] = {}
        self.roster = Roster()
        self.secrets = SecretIndex()
        self.archived: OrderedDict[Attempt, ArchivedLog] = OrderedDict()
        self.plans: OrderedDict[str, dict[str, Stage]] = OrderedDict()
        self.news: deque[tuple[str, Attempt]] = deque(maxlen=REMEMBERED)
        """(worker, attempt): interrupted."""

    def apply(self, fact: Fact) -> None:
        """Fold one fact; those at or before `position` are known already."""
        if fact.position <= self.position:
            return
        self.position = fact.position
        self.now = max(self.now, fact.recorded_at.timestamp())
        build = fact.subject_id
        match fact.event:
            case BuildCreated() as event:
                self.plans[build] = {stage.name: stage for stage in event.plan.stages}
                while len(self.plans) > REMEMBERED:
                    self.plans.popitem(last=False)
            case StageQueued() as event:
                attempt = Attempt(build, event.stage, event.attempt)
                self._forget(attempt)
                self._forget(Attempt(build, event.stage, event.attempt - 1))
                self.queue.add(
                    Queued(
                        attempt=attempt,
                        team=fact.team,
                        requirements=event.requirements,
                        position=fact.position,
                        queued_at=fact.recorded_at.timestamp(),
                        correlation_id=fact.correlation_id,
                        event_id=fact.event_id,
                        inputs=event.inputs,
                    )
                )
            case StageLeased() as event:
                attempt = Attempt(build, event.stage, event.attempt)
                queued = self.queue.remove(attempt, leased_at=fact.recorded_at.timestamp())
                if queued is not None:
                    lease = Lease(
                        attempt=attempt,
                        team=queued.team,
                        worker=event.worker,
                        boot=event.boot,
                        credit=event.credit,
                        position=fact.position,
                        queued=queued,
                    )
                    self._hold(lease)
                    self.queue.count(lease.team, 1)
            case StageDeferred() as event:
                waiting = self.queue.get(Attempt(build, event.stage, event.attempt))
                if waiting is not None:
                    self.queue.add(replace(waiting, deferred=event.reason))
            case LeaseExpired() as event:
                self._forget(Attempt(build, event.stage, event.attempt))
            case StepStarted() | StepProgressed() | StepFinished() as event:
                attempt = Attempt(build, event.stage, event.attempt)
                known = self.leases.get(attempt)
                if known is not None:
                    self._hold(replace(known, recorded=event.report))
            case StageInterrupted() as event:
                attempt = Attempt(build, event.stage, event.attempt)
                known = self.leases.get(attempt)
                if known is not None:
                    self._hold(replace(known, interrupted=event.reason))
                    self.news.append((known.worker, attempt))
            case StageFinished() as event:
                self._forget(Attempt(build, event.stage, event.attempt))
            case BuildFinished():
                self.plans.pop(build, None)
                self.secrets.over.append(build)
            case WorkerBooted() as event:
                if self.roster.on_boot(event.worker, event.rank):
                    self.boots[event.worker] = event.boot
            case WorkerLost() as event:
                if self.boots.get(event.worker) == event.boot:
                    del self.boots[event.worker]
            case LogArchived() as event:
                log = archive_of(event)
                self.archived[log.attempt] = log
                while len(self.archived) > REMEMBERED:
                    self.archived.popitem(last=False)
            case WorkerRegistered() | WorkerDrained() | WorkerResumed() | WorkerRevoked() | WorkerDeleted():
                self.roster.apply(build, fact.event)
            case SecretSet() | SecretRemoved() as event:
                self.secrets.apply(fact.team, event)
            case SealingKeyMade() as event:
                self.secrets.sealing = SealingKey(event.version, event.entry, event.master, fact.recorded_at.timestamp())
            case _:
                pass

    def _hold(self, lease: Lease) -> None:
        self.leases[lease.attempt] = lease
        self.held.setdefault(lease.worker, {})[lease.attempt] = lease

    def _forget(self, attempt: Attempt) -> None:
        self.queue.remove(attempt)
        lease = self.leases.pop(attempt, None)
        if lease is not None:
            self.queue.count(lease.team, -1)
            held = self.held[lease.worker]
            del held[attempt]
            if not held:
                del self.held[lease.worker]

    def snapshot(self) -> bytes:
        """All that `restore` needs, at `position`."""
        queued = sorted(self.queue.all(), key=lambda q: q.position)
        stored = _Snapshot(
            queued=queued,
            leases=list(self.leases.values()),
            boots=self.boots,
            members=self.roster.members,
            revoked=self.roster.revoked,
            secrets=self.secrets.of_team,
            sealing=self.secrets.sealing,
        )
        return msgspec.msgpack.encode(stored)

    @classmethod
    def restore(cls, position: int, data: bytes) -> "Board":
        """The board as it was."""
        stored = msgspec.msgpack.decode(data, type=_Snapshot)
        board = cls()
        board.position = position
        board.boots = stored.boots
        board.roster = Roster(stored.members, stored.revoked)
        board.secrets = SecretIndex(stored.secrets, stored.sealing)
        for queued in stored.queued:
            board.queue.add(queued)
            board.now = max(board.now, queued.queued_at)
        for lease in stored.leases:
            board._hold(lease)
            board.queue.count(lease.team, 1)
        return board
