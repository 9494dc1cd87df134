"""The first team, its first token and the first workers, which the deployment chooses: without them nobody could ask for others."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import structlog

from libs.eventlog.log import EventLog, LogUnavailable
from libs.runtime.commands import CommandLoop
from libs.runtime.decisions import Cause, Refused
from proto.envelope import UnreadableEvent
from services.gateway.commands import CreateTeam, FleetCommand, IssueToken, RegisterWorker, TeamCommand
from services.gateway.decider import Fleet, Team

logger = structlog.get_logger()


class Bootstrap:
    """Sees to it that the team, the token (SHA-256, hex; "" for none) and the workers (public keys by name) exist, and that the read models have
    caught up with the log as it was then, as far as they can.
    `problem` says why that is not so yet."""

    def __init__(
        self,
        teams: CommandLoop[TeamCommand, Team],
        fleet: CommandLoop[FleetCommand, Fleet],
        log: EventLog,
        passed: Callable[[int], Awaitable[bool]],
        team: str,
        sha256: str,
        workers: Mapping[str, str],
    ) -> None:
        self._teams = teams
        self._fleet = fleet
        self._workers = workers
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
                try:
                    await self._teams.execute(CreateTeam(team=self._team), cause)
                    if self._sha256:
                        await self._teams.execute(token, cause)
                except UnreadableEvent as error:  # what has a history was made before
                    logger.error("the first team is left as it is", why=str(error))
                for worker, key in self._workers.items():
                    try:
                        await self._fleet.execute(RegisterWorker(worker=worker, key=key), cause)
                    except (Refused, UnreadableEvent) as error:  # it was revoked since, or another has its name
                        logger.warning("not registered at the start", worker=worker, why=str(error))
                head = await self._log.head()
                self.problem = None if await self._passed(head) else f"the read models have not reached position {head}"
            except LogUnavailable as error:
                self.problem = str(error)
                await asyncio.sleep(0.2)
        await asyncio.Event().wait()
