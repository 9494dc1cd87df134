"""Teams, their tokens and their policies."""

import hashlib
import re
from collections.abc import Awaitable, Callable

from aiohttp import web

from libs.runtime.commands import CommandLoop, Outcome
from libs.runtime.decisions import Cause
from libs.runtime.http import read_body, strict_json
from proto.api.teams import NewToken, Policy, Team, Token
from services.gateway import decider
from services.gateway.auth import Principal
from services.gateway.commands import CreateTeam, IssueToken, SetPolicy, TeamCommand
from services.gateway.queries import Queries
from services.gateway.refusals import Denied, absent, invalid
from services.gateway.routes.endpoint import Endpoint, answer
from services.gateway.views import policy_view

MAX_BODY = 16 << 10

_TEAM = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class TeamRoutes:
    """Owners of `first`, the team that the deployment began with, may make teams and issue any team's tokens; owners of others their own team's."""

    def __init__(
        self,
        *,
        queries: Queries,
        teams: CommandLoop[TeamCommand, decider.Team],
        passed: Callable[[int, float], Awaitable[bool]],
        first: str,
        ids: Callable[[], str],
        secret: Callable[[], str],
    ) -> None:
        self._queries = queries
        self._teams = teams
        self._passed = passed
        self._first = first
        self._ids = ids
        self._secret = secret

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                method="PUT",
                path="/teams/{team}",
                summary="Make a team; 200 when it exists",
                handler=self.create,
                least="owner",
                any_team=True,
                answers={201: Team, 200: Team},
            ),
            Endpoint(
                method="POST",
                path="/teams/{team}/tokens",
                summary="Issue a token; it is shown this once",
                handler=self.issue,
                least="owner",
                any_team=True,
                body=NewToken,
                answers={201: Token},
            ),
            Endpoint(
                method="GET",
                path="/teams/{team}/policy",
                summary="How long artifacts are kept, how many bytes may be stored, and whether steps may be privileged",
                handler=self.policy,
                any_team=True,
                answers={200: Policy},
            ),
            Endpoint(
                method="PUT",
                path="/teams/{team}/policy",
                summary="Set the policy; artifacts that are there already keep their time",
                handler=self.set_policy,
                least="owner",
                any_team=True,
                body=Policy,
                answers={200: Policy},
            ),
        ]

    async def create(self, request: web.Request, principal: Principal) -> web.Response:
        team = request.match_info["team"]
        if principal.team != self._first:
            raise absent("team", team)
        if not _TEAM.fullmatch(team):
            raise invalid("team", "lower-case letters, digits and `-`; at most 63")
        outcome = await self._execute(CreateTeam(team=team), team, principal)
        return answer(Team(name=team), status=201 if outcome.events else 200)

    async def issue(self, request: web.Request, principal: Principal) -> web.Response:
        team = request.match_info["team"]
        if principal.team not in (team, self._first) or not _TEAM.fullmatch(team):
            raise absent("team", team)
        wanted = strict_json(await read_body(request, MAX_BODY), NewToken)
        token, token_id = self._secret(), self._ids()
        command = IssueToken(team=team, token_id=token_id, sha256=sha256_of(token), role=wanted.role, description=wanted.description)
        await self._execute(command, team, principal)
        return answer(Token(id=token_id, token=token, team=team, role=wanted.role, description=wanted.description), status=201)

    async def policy(self, request: web.Request, principal: Principal) -> web.Response:
        return answer(policy_view(await self._queries.team(self._team(request, principal))))

    async def set_policy(self, request: web.Request, principal: Principal) -> web.Response:
        team = self._team(request, principal)
        policy = strict_json(await read_body(request, MAX_BODY), Policy)
        if policy.privileged and principal.team != self._first and not policy_view(await self._queries.team(team)).privileged:
            raise Denied(403, "This token may not do that", "only an owner of the first team may let a team run privileged steps", why="another team")
        command = SetPolicy(
            team=team,
            input_seconds=policy.input_seconds,
            output_seconds=policy.output_seconds,
            quota_bytes=policy.quota_bytes,
            privileged=policy.privileged,
        )
        await self._execute(command, team, principal)
        return answer(policy)

    def _team(self, request: web.Request, principal: Principal) -> str:
        """The team that the path names. Raises Problem 404."""
        team = request.match_info["team"]
        if team != principal.team and (principal.team != self._first or not principal.may("owner")):
            raise absent("team", team)
        return team

    async def _execute(self, command: TeamCommand, team: str, principal: Principal) -> Outcome:
        cause = Cause(team=team, correlation_id=self._ids(), causation_id=principal.actor, actor=principal.actor)
        outcome = await self._teams.execute(command, cause)
        await self._passed(outcome.position, 1.0)
        return outcome


def sha256_of(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
