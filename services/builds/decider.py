"""The build aggregate: what a build is, what may happen to it, and what follows (the life of an attempt is decided here alone).

           StageQueued                 StepStarted               StageFinished
(needed) ──────────────▶ queued ──────────────────▶ running ──────────────────▶ over
                           ▲  │ LoseAttempt            │  │ AbortBuild, TimeOutStep
                           └──┘ (attempt + 1) ◀────────┘  ▼
                                                    interrupted ─── StageFinished ──▶ over
"""

from collections.abc import Mapping, Sequence
from typing import Literal, assert_never

import msgspec
from msgspec.structs import replace

from libs.runtime.decisions import Early, Refused
from proto.events.base import ArtifactRef, Event, Status
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
from proto.messages import ReportBody, ReportStageFinished, ReportStepFinished, ReportStepProgressed, ReportStepStarted
from proto.plan import Stage, requirements_of
from services.builds.commands import AbortBuild, Command, CreateBuild, LoseAttempt, RecordReports, TimeOutStep

UNLOGGED_ATTEMPTS = 10
"""Attempts that never started a step cannot have run twice: they are retried this often whatever the stage's own limit."""

_WORST: tuple[Status, ...] = ("aborted", "errored", "failed", "succeeded")


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """The latest attempt of a stage. `step` is the one that runs, `reported` the number of the last report recorded, `percents` each step's
    progress."""

    number: int
    phase: Literal["queued", "running", "interrupted", "over"] = "queued"
    worker: str = ""
    step: str = ""
    reported: int = 0
    interruption: StageInterrupted | None = None
    percents: Mapping[str, int] = {}


class StageState(msgspec.Struct, frozen=True, kw_only=True):
    """A stage: unqueued (no attempt), under way, or over with a status."""

    plan: Stage
    attempt: Attempt | None = None
    status: Status | None = None
    outputs: Mapping[str, ArtifactRef] = {}


class NoBuild(msgspec.Struct, frozen=True):
    """Nothing has been requested yet."""


class Build(msgspec.Struct, frozen=True, kw_only=True):
    """A build under way, or over with a status."""

    inputs: Mapping[str, ArtifactRef]
    stages: Mapping[str, StageState]
    aborting: bool = False
    status: Status | None = None


State = NoBuild | Build


class BuildDecider:
    """Stream `build-<build>`."""

    initial: State = NoBuild()

    def stream(self, command: Command, /) -> str:
        return f"build-{command.build}"

    def decide(self, command: Command, state: State, /) -> Sequence[Event]:
        if isinstance(state, NoBuild):
            match command:
                case CreateBuild():
                    return _create(command)
                case RecordReports():
                    raise Refused("unknown", "a report on a build that does not exist")
                case AbortBuild() | LoseAttempt() | TimeOutStep():
                    raise Early
                case _:
                    assert_never(command)
        match command:
            case CreateBuild():
                return []
            case RecordReports():
                return _record(command, state)
            case AbortBuild():
                return _abort(state) if state.status is None else []
            case LoseAttempt():
                return _lose(command, state) if state.status is None else []
            case TimeOutStep():
                return _time_out(command, state) if state.status is None else []
            case _:
                assert_never(command)

    def evolve(self, state: State, event: Event, /) -> State:
        return evolve(state, event)


def evolve(state: State, event: Event) -> State:
    """The state after an event."""
    if isinstance(event, BuildCreated):
        return Build(inputs=event.inputs, stages={stage.name: StageState(plan=stage) for stage in event.plan.stages})
    if isinstance(state, NoBuild):
        raise ValueError(f"{type(event).__name__} on a build that was not created")
    match event:
        case StageQueued():
            return _with_stage(state, event.stage, attempt=Attempt(number=event.attempt))
        case StepStarted():
            attempt = _attempt(state, event.stage)
            phase: Literal["running", "interrupted"] = "interrupted" if attempt.phase == "interrupted" else "running"
            return _with_stage(state, event.stage, attempt=replace(attempt, phase=phase, worker=event.worker, step=event.step, reported=event.report))
        case StepProgressed():
            attempt = _attempt(state, event.stage)
            percents = {**attempt.percents, event.step: event.percent}
            return _with_stage(state, event.stage, attempt=replace(attempt, percents=percents, reported=event.report))
        case StepFinished():
            stage = state.stages[event.stage]
            attempt = replace(_attempt(state, event.stage), step="", reported=event.report)
            return _with_stage(state, event.stage, attempt=attempt, outputs={**stage.outputs, **event.outputs})
        case StageInterrupted():
            attempt = replace(_attempt(state, event.stage), phase="interrupted", interruption=event)
            aborting = state.aborting or event.reason == "aborted"
            return replace(_with_stage(state, event.stage, attempt=attempt), aborting=aborting)
        case StageFinished():
            attempt = _attempt(state, event.stage)
            attempt = replace(attempt, phase="over", reported=max(attempt.reported, event.report))
            aborting = state.aborting or event.status == "aborted"
            return replace(_with_stage(state, event.stage, attempt=attempt, status=event.status), aborting=aborting)
        case BuildFinished():
            return replace(state, status=event.status)
        case _:
            raise ValueError(f"{type(event).__name__} on a build's stream")


def _with_stage(build: Build, name: str, **changes: object) -> Build:
    return replace(build, stages={**build.stages, name: replace(build.stages[name], **changes)})


def _attempt(build: Build, stage: str) -> Attempt:
    attempt = build.stages[stage].attempt
    assert attempt is not None
    return attempt


def _create(command: CreateBuild) -> list[Event]:
    created = BuildCreated(plan=command.plan, inputs=command.inputs, name=command.name)
    return [created, *_what_follows(evolve(NoBuild(), created))]


def _abort(build: Build) -> list[Event]:
    events: list[Event] = []
    for name, stage in build.stages.items():
        match stage.attempt:
            case Attempt(phase="running", number=number):
                events.append(StageInterrupted(stage=name, attempt=number, reason="aborted"))
            case Attempt(phase="queued", number=number):
                events.append(StageFinished(stage=name, attempt=number, status="aborted"))
            case _:
                pass
    return [*events, *_what_follows(_fold(build, events))]


def _time_out(command: TimeOutStep, build: Build) -> list[Event]:
    stage = build.stages.get(command.stage)
    attempt = stage.attempt if stage else None
    if stage is None or attempt is None or attempt.phase != "running" or (attempt.number, attempt.step) != (command.attempt, command.step):
        return []
    seconds = next((step.timeout for step in stage.plan.steps if step.name == command.step), 0)
    error = f"step `{command.step}` was interrupted: its timeout of {seconds} s is up"
    return [StageInterrupted(stage=command.stage, attempt=command.attempt, reason="timeout", error=error)]


def _lose(command: LoseAttempt, build: Build) -> list[Event]:
    stage = build.stages.get(command.stage)
    attempt = stage.attempt if stage else None
    if stage is None or attempt is None or attempt.number != command.attempt or attempt.phase == "over":
        return []
    started = attempt.phase != "queued"
    limit = stage.plan.max_attempts if started else UNLOGGED_ATTEMPTS
    events: list[Event]
    if attempt.interruption is None and not build.aborting and attempt.number < limit:
        return [_queued(build, stage, attempt.number + 1)]
    log = LogExtent(chunks=-1) if started else None
    if attempt.interruption is not None:
        status, error = _interrupted(attempt.interruption)
    else:
        status, error = "errored", f"the worker was lost ({command.evidence}) on attempt {attempt.number} of at most {limit}"
    events = [StageFinished(stage=command.stage, attempt=attempt.number, status=status, error=error, worker=attempt.worker, log=log)]
    return [*events, *_what_follows(_fold(build, events))]


def _record(command: RecordReports, build: Build) -> list[Event]:
    stage = build.stages.get(command.stage)
    if stage is None or stage.attempt is None or command.attempt > stage.attempt.number:
        raise Refused("unknown", "a report on an attempt that does not exist")
    attempt = stage.attempt
    if command.worker != (attempt.worker or command.leased_to):
        raise Refused("foreign", f"a report by {command.worker} on an attempt that is not its own")
    if command.attempt == attempt.number and command.first + len(command.bodies) - 1 <= attempt.reported:
        return []
    if command.attempt < attempt.number or attempt.phase == "over" or build.status is not None:
        raise Refused("stale", f"a report on attempt {command.attempt} of stage {command.stage}, which is over")
    if command.first > attempt.reported + 1:
        raise Early
    events: list[Event] = []
    now = build
    for number, body in enumerate(command.bodies, start=command.first):
        if number <= attempt.reported or _attempt(now, command.stage).phase == "over":
            continue
        new = _reported(command, now, number, body)
        events += new
        now = _fold(now, new)
    return events


def _reported(command: RecordReports, build: Build, number: int, body: ReportBody) -> list[Event]:
    name, attempt = command.stage, _attempt(build, command.stage)
    steps = {step.name: step for step in build.stages[name].plan.steps}
    if not isinstance(body, ReportStageFinished) and body.step not in steps:
        raise Refused("unknown", f"a report on a step `{body.step}` that stage {name} does not have")
    match body:
        case ReportStepStarted():
            timeout = steps[body.step].timeout
            return [
                StepStarted(
                    stage=name,
                    attempt=attempt.number,
                    step=body.step,
                    worker=command.worker,
                    sandbox=body.sandbox,
                    image=body.image,
                    reference=body.reference,
                    timeout=timeout,
                    report=number,
                )
            ]
        case ReportStepProgressed():
            percent = max(attempt.percents.get(body.step, 0), min(100, max(0, body.percent)))
            return [StepProgressed(stage=name, attempt=attempt.number, step=body.step, percent=percent, report=number)]
        case ReportStepFinished():
            return [
                StepFinished(
                    stage=name,
                    attempt=attempt.number,
                    step=body.step,
                    status=body.status,
                    exit_code=body.exit_code,
                    error=body.error,
                    outputs=body.outputs,
                    report=number,
                )
            ]
        case ReportStageFinished():
            log = LogExtent(chunks=body.chunks, lines=body.lines, bytes=body.bytes, dropped=body.dropped) if body.chunks else None
            status, error = body.status, body.error
            if attempt.interruption is not None:
                status, error = _interrupted(attempt.interruption)
            finished = StageFinished(stage=name, attempt=attempt.number, status=status, error=error, worker=command.worker, log=log, report=number)
            return [finished, *_what_follows(evolve(build, finished))]
        case _:
            assert_never(body)


def _interrupted(interruption: StageInterrupted) -> tuple[Status, str]:
    """How an interrupted attempt ends, whatever its worker says: the interruption came first."""
    return ("aborted", "") if interruption.reason == "aborted" else ("failed", interruption.error)


def _what_follows(state: State) -> list[Event]:
    """Queue the stages that have become possible, or end the build when none is under way and none can follow."""
    assert isinstance(state, Build)
    queued: list[Event] = []
    if not state.aborting:
        queued = [
            _queued(state, stage, 1)
            for stage in state.stages.values()
            if stage.attempt is None and all(state.stages[need].status == "succeeded" for need in stage.plan.needs)
        ]
    under_way = any(stage.attempt is not None and stage.status is None for stage in state.stages.values())
    if queued or under_way:
        return queued
    statuses = [stage.status for stage in state.stages.values() if stage.status is not None]
    status = min(statuses, key=_WORST.index)
    return [BuildFinished(status=status)]


def _queued(build: Build, stage: StageState, number: int) -> StageQueued:
    available = dict(build.inputs)
    for other in build.stages.values():
        if other.status == "succeeded":
            available.update(other.outputs)
    wanted = {task_input.name for step in stage.plan.steps for task_input in step.config.inputs}
    inputs = {name: ref for name, ref in available.items() if name in wanted}
    return StageQueued(stage=stage.plan.name, attempt=number, requirements=requirements_of(stage.plan), inputs=inputs)


def _fold(state: Build, events: Sequence[Event]) -> Build:
    for event in events:
        after = evolve(state, event)
        assert isinstance(after, Build)
        state = after
    return state
