"""The catalogue: tag, class, category and owner of every event. Ownership in the database, subjects, schemas and decoders derive from it."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import msgspec

from proto.events.artifact import ArtifactDeleted, ArtifactExpired, ArtifactLifetimeChanged, ArtifactSealed, LogArchived
from proto.events.base import Event, tag_of
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
from proto.events.team import TeamCreated, TeamPolicySet, TokenIssued
from proto.events.worker import WorkerBooted, WorkerLost


class Category(NamedTuple):
    """A kind of event stream (`<name>-<id>`), the one service that may append to it, and its events."""

    name: str
    owner: str
    events: tuple[type[Event], ...]


CATEGORIES: tuple[Category, ...] = (
    Category("team", "gateway", (TeamCreated, TokenIssued, TeamPolicySet)),
    Category(
        "fleet",
        "gateway",
        (RegistrationTokenIssued, RegistrationTokenUsed, WorkerRegistered, WorkerDrained, WorkerResumed, WorkerRevoked, WorkerDeleted),
    ),
    Category("request", "gateway", (BuildRequested, BuildAbortRequested)),
    Category(
        "build",
        "builds",
        (BuildCreated, StageQueued, StepStarted, StepProgressed, StepFinished, StageInterrupted, StageFinished, BuildFinished),
    ),
    Category("lease", "scheduler", (StageLeased, LeaseExpired, StageDeferred)),
    Category("worker", "scheduler", (WorkerBooted, WorkerLost)),
    Category("secret", "scheduler", (SecretSet, SecretRemoved, SealingKeyMade)),
    Category("artifact", "artifacts", (ArtifactSealed, ArtifactLifetimeChanged, ArtifactExpired, ArtifactDeleted, LogArchived)),
)

SERVICES: tuple[str, ...] = ("gateway", "builds", "scheduler", "artifacts")
"""The services that hold a database role; the worker holds none."""

OWNERS: Mapping[str, str] = MappingProxyType({c.name: c.owner for c in CATEGORIES})
EVENTS: Mapping[str, type[Event]] = MappingProxyType({tag_of(cls): cls for c in CATEGORIES for cls in c.events})
TAGS: Mapping[type[Event], str] = MappingProxyType({cls: tag for tag, cls in EVENTS.items()})
_DECODERS = {tag: msgspec.json.Decoder(cls) for tag, cls in EVENTS.items()}
_ENCODER = msgspec.json.Encoder()


class UnknownEvent(Exception):
    """A tag that this code does not know: consumers are deployed first, so whoever follows its category stops and says so."""


def category_of(stream: str) -> str:
    """`build-1f…` → `build`."""
    return stream.partition("-")[0]


def encode(event: Event) -> bytes:
    """The exact bytes the log keeps."""
    return _ENCODER.encode(event)


def decode(tag: str, data: bytes) -> Event:
    """The event of a tag. Raises UnknownEvent, or msgspec.ValidationError for data that is not of its type."""
    try:
        decoder = _DECODERS[tag]
    except KeyError:
        raise UnknownEvent(tag) from None
    return decoder.decode(data)
