"""Which leases end because their worker cannot be running them any more, and which workers are lost. Pure: `now` is monotonic seconds.

Silence is evidence only since this process could hear (`listening_since`): after a takeover, a stop or a lost connection each lease has a whole
term."""

from collections.abc import Iterable

import msgspec

from services.scheduler.board import Board, Lease
from services.scheduler.fleet import Fleet
from services.scheduler.grants import Grants


class Ends(msgspec.Struct, frozen=True):
    """Leases with the evidence against them; workers that are lost, with why."""

    leases: list[tuple[Lease, str]]
    workers: list[tuple[str, str]]


def ends(names: Iterable[str], board: Board, fleet: Fleet, grants: Grants, *, now: float, listening_since: float, lease_seconds: float) -> Ends:
    """What is over at these workers."""
    found = Ends([], [])
    for name in names:
        worker, boot = fleet.get(name), board.boots.get(name)
        heard = listening_since if worker is None else max(worker.heard, listening_since)
        lost, evidence = "", ""
        if barred := board.roster.barred(name):
            lost, evidence = "revoked", f"worker {name} {barred}"
        elif worker is not None and worker.heartbeat.goodbye:
            lost, evidence = "drained", f"worker {name} has left"
        elif now - heard > lease_seconds:
            lost, evidence = "silent", f"worker {name} was silent for {lease_seconds:g} s"
        for lease in board.held.get(name, {}).values():
            given = grants.since(lease.attempt, now)
            if boot is not None and boot != lease.boot:
                found.leases.append((lease, f"worker {name} has restarted"))
            elif barred or (lost and (worker is not None or now - given > lease_seconds)):
                found.leases.append((lease, evidence))
        if lost and (worker is not None or boot is not None):
            found.workers.append((name, lost))
    return found
