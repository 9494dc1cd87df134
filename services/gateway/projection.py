"""What people see, folded from the log: teams, tokens, builds (numbered densely within their team, in log order), artifacts, workers, names
of secrets. Pure."""

from collections.abc import Iterable
from datetime import datetime
from typing import Any, Literal, assert_never

import msgspec
from msgspec.structs import replace

from libs.eventlog.projections import Get, Gone, Projection, Table
from proto.api.artifacts import ArtifactKind, TreeRef
from proto.api.builds import BuildStage, BuildStatus, Positions, Step
from proto.envelope import Fact
from proto.events.artifact import ArtifactDeleted, ArtifactExpired, ArtifactLifetimeChanged, ArtifactSealed, LogArchived
from proto.events.base import ArtifactRef
from proto.events.build import (
    BuildCreated,
    BuildFinished,
    StageFinished,
    StageInterrupted,
    StageQueued,
    StepFinished,
    StepProgressed,
    StepStarted,
)
from proto.events.fleet import (
    RegistrationTokenIssued,
    RegistrationTokenUsed,
    WorkerDeleted,
    WorkerDrained,
    WorkerRegistered,
    WorkerResumed,
    WorkerRevoked,
)
from proto.events.lease import LeaseExpired, StageDeferred, StageLeased
from proto.events.request import BuildAbortRequested, BuildRequested
from proto.events.secret import SealingKeyMade, SecretRemoved, SecretSet
from proto.events.team import DEFAULT_POLICY, Role, TeamCreated, TeamPolicySet, TokenIssued
from proto.events.worker import WorkerBooted, WorkerLost
from services.gateway.workers import LeaseRow, WorkerRow, lease_keys, leases_after, of_worker, worker_after

CODE_VERSION = "7"
"""Raised when a row's meaning changes: the tables are then rebuilt from the log."""

CATEGORIES = frozenset({"team", "request", "build", "lease", "artifact", "fleet", "worker", "secret"})

_OF_BUILD = frozenset(
    {BuildCreated, StageQueued, StageDeferred, StageLeased, LeaseExpired, StepStarted, StepProgressed, StepFinished, StageInterrupted, StageFinished}
    | {BuildFinished}
)
"""What is about the build that its stream names: most of all events, and so asked for first."""

StageEvent = StageQueued | StageDeferred | StageLeased | StepStarted | StepProgressed | StepFinished | StageInterrupted | StageFinished


class TeamRow(msgspec.Struct, frozen=True, kw_only=True):
    """`builds` is the highest number given to a build of the team; the rest is its policy (see TeamPolicySet)."""

    name: str
    builds: int = 0
    created_at: datetime
    input_seconds: int = DEFAULT_POLICY.input_seconds
    output_seconds: int = DEFAULT_POLICY.output_seconds
    quota_bytes: int = DEFAULT_POLICY.quota_bytes
    privileged: bool = DEFAULT_POLICY.privileged


class TokenRow(msgspec.Struct, frozen=True, kw_only=True):
    """Whoever shows the token with this SHA-256 acts for `team` in `role`."""

    sha256: str
    token_id: str
    team: str
    role: Role
    description: str = ""


class AttemptLog(msgspec.Struct, frozen=True, kw_only=True):
    """The log of one attempt: who may write it, whether it is over, how many chunks it then holds in all (None: its worker was lost, and
    nobody knows), and the lines of its archive (None: there is none yet)."""

    worker: str = ""
    over: bool = False
    chunks: int | None = None
    archived: int | None = None


class BuildRow(msgspec.Struct, frozen=True, kw_only=True):
    """A build as it is at `position`. `logs` by `attempt_key`."""

    id: str
    team: str
    number: int
    name: str = ""
    status: BuildStatus = "pending"
    percent: int = 0
    error: str = ""
    reason: str = ""
    exit_code: int | None = None
    created_at: datetime
    started_at: datetime | None = None
    finished_at: datetime | None = None
    requested_by: str = ""
    inputs: dict[str, TreeRef] = {}
    outputs: dict[str, TreeRef] = {}
    stages: list[BuildStage] = []
    logs: dict[str, AttemptLog] = {}
    positions: Positions = Positions()
    position: int


class ArtifactRow(msgspec.Struct, frozen=True, kw_only=True):
    """A sealed tree; `expires_at` in unix seconds, 0: never. `gone`: it is a tombstone, and why. `build_number` is 0 for what no build made."""

    id: str
    team: str
    kind: ArtifactKind
    name: str = ""
    digest: str
    size: int
    files: int
    build: str = ""
    build_number: int = 0
    created_at: datetime
    expires_at: int = 0
    pinned: bool = False
    gone: Literal["", "expired", "deleted"] = ""
    position: int


class SecretRow(msgspec.Struct, frozen=True, kw_only=True):
    """A secret that a team has; `id` is `team/name`."""

    id: str
    team: str
    name: str
    version: int
    set_at: datetime
    set_by: str


class SealingKeyRow(msgspec.Struct, frozen=True, kw_only=True):
    """What secrets are sealed to on their way to the schedulers: the public `key`, whose private one is stored as `entry`. There is one row."""

    id: str
    version: int
    entry: str
    key: str


class RevokedKeyRow(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's key that is good for nothing any more, and the last name that it had."""

    key: str
    worker: str


SEALING = "latest"
"""The id of that row."""

TABLES = (
    Table(TeamRow, "teams", "name"),
    Table(TokenRow, "tokens", "sha256"),
    Table(BuildRow, "builds", "id"),
    Table(ArtifactRow, "artifacts", "id"),
    Table(WorkerRow, "workers", "name"),
    Table(RevokedKeyRow, "revoked_keys", "key"),
    Table(LeaseRow, "leases", "key"),
    Table(SecretRow, "secrets", "id"),
    Table(SealingKeyRow, "sealing_keys", "id"),
)


def gateway_projection(tables_sql: str) -> Projection:
    """The projection of the gateway's read models."""
    return Projection(
        name="gateway",
        code_version=CODE_VERSION,
        tables=TABLES,
        tables_sql=tables_sql,
        categories=CATEGORIES,
        project=project,
        keys=keys,
    )


def attempt_key(stage: str, attempt: int) -> str:
    """Names an attempt within its build."""
    return f"{stage}/{attempt}"


def keys(fact: Fact) -> Iterable[tuple[type[Any], str]]:
    """The rows that `project` asks for."""
    if type(fact.event) in _OF_BUILD:
        yield BuildRow, fact.subject_id
        yield from lease_keys(fact)
        return
    match fact.event:
        case TeamCreated():
            yield TeamRow, fact.event.name
        case TeamPolicySet():
            yield TeamRow, fact.team
        case BuildRequested():
            yield TeamRow, fact.team
            yield BuildRow, fact.event.build
        case LogArchived():
            yield BuildRow, fact.event.build
        case ArtifactSealed():
            if fact.event.build:
                yield BuildRow, fact.event.build
        case ArtifactLifetimeChanged() | ArtifactExpired() | ArtifactDeleted():
            yield ArtifactRow, fact.event.artifact
        case WorkerRegistered() | WorkerBooted() | WorkerLost():
            yield WorkerRow, fact.event.worker
        case WorkerDrained() | WorkerResumed() | WorkerRevoked() | WorkerDeleted():
            yield WorkerRow, of_worker(fact)
        case TokenIssued() | BuildAbortRequested() | RegistrationTokenIssued() | RegistrationTokenUsed():
            pass
        case SecretSet() | SecretRemoved() | SealingKeyMade():
            pass
        case _:
            raise TypeError(f"{type(fact.event).__name__} is not projected")


def project(fact: Fact, get: Get) -> Iterable[Any]:
    """The rows that the fact makes or changes, given the rows as they are."""
    event = fact.event
    if type(event) in _OF_BUILD:
        build = get(BuildRow, fact.subject_id)
        if build is not None and fact.position > build.position:
            yield change(build, fact)
            yield from leases_after(fact, build.number, build.stages, get)
        return
    match event:
        case TeamCreated():
            if get(TeamRow, event.name) is None:
                yield TeamRow(name=event.name, created_at=fact.recorded_at)
        case TokenIssued():
            yield TokenRow(sha256=event.sha256, token_id=event.token_id, team=fact.team, role=event.role, description=event.description)
        case TeamPolicySet():
            team = get(TeamRow, fact.team) or TeamRow(name=fact.team, created_at=fact.recorded_at)
            yield replace(
                team,
                input_seconds=event.input_seconds,
                output_seconds=event.output_seconds,
                quota_bytes=event.quota_bytes,
                privileged=event.privileged,
            )
        case BuildRequested():
            team = get(TeamRow, fact.team) or TeamRow(name=fact.team, created_at=fact.recorded_at)
            if get(BuildRow, event.build) is None:
                number = team.builds + 1
                yield replace(team, builds=number)
                yield _requested(fact, event, number)
        case ArtifactSealed():
            build = get(BuildRow, event.build) if event.build else None
            yield _artifact(fact, event, build.number if build is not None else 0)
        case ArtifactLifetimeChanged() | ArtifactExpired() | ArtifactDeleted():
            artifact = get(ArtifactRow, event.artifact)
            if artifact is not None:
                yield _living(artifact, event)
        case WorkerRegistered() | WorkerBooted() | WorkerLost():
            if worker := worker_after(get(WorkerRow, event.worker), fact):
                yield worker
        case WorkerDrained() | WorkerResumed() | WorkerRevoked() | WorkerDeleted():
            if worker := worker_after(get(WorkerRow, of_worker(fact)), fact):
                yield worker
                if isinstance(event, WorkerRevoked):
                    yield RevokedKeyRow(key=worker.key, worker=worker.name)
        case SecretSet():
            id_ = f"{fact.team}/{event.name}"
            yield SecretRow(id=id_, team=fact.team, name=event.name, version=event.version, set_at=fact.recorded_at, set_by=event.by)
        case SecretRemoved():
            yield Gone(SecretRow, f"{fact.team}/{event.name}")
        case SealingKeyMade():
            yield SealingKeyRow(id=SEALING, version=event.version, entry=event.entry, key=event.key)
        case BuildAbortRequested() | RegistrationTokenIssued() | RegistrationTokenUsed():
            pass
        case LogArchived():
            build = get(BuildRow, event.build)
            if build is not None and fact.position > build.position:
                yield change(build, fact)
        case _:
            raise TypeError(f"{type(event).__name__} is not projected")


def _requested(fact: Fact, event: BuildRequested, number: int) -> BuildRow:
    return BuildRow(
        id=event.build,
        team=fact.team,
        number=number,
        name=event.name,
        created_at=fact.recorded_at,
        requested_by=fact.actor,
        inputs=_trees(event.inputs),
        stages=[BuildStage(name=stage.name, steps=[Step(name=step.name) for step in stage.steps]) for stage in event.plan.stages],
        positions=Positions(status=fact.position, percent=fact.position, error=fact.position),
        position=fact.position,
    )


def _artifact(fact: Fact, event: ArtifactSealed, build_number: int) -> ArtifactRow:
    return ArtifactRow(
        id=event.artifact,
        team=fact.team,
        kind="part" if event.part else event.kind,
        name=event.name,
        digest=event.digest,
        size=event.size,
        files=event.files,
        build=event.build,
        build_number=build_number,
        created_at=fact.recorded_at,
        expires_at=event.expires_at,
        pinned=event.pinned,
        position=fact.position,
    )


def _living(artifact: ArtifactRow, event: ArtifactLifetimeChanged | ArtifactExpired | ArtifactDeleted) -> ArtifactRow:
    match event:
        case ArtifactLifetimeChanged():
            return replace(artifact, expires_at=event.expires_at, pinned=event.pinned)
        case ArtifactExpired():
            return replace(artifact, gone="expired")
        case ArtifactDeleted():
            return replace(artifact, gone="deleted")
        case _:
            assert_never(event)


def change(build: BuildRow, fact: Fact) -> BuildRow:
    """The build after a fact about it."""
    changed = _apply(build, fact)
    percent = 100 if changed.status == "succeeded" else _percent(changed.stages)
    reason = next((stage.reason for stage in changed.stages if stage.reason), "") if changed.finished_at is None else ""
    positions, at = build.positions, fact.position
    if (changed.status, percent, changed.error) != (build.status, build.percent, build.error):
        positions = Positions(
            status=positions.status if changed.status == build.status else at,
            percent=positions.percent if percent == build.percent else at,
            error=positions.error if changed.error == build.error else at,
        )
    return replace(changed, percent=percent, reason=reason, positions=positions, position=at)


def _apply(build: BuildRow, fact: Fact) -> BuildRow:
    match fact.event:
        case BuildCreated() | LeaseExpired():
            return build
        case LogArchived(stage=stage, attempt=attempt, lines=lines):
            return _log(build, stage, attempt, archived=lines)
        case BuildFinished(status=status, error=error):
            why = _text(error) or ("" if status == "succeeded" else build.error)
            return replace(build, status=status, error=why, finished_at=fact.recorded_at, exit_code=_exit_code(build.stages))
        case (
            StageQueued() | StageDeferred() | StageLeased() | StepStarted() | StepProgressed() | StepFinished() | StageInterrupted() | StageFinished()
        ) as event:
            current = [s.attempt for s in build.stages if s.name == event.stage]
            if not isinstance(event, StageQueued) and event.attempt not in current:
                return build
            build = replace(build, stages=[_stage_after(s, event) if s.name == event.stage else s for s in build.stages])
            return _build_after(build, event, fact)
        case _:
            raise TypeError(f"{type(fact.event).__name__} is not about a build")


def _stage_after(stage: BuildStage, event: StageEvent) -> BuildStage:
    match event:
        case StageQueued():
            return BuildStage(name=stage.name, attempt=event.attempt, steps=[Step(name=step.name) for step in stage.steps])
        case StageDeferred():
            return replace(stage, reason=_text(event.reason))
        case StageLeased():
            return replace(stage, worker=event.worker, reason="")
        case StepStarted():
            stage = replace(stage, status="started", worker=event.worker, sandbox=event.sandbox, reason="")
            return _step(stage, event.step, status="started", image=_text(event.image), reference=_text(event.reference))
        case StepProgressed():
            return _step(stage, event.step, percent=event.percent)
        case StepFinished():
            done = {"percent": 100} if event.status == "succeeded" else {}
            return _step(stage, event.step, status=event.status, exit_code=event.exit_code, error=_text(event.error), **done)
        case StageInterrupted():
            return replace(stage, error=_text(event.error))
        case StageFinished():
            error = _text(event.error) or ("" if event.status == "succeeded" else stage.error)
            return replace(stage, status=event.status, error=error, worker=event.worker or stage.worker, reason="")
        case _:
            assert_never(event)


def _build_after(build: BuildRow, event: StageEvent, fact: Fact) -> BuildRow:
    match event:
        case StageLeased():
            return _log(build, event.stage, event.attempt, worker=event.worker)
        case StepStarted():
            return replace(build, status="started", started_at=build.started_at or fact.recorded_at)
        case StepFinished():
            return replace(build, outputs=build.outputs | _trees(event.outputs), error=build.error or _text(event.error))
        case StageFinished():
            chunks = 0 if event.log is None else event.log.chunks if event.log.chunks >= 0 else None
            build = _log(build, event.stage, event.attempt, over=True, chunks=chunks)
            return replace(build, error=build.error or _text(event.error))
        case _:
            return build


def _step(stage: BuildStage, name: str, **changes: Any) -> BuildStage:
    return replace(stage, steps=[replace(s, **changes) if s.name == name else s for s in stage.steps])


def _log(build: BuildRow, stage: str, attempt: int, **changes: Any) -> BuildRow:
    key = attempt_key(stage, attempt)
    return replace(build, logs=build.logs | {key: replace(build.logs.get(key, AttemptLog()), **changes)})


def _percent(stages: list[BuildStage]) -> int:
    steps = [step.percent for stage in stages for step in stage.steps]
    return sum(steps) // len(steps) if steps else 0


def _exit_code(stages: list[BuildStage]) -> int | None:
    steps = [step for stage in stages for step in stage.steps if step.status not in ("pending", "started")]
    failed = [step for step in steps if step.status != "succeeded"]
    return failed[0].exit_code if failed else steps[-1].exit_code if steps else None


def _trees(refs: dict[str, ArtifactRef]) -> dict[str, TreeRef]:
    return {name: TreeRef(id=ref.id, digest=ref.digest, size=ref.size, files=ref.files) for name, ref in refs.items()}


def _text(text: str) -> str:
    """Postgres text holds no NUL; a worker's words may."""
    return text.replace("\0", "\ufffd")
