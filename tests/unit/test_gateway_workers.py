"""What a worker looks like to a client, and why a stage is where it is."""

from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from libs.tokens import new_seed, public_key, sign
from proto.api.builds import BuildStage
from proto.api.preparation import Preparation
from proto.envelope import Fact
from proto.events.base import Event
from proto.events.build import BuildCreated, BuildFinished, StageFinished, StageQueued, StepStarted
from proto.events.lease import Candidate, LeaseExpired, StageDeferred, StageLeased
from proto.messages import About, Attempt, Availability, Credit, Heartbeat, Offers, SlotsHeld, StageWaits
from proto.plan import Plan, Requirements, Run, RunStep, Stage, TaskConfig
from services.gateway.preparation import prepared, with_waits
from services.gateway.presence import MANY, Heard, Presence
from services.gateway.worker_view import SILENT, worker_view
from services.gateway.workers import LeaseRow, WorkerRow

START = datetime(2026, 11, 22, tzinfo=UTC)
NOW = START.timestamp() + 100
ROW = WorkerRow(name="w1", key="k", tags=["gpu"], standing="registered", life="up", boot="b", slots=2, changed_at=START)
MINE = LeaseRow(key="b1/main", build="b1", number=7, team="main", stage="main", attempt=1, worker="w1", since=START)
OTHERS = LeaseRow(key="b2/main", build="b2", number=3, team="other", stage="main", attempt=1, worker="w1", since=START)


def heartbeat(**more: object) -> Heartbeat:
    credits = [Credit("n", b"k" * 32)] if more.pop("offering", True) else []
    offers = Offers(tags=("own", "gpu"), sandbox="bubblewrap")
    about = About(version="1", hostname="h", address="10.0.0.1")
    told = {"about": about, "slots": 2, "cache_used": 5, "cache_limit": 10, **more}
    return Heartbeat(boot="b", since=1, number=1, availability=Availability(challenge=b"", offers=offers, credits=credits), **told)


def seen(row: WorkerRow = ROW, heard: Heard | None = None, leases: tuple[LeaseRow, ...] = (), team: str = "main", owner: bool = False):
    return worker_view(row, heard, leases, NOW, team, owner)


@pytest.mark.parametrize(
    ("status", "row", "more"),
    [
        ("available", {}, {}),
        ("busy", {}, {"busy": 2, "offering": False}),
        ("idle", {}, {"offering": False}),
        ("error", {}, {"trouble": "disk full", "offering": False}),
        ("draining", {}, {"draining": True, "offering": False}),
        ("draining", {"standing": "drained"}, {}),
        ("revoked", {"standing": "revoked"}, {}),
        ("lost", {"life": "lost", "lost": "silent"}, {}),
        ("idle", {"life": ""}, {}),
    ],
)
def test_a_workers_status(status: str, row: dict[str, str], more: dict[str, object]) -> None:
    assert seen(msgspec.structs.replace(ROW, **row), Heard(heartbeat(**more), NOW - 1)).status == status


def test_a_pull_worker_that_wants_nothing_has_its_reason() -> None:
    pulls = heartbeat(offering=False, about=About(mode="pull"), limited="its load is 9")
    assert seen(ROW, Heard(pulls, NOW - 1)).reason == "it wants no work now: its load is 9"
    assert seen(ROW, Heard(msgspec.structs.replace(pulls, limited=""), NOW - 1)).reason == "it wants no work now"


def test_a_worker_that_is_silent_for_long_is_lost_though_no_scheduler_said_so() -> None:
    assert seen(heard=Heard(heartbeat(), NOW - SILENT)).status == "available"
    assert seen(heard=Heard(heartbeat(), NOW - SILENT - 1)).status == "lost"


def test_what_it_is_chosen_by_and_what_it_said_last_is_shown() -> None:
    shown = seen(heard=Heard(heartbeat(busy=1), NOW - 1), owner=True)
    assert shown.routes == ["linux", "gpu"], "what was given stands for what it says"
    assert seen(msgspec.structs.replace(ROW, tags=[]), Heard(heartbeat(), NOW)).routes == ["linux", "own", "gpu"]
    assert (shown.slots_in_use, shown.build_limit, shown.cache_used, shown.cache_limit) == (1, 2, 5, 10)
    assert shown.last_checked_in == START + timedelta(seconds=99)
    assert (shown.hostname, shown.address) == ("h", "10.0.0.1")


def test_what_it_was_given_since_it_spoke_counts() -> None:
    assert seen(heard=Heard(heartbeat(), NOW), leases=(MINE,)).slots_in_use == 1
    full = seen(heard=Heard(heartbeat(), NOW), leases=(MINE, OTHERS))
    assert (full.slots_in_use, full.status) == (2, "busy")


def test_what_a_revoked_worker_says_it_runs_counts_for_nothing() -> None:
    revoked = msgspec.structs.replace(ROW, standing="revoked")
    assert seen(revoked, Heard(heartbeat(busy=2), NOW)).slots_in_use == 0


def test_other_teams_builds_and_the_machine_are_for_owners_of_the_first_team() -> None:
    shown = seen(heard=Heard(heartbeat(busy=2), NOW), leases=(MINE, OTHERS))
    assert ([build.number for build in shown.running_builds], shown.other_builds) == ([7], 1)
    assert (shown.hostname, shown.address) == ("", "")
    assert [build.number for build in seen(leases=(MINE, OTHERS), owner=True).running_builds] == [7, 3]


def test_only_what_a_worker_signed_in_its_present_boot_is_believed() -> None:
    seed, presence = new_seed(), Presence(lambda: NOW)
    presence.hear("w1", msgspec.msgpack.encode(sign(seed, "presence", msgspec.msgpack.encode(heartbeat(busy=1)))))
    assert presence.of("w1", public_key(seed), "b") == Heard(heartbeat(busy=1), NOW)
    assert presence.of("w1", public_key(new_seed()), "b") is None, "another's key"
    assert presence.of("w1", public_key(seed), "later") is None, "another boot"
    assert presence.of("w2", public_key(seed), "b") is None
    presence.hear("w1", b"\xc1")
    assert presence.of("w1", public_key(seed), "b") is None


def test_of_too_many_workers_the_one_that_was_silent_longest_is_forgotten() -> None:
    seed, presence = new_seed(), Presence(lambda: NOW)
    said = msgspec.msgpack.encode(sign(seed, "presence", msgspec.msgpack.encode(heartbeat())))
    for number in range(MANY):
        presence.hear(f"w{number}", said)
    presence.hear("w0", said)
    presence.hear("new", said)
    heard = [name for name in ("w0", "w1", "w2", "new") if presence.of(name, public_key(seed), "b") is not None]
    assert heard == ["w0", "w2", "new"]


def facts(*events: Event) -> list[Fact]:
    return [
        Fact(
            position=n,
            stream="build-b1",
            version=n,
            event_id=str(n),
            team="main",
            correlation_id="c",
            causation_id="c",
            actor="a",
            recorded_at=START + timedelta(seconds=n),
            event=event,
        )
        for n, event in enumerate(events, 1)
    ]


STEP = RunStep(name="run", config=TaskConfig(run=Run(path="true")))
CREATED = BuildCreated(plan=Plan(stages=[Stage(name="one", steps=[STEP]), Stage(name="two", needs=["one"], steps=[STEP])]))
QUEUED = StageQueued(stage="one", attempt=1, requirements=Requirements(tags=("gpu",)))
DEFERRED = StageDeferred(stage="one", attempt=1, reason="no worker offers tag gpu", refused={"tag gpu": 2})
LEASED = StageLeased(stage="one", attempt=1, worker="w1", boot="b", credit="c", why=[Candidate(worker="w1", load=0.5, missing=3)])
STARTED = StepStarted(stage="one", attempt=1, step="run", worker="w1", report=1)


def one_of(*events: Event) -> Preparation:
    return prepared([], facts(CREATED, *events))[0]


def test_a_stage_waits_for_those_it_needs() -> None:
    (_, two) = prepared([], facts(CREATED, QUEUED))
    assert (two.state, two.needs) == ("blocked", ["one"])


def test_a_build_that_was_not_taken_up_says_so() -> None:
    (stage,) = prepared([BuildStage(name="one")], [])
    assert (stage.state, stage.reason) == ("blocked", "it was not taken up yet")


def test_a_queued_stage_has_the_reason_last_recorded() -> None:
    queued = one_of(QUEUED, DEFERRED)
    assert (queued.state, queued.attempt, queued.reason, queued.refused) == ("queued", 1, "no worker offers tag gpu", {"tag gpu": 2})
    assert queued.since == START + timedelta(seconds=2)


def test_a_leased_stage_has_its_worker_and_why_there() -> None:
    leased = one_of(QUEUED, DEFERRED, LEASED, STARTED)
    assert (leased.state, leased.status, leased.worker, leased.reason, leased.refused) == ("leased", "started", "w1", "", {})
    assert [(why.worker, why.load, why.missing) for why in leased.why] == [("w1", 0.5, 3)]
    assert leased.started_at is not None


def test_a_lost_worker_puts_a_stage_back_and_what_comes_late_of_it_counts_for_nothing() -> None:
    expired = LeaseExpired(stage="one", attempt=1, worker="w1", evidence="worker w1 was silent for 15 s")
    assert one_of(QUEUED, LEASED, STARTED, expired).reason == "worker w1 was silent for 15 s"
    again = one_of(QUEUED, LEASED, STARTED, expired, StageQueued(stage="one", attempt=2, requirements=Requirements()), DEFERRED, LEASED)
    assert (again.state, again.attempt, again.worker, again.reason) == ("queued", 2, "", "")
    assert again.lost == "worker w1 was silent for 15 s"
    assert one_of(QUEUED, LEASED, STARTED, expired).lost == "", "nothing was before the first"


def test_nothing_is_waited_for_when_all_is_over() -> None:
    over = prepared(
        [], facts(CREATED, QUEUED, StageFinished(stage="one", attempt=1, status="failed", error="e"), LEASED, BuildFinished(status="failed"))
    )
    assert [(stage.state, stage.status) for stage in over] == [("over", "failed"), ("over", "pending")]


def test_what_a_scheduler_says_names_only_the_teams_builds() -> None:
    held = SlotsHeld(worker="w1", slots=4, offered=1, own=[Attempt("b7", "main", 1), Attempt("gone", "main", 1)], others=2)
    own = [Attempt("b8", "main", 1)]
    waits = StageWaits(attempt=Attempt("b1", "one", 1), requires=["tag gpu"], ahead=3, more=False, own=own, able=1, holders=[held])
    shown = with_waits(one_of(QUEUED), waits, {"b7": 7, "b8": 8})
    assert (shown.live, shown.ahead, [one.build for one in shown.ahead_builds]) == (True, 3, [8])
    assert [(holder.worker, holder.slots, holder.offered, holder.builds, holder.others) for holder in shown.holders] == [("w1", 4, 1, [7], 2)]
