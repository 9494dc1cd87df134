"""Why the stages of a build are where they are, folded from what was recorded of it. Pure."""

from collections.abc import Iterable, Mapping

from msgspec.structs import replace

from proto.api.builds import BuildStage
from proto.api.preparation import Candidate, Holder, Preparation, Waiting
from proto.envelope import Fact
from proto.events.build import BuildCreated, BuildFinished, StageFinished, StageQueued, StepStarted
from proto.events.lease import LeaseExpired, StageDeferred, StageLeased
from proto.messages import SlotsHeld, StageWaits

NOT_CREATED = "it was not taken up yet"


def prepared(stages: Iterable[BuildStage], facts: Iterable[Fact]) -> list[Preparation]:
    """`stages` as they are known to be; `facts` of the build's own stream and of its leases, in order."""
    found = {stage.name: Preparation(stage=stage.name, state="blocked", reason=NOT_CREATED) for stage in stages}
    lost: dict[tuple[str, int], str] = {}
    for fact in facts:
        event = fact.event
        match event:
            case BuildCreated(plan=plan):
                found = {stage.name: Preparation(stage=stage.name, state="blocked", needs=stage.needs) for stage in plan.stages}
            case BuildFinished():
                found = {name: replace(one, state="over") for name, one in found.items()}
            case StageQueued(stage=name, attempt=attempt):
                why = lost.get((name, attempt - 1), "")
                found[name] = Preparation(stage=name, state="queued", attempt=attempt, needs=found[name].needs, since=fact.recorded_at, lost=why)
            case StageDeferred() | StageLeased() | StepStarted() | LeaseExpired() | StageFinished():
                if found[event.stage].attempt == event.attempt and found[event.stage].state != "over":
                    found[event.stage] = _after(found[event.stage], fact)
                if isinstance(event, LeaseExpired):
                    lost[event.stage, event.attempt] = event.evidence
            case _:
                pass
    return list(found.values())


def _after(stage: Preparation, fact: Fact) -> Preparation:
    match fact.event:
        case StageDeferred(reason=reason, refused=refused):
            return replace(stage, reason=reason, refused=refused)
        case StageLeased(worker=worker, why=why, refused=refused):
            candidates = [Candidate(worker=one.worker, load=one.load, missing=one.missing) for one in why]
            return replace(stage, state="leased", reason="", worker=worker, leased_at=fact.recorded_at, why=candidates, refused=refused)
        case StepStarted(worker=worker):
            return replace(stage, state="leased", status="started", worker=worker, started_at=stage.started_at or fact.recorded_at)
        case LeaseExpired(evidence=evidence):
            return replace(stage, state="queued", status="pending", worker="", reason=evidence)
        case StageFinished(status=status, error=error):
            return replace(stage, state="over", status=status, reason=error)
        case _:
            raise TypeError(f"{type(fact.event).__name__} is not about a stage's attempt")


def with_waits(stage: Preparation, waits: StageWaits, numbers: Mapping[str, int]) -> Preparation:
    """With what a scheduler said of it. `numbers`: the team's builds by id."""
    return replace(
        stage,
        live=True,
        requires=waits.requires,
        ahead=waits.ahead,
        more=waits.more,
        ahead_builds=[Waiting(build=numbers[one.build], stage=one.stage) for one in waits.own if one.build in numbers],
        able=waits.able,
        holders=[_holder(one, numbers) for one in waits.holders],
    )


def _holder(held: SlotsHeld, numbers: Mapping[str, int]) -> Holder:
    builds = {numbers[own.build] for own in held.own if own.build in numbers}
    return Holder(worker=held.worker, slots=held.slots, offered=held.offered, builds=sorted(builds), others=held.others)
