"""Placement: one pure function of queue, fleet and time. What a worker must offer comes first, then how few bytes it lacks, then how little it does;
among those that wait, whoever has least and has had nothing longest.

A decision costs the logarithm of the groups that compete for the free workers, and a few operations on sets of workers. Neither the queue's length
nor classes that nobody can take matter to it."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import msgspec

from proto.events.base import ArtifactRef
from proto.events.lease import Candidate
from proto.messages import TREE_HINT, Attempt, Credit
from services.scheduler.contest import Contest
from services.scheduler.pool import DRAINING, IN_TROUBLE, Pool, Standing, WorkerView, bits
from services.scheduler.queue import Queue, Queued

CANDIDATES = 5
"""How many of the best workers a lease records."""
REASONS = 8
"""How many reasons an event counts; the rest are counted together."""
OTHERS = "something else"
WORDS = 80
"""Letters of a reason that an event holds."""
UNREADABLE = "its plan cannot be read: the scheduler's log says why"
PRECISION = 20
"""Bits in which the bytes that a worker has of an attempt's inputs are counted: trees under a millionth of the whole do not matter."""
LIMIT = 256
"""Attempts placed at once."""
LOOKS = 256
"""Classes looked at at once; the others have their turn."""


_CURES = {
    (DRAINING,): "resume one, or start another",
    (IN_TROUBLE,): "`penstock workers` says why",
    (DRAINING, IN_TROUBLE): "`penstock workers` says which, and why",
}


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt placed on a worker's credit, and why."""

    queued: Queued
    worker: str
    boot: str
    credit: Credit
    why: list[Candidate]
    refused: dict[str, int]


class Deferral(msgspec.Struct, frozen=True, kw_only=True):
    """An attempt that no worker of the fleet can serve, however idle it were, and that was not told so yet."""

    queued: Queued
    reason: str
    refused: dict[str, int]


def place(queue: Queue, pool: Pool, now: float, limit: int = LIMIT) -> list[Assignment]:
    """Assign waiting attempts to free credits, at most `limit`. `now` is what the log's clock says.

    What waits and who is there stays as it is: that follows from the events. Only which classes are worth a look is noted."""
    queue.wake(pool.freed())
    draft = _Draft(pool)
    contest = Contest(queue, now)
    for line in list(islice(queue.awake, LOOKS)):
        standing = pool.standing(line.needs)
        if standing.able & draft.free:
            queue.awake.move_to_end(line)
            contest.enter(line)
        else:
            queue.park(line, standing.rarest)
    assignments: list[Assignment] = []
    while draft.free and len(assignments) < limit and (following := contest.following()) is not None:
        line, queued = following
        standing = pool.standing(line.needs)
        free = standing.able & draft.free
        if not free:
            contest.leave(line)
            continue
        trees = _trees(pool, free, queued.inputs.values())
        best = draft.best(free, trees)
        why = [Candidate(worker=pool.at(bit).worker, load=round(draft.load(bit), 3), missing=_missing(trees, bit)) for bit in best]
        view, credit = draft.take(best[0])
        contest.lease(line, queued)
        counts = _bounded({**standing.refused, "busy": (standing.able ^ free).bit_count()})
        assignments.append(Assignment(queued=queued, worker=view.worker, boot=view.boot, credit=credit, why=why, refused=counts))
    return assignments


def explain(queue: Queue, pool: Pool, before: float, limit: int) -> list[Deferral]:
    """What to tell those that wait since `before` or longer, of classes that no worker can serve: at most `limit`, each until it is recorded."""
    queue.reconsider(pool.generation)
    deferrals: list[Deferral] = []
    for line in list(islice(queue.unexplained, LOOKS)):
        if len(deferrals) >= limit:
            break
        del queue.unexplained[line]
        standing = pool.standing(line.needs)
        if standing.able:
            line.reason = ""
            line.unsaid.clear()
            continue
        refused = _bounded(standing.refused) if line.requirements is not None else {}
        reason = _reason(line.needs, standing) if line.requirements is not None else UNREADABLE
        if reason != line.reason:
            line.reason = reason
            members = sorted((queued for group in line.groups.values() for queued in group.members.values()), key=lambda queued: queued.position)
            line.unsaid = OrderedDict.fromkeys(queued.attempt for queued in members)
        said: list[Attempt] = []
        for attempt in line.unsaid:
            queued = queue.get(attempt)
            if queued is None or queued.deferred == reason:
                said.append(attempt)
            elif queued.queued_at > before or len(deferrals) >= limit:
                break
            else:
                deferrals.append(Deferral(queued=queued, reason=reason, refused=refused))
        for attempt in said:
            del line.unsaid[attempt]
        if line.unsaid:
            queue.unexplained[line] = None
    return deferrals


class _Draft:
    """The free workers while credits are handed out that the fleet does not know of yet."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._levels = list(pool.levels)
        self._used: dict[int, int] = {}
        self.free = 0
        for level in self._levels:
            self.free |= level

    def load(self, bit: int) -> float:
        return self._pool.at(bit).load(self._used.get(bit, 0))

    def best(self, free: int, trees: Sequence["_Tree"]) -> list[int]:
        """The best of `free`, which are some: with the most bytes of the trees, then the least loaded, then by number."""
        held = _held(free, trees)
        best: list[int] = []
        while free and len(best) < CANDIDATES:
            leading = free
            for plane in reversed(held):
                leading = leading & plane or leading
            free ^= leading
            for level in self._levels:
                best += islice(bits(leading & level), CANDIDATES - len(best))
        return best

    def take(self, bit: int) -> tuple[WorkerView, Credit]:
        """Use a credit of a free worker."""
        view, used, mark = self._pool.at(bit), self._used.get(bit, 0), 1 << bit
        before, after = view.level(used), view.level(used + 1)
        assert before is not None
        self._levels[before] ^= mark
        if after is None:
            self.free ^= mark
        else:
            self._levels[after] ^= mark
        self._used[bit] = used + 1
        return view, view.credits[used]


class _Tree(NamedTuple):
    """A tree that is wanted: its bytes, and which of the free workers have it."""

    size: int
    holders: int


def _trees(pool: Pool, free: int, inputs: Iterable[ArtifactRef]) -> list[_Tree]:
    sizes = {ref.digest: ref.size for ref in inputs}
    return [_Tree(size, free & pool.holders(digest[:TREE_HINT])) for digest, size in sizes.items()]


def _missing(trees: Sequence[_Tree], bit: int) -> int:
    return sum(tree.size for tree in trees if not tree.holders >> bit & 1)


def _held(free: int, trees: Sequence[_Tree]) -> list[int]:
    """How much of the trees each free worker has, as a number standing on edge: set i holds those in whose number bit i is one. Adding a tree to all
    of its holders at once is then a sum by hand, with sets for digits."""
    shift = max(0, sum(tree.size for tree in trees).bit_length() - PRECISION)
    held: list[int] = []
    for size, holders in trees:
        if not holders or holders == free:
            continue
        left, carry, i = size >> shift, 0, 0
        while left or carry:
            if i == len(held):
                held.append(0)
            digit = held[i]
            if left & 1:
                held[i] = digit ^ holders ^ carry
                carry = digit & holders | carry & (digit | holders)
            elif carry:
                held[i] = digit ^ carry
                carry &= digit
            left >>= 1
            i += 1
    return held


def _bounded(counts: Mapping[str, int]) -> dict[str, int]:
    """The most frequent reasons, fit for an event."""
    short: dict[str, int] = {}
    for reason, count in counts.items():
        if count:
            short[reason[:WORDS]] = short.get(reason[:WORDS], 0) + count
    if len(short) > REASONS:
        often = sorted(short, key=lambda reason: (-short[reason], reason))
        short = {reason: short[reason] for reason in often[:REASONS]} | {OTHERS: sum(short[reason] for reason in often[REASONS:])}
    return short


def _reason(needs: Sequence[str], standing: Standing) -> str:
    """Why nobody is able, and where that is not plain, what to do."""
    if not standing.refused:
        return "no worker is connected"
    if standing.missing:
        return f"no worker offers {_words(standing.missing, 'or')}"
    if not standing.closed:
        return f"no worker offers {_words(needs, 'and')} together"
    who = "every worker" if standing.refused.keys() <= set(standing.closed) else f"every worker that offers {_words(needs, 'and')}"
    return f"{who} is {' or '.join(standing.closed)}: {_CURES[standing.closed]}"


def _words(words: Sequence[str], last: str) -> str:
    """Several, fit for an event."""
    short = [word[:WORDS] for word in words[:REASONS]] + [OTHERS] * (len(words) > REASONS)
    return f" {last} ".join(filter(None, (", ".join(short[:-1]), short[-1])))
