"""`build-<build>`: the life of a build, and the only stream that decides the life of an attempt. Owned by builds.

`report` is the number of the worker's report that led to the event, within its attempt: the receipt the worker's spool waits for.
"""

from typing import Literal

from proto.events.base import ArtifactRef, Event, Status, Value
from proto.plan import Plan, Requirements


class LogExtent(Value, frozen=True, kw_only=True):
    """How much log an attempt wrote: numbered chunks, lines and raw bytes; `dropped` bytes fell to its limit.
    `chunks` is -1 when its worker was lost: then what arrived is all there is."""

    chunks: int = 0
    lines: int = 0
    bytes: int = 0
    dropped: int = 0


class BuildCreated(Event, frozen=True, kw_only=True):
    """builds, on BuildRequested: the build exists and is pending."""

    plan: Plan
    inputs: dict[str, ArtifactRef] = {}
    name: str = ""


class StageQueued(Event, frozen=True, kw_only=True):
    """builds, when all that a stage needs has succeeded, or an attempt was lost: attempt `attempt` may be leased, once.
    `inputs` are the trees its steps may read, by name."""

    stage: str
    attempt: int
    requirements: Requirements
    inputs: dict[str, ArtifactRef] = {}


class StepStarted(Event, frozen=True, kw_only=True):
    """builds, on a worker's report: the step's command runs on `worker`, inside `sandbox`, in exactly this `image` if in any, which its
    task names by `reference`."""

    stage: str
    attempt: int
    step: str
    worker: str
    sandbox: str = ""
    image: str = ""
    reference: str = ""
    timeout: int = 0
    report: int = 0


class StepProgressed(Event, frozen=True, kw_only=True):
    """builds, on a worker's report, at most once a second: the step is at `percent` (0–100, never falling)."""

    stage: str
    attempt: int
    step: str
    percent: int
    report: int = 0


class StepFinished(Event, frozen=True, kw_only=True):
    """builds, on a worker's report: the step has ended and its outputs are sealed. `exit_code` is None when no process ended by itself."""

    stage: str
    attempt: int
    step: str
    status: Status
    exit_code: int | None = None
    error: str = ""
    outputs: dict[str, ArtifactRef] = {}
    report: int = 0


class StageInterrupted(Event, frozen=True, kw_only=True):
    """builds, on an abort or a timeout while an attempt runs: the worker must stop it; it will end `aborted` or `failed`."""

    stage: str
    attempt: int
    reason: Literal["aborted", "timeout"]
    error: str = ""


class StageFinished(Event, frozen=True, kw_only=True):
    """builds: the attempt is over and its lease with it. `log` says what the archive must hold."""

    stage: str
    attempt: int
    status: Status
    error: str = ""
    worker: str = ""
    log: LogExtent | None = None
    report: int = 0


class BuildFinished(Event, frozen=True, kw_only=True):
    """builds, exactly once, last on its stream (log archives aside): the build has this status for ever."""

    status: Status
    error: str = ""
