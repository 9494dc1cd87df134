"""Decide what is recorded on `request-*`, `team-*` and `fleet-*` streams. Pure."""

import hmac
from collections.abc import Sequence
from typing import assert_never

import msgspec

from libs.runtime.decisions import Refused
from proto.events.base import Event
from proto.events.fleet import (
    RegistrationTokenIssued,
    RegistrationTokenUsed,
    WorkerDeleted,
    WorkerDrained,
    WorkerRegistered,
    WorkerResumed,
    WorkerRevoked,
)
from proto.events.request import BuildAbortRequested, BuildRequested
from proto.events.team import DEFAULT_POLICY, TeamCreated, TeamPolicySet, TokenIssued
from services.gateway.commands import (
    AbortBuild,
    CreateTeam,
    DeleteWorker,
    DrainWorker,
    FleetCommand,
    IssueRegistration,
    IssueToken,
    RecallBuild,
    RegisterWorker,
    RequestBuild,
    RequestCommand,
    ResumeWorker,
    RevokeWorker,
    SetPolicy,
    TeamCommand,
    UseRegistration,
)


class Unasked(msgspec.Struct, frozen=True):
    """Nothing has been wished for on this stream."""


class Asked(msgspec.Struct, frozen=True):
    """A build was wished for; `body_mac` tells a repeat from another wish under the same key."""

    build: str
    body_mac: str


class AbortAsked(msgspec.Struct, frozen=True):
    """The build's end was wished for."""

    build: str


Request = Unasked | Asked | AbortAsked


class RequestDecider:
    """A client's wish: recorded once, however often it is sent."""

    initial: Request = Unasked()

    def stream(self, command: RequestCommand) -> str:
        match command:
            case RequestBuild() | RecallBuild():
                return f"request-{command.request}"
            case AbortBuild():
                return f"request-abort-{command.build}"
            case _:
                assert_never(command)

    def decide(self, command: RequestCommand, state: Request) -> Sequence[Event]:
        match command, state:
            case RequestBuild(), Unasked():
                return [requested(command)]
            case RecallBuild(), Unasked():
                raise Refused("missing", "there was no such request")
            case ((RequestBuild() | RecallBuild()), Asked()):
                if not hmac.compare_digest(state.body_mac, command.body_mac):
                    raise Refused("conflict", "this Idempotency-Key came with another body before")
                return []
            case AbortBuild(), Unasked():
                return [BuildAbortRequested(build=command.build)]
            case AbortBuild(), AbortAsked():
                return []
            case _:
                raise Refused("conflict", "the request stream is in other use")

    def evolve(self, state: Request, event: Event) -> Request:
        match event:
            case BuildRequested():
                return Asked(event.build, event.body_mac)
            case BuildAbortRequested():
                return AbortAsked(event.build)
            case _:
                raise TypeError(f"{type(event).__name__} on a request stream")


def requested(command: RequestBuild) -> BuildRequested:
    return BuildRequested(
        build=command.build,
        plan=command.plan,
        inputs=command.inputs,
        name=command.name,
        body_mac=command.body_mac,
        keep_seconds=command.keep_seconds,
    )


class Team(msgspec.Struct, frozen=True):
    """Whether the team exists, the tokens (SHA-256) it has issued, and its policy."""

    exists: bool = False
    tokens: frozenset[str] = frozenset()
    policy: TeamPolicySet = DEFAULT_POLICY


class TeamDecider:
    """A team: created once; a token is issued once; a policy holds until another is set."""

    initial: Team = Team()

    def stream(self, command: TeamCommand) -> str:
        return f"team-{command.team}"

    def decide(self, command: TeamCommand, state: Team) -> Sequence[Event]:
        if not state.exists and not isinstance(command, CreateTeam):
            raise Refused("missing", f"there is no team `{command.team}`")
        match command:
            case CreateTeam():
                return [] if state.exists else [TeamCreated(name=command.team)]
            case SetPolicy():
                policy = TeamPolicySet(
                    input_seconds=command.input_seconds,
                    output_seconds=command.output_seconds,
                    quota_bytes=command.quota_bytes,
                    privileged=command.privileged,
                )
                return [policy] if policy != state.policy else []
            case IssueToken():
                if command.sha256 in state.tokens:
                    return []
                return [TokenIssued(token_id=command.token_id, sha256=command.sha256, role=command.role, description=command.description)]
            case _:
                assert_never(command)

    def evolve(self, state: Team, event: Event) -> Team:
        match event:
            case TeamCreated():
                return msgspec.structs.replace(state, exists=True)
            case TokenIssued():
                return msgspec.structs.replace(state, tokens=state.tokens | {event.sha256})
            case TeamPolicySet():
                return msgspec.structs.replace(state, policy=event)
            case _:
                raise TypeError(f"{type(event).__name__} on a team stream")


class Token(msgspec.Struct, frozen=True):
    """A registration token, and whom it has registered (worker, key)."""

    sha256: str
    expires_at: float
    tags: tuple[str, ...]
    used: tuple[str, str] | None = None


class Member(msgspec.Struct, frozen=True):
    """A worker by its key, and the token that it came with ("" if the deployment names it). `burnt`: keys of this name that were revoked."""

    key: str
    token_id: str = ""
    draining: bool = False
    revoked: bool = False
    burnt: frozenset[str] = frozenset()


class Deleted(msgspec.Struct, frozen=True):
    """There was a worker of this name. What let it in lets it in no more, nor is a key that was revoked ever good again."""

    token_id: str
    burnt: frozenset[str] = frozenset()


Fleet = Token | Member | Deleted | None
KEY_REVOKED = "key-revoked"


def key_revoked() -> Refused:
    """Whoever bears that key needs another."""
    return Refused(KEY_REVOKED, "this key was revoked")


class FleetDecider:
    """Streams `fleet-token-<id>` and `fleet-worker-<name>`: a token registers one worker, a name has one key."""

    initial: Fleet = None

    def stream(self, command: FleetCommand) -> str:
        match command:
            case IssueRegistration() | UseRegistration():
                return f"fleet-token-{command.token_id}"
            case _:
                return f"fleet-worker-{command.worker}"

    def decide(self, command: FleetCommand, state: Fleet) -> Sequence[Event]:
        match command, state:
            case IssueRegistration(), None:
                issued = RegistrationTokenIssued(
                    token_id=command.token_id,
                    sha256=command.sha256,
                    expires_at=command.expires_at,
                    tags=command.tags,
                    description=command.description,
                )
                return [issued]
            case UseRegistration(), Token() if hmac.compare_digest(command.sha256, state.sha256) and command.now < state.expires_at:
                if state.used is None:
                    return [] if command.trial else [RegistrationTokenUsed(worker=command.worker, key=command.key)]
                if state.used != (command.worker, command.key):  # whose answer was lost asks again
                    raise Refused("unknown", "the token is of no use")
                return []
            case UseRegistration(), _:
                raise Refused("unknown", "the token is of no use")
            case RegisterWorker(), Deleted() if command.token_id in ("", state.token_id):  # the deployment names it at each start
                raise Refused("conflict", f"`{command.worker}` was deleted")
            case RegisterWorker(), Deleted() if command.key in state.burnt:
                raise key_revoked()
            case RegisterWorker(), None | Deleted():
                registered = WorkerRegistered(worker=command.worker, key=command.key, tags=command.tags, token_id=command.token_id)
                return [] if command.trial else [registered]
            case RegisterWorker(), Member():
                if state.key != command.key or state.revoked:
                    raise Refused("conflict", f"the name `{command.worker}` is taken")
                return []
            case _, Member():
                return _changed(command, state)
            case _:
                raise Refused("missing", "there is no such worker")

    def evolve(self, state: Fleet, event: Event) -> Fleet:
        match event, state:
            case RegistrationTokenIssued(), _:
                return Token(event.sha256, event.expires_at, event.tags)
            case RegistrationTokenUsed(), Token():
                return msgspec.structs.replace(state, used=(event.worker, event.key))
            case WorkerRegistered(), _:
                return Member(event.key, event.token_id, burnt=state.burnt if isinstance(state, Deleted) else frozenset())
            case WorkerDrained(), Member():
                return msgspec.structs.replace(state, draining=True)
            case WorkerResumed(), Member():
                return msgspec.structs.replace(state, draining=False)
            case WorkerRevoked(), Member():
                return msgspec.structs.replace(state, revoked=True, burnt=state.burnt | {state.key})
            case WorkerDeleted(), Member():
                return Deleted(state.token_id, state.burnt)
            case _:
                raise TypeError(f"{type(event).__name__} on a fleet stream")


def _changed(command: FleetCommand, state: Member) -> Sequence[Event]:
    if state.revoked and not isinstance(command, RevokeWorker | DeleteWorker):
        raise Refused("conflict", "the worker was revoked")
    match command:
        case DrainWorker():
            return [] if state.draining else [WorkerDrained(reason=command.reason)]
        case ResumeWorker():
            return [WorkerResumed()] if state.draining else []
        case RevokeWorker():
            return [] if state.revoked else [WorkerRevoked(reason=command.reason)]
        case DeleteWorker():
            if not (state.revoked or command.lost):
                raise Refused("conflict", "the worker is neither revoked nor lost: stop or revoke it first")
            return [WorkerDeleted()]
        case _:
            raise Refused("conflict", "the stream is in other use")
