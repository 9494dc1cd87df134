"""What must be true of every log, checked event by event as it grows; and what must be true of it when all is over."""

from collections.abc import Callable

import msgspec

from proto.envelope import Fact
from proto.events.build import BuildCreated, BuildFinished, StageFinished, StageInterrupted, StageQueued, StepFinished, StepProgressed, StepStarted
from proto.events.lease import LeaseExpired, StageLeased
from proto.events.request import BuildRequested
from proto.messages import Attempt


class _Stage(msgspec.Struct):
    """A stage's latest attempt, by its build (`queued`, `over`, `reported`) and by its leases (`leased` to `worker`, `expired`)."""

    queued: int = 0
    over: bool = False
    reported: int = 0
    leased: int = 0
    worker: str = ""
    expired: bool = True


class Ledger:
    """`runs(worker, attempt)`: whether a worker that is not stopped runs an attempt by right of its lease."""

    def __init__(self, runs: Callable[[str, Attempt], bool]) -> None:
        self._runs = runs
        self._stages: dict[tuple[str, str], _Stage] = {}
        self.requested: dict[str, str] = {}
        """Builds, and whether they were created ("created") and have ended (their status)."""

    def note(self, fact: Fact) -> None:
        """Raises AssertionError for what must never be recorded after what is."""
        event, build = fact.event, fact.subject_id
        match event:
            case BuildRequested():
                assert event.build not in self.requested
                self.requested[event.build] = ""
            case BuildCreated():
                assert self.requested[build] == "", f"{build} was created twice"
                self.requested[build] = "created"
                for stage in event.plan.stages:
                    self._stages[build, stage.name] = _Stage()
            case StageQueued(stage=stage, attempt=number):
                known = self._of(build, stage)
                assert number == known.queued + 1 and not known.over, f"attempt {number} of {build}/{stage} after {known}"
                if number > 1:
                    assert known.leased == number - 1 and known.expired, f"attempt {number} of {build}/{stage}, but the lease before lives: {known}"
                known.queued, known.reported = number, 0
            case StageLeased(stage=stage, attempt=number):  # who leases, or ends a lease, may not have read yet that the build is over
                known = self._stages[build, stage]
                assert number > known.leased, f"attempt {number} of {build}/{stage} is leased to {event.worker}, and was to {known.worker}"
                assert number <= known.queued, f"attempt {number} of {build}/{stage} is leased, and was not queued"
                known.leased, known.worker, known.expired = number, event.worker, False
            case LeaseExpired(stage=stage, attempt=number):
                known = self._stages[build, stage]
                assert (number, event.worker, False) == (known.leased, known.worker, known.expired), f"{event} of {known}"
                known.expired = True
                runs = not known.over and self._runs(event.worker, Attempt(build, stage, number))
                assert not runs, f"{event.worker} runs attempt {number} of {build}/{stage} by right, and the lease expires: {event.evidence}"
            case StepStarted() | StepProgressed() | StepFinished():
                known = self._of(build, event.stage)
                assert event.attempt == known.queued and not known.over, f"a late word: {event} after {known}"
                assert event.attempt == known.leased, f"a word on what was never leased: {event} after {known}"
                assert event.report == known.reported + 1, f"{event} after {known}"
                known.reported = event.report
                if isinstance(event, StepStarted):
                    assert event.worker == known.worker, f"{event}, but it was leased to {known.worker}"
            case StageInterrupted(stage=stage, attempt=number):
                known = self._of(build, stage)
                assert number == known.queued and not known.over
            case StageFinished(stage=stage, attempt=number):
                known = self._of(build, stage)
                assert number == known.queued and not known.over, f"{event} after {known}"
                assert event.worker in ("", known.worker), f"{event}, but it was leased to {known.worker}"
                known.over = True
            case BuildFinished():
                assert self.requested[build] == "created", f"{build} ends again"
                self.requested[build] = event.status
                ends = {name: known for (of, name), known in self._stages.items() if of == build}
                assert all(known.over or not known.queued for known in ends.values()), f"{build} ends before its stages: {ends}"
            case _:
                pass

    def _of(self, build: str, stage: str) -> _Stage:
        assert self.requested.get(build) == "created", f"{build} is {self.requested.get(build)!r}"
        return self._stages[build, stage]

    @property
    def open(self) -> list[str]:
        """Builds that have not ended."""
        return [build for build, status in self.requested.items() if status in ("", "created")]
