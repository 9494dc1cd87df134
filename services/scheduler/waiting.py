"""Why an attempt still waits: what comes before it, and who has the slots of the workers that could take it. Pure, and changes nothing."""

from collections.abc import Mapping, Sequence
from itertools import islice

from proto.messages import Attempt, SlotsHeld, StagesWait, StageWaits
from services.scheduler.board import Board, Lease
from services.scheduler.contest import Contest
from services.scheduler.pool import Pool, bits
from services.scheduler.queue import Queue, Queued

LOOK = 1_000
"""How far ahead is looked, and among how many classes."""
NAMED = 20
"""Attempts, and workers, that are named."""


def ahead(queue: Queue, pool: Pool, attempt: Attempt, now: float) -> tuple[list[Queued], bool]:
    """What would get a lease before it if slots became free one by one, in order, and whether there may be more: it is not looked further than LOOK.
    `now` is what the log's clock says. KeyError if it does not wait."""
    line = queue.line(attempt)
    able = pool.standing(line.needs).able
    contest = Contest(queue, now)
    contest.enter(line)
    for other in islice(queue.lines.values(), LOOK):
        if other is not line and pool.standing(other.needs).able & able:
            contest.enter(other)
    before: list[Queued] = []
    while (following := contest.following()) is not None:
        other, queued = following
        if queued.attempt == attempt:
            return before, len(queue.lines) > LOOK
        if len(before) == LOOK:
            break
        before.append(queued)
        contest.lease(other, queued)
    return before, True


def waits(asked: Sequence[Attempt], board: Board, pool: Pool) -> StagesWait:
    """What is to be said of those that do wait."""
    return StagesWait(stages=[_waits(board.queue, pool, board.held, each, board.now) for each in asked[:NAMED] if each in board.queue])


def _waits(queue: Queue, pool: Pool, held: Mapping[str, Mapping[Attempt, Lease]], attempt: Attempt, now: float) -> StageWaits:
    """All of it, for who may see only what is its team's. `held`: the leases by worker. KeyError if it does not wait."""
    line, team = queue.line(attempt), queue.team(attempt)
    before, more = ahead(queue, pool, attempt, now)
    able = pool.standing(line.needs).able
    holders: list[SlotsHeld] = []
    for bit in islice(bits(able), NAMED):
        view = pool.at(bit)
        leases = held.get(view.worker, {}).values()
        own = [lease.attempt for lease in leases if lease.team == team]
        holders.append(SlotsHeld(worker=view.worker, slots=view.slots, offered=len(view.credits), own=own, others=len(leases) - len(own)))
    return StageWaits(
        attempt=attempt,
        requires=list(line.needs),
        ahead=len(before),
        more=more,
        own=[queued.attempt for queued in before if queued.team == team][:NAMED],
        able=able.bit_count(),
        holders=holders,
    )
