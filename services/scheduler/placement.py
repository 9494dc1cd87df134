"""Placement: one pure function of queue and fleet. Requirements first, then load; fair between teams; the oldest first."""

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from proto.events.lease import Candidate
from proto.messages import Credit, Offers
from proto.plan import Requirements
from services.scheduler.queue import Group, Queue, Queued

CANDIDATES = 5
"""How many of the best workers a lease records."""


class WorkerView(msgspec.Struct, kw_only=True):
    """A worker as placement sees it: `credits` are offers that were not used yet, `busy` its slots in use."""

    worker: str
    boot: str
    slots: int
    offers: Offers
    credits: list[Credit]
    busy: int = 0
    draining: bool = False

    @property
    def load(self) -> float:
        return self.busy / self.slots if self.slots else 1.0


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt placed on a worker's credit, and why."""

    queued: Queued
    worker: str
    boot: str
    credit: Credit
    why: list[Candidate]
    refused: dict[str, int]


class Deferral(msgspec.Struct, frozen=True, kw_only=True):
    """A group that no worker of the fleet can serve, however idle it were."""

    group: Group
    reason: str
    refused: dict[str, int]


class Placement(msgspec.Struct, frozen=True):
    """What to lease now, and which groups cannot be placed at all."""

    assignments: list[Assignment]
    deferrals: list[Deferral]


def refusal(requirements: Requirements, offers: Offers) -> str | None:
    """The first requirement that a worker does not offer, in words; None when it offers all."""
    if requirements.platform != offers.platform:
        return f"platform {requirements.platform}"
    if requirements.image is not None and requirements.image not in offers.images:
        return "rootfs_uri" if requirements.image == "rootfs" else f"image_resource of type {requirements.image}"
    if requirements.user and not offers.user:
        return "run.user"
    if requirements.limits and not offers.limits:
        return "container_limits"
    missing = [tag for tag in requirements.tags if tag not in offers.tags]
    return f"tag {missing[0]}" if missing else None


def place(queue: Queue, fleet: Sequence[WorkerView], running: Mapping[str, int], limit: int = 256) -> Placement:
    """Assign waiting attempts to free credits, at most `limit`. `running` counts each team's leases: the team with the fewest goes first, then age.

    The cost grows with the assignments, the groups and the fleet, not with the queue's length. `fleet` is not changed."""
    fleet = [msgspec.structs.replace(worker, credits=list(worker.credits)) for worker in fleet]
    deferrals: list[Deferral] = []
    open_groups: dict[Group, tuple[list[WorkerView], dict[str, int], Iterator[Queued], Queued]] = {}
    for group, members in queue.groups():
        able: list[WorkerView] = []
        refused: dict[str, int] = {}
        for worker in fleet:
            unmet = "draining" if worker.draining else refusal(group[0], worker.offers)
            if unmet is None:
                able.append(worker)
            else:
                refused[unmet] = refused.get(unmet, 0) + 1
        if not able:
            deferrals.append(Deferral(group=group, reason=_reason(refused), refused=refused))
        elif any(worker.credits for worker in able):
            open_groups[group] = (able, refused, members, next(members))
    counts = dict(running)
    assignments: list[Assignment] = []
    while open_groups and len(assignments) < limit:
        group = min(open_groups, key=lambda g: (counts.get(g[1], 0), open_groups[g][3].position))
        able, refused, members, queued = open_groups[group]
        free = sorted((w for w in able if w.credits), key=lambda w: (w.load, w.worker))
        if not free:
            del open_groups[group]
            continue
        best = free[0]
        why = [Candidate(worker=w.worker, load=round(w.load, 3)) for w in free[:CANDIDATES]]
        assignments.append(Assignment(queued=queued, worker=best.worker, boot=best.boot, credit=best.credits.pop(), why=why, refused=dict(refused)))
        best.busy += 1
        counts[group[1]] = counts.get(group[1], 0) + 1
        following = next(members, None)
        if following is None:
            del open_groups[group]
        else:
            open_groups[group] = (able, refused, members, following)
    return Placement(assignments, deferrals)


def _reason(refused: Mapping[str, int]) -> str:
    if not refused:
        return "no worker is connected"
    if set(refused) == {"draining"}:
        return "every worker is draining"
    wants = " or ".join(sorted(why for why in refused if why != "draining"))
    return f"no worker offers {wants}"
