"""Decide what is recorded on `request-*` and `team-*` streams. Pure."""

from collections.abc import Sequence
from typing import assert_never

import msgspec

from libs.runtime.decisions import Refused
from proto.events.base import Event
from proto.events.request import BuildAbortRequested, BuildRequested
from proto.events.team import TeamCreated, TokenIssued
from services.gateway.commands import AbortBuild, CreateTeam, IssueToken, RequestBuild


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

    def stream(self, command: RequestBuild | AbortBuild) -> str:
        match command:
            case RequestBuild():
                return f"request-{command.request}"
            case AbortBuild():
                return f"request-abort-{command.build}"
            case _:
                assert_never(command)

    def decide(self, command: RequestBuild | AbortBuild, state: Request) -> Sequence[Event]:
        match command, state:
            case RequestBuild(), Unasked():
                return [
                    BuildRequested(build=command.build, plan=command.plan, inputs=command.inputs, name=command.name, body_sha256=command.body_sha256)
                ]
            case RequestBuild(), Asked():
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


class Team(msgspec.Struct, frozen=True):
    """Whether the team exists, and the tokens (SHA-256) it has issued."""

    exists: bool = False
    tokens: frozenset[str] = frozenset()


class TeamDecider:
    """A team: created once; a token is issued once."""

    initial: Team = Team()

    def stream(self, command: CreateTeam | IssueToken) -> str:
        return f"team-{command.team}"

    def decide(self, command: CreateTeam | IssueToken, state: Team) -> Sequence[Event]:
        match command:
            case CreateTeam():
                return [] if state.exists else [TeamCreated(name=command.team)]
            case IssueToken():
                if not state.exists:
                    raise Refused("missing", f"there is no team `{command.team}`")
                if command.sha256 in state.tokens:
                    return []
                return [TokenIssued(token_id=command.token_id, sha256=command.sha256, role=command.role, description=command.description)]
            case _:
                assert_never(command)

    def evolve(self, state: Team, event: Event) -> Team:
        match event:
            case TeamCreated():
                return Team(exists=True, tokens=state.tokens)
            case TokenIssued():
                return Team(exists=state.exists, tokens=state.tokens | {event.sha256})
            case _:
                raise TypeError(f"{type(event).__name__} on a team stream")
