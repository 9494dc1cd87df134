"""What may be asked of leases and workers."""

import hashlib

import msgspec

from proto.events.lease import Candidate
from proto.messages import About, Offers


class _OnLease(msgspec.Struct, frozen=True, kw_only=True):
    build: str
    stage: str
    attempt: int
    term: int


class LeaseStage(_OnLease, frozen=True, kw_only=True):
    """Give an attempt to a worker."""

    worker: str
    boot: str
    credit: str
    lease_seconds: float
    why: list[Candidate]
    refused: dict[str, int]
    secrets: dict[str, int] = {}


class ExpireLease(_OnLease, frozen=True, kw_only=True):
    """The worker cannot be running it any more."""

    worker: str
    evidence: str


class DeferStage(_OnLease, frozen=True, kw_only=True):
    """It cannot be placed, and why is new."""

    reason: str
    refused: dict[str, int]


class _OnWorker(msgspec.Struct, frozen=True, kw_only=True):
    worker: str
    boot: str
    term: int


class BootWorker(_OnWorker, frozen=True, kw_only=True):
    """A boot was heard of for the first time."""

    since: int
    slots: int
    offers: Offers
    about: About = About()


class LoseWorker(_OnWorker, frozen=True, kw_only=True):
    """It is silent, or has said goodbye."""

    reason: str


class _OnSecret(msgspec.Struct, frozen=True, kw_only=True):
    team: str
    name: str
    by: str


class SetSecret(_OnSecret, frozen=True, kw_only=True):
    """Its value is stored as `entry`."""

    entry: str


class RemoveSecret(_OnSecret, frozen=True, kw_only=True):
    """The team shall have it no more."""


class MakeSealingKey(msgspec.Struct, frozen=True, kw_only=True):
    """From now on the gateway shall seal to `key`; the private one is stored as `entry`. `after`: only if so many were made before (None: in any
    case)."""

    entry: str
    key: str
    master: str
    by: str
    after: int | None = None


LeaseCommand = LeaseStage | ExpireLease | DeferStage
WorkerCommand = BootWorker | LoseWorker
SecretCommand = SetSecret | RemoveSecret | MakeSealingKey
Command = LeaseCommand | WorkerCommand | SecretCommand


NOBODY, SEALING = "", "sealing-key"
"""Whose secret the private keys are that open what the gateway seals, and what it is called: no team has an empty name."""


def secret_stream(team: str, name: str) -> str:
    """A stream's name must be fit for a subject of NATS, and a secret's need not be."""
    return "secret-" + hashlib.sha256(f"{team}\0{name}".encode()).hexdigest()[:32]
