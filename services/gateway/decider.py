"""Decide what is recorded on `request-*` and `team-*` streams. Pure."""

from collections.abc import Sequence
from typing import assert_never

import msgspec

from libs.runtime.decisions import Refused
from proto.events.base import Event
from proto.events.request import BuildAbortRequested, BuildRequested
from proto.events.team import DEFAULT_POLICY, TeamCreated, TeamPolicySet, TokenIssued
from services.gateway.commands import AbortBuild, CreateTeam, IssueToken, RecallBuild, RequestBuild, RequestCommand, SetPolicy, TeamCommand


class Unasked(msgspec.Struct, frozen=True):
    """Nothing has been wished for on this stream."""


class Asked(msgspec.Struct, frozen=True):
    """A build was wished for; `body_sha256` tells a repeat from another wish under the same key."""

    build: str
    body_sha256: str


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
                if state.body_sha256 != command.body_sha256:
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
                return Asked(event.build, event.body_sha256)
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
        body_sha256=command.body_sha256,
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
                policy = TeamPolicySet(input_seconds=command.input_seconds, output_seconds=command.output_seconds, quota_bytes=command.quota_bytes)
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
