"""What comes before an attempt, and who has the slots that it waits for."""

from collections import Counter

import pytest
from hypothesis import given, settings

from proto.messages import Attempt
from proto.plan import Requirements
from services.scheduler import waiting as module
from services.scheduler.board import Lease
from services.scheduler.pool import Pool
from services.scheduler.queue import AGING
from services.scheduler.waiting import ahead, waits
from tests.unit.test_scheduler_placement import fits, queue_of, queued, running_counts, waiting, worker, workers


def before(queue, pool, number, now=0.0):
    found, more = ahead(queue, pool, Attempt(f"b{number}", "main", 1), now)
    return [int(one.attempt.build[1:]) for one in found], more


def test_the_older_ones_of_the_team_come_first():
    queue = queue_of(queued(1), queued(2), queued(3))
    assert before(queue, Pool([worker("w", free=0)]), 3) == ([1, 2], False)
    assert before(queue, Pool([worker("w", free=0)]), 1) == ([], False)


def test_teams_take_turns_and_whoever_has_less_running_is_before():
    queue = queue_of(queued(1, "big"), queued(2, "big"), queued(3, "small"), queued(4, "small"), running={"big": 2})
    assert before(queue, Pool([worker("w", free=0)]), 2) == ([3, 4, 1], False)
    assert before(queue, Pool([worker("w", free=0)]), 4) == ([3], False)


def test_whoever_wants_other_workers_is_not_before():
    fleet = Pool([worker("w1", tags=("gpu",)), worker("w2")])
    gpu, other = Requirements(tags=("gpu",)), Requirements(platform="darwin")
    queue = queue_of(queued(1), queued(2, requirements=other), queued(3, requirements=gpu))
    assert before(queue, fleet, 3) == ([1], False), "the first may take the one worker that the third needs"
    assert before(queue, fleet, 2) == ([], False), "nobody offers that at all"


def test_it_is_looked_only_so_far(monkeypatch):
    monkeypatch.setattr(module, "LOOK", 2)
    queue = queue_of(*(queued(number) for number in range(1, 6)))
    assert before(queue, Pool([worker("w")]), 5) == ([1, 2], True)
    assert before(queue, Pool([worker("w")]), 3) == ([1, 2], False)


def test_one_that_does_not_wait_is_none_of_it():
    with pytest.raises(KeyError):
        ahead(queue_of(queued(1)), Pool(), Attempt("b2", "main", 1), 0.0)


@settings(max_examples=200, deadline=None)
@given(waiting, workers, running_counts)
def test_the_order_is_the_one_in_which_leases_would_be_given(wanting, fleet, running):
    """Looking at everything again for each decision, among those that want one of the same workers."""
    now = 300.0
    times = sorted(at for _, _, at, _ in wanting)
    items = [queued(number, team, needs, times[number], trees) for number, (team, needs, _, trees) in enumerate(wanting)]
    queue, pool = queue_of(*items, running=running), Pool(fleet)
    for target in items:
        able = {view.worker for view in fleet if fits(target.requirements, view)}
        rivals = [one for one in items if one.requirements == target.requirements or able & {v.worker for v in fleet if fits(one.requirements, v)}]
        more, served, expected = Counter(running), set(), []

        def key(item, more=more, served=served):
            since = now if (item.team, item.requirements) in served else item.queued_at
            return more[item.team] + since / AGING, item.position

        while (following := min(rivals, key=key)) is not target:
            rivals.remove(following)
            expected.append(following)
            more[following.team] += 1
            served.add((following.team, following.requirements))
        assert ahead(queue, pool, target.attempt, now) == (expected, False)


def test_it_is_said_whose_slots_they_are_and_of_others_only_how_many():
    queue = queue_of(queued(1, "other"), queued(2), queued(3))
    leases = [
        Lease(attempt=Attempt(f"r{n}", "main", 1), team=team, worker="w1", boot="1", credit="", position=n, queued=queued(n, team))
        for n, team in enumerate(("main", "other", "other"))
    ]

    class Known:
        held = {"w1": {lease.attempt: lease for lease in leases}}
        now = 100.0

    Known.queue = queue
    (said,) = waits(
        [Attempt("b3", "main", 1), Attempt("gone", "main", 1)], Known, Pool([worker("w1", free=0), worker("w2", closed="draining")])
    ).stages
    assert (said.ahead, said.more, said.own, said.able) == (2, False, [Attempt("b2", "main", 1)], 1)
    (holder,) = said.holders
    assert (holder.worker, holder.slots, holder.offered, holder.own, holder.others) == ("w1", 4, 0, [Attempt("r0", "main", 1)], 2)
