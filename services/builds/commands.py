"""What may be asked of a build."""

from collections.abc import Sequence

import msgspec

from proto.events.base import ArtifactRef
from proto.messages import ReportBody
from proto.plan import Plan


class _Command(msgspec.Struct, frozen=True, kw_only=True):
    build: str


class CreateBuild(_Command, frozen=True, kw_only=True):
    """A client requested the build."""

    plan: Plan
    inputs: dict[str, ArtifactRef]
    name: str = ""


class AbortBuild(_Command, frozen=True, kw_only=True):
    """A client wants it to stop."""


class RecordReports(_Command, frozen=True, kw_only=True):
    """A worker reports on an attempt: `bodies` are numbers `first`, `first` + 1, … of it. `leased_to` is whom the lease stream names for
    the attempt, "" when nobody."""

    stage: str
    attempt: int
    worker: str
    leased_to: str
    first: int
    bodies: Sequence[ReportBody]


class LoseAttempt(_Command, frozen=True, kw_only=True):
    """The lease has expired: the worker cannot be running the attempt any more."""

    stage: str
    attempt: int
    evidence: str


class TimeOutStep(_Command, frozen=True, kw_only=True):
    """The step's time is up."""

    stage: str
    attempt: int
    step: str


Command = CreateBuild | AbortBuild | RecordReports | LoseAttempt | TimeOutStep
