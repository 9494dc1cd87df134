"""Placement: requirements, cached trees, load, fairness, age, what is said when nothing fits, and what a decision costs."""

import sys
from collections import Counter
from itertools import count, product

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.events.base import ArtifactRef
from proto.messages import TREE_HINT, Attempt, Credit, Offers
from proto.plan import Requirements
from services.scheduler.needs import offered, wanted
from services.scheduler.placement import CANDIDATES, LOOKS, REASONS, explain, place
from services.scheduler.pool import Pool, WorkerView, bits
from services.scheduler.queue import AGING, Queue, Queued

LATER = 1e9


def queued(number, team="main", requirements=None, at=0.0, inputs=()):
    return Queued(
        attempt=Attempt(f"b{number}", "main", 1),
        team=team,
        requirements=requirements or Requirements(),
        position=number,
        queued_at=at,
        correlation_id="",
        event_id="",
        inputs={f"i{n}": ArtifactRef(id="", digest=digest, size=size) for n, (digest, size) in enumerate(inputs)},
    )


def queue_of(*items, running=None):
    queue = Queue()
    for item in items:
        queue.add(item)
    for team, leases in (running or {}).items():
        queue.count(team, leases)
    return queue


def worker(name, free=1, slots=4, cached=(), closed="", **offers):
    credits = [Credit(f"{name}-{i}", b"") for i in range(free)]
    return WorkerView(
        worker=name,
        boot="1",
        slots=slots,
        offers=Offers(**offers),
        credits=credits,
        busy=slots - free,
        closed=closed,
        cached=tuple(digest[:TREE_HINT] for digest in cached),
    )


def assigned(queue, *fleet, now=0.0):
    return [(a.queued.attempt.build, a.worker) for a in place(queue, Pool(fleet), now)]


# --- who goes where, and who goes first ----------------------------------------------------------------------------------------------


def test_the_oldest_goes_first_to_the_least_loaded():
    queue, fleet = queue_of(queued(1), queued(2), queued(3)), Pool([worker("w1", free=1), worker("w2", free=3)])
    assignments = place(queue, fleet, 0.0)
    assert [(a.queued.attempt.build, a.worker) for a in assignments] == [("b1", "w2"), ("b2", "w2"), ("b3", "w1")]
    assert [c.worker for c in assignments[0].why] == ["w2", "w1"]


def test_the_team_with_the_fewest_running_goes_first():
    queue = queue_of(*(queued(i, "big") for i in range(5)), queued(9, "small"), running={"big": 3})
    assert assigned(queue, worker("w1", free=2)) == [("b9", "w1"), ("b0", "w1")]


def test_fewer_missing_bytes_count_more_than_load():
    big, small = ("b" * 64, 1000), ("s" * 64, 10)
    fleet = (worker("idle", free=4), worker("small", free=4, cached=[small[0]]), worker("big", free=1, cached=[big[0]]))
    [assignment] = place(queue_of(queued(1, inputs=[big, small])), Pool(fleet), 0.0)
    assert [(c.worker, c.missing) for c in assignment.why] == [("big", 10), ("small", 1000), ("idle", 1010)]


def test_a_tree_under_two_names_is_missed_once():
    twice, other = ("t" * 64, 600), ("o" * 64, 1000)
    fleet = (worker("two", cached=[twice[0]]), worker("one", cached=[other[0]]))
    assert assigned(queue_of(queued(1, inputs=[twice, twice, other])), *fleet) == [("b1", "one")]


def test_a_worker_that_lacks_a_requirement_is_not_chosen_for_what_it_has_cached():
    tree, gpu = ("t" * 64, 1000), Requirements(tags=("gpu",))
    assert assigned(queue_of(queued(1, requirements=gpu, inputs=[tree])), worker("w1", cached=[tree[0]]), worker("w2", tags=("gpu",))) == [
        ("b1", "w2")
    ]


def test_a_lease_says_which_workers_were_not_candidates_and_why():
    fleet = (worker("w1"), worker("w2", free=0), worker("w3", closed="draining"), worker("w4", platform="darwin"))
    [assignment] = place(queue_of(queued(1)), Pool(fleet), 0.0)
    assert assignment.refused == {"busy": 1, "draining": 1, "platform linux": 1}


def test_a_busy_fleet_is_no_reason_only_a_wait():
    queue, fleet = queue_of(queued(1)), Pool([worker("w1", free=0)])
    assert place(queue, fleet, 0.0) == [] and explain(queue, fleet, LATER, 10) == []


def test_the_queue_and_the_fleet_are_left_as_they_were():
    queue, fleet = queue_of(queued(1), queued(2, "other")), Pool([worker("w1", free=2)])
    before = queue_state(queue), pool_state(fleet)
    assert place(queue, fleet, 0.0) == place(queue, fleet, 0.0) != []
    assert (queue_state(queue), pool_state(fleet)) == before


@pytest.mark.parametrize("limit", [1, 3])
def test_what_is_over_the_limit_is_placed_next(limit):
    queue, fleet = queue_of(*(queued(i, f"t{i % 3}") for i in range(7))), Pool([worker("w", free=9, slots=9)])
    builds = []
    while assignments := place(queue, fleet, 0.0, limit):
        assert len(assignments) <= limit
        for assignment in assignments:
            lease(queue, fleet, assignment, 0.0)
            builds.append(assignment.queued.attempt.build)
    assert sorted(builds) == [f"b{i}" for i in range(7)]


def lease(queue, fleet, assignment, at):
    """What the board and the fleet make of a lease."""
    queue.remove(assignment.queued.attempt, leased_at=at)
    queue.count(assignment.queued.team, 1)
    view = next(view for view in map(fleet.at, bits(fleet.takers)) if view.worker == assignment.worker)
    credits = [credit for credit in view.credits if credit != assignment.credit]
    fleet.put(msgspec.structs.replace(view, credits=credits, busy=view.busy + 1))


# --- why it waits ------------------------------------------------------------------------------------------------------------------------


def test_a_requirement_that_nobody_offers_is_said_in_words():
    wants = {
        "no worker offers a container engine for registry-image": Requirements(image="registry-image"),
        "no worker offers run.user without an image": Requirements(user=True),
        "no worker offers container_limits without an image": Requirements(limits=True),
        "no worker offers platform darwin": Requirements(platform="darwin"),
        "no worker offers tag gpu": Requirements(tags=("gpu",)),
    }
    for reason, requirements in wants.items():
        queue, fleet = queue_of(queued(1, requirements=requirements)), Pool([worker("w1"), worker("w2")])
        assert place(queue, fleet, 0.0) == []
        [deferral] = explain(queue, fleet, LATER, 10)
        assert deferral.reason == reason
        assert list(deferral.refused.values()) == [2]


def reasons(queue, fleet, before=LATER, limit=100):
    """What is said, which the board then notes."""
    deferrals = explain(queue, fleet, before, limit)
    for deferral in deferrals:
        queue.add(msgspec.structs.replace(deferral.queued, deferred=deferral.reason))
    return [(deferral.queued.attempt.build, deferral.reason) for deferral in deferrals]


def test_an_empty_fleet_is_said():
    assert reasons(queue_of(queued(1)), Pool()) == [("b1", "no worker is connected")]


@pytest.mark.parametrize(
    ("fleet", "reason"),
    [
        ([worker("w", tags=("gpu",), closed="draining")], "every worker is draining: resume one, or start another"),
        (
            [worker("v", tags=("gpu",), closed="in trouble"), worker("w", tags=("gpu",), closed="draining")],
            "every worker is draining or in trouble: `penstock workers` says which, and why",
        ),
        (
            [worker("v"), worker("w", tags=("gpu",), closed="draining")],
            "every worker that offers platform linux and tag gpu is draining: resume one, or start another",
        ),
        (
            [worker("v", closed="draining"), worker("w", tags=("gpu",), closed="in trouble")],
            "every worker that offers platform linux and tag gpu is in trouble: `penstock workers` says why",
        ),
        ([worker("v", closed="draining"), worker("w")], "no worker offers tag gpu"),
        ([worker("v"), worker("w", platform="darwin", tags=("gpu",))], "no worker offers platform linux and tag gpu together"),
    ],
    ids=["all drain", "all are closed", "one drains", "one is in trouble", "none has it", "none has both"],
)
def test_what_is_said_is_true_of_those_that_may_take_nothing_too(fleet, reason):
    queue, pool = queue_of(queued(1, requirements=Requirements(tags=("gpu",)))), Pool(fleet)
    assert reasons(queue, pool) == [("b1", reason)]
    pool.put(worker("new", free=0, tags=("gpu",)))
    assert reasons(queue, pool) == [], "a busy one is no reason, only a wait"


def test_all_that_nobody_offers_is_named():
    queue = queue_of(queued(1, requirements=Requirements(platform="plan9", tags=("a", "b"))))
    assert reasons(queue, Pool([worker("w")])) == [("b1", "no worker offers platform plan9, tag a or tag b")]


def test_one_that_is_set_aside_holds_up_nobody_and_waits_in_its_place_of_the_log():
    queue, fleet = queue_of(queued(1), queued(2)), Pool([worker("w", free=1)])
    queue.set_aside(Attempt("b1", "main", 1))
    [assignment] = place(queue, fleet, 0.0)
    assert assignment.queued.attempt.build == "b2"
    assert reasons(queue, fleet) == [("b1", "its plan cannot be read: the scheduler's log says why")]
    assert [(one.attempt.build, one.deferred != "") for one in queue.all()] == [("b2", False), ("b1", True)]
    lease(queue, fleet, assignment, 0.0)
    assert place(queue, fleet, 0.0) == [] and not queue.awake, "nothing is looked at again and again"
    assert queue.remove(Attempt("b1", "main", 1)) is not None and queue.lines == {}


def test_a_reason_is_said_once_and_again_when_it_is_another():
    queue, fleet = queue_of(queued(1)), Pool()
    assert reasons(queue, fleet) == [("b1", "no worker is connected")]
    assert reasons(queue, fleet) == []
    fleet.put(worker("w1", platform="darwin"))
    assert reasons(queue, fleet) == [("b1", "no worker offers platform linux")]
    fleet.put(worker("w2", free=0))
    assert reasons(queue, fleet) == []
    fleet.remove("w2")
    assert reasons(queue, fleet) == [], "it is what was said last"
    fleet.remove("w1")
    assert reasons(queue, fleet) == [("b1", "no worker is connected")]


def test_a_reason_that_could_not_be_recorded_is_said_again():
    queue, fleet = queue_of(queued(1)), Pool()
    assert explain(queue, fleet, LATER, 10) == explain(queue, fleet, LATER, 10) != []


def test_a_reason_that_is_recorded_already_is_not_said_again():
    assert reasons(queue_of(msgspec.structs.replace(queued(1), deferred="no worker is connected")), Pool()) == []


def test_reasons_are_given_to_all_in_turn_and_to_nobody_before_it_has_waited():
    queue, fleet = queue_of(*(queued(i, f"t{i % 2}", at=float(i)) for i in range(9))), Pool()
    said = [reasons(queue, fleet, before, limit=2) for before in (-1.0, 4.0, 4.0, 4.0, 4.0)]
    assert [[build for build, _ in once] for once in said] == [[], ["b0", "b1"], ["b2", "b3"], ["b4"], []]


def test_what_is_said_is_bounded_whatever_is_asked_for():
    tags = tuple(f"{n:04}{'x' * 1000}" for n in range(300))
    fleet = Pool(worker(f"w{n}", tags=tags[:n]) for n in range(300))
    [deferral] = explain(queue_of(queued(1, requirements=Requirements(tags=tags))), fleet, LATER, 1)
    assert len(msgspec.json.encode((deferral.reason, deferral.refused))) < 2000
    assert len(deferral.refused) == REASONS + 1 and sum(deferral.refused.values()) == 300


# --- properties ------------------------------------------------------------------------------------------------------------------------

TREES = [(f"{n}" * 64, 1 << n) for n in range(4)]
platforms, tags = st.sampled_from(["linux", "darwin"]), st.sampled_from([(), ("gpu",), ("arm", "gpu")])
some_trees = st.lists(st.sampled_from(TREES), max_size=4, unique=True)
requirements = st.builds(Requirements, platform=platforms, tags=tags, user=st.booleans())
teams = st.sampled_from(["t1", "t2", "t3"])
waiting = st.lists(st.tuples(teams, requirements, st.integers(0, 300), some_trees), max_size=20)
one_worker = st.builds(
    lambda i, free, cached, **offers: worker(f"w{i}", free=free, cached=[digest for digest, _ in cached], **offers),
    st.integers(0, 12),
    st.integers(0, 4),
    some_trees,
    platform=platforms,
    tags=tags,
    user=st.booleans(),
    closed=st.sampled_from(["", "draining", "in trouble"]),
)
workers = st.lists(one_worker, max_size=8, unique_by=lambda w: w.worker)
running_counts = st.dictionaries(teams, st.integers(0, 4))


def fits(needs, view):
    return not view.closed and set(wanted(needs)) <= set(offered(view.offers))


def missing(item, view):
    return sum(ref.size for ref in item.inputs.values() if ref.digest[:TREE_HINT] not in view.cached)


@settings(max_examples=300, deadline=None)
@given(waiting, workers, running_counts)
def test_each_decision_is_the_one_that_looking_at_everything_would_make(wanting, fleet, running):
    """Never over capacity or against a requirement; the group that has least; the worker that lacks least, then does least; and nobody left over."""
    now = 300.0
    items = [queued(i, team, needs, float(sorted(at for _, _, at, _ in wanting)[i]), trees) for i, (team, needs, _, trees) in enumerate(wanting)]
    placed = place(queue_of(*items, running=running), Pool(fleet), now)
    left, used, more = {item.attempt: item for item in items}, Counter(), Counter()
    served = set()

    def key(item):
        since = now if (item.team, item.requirements) in served else item.queued_at
        return running.get(item.team, 0) + more[item.team] + since / AGING, item.position

    def open_to(item):
        return [view for view in fleet if fits(item.requirements, view) and used[view.worker] < len(view.credits)]

    for assignment in placed:
        assert key(assignment.queued) == min(key(item) for item in left.values() if open_to(item))
        open_workers = {view.worker: view for view in open_to(assignment.queued)}
        order = sorted((missing(assignment.queued, view), view.load(used[name])) for name, view in open_workers.items())
        named = [open_workers[candidate.worker] for candidate in assignment.why]
        assert [(missing(assignment.queued, view), view.load(used[view.worker])) for view in named] == order[:CANDIDATES]
        assert [candidate.missing for candidate in assignment.why] == [missing(assignment.queued, view) for view in named]
        assert assignment.worker == assignment.why[0].worker
        del left[assignment.queued.attempt]
        used[assignment.worker] += 1
        more[assignment.queued.team] += 1
        served.add((assignment.queued.team, assignment.queued.requirements))
    assert len({assignment.credit.nonce for assignment in placed}) == len(placed)
    assert not any(open_to(item) for item in left.values())


changes = st.lists(
    st.one_of(
        st.tuples(st.just("queue"), teams, requirements),
        st.tuples(st.just("worker"), one_worker),
        st.tuples(st.just("leave"), st.integers(0, 12)),
        st.tuples(st.just("forget"), st.integers(0, 30)),
        st.tuples(st.just("end"), teams),
        st.tuples(st.just("place")),
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(changes)
def test_after_any_changes_the_indexes_are_those_that_are_built_anew_and_decide_the_same(happened):
    queue, pool, views, items = Queue(), Pool(), {}, {}
    served, running = {}, Counter()
    for now, change in enumerate(happened, 1):
        match change:
            case "queue", team, needs:
                item = queued(now, team, needs, float(now))
                items[item.attempt] = item
                queue.add(item)
            case "worker", view:
                views[view.worker] = view
                pool.put(view)
            case "leave", number:
                views.pop(f"w{number}", None)
                pool.remove(f"w{number}")
            case "forget", number:
                items.pop(Attempt(f"b{number}", "main", 1), None)
                queue.remove(Attempt(f"b{number}", "main", 1))
            case "end", team if running[team]:
                running[team] -= 1
                queue.count(team, -1)
            case ("place",):
                anew, decided = place(rebuilt(items, served, running), Pool(views.values()), float(now)), place(queue, pool, float(now))
                assert [a.queued for a in decided[:1]] == [a.queued for a in anew[:1]]
                for one in decided[:1]:
                    lease(queue, pool, one, float(now))
                    del items[one.queued.attempt]
                    running[one.queued.team] += 1
                    served[one.queued.team, one.queued.requirements] = float(now)
                    old = views[one.worker]
                    credits = [credit for credit in old.credits if credit != one.credit]
                    views[one.worker] = msgspec.structs.replace(old, credits=credits, busy=old.busy + 1)
        assert pool_state(pool) == pool_state(Pool(views.values()))
        assert queue_state(queue) == queue_state(rebuilt(items, served, running))


def queue_state(queue):
    lines = queue.lines.values()
    assert all((line in queue.awake) != bool(line.parked) for line in lines) and len(queue) == len(list(queue.all()))
    ranks = {line.requirements: list(queue.ranked(line)) for line in lines}
    members = {(line.requirements, team): list(group.members) for line in lines for team, group in line.groups.items()}
    return queue.running, ranks, members


def pool_state(pool):
    def names(workers):
        return sorted(pool.at(bit).worker for bit in bits(workers))

    needs = product(("linux", "darwin"), ((), ("gpu",), ("arm", "gpu")), (True, False))
    standings = [pool.standing(wanted(Requirements(platform=platform, tags=tags, user=user))) for platform, tags, user in needs]
    trees = [names(pool.holders(digest[:TREE_HINT])) for digest, _ in TREES]
    return [(names(s.able), s.refused) for s in standings], list(map(names, pool.levels)), trees


def rebuilt(items, served, running):
    """A queue of those items, whose groups were served when these were: one more of each was, that came before."""
    waiting = {(item.team, item.requirements) for item in items.values()}
    before = [(queued(-n, *group), at) for n, (group, at) in enumerate(served.items(), 1) if group in waiting]
    queue = queue_of(*(item for item, _ in before), *items.values(), running=+running)
    for item, at in before:
        queue.remove(item.attempt, leased_at=at)
    return queue


# --- fairness ----------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 30), min_size=1), st.integers(1, 60))
def test_teams_that_wait_together_have_shares_that_differ_by_one_at_most(wanting, slots):
    numbers = count()
    queue = queue_of(*(queued(next(numbers), team) for team, many in wanting.items() for _ in range(many)))
    got = Counter(a.queued.team for a in place(queue, Pool([worker("w", free=slots, slots=slots)]), 0.0))
    unserved = [got[team] for team, many in wanting.items() if got[team] < many]
    assert not unserved or max(got.values()) - min(unserved) <= 1
    assert sum(got.values()) == min(slots, sum(wanting.values()))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 20))
def test_nothing_starves_though_others_always_have_less(elsewhere, floods, seconds):
    """A team that runs `elsewhere` leases for good waits for one slot that teams with none want again each time: each lease it has costs it so
    many seconds, and then each other group goes first once at most."""
    queue, fleet = queue_of(queued(0, "patient"), running={"patient": elsewhere}), Pool([worker("w", free=1, slots=1)])
    numbers, now, leased_to = count(1), 0.0, ""
    while leased_to != "patient":
        for n in range(floods):
            if f"flood{n}" not in {item.team for item in queue.all()}:
                queue.add(queued(next(numbers), f"flood{n}", at=now))
        [assignment] = place(queue, fleet, now, limit=1)
        lease(queue, fleet, assignment, now)
        leased_to = assignment.queued.team
        assert now <= elsewhere * AGING + seconds * (floods + 1)
        now += seconds
        queue.count(leased_to, -1)
        fleet.put(worker("w", free=1, slots=1))


def test_of_very_many_classes_that_a_slot_would_do_for_each_has_its_turn():
    tags = tuple(f"tag{n}" for n in range(3 * LOOKS))
    queue, fleet = queue_of(*(queued(n, requirements=Requirements(tags=(tag,))) for n, tag in enumerate(tags))), Pool()
    for now in range(2 * len(tags)):
        fleet.put(worker("w", free=1, slots=1, tags=tags))
        for assignment in place(queue, fleet, float(now)):
            lease(queue, fleet, assignment, float(now))
            queue.count("main", -1)
    assert not len(queue)


# --- what a decision costs ---------------------------------------------------------------------------------------------------------------


def lines_run(work):
    """How many lines of Python a call runs: its cost, whatever else this machine does."""
    ran = 0

    def trace(_frame, event, _argument):
        nonlocal ran
        ran += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return ran


def ten_decisions(queue, fleet):
    """A slot becomes free, is given away, becomes free."""

    def turns():
        for now in range(10):
            fleet.put(worker("w0", free=1, slots=1))
            [assignment] = place(queue, fleet, float(now))
            lease(queue, fleet, assignment, float(now))
            queue.count(assignment.queued.team, -1)
            assert explain(queue, fleet, 0.0, 100) == []

    while queue.awake:
        place(queue, fleet, 0.0, 0)
    while queue.unexplained:
        reasons(queue, fleet, limit=100_000)
    return lines_run(turns)


def test_a_decision_costs_the_same_however_long_the_queue_is():
    costs = [
        ten_decisions(queue_of(*(queued(i, f"t{i % 7}") for i in range(length))), Pool([worker(f"w{n}", free=0, slots=1) for n in range(50)]))
        for length in (100, 20_000)
    ]
    assert costs[1] <= costs[0] * 1.02


def test_classes_that_nobody_can_take_cost_a_decision_nothing():
    hopeless = [queued(i, f"t{i % 7}", Requirements(tags=(f"tag{i}",))) for i in range(100, 3000)]
    costs = [
        ten_decisions(queue_of(*(queued(i, f"t{i % 7}") for i in range(100)), *more), Pool([worker(f"w{n}", free=0, slots=1) for n in range(50)]))
        for more in ([], hopeless)
    ]
    assert costs[1] <= costs[0] * 1.02


def test_a_decision_costs_the_same_however_many_workers_there_are():
    costs = [
        ten_decisions(queue_of(*(queued(i) for i in range(100))), Pool([worker(f"w{n}", free=0, slots=1) for n in range(size)])) for size in (50, 500)
    ]
    assert costs[1] <= costs[0] * 1.02
