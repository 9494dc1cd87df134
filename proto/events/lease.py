"""`lease-<build>`: which worker may run which attempt of a build's stages. Owned by the scheduler."""

from proto.events.base import Event, Value


class Candidate(Value, frozen=True, kw_only=True):
    """One of the best workers for an attempt; `load` is the share of its slots in use, `missing` how many bytes of the inputs it was not known to
    have."""

    worker: str
    load: float = 0.0
    missing: int = 0


class StageLeased(Event, frozen=True, kw_only=True):
    """The scheduler's leader, having placed the attempt: `worker` may run it on `credit` until it stops renewing.
    `term` names the leadership, `boot` the worker's life, `why` up to five candidates, `refused` counts of workers by reason; `secrets` the versions
    of those that the worker is given, by name."""

    stage: str
    attempt: int
    worker: str
    boot: str
    credit: str
    term: int = 0
    lease_seconds: float = 15.0
    why: list[Candidate] = []
    refused: dict[str, int] = {}
    secrets: dict[str, int] = {}


class LeaseExpired(Event, frozen=True, kw_only=True):
    """The scheduler's leader, with evidence: the worker cannot be running the attempt any more. builds decides what follows."""

    stage: str
    attempt: int
    worker: str
    evidence: str
    term: int = 0


class StageDeferred(Event, frozen=True, kw_only=True):
    """The scheduler's leader, when an attempt cannot be placed and why has changed: `reason` for people, `refused` counts of workers by reason."""

    stage: str
    attempt: int
    reason: str
    refused: dict[str, int] = {}
    term: int = 0
