"""What people see, folded from the log; every history is delivered once and twice."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from libs.eventlog.projections import Gone
from proto.api.builds import Positions
from proto.envelope import Fact
from proto.events.artifact import ArtifactDeleted, ArtifactExpired, ArtifactLifetimeChanged, ArtifactSealed, LogArchived
from proto.events.base import ArtifactRef, Event
from proto.events.build import (
    BuildCreated,
    BuildFinished,
    LogExtent,
    StageFinished,
    StageInterrupted,
    StageQueued,
    StepFinished,
    StepProgressed,
    StepStarted,
)
from proto.events.fleet import WorkerDeleted, WorkerDrained, WorkerRegistered, WorkerResumed, WorkerRevoked
from proto.events.lease import LeaseExpired, StageDeferred, StageLeased
from proto.events.request import BuildAbortRequested, BuildRequested
from proto.events.team import DEFAULT_POLICY, TeamCreated, TeamPolicySet, TokenIssued
from proto.events.worker import WorkerBooted, WorkerLost
from proto.messages import About, Offers
from proto.plan import Plan, Requirements, Run, RunStep, Stage, TaskConfig
from services.gateway.projection import TABLES, ArtifactRow, AttemptLog, BuildRow, TeamRow, TokenRow, keys, project
from services.gateway.views import artifact_view, build_view, policy_view
from services.gateway.workers import LeaseRow, WorkerRow

START = datetime(2026, 11, 22, tzinfo=UTC)
KEYS = {table.row: table.key for table in TABLES}


class Rows:
    """The projection over rows in memory; `deliveries` of each batch."""

    def __init__(self, deliveries: int) -> None:
        self.deliveries = deliveries
        self.rows: dict[tuple[type, str], object] = {}
        self.position = 0

    def given(self, *events: tuple[str, Event], team: str = "main") -> "Rows":
        facts = []
        for stream, event in events:
            self.position += 1
            facts.append(
                Fact(
                    position=self.position,
                    stream=stream,
                    version=1,
                    event_id=str(self.position),
                    team=team,
                    correlation_id="c",
                    causation_id="c",
                    actor="token:k1",
                    recorded_at=START + timedelta(seconds=self.position),
                    event=event,
                )
            )
        for _ in range(self.deliveries):
            for fact in facts:
                allowed = set(keys(fact))

                def get(row: type, key: str, /, allowed: set = allowed) -> object:
                    assert (row, key) in allowed
                    return self.rows.get((row, key))

                for row in list(project(fact, get)):  # type: ignore[arg-type]
                    if isinstance(row, Gone):
                        self.rows.pop((row.row, row.key), None)
                    else:
                        self.rows[(type(row), getattr(row, KEYS[type(row)]))] = row
        return self

    def build(self, build: str = "b1") -> BuildRow:
        row = self.rows[(BuildRow, build)]
        assert isinstance(row, BuildRow)
        return row


@pytest.fixture(params=[1, 2])
def rows(request) -> Rows:
    return Rows(request.param)


def plan(*stages: tuple[str, Sequence[str]]) -> Plan:
    config = TaskConfig(run=Run(path="true"))
    return Plan(stages=[Stage(name=name, steps=[RunStep(name=step, config=config) for step in steps]) for name, steps in stages])


SRC = ArtifactRef(id="a", digest="d", size=1, files=1)
REQUESTED = BuildRequested(build="b1", plan=plan(("main", ["one", "two"])), inputs={"src": SRC}, name="n")
QUEUED = StageQueued(stage="main", attempt=1, requirements=Requirements())
LEASED = StageLeased(stage="main", attempt=1, worker="w1", boot="b", credit="c")


def started(step: str = "one", attempt: int = 1) -> StepStarted:
    return StepStarted(stage="main", attempt=attempt, step=step, worker="w1", sandbox="bwrap")


def ended(step: str = "one", status: str = "succeeded", code: int | None = 0, error: str = "", **outputs: ArtifactRef) -> StepFinished:
    return StepFinished(stage="main", attempt=1, step=step, status=status, exit_code=code, error=error, outputs=outputs)  # type: ignore[arg-type]


def of_build(*events: Event) -> list[tuple[str, Event]]:
    return [("lease-b1" if isinstance(event, StageLeased | StageDeferred | LeaseExpired) else "build-b1", event) for event in events]


def test_builds_are_numbered_densely_within_their_team_in_log_order(rows: Rows) -> None:
    rows.given(("team-main", TeamCreated(name="main")))
    for number in range(3):
        rows.given((f"request-{number}", BuildRequested(build=f"b{number}", plan=REQUESTED.plan)))
        rows.given((f"request-o{number}", BuildRequested(build=f"o{number}", plan=REQUESTED.plan)), team="other")
    assert [rows.build(f"b{n}").number for n in range(3)] == [1, 2, 3]
    assert [rows.build(f"o{n}").number for n in range(3)] == [1, 2, 3]
    team = rows.rows[(TeamRow, "main")]
    assert isinstance(team, TeamRow)
    assert team.builds == 3


def test_a_requested_build_is_pending_with_its_stages(rows: Rows) -> None:
    build = rows.given(("request-1", REQUESTED)).build()
    assert (build.status, build.percent, build.name, build.requested_by) == ("pending", 0, "n", "token:k1")
    assert build.inputs["src"].digest == "d"
    assert [(s.name, s.status, [step.name for step in s.steps]) for s in build.stages] == [("main", "pending", ["one", "two"])]
    assert build.positions == Positions(status=1, percent=1, error=1)


def test_a_build_succeeds(rows: Rows) -> None:
    rows.given(("request-1", REQUESTED), *of_build(BuildCreated(plan=REQUESTED.plan, inputs={}), QUEUED, LEASED, started()))
    assert (rows.build().status, rows.build().stages[0].worker, rows.build().stages[0].sandbox) == ("started", "w1", "bwrap")
    at = rows.position
    rows.given(*of_build(StepProgressed(stage="main", attempt=1, step="one", percent=50)))
    assert rows.build().percent == 25
    assert rows.build().positions == Positions(status=at, percent=at + 1, error=1)
    dist = ArtifactRef(id="o", digest="d2")
    rows.given(*of_build(ended(dist=dist), started("two"), ended("two")))
    rows.given(*of_build(StageFinished(stage="main", attempt=1, status="succeeded", worker="w1", log=LogExtent(chunks=2, lines=9))))
    rows.given(*of_build(BuildFinished(status="succeeded")))
    build = rows.build()
    assert (build.status, build.percent, build.error, build.exit_code) == ("succeeded", 100, "", 0)
    assert build.outputs["dist"].id == "o"
    assert build.logs == {"main/1": AttemptLog(worker="w1", over=True, chunks=2)}
    assert build.started_at is not None
    assert build.finished_at == START + timedelta(seconds=rows.position)


def test_a_failure_says_which_step_and_why(rows: Rows) -> None:
    rows.given(("request-1", REQUESTED), *of_build(QUEUED, LEASED, started(), ended(status="failed", code=7, error="exit 7")))
    rows.given(*of_build(StageFinished(stage="main", attempt=1, status="failed"), BuildFinished(status="failed")))
    build = rows.build()
    assert (build.status, build.exit_code, build.error, build.percent) == ("failed", 7, "exit 7", 0)
    assert [step.status for step in build.stages[0].steps] == ["failed", "pending"]
    assert build.logs["main/1"].chunks == 0


def test_of_a_lost_worker_nobody_knows_how_much_log_there_is(rows: Rows) -> None:
    rows.given(("request-1", REQUESTED), *of_build(QUEUED, LEASED, started()))
    rows.given(*of_build(StageFinished(stage="main", attempt=1, status="errored", log=LogExtent(chunks=-1)), BuildFinished(status="errored")))
    assert rows.build().logs["main/1"] == AttemptLog(worker="w1", over=True, chunks=None)


def test_why_a_build_waits_is_said_until_it_is_placed(rows: Rows) -> None:
    rows.given(("request-1", REQUESTED), *of_build(QUEUED, StageDeferred(stage="main", attempt=1, reason="no worker")))
    assert rows.build().reason == rows.build().stages[0].reason == "no worker"
    rows.given(*of_build(LEASED))
    assert rows.build().reason == ""
    rows.given(*of_build(LeaseExpired(stage="main", attempt=1, worker="w1", evidence="silent")))
    rows.given(*of_build(StageQueued(stage="main", attempt=2, requirements=Requirements())))
    rows.given(*of_build(StageDeferred(stage="main", attempt=1, reason="stale")))
    assert rows.build().reason == ""


def test_another_attempt_starts_afresh_and_an_earlier_one_changes_nothing(rows: Rows) -> None:
    rows.given(("request-1", REQUESTED), *of_build(QUEUED, LEASED, started(), ended()))
    assert rows.build().percent == 50
    rows.given(*of_build(StageQueued(stage="main", attempt=2, requirements=Requirements())))
    stage = rows.build().stages[0]
    assert (stage.attempt, stage.worker, stage.status, rows.build().percent) == (2, "", "pending", 0)
    rows.given(*of_build(started(), ended("two", "failed", 1)))
    assert rows.build().stages[0] == stage


def test_an_interrupted_stage_says_why(rows: Rows) -> None:
    rows.given(("request-1", REQUESTED), *of_build(QUEUED, LEASED, started()), ("request-abort-b1", BuildAbortRequested(build="b1")))
    rows.given(*of_build(StageInterrupted(stage="main", attempt=1, reason="timeout", error="longer than 5 s")))
    rows.given(*of_build(StageFinished(stage="main", attempt=1, status="failed"), BuildFinished(status="failed", error="longer than 5 s")))
    assert rows.build().stages[0].error == rows.build().error == "longer than 5 s"


def test_an_archived_log_is_known(rows: Rows) -> None:
    rows.given(("request-1", REQUESTED), *of_build(QUEUED, LEASED))
    archived = LogArchived(build="b1", stage="main", attempt=1, archive=1, digest="d", chunks=2, lines=9, bytes=80)
    rows.given(("artifact-log-b1-main-1", archived))
    assert rows.build().logs["main/1"] == AttemptLog(worker="w1", archived=9)


def test_artifacts_and_tokens_are_kept(rows: Rows) -> None:
    rows.given(("artifact-a1", ArtifactSealed(artifact="a1", kind="user", digest="d", size=5, files=2, name="src", expires_at=60)))
    rows.given(("team-main", TokenIssued(token_id="k", sha256="ff", role="viewer", description="ci")))
    artifact = rows.rows[(ArtifactRow, "a1")]
    assert isinstance(artifact, ArtifactRow)
    assert artifact_view(artifact).expires_at == datetime(1970, 1, 1, 0, 1, tzinfo=UTC)
    token = rows.rows[(TokenRow, "ff")]
    assert isinstance(token, TokenRow)
    assert (token.team, token.role) == ("main", "viewer")


def artifact_of(rows: Rows, artifact: str = "a1") -> ArtifactRow:
    row = rows.rows[(ArtifactRow, artifact)]
    assert isinstance(row, ArtifactRow)
    return row


def test_an_output_knows_its_build_by_number(rows: Rows) -> None:
    sealed = ArtifactSealed(artifact="a1", kind="output", digest="d", size=5, files=2, name="dist", build="b1")
    rows.given(("request-1", REQUESTED), ("artifact-a1", sealed))
    view = artifact_view(artifact_of(rows))
    assert (view.kind, view.build, view.build_id, view.expires_at) == ("output", 1, "b1", None)
    rows.given(("artifact-a2", msgspec.structs.replace(sealed, artifact="a2", build="unknown")))
    assert artifact_view(artifact_of(rows, "a2")).build is None


def test_an_artifact_lives_until_it_has_a_tombstone(rows: Rows) -> None:
    for name in ("a1", "a2"):
        rows.given((f"artifact-{name}", ArtifactSealed(artifact=name, kind="user", digest="d", size=5, files=2, expires_at=60)))
    assert artifact_of(rows).gone == ""
    rows.given(("artifact-a1", ArtifactLifetimeChanged(artifact="a1", expires_at=60, pinned=True)))
    assert (artifact_view(artifact_of(rows)).expires_at, artifact_view(artifact_of(rows)).pinned) == (None, True)
    rows.given(("artifact-a1", ArtifactLifetimeChanged(artifact="a1", expires_at=0, pinned=False)))
    assert artifact_view(artifact_of(rows)).expires_at is None
    rows.given(("artifact-a1", ArtifactDeleted(artifact="a1")), ("artifact-a2", ArtifactExpired(artifact="a2")))
    assert [artifact_of(rows, name).gone for name in ("a1", "a2")] == ["deleted", "expired"]
    rows.given(("artifact-a3", ArtifactExpired(artifact="a3")))
    assert (ArtifactRow, "a3") not in rows.rows


def test_a_team_has_a_policy(rows: Rows) -> None:
    rows.given(("team-main", TeamCreated(name="main")), ("request-1", REQUESTED))

    def policy() -> tuple[int, int, int]:
        row = rows.rows[(TeamRow, "main")]
        assert isinstance(row, TeamRow)
        view = policy_view(row)
        return view.input_seconds, view.output_seconds, view.quota_bytes

    assert policy() == (DEFAULT_POLICY.input_seconds, DEFAULT_POLICY.output_seconds, 0)
    rows.given(("team-main", TeamPolicySet(input_seconds=1, output_seconds=2, quota_bytes=3)), ("request-2", REQUESTED))
    assert policy() == (1, 2, 3)
    assert policy_view(None).input_seconds == DEFAULT_POLICY.input_seconds


def test_what_is_about_an_unknown_build_is_nothing(rows: Rows) -> None:
    rows.given(*of_build(QUEUED, LEASED, BuildFinished(status="errored")))
    assert rows.rows == {}


def test_a_nul_in_a_workers_words_does_not_stop_the_projection(rows: Rows) -> None:
    rows.given(("request-1", REQUESTED), *of_build(QUEUED, LEASED, started(), ended(status="errored", code=None, error="a\0b")))
    assert rows.build().error == "a\ufffdb"


def test_a_view_carries_a_url(rows: Rows) -> None:
    build = rows.given(("request-1", REQUESTED)).build()
    assert build_view(build, "http://h:1").url == "http://h:1/api/v1/teams/main/builds/1"


def test_a_history_read_in_any_batches_gives_the_same_rows() -> None:
    history = [
        ("request-1", REQUESTED),
        *of_build(QUEUED, LEASED, started(), ended(), started("two"), ended("two"), BuildFinished(status="succeeded")),
    ]
    make: Callable[[], Rows] = lambda: Rows(1)  # noqa: E731
    at_once = make().given(*history)
    one_by_one = make()
    for event in history:
        one_by_one.given(event)
    assert at_once.rows == one_by_one.rows


REGISTERED = ("fleet-worker-w1", WorkerRegistered(worker="w1", key="k", tags=("gpu",), token_id="t1"))
BOOTED = ("worker-w1-x", WorkerBooted(worker="w1", boot="x", since=1, slots=2, offers=Offers(tags=("own",)), about=About(version="1", mode="pull")))


def worker(rows: Rows) -> WorkerRow:
    row = rows.rows[(WorkerRow, "w1")]
    assert isinstance(row, WorkerRow)
    return row


def leases(rows: Rows) -> list[str]:
    return [row.worker for row in rows.rows.values() if isinstance(row, LeaseRow)]


def test_a_worker_is_registered_boots_drains_and_is_lost(rows):
    rows.given(REGISTERED)
    assert (worker(rows).standing, worker(rows).life, worker(rows).tags) == ("registered", "", ["gpu"])
    rows.given(BOOTED)
    assert (worker(rows).life, worker(rows).slots, worker(rows).about.mode) == ("up", 2, "pull")
    rows.given(("fleet-worker-w1", WorkerDrained(reason="a new disk")))
    assert (worker(rows).standing, worker(rows).reason) == ("drained", "a new disk")
    rows.given(("fleet-worker-w1", WorkerResumed()), ("worker-w1-old", WorkerLost(worker="w1", boot="old", reason="silent")))
    assert (worker(rows).standing, worker(rows).life) == ("registered", "up"), "an earlier life ended"
    rows.given(("worker-w1-x", WorkerLost(worker="w1", boot="x", reason="silent")))
    assert (worker(rows).life, worker(rows).lost) == ("lost", "silent")
    rows.given(("fleet-worker-w1", WorkerRevoked(reason="stolen")), ("fleet-worker-w1", WorkerDeleted()))
    assert worker(rows).standing == "deleted"
    rows.given(("fleet-worker-w1", WorkerRegistered(worker="w1", key="other")))
    assert (worker(rows).standing, worker(rows).life, worker(rows).key) == ("registered", "", "other"), "another worker of the same name"


def test_an_older_boot_that_is_recorded_later_is_not_the_worker_s(rows):
    older, newer = (
        ("worker-w1-" + boot, WorkerBooted(worker="w1", boot=boot, since=since, slots=since, offers=Offers())) for boot, since in (("z", 1), ("a", 2))
    )
    rows.given(REGISTERED, older, newer, older)
    assert (worker(rows).boot, worker(rows).slots) == ("a", 2)
    rows.given(("worker-w1-a", WorkerLost(worker="w1", boot="a", reason="silent")), ("fleet-worker-w1", WorkerDeleted()), REGISTERED, older)
    assert (worker(rows).boot, worker(rows).life) == ("z", "up"), "registered again, it begins anew"


def test_a_lease_is_its_workers_until_its_attempt_is_over(rows):
    leased = ("lease-b1", StageLeased(stage="main", attempt=1, worker="w1", boot="x", credit="c"))
    rows.given(BOOTED, ("request-k", REQUESTED), ("build-b1", StageQueued(stage="main", attempt=1, requirements=Requirements())), leased)
    assert leases(rows) == ["w1"] and worker(rows).build_started_at is not None and worker(rows).build_finished_at is None
    rows.given(("build-b1", StageFinished(stage="main", attempt=1, status="succeeded", worker="w1")))
    assert leases(rows) == [] and worker(rows).build_finished_at is not None


def test_a_lease_that_expires_is_nobodys_and_the_next_attempts_is_anothers(rows):
    queued = [("build-b1", StageQueued(stage="main", attempt=n, requirements=Requirements())) for n in (1, 2)]
    leased = [("lease-b1", StageLeased(stage="main", attempt=n, worker=f"w{n}", boot="x", credit="c")) for n in (1, 2)]
    rows.given(("request-k", REQUESTED), queued[0], leased[0], ("lease-b1", LeaseExpired(stage="main", attempt=1, worker="w1", evidence="silent")))
    assert leases(rows) == []
    rows.given(queued[1], leased[0])
    assert leases(rows) == [], "it is not the current attempt"
    rows.given(leased[1])
    assert leases(rows) == ["w2"]


def test_a_lease_that_comes_after_the_end_of_its_attempt_is_none(rows):
    """It was aborted while the scheduler placed it: nothing would ever end such a lease."""
    rows.given(
        ("request-k", REQUESTED),
        ("build-b1", StageQueued(stage="main", attempt=1, requirements=Requirements())),
        ("build-b1", StageFinished(stage="main", attempt=1, status="aborted")),
        ("lease-b1", StageLeased(stage="main", attempt=1, worker="w1", boot="x", credit="c")),
    )
    assert leases(rows) == []
