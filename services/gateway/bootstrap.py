"""The first team and its first token, which the deployment chooses: without them nobody could ask for others."""

import asyncio
from collections.abc import Awaitable, Callable

from libs.eventlog.log import EventLog, LogUnavailable
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause
from services.gateway.commands import CreateTeam, IssueToken, TeamCommand
from services.gateway.decider import Team


class Bootstrap:
    """Sees to it that the team and the token (SHA-256, hex; "" for none) exist, and that the read models have caught up with the log as it was then.
    `problem` says why that is not so yet."""

    def __init__(
        self,
        teams: CommandLoop[TeamCommand, Team],
        log: EventLog,
        passed: Callable[[int], Awaitable[bool]],
        team: str,
        sha256: str,
    ) -> None:
        self._teams = teams
        self._log = log
        self._passed = passed
        self._team = team
        self._sha256 = sha256.lower()
        self.problem: str | None = "has not begun"

    async def run(self) -> None:
        """Try until it is so, then rest for ever."""
        cause = Cause(team=self._team, correlation_id="bootstrap", causation_id="bootstrap", actor="bootstrap")
        token = IssueToken(
            team=self._team, token_id=f"bootstrap-{self._sha256[:8]}", sha256=self._sha256, role="owner", description="the first token"
        )
        while self.problem is not None:
            try:
                await self._teams.execute(CreateTeam(team=self._team), cause)
                if self._sha256:
                    await self._teams.execute(token, cause)
                head = await self._log.head()
                self.problem = None if await self._passed(head) else f"the read models have not reached position {head}"
            except LogUnavailable as error:
                self.problem = str(error)
                await asyncio.sleep(0.2)
        await asyncio.Event().wait()
