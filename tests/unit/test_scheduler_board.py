"""The board and the fleet: folds without I/O."""

from datetime import UTC, datetime

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.envelope import Fact
from proto.events.artifact import LogArchived, LogGap
from proto.events.build import BuildCreated, BuildFinished, StageFinished, StageInterrupted, StageQueued, StepStarted
from proto.events.fleet import WorkerDeleted, WorkerRegistered
from proto.events.lease import LeaseExpired, StageDeferred, StageLeased
from proto.events.worker import WorkerBooted, WorkerLost
from proto.messages import ArchivedLog, Attempt, Availability, Credit, Heartbeat, Offers, Running
from proto.plan import Plan, Requirements, Run, RunStep, Stage, TaskConfig
from services.scheduler.board import Board
from services.scheduler.fleet import Fleet, unlisted
from services.scheduler.pool import bits

PLAN = Plan(stages=[Stage(name="main", steps=[RunStep(name="run", config=TaskConfig(run=Run(path="true")))])])
A1 = Attempt("b1", "main", 1)


def facts(*happened, start=1):
    """Events on streams, in log order: (stream, event)."""
    return [
        Fact(
            position=position,
            stream=stream,
            version=position,
            event_id=f"e{position}",
            team="main",
            correlation_id="c",
            causation_id="",
            actor="test",
            recorded_at=datetime(2026, 11, 22, tzinfo=UTC),
            event=event,
        )
        for position, (stream, event) in enumerate(happened, start)
    ]


def board(*happened):
    result = Board()
    for one in facts(*happened):
        result.apply(one)
        result.apply(one)
    return result


CREATED = ("build-b1", BuildCreated(plan=PLAN))
QUEUED = ("build-b1", StageQueued(stage="main", attempt=1, requirements=Requirements()))
LEASED = ("lease-b1", StageLeased(stage="main", attempt=1, worker="w1", boot="x", credit="n"))
STARTED = ("build-b1", StepStarted(stage="main", attempt=1, step="run", worker="w1", report=1))
ENDED = ("build-b1", StageFinished(stage="main", attempt=1, status="succeeded"))
OVER = ("build-b1", BuildFinished(status="succeeded"))


def test_an_attempt_waits_then_is_leased_then_is_over():
    assert A1 in board(CREATED, QUEUED).queue
    leased = board(CREATED, QUEUED, LEASED, STARTED)
    assert A1 not in leased.queue and leased.leases[A1].recorded == 1 and leased.queue.running == {"main": 1}
    over = board(CREATED, QUEUED, LEASED, STARTED, ENDED, OVER)
    assert not over.leases and not over.queue.running and not len(over.queue) and not over.plans


def test_a_build_aborted_before_its_lease_is_forgotten():
    assert not len(board(CREATED, QUEUED, ENDED, OVER).queue)


def test_a_lost_attempt_waits_again_under_its_next_number():
    again = ("build-b1", StageQueued(stage="main", attempt=2, requirements=Requirements()))
    lost = board(CREATED, QUEUED, LEASED, ("lease-b1", LeaseExpired(stage="main", attempt=1, worker="w1", evidence="e")), again)
    assert not lost.leases and [q.attempt.number for q in lost.queue.all()] == [2]


def test_an_interruption_is_news_for_its_worker():
    interrupted = board(CREATED, QUEUED, LEASED, ("build-b1", StageInterrupted(stage="main", attempt=1, reason="aborted")))
    assert list(interrupted.news) == [("w1", A1)] and interrupted.leases[A1].interrupted == "aborted"


def test_a_deferral_keeps_its_place_in_the_queue():
    second = ("build-b2", StageQueued(stage="main", attempt=1, requirements=Requirements()))
    deferred = board(CREATED, QUEUED, second, ("lease-b1", StageDeferred(stage="main", attempt=1, reason="r")))
    assert [(q.attempt.build, q.deferred) for q in deferred.queue.all()] == [("b1", "r"), ("b2", "")]


def test_boots_follow_workers():
    booted = ("worker-w1-x", WorkerBooted(worker="w1", boot="x", since=1, slots=1, offers=Offers()))
    assert board(booted).boots == {"w1": "x"}
    assert board(booted, ("worker-w1-x", WorkerLost(worker="w1", boot="x", reason="silent"))).boots == {}
    newer = ("worker-w1-y", WorkerBooted(worker="w1", boot="y", since=1, slots=1, offers=Offers()))
    assert board(booted, newer, ("worker-w1-x", WorkerLost(worker="w1", boot="x", reason="silent"))).boots == {"w1": "y"}


def boot(name, since, worker="w1"):
    return f"worker-{worker}-{name}", WorkerBooted(worker=worker, boot=name, since=since, slots=1, offers=Offers())


REGISTERED = ("fleet-worker-w1", WorkerRegistered(worker="w1", key="k"))


def test_an_older_boot_that_is_recorded_later_is_not_the_worker_s():
    # FAULTS 46: two led at once, and each had heard another
    both = board(REGISTERED, boot("z-first", 1), boot("a-second", 2), boot("z-first", 1))
    assert both.boots == {"w1": "a-second"} and both.roster.members["w1"].latest == (2, "a-second")
    lost = board(REGISTERED, boot("b", 2), ("worker-w1-b", WorkerLost(worker="w1", boot="b", reason="silent")), boot("a", 1))
    assert lost.boots == {}, "it is remembered while it is lost"
    assert board(REGISTERED, boot("b", 2), boot("b", 2)).boots == {"w1": "b"}
    restored = Board.restore(lost.position, lost.snapshot())
    assert restored.roster.members == lost.roster.members and restored.boots == {}


def test_the_order_of_boots_begins_anew_with_a_registration():
    assert board(REGISTERED, boot("b", 2), ("fleet-worker-w1", WorkerDeleted()), REGISTERED, boot("a", 1)).boots == {"w1": "a"}


def test_an_archived_log_is_remembered():
    archived = LogArchived(build="b1", stage="main", attempt=1, archive=1, digest="d", chunks=2, lines=1, bytes=1, gaps=[LogGap(first=2, last=4)])
    assert board(("artifact-log-b1-main-1", archived)).archived == {A1: ArchivedLog("b1", "main", 1, 5, [(2, 4)])}


one_event = st.builds(
    lambda build, make: make(f"b{build}"),
    st.integers(1, 3),
    st.sampled_from(
        [
            lambda b: (f"build-{b}", BuildCreated(plan=PLAN)),
            lambda b: (f"build-{b}", StageQueued(stage="main", attempt=1, requirements=Requirements())),
            lambda b: (f"build-{b}", StageQueued(stage="main", attempt=2, requirements=Requirements())),
            lambda b: (f"lease-{b}", StageLeased(stage="main", attempt=1, worker="w1", boot="x", credit="n")),
            lambda b: (f"lease-{b}", LeaseExpired(stage="main", attempt=1, worker="w1", evidence="e")),
            lambda b: (f"lease-{b}", StageDeferred(stage="main", attempt=1, reason="r")),
            lambda b: (f"build-{b}", StageInterrupted(stage="main", attempt=1, reason="aborted")),
            lambda b: (f"build-{b}", StageFinished(stage="main", attempt=1, status="failed")),
        ]
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(one_event, max_size=30), st.integers(0, 30))
def test_a_board_restored_anywhere_and_folded_on_is_the_board_that_never_stopped(happened, cut):
    live = board(*happened)
    log = facts(*happened)
    half = Board()
    for one in log[:cut]:
        half.apply(one)
    restored = Board.restore(half.position, half.snapshot())
    for one in log:
        restored.apply(one)
    assert restored.snapshot() == live.snapshot() and restored.queue.running == live.queue.running
    ranks = [{line.requirements: list(queue.ranked(line)) for line in queue.lines.values()} for queue in (restored.queue, live.queue)]
    assert ranks[0] == ranks[1]
    assert restored.held == live.held


def heartbeat(number, boot="x", since=1, credits=("n1",), running=(), challenge=b"c", cached=None):
    return Heartbeat(
        boot=boot,
        since=since,
        number=number,
        slots=2,
        availability=Availability(challenge=challenge, offers=Offers(), credits=[Credit(nonce, b"k") for nonce in credits], cached=cached),
        busy=2 - len(credits),
        running=[Running(attempt, 0) for attempt in running],
    )


def test_a_used_credit_is_not_offered_again_though_its_worker_still_lists_it():
    fleet = Fleet()
    fleet.on_heartbeat("w1", heartbeat(1), True, 0.0)
    fleet.use("w1", Credit("n1", b"k"))
    worker = fleet.on_heartbeat("w1", heartbeat(2), True, 1.0)
    assert worker is not None and worker.view().credits == [] and worker.view().busy == 2
    worker = fleet.on_heartbeat("w1", heartbeat(3, credits=("n2",)), True, 2.0)
    assert worker is not None and [c.nonce for c in worker.view().credits] == ["n2"] and worker.used == set()


def test_credits_without_a_recent_challenge_do_not_count():
    # FAULTS 86: a heartbeat that is replayed, or that answers another server's challenge
    worker = Fleet().on_heartbeat("w1", heartbeat(1, challenge=b""), False, 0.0)
    assert worker is not None and worker.view().credits == []


def test_an_old_heartbeat_is_ignored():
    fleet = Fleet()
    fleet.on_heartbeat("w1", heartbeat(5), True, 0.0)
    assert fleet.on_heartbeat("w1", heartbeat(5), True, 1.0) is None
    assert fleet.on_heartbeat("w1", heartbeat(4), True, 1.0) is None


@pytest.mark.parametrize("order", ["on", "no", "non", "ono"])
@pytest.mark.parametrize("since", [1, 2], ids=["at once", "later"])
def test_of_two_workers_with_one_identity_the_newer_wins_in_whatever_order_they_are_heard(order, since):
    # FAULTS 46
    fleet, beats = Fleet(), {"o": heartbeat(5, boot="k"), "n": heartbeat(1, boot="a" if since > 1 else "z", since=since)}
    for at, one in enumerate(order):
        heard = fleet.on_heartbeat("w1", beats[one], True, at)
        assert (heard is None) == ("n" in order[:at])
    [worker] = fleet
    assert worker.heartbeat is beats["n"]


def free(fleet):
    return [fleet.pool.at(bit).worker for level in fleet.pool.levels for bit in bits(level)]


def test_the_pool_follows_heartbeats_uses_and_farewells():
    fleet = Fleet()
    fleet.on_heartbeat("w1", heartbeat(1), True, 0.0)
    assert free(fleet) == ["w1"]
    fleet.use("w1", Credit("n1", b"k"))
    assert free(fleet) == []
    fleet.on_heartbeat("w1", heartbeat(2, credits=("n2",)), True, 1.0)
    assert free(fleet) == ["w1"]
    fleet.on_heartbeat("w1", msgspec.structs.replace(heartbeat(3, credits=("n2",)), goodbye=True), True, 2.0)
    assert free(fleet) == []
    fleet.remove("w1")
    assert fleet.pool.standing(("platform linux",)).refused == {}


def test_what_a_worker_has_cached_stands_until_it_says_otherwise_or_boots_anew():
    fleet = Fleet()
    fleet.on_heartbeat("w1", heartbeat(1, cached=("t1", "t2")), True, 0.0)
    fleet.on_heartbeat("w1", heartbeat(2), True, 1.0)
    assert fleet.pool.holders("t1") == 1
    fleet.on_heartbeat("w1", heartbeat(3, cached=("t2",)), True, 2.0)
    assert (fleet.pool.holders("t1"), fleet.pool.holders("t2")) == (0, 1)
    fleet.on_heartbeat("w1", heartbeat(1, boot="y", since=2), True, 3.0)
    assert fleet.pool.holders("t2") == 0


def test_what_a_worker_does_not_list_it_does_not_hold():
    assert unlisted(heartbeat(1), A1) and not unlisted(heartbeat(1, running=[A1]), A1)
