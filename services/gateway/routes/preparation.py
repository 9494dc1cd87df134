"""Why a build waits: what was recorded, and what a scheduler says now."""

import asyncio
from collections.abc import Iterable
from itertools import chain

import msgspec
import structlog
from aiohttp import web

from libs.bus.bus import Bus, BusUnavailable
from libs.eventlog.log import EventLog
from proto.api.preparation import BuildPreparation
from proto.envelope import facts
from proto.messages import Attempt, StagesWait, StageWaits, WhyWaiting
from services.gateway.auth import Principal
from services.gateway.preparation import prepared, with_waits
from services.gateway.queries import Queries
from services.gateway.refusals import absent
from services.gateway.routes.endpoint import Endpoint, answer

logger = structlog.get_logger()

PATIENCE = 1.0
"""Seconds that a scheduler has to answer; what was recorded is told in any case."""
ASKED = 20
"""Stages that are asked about."""


class PreparationRoutes:
    def __init__(self, *, queries: Queries, log: EventLog, bus: Bus) -> None:
        self._queries = queries
        self._log = log
        self._bus = bus

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                method="GET",
                path="/teams/{team}/builds/{build}/preparation",
                summary="Why a build waits and what is ahead of it, or why it is where it is",
                handler=self.show,
                answers={200: BuildPreparation},
            )
        ]

    async def show(self, request: web.Request, principal: Principal) -> web.Response:
        name = request.match_info["build"]
        row = await self._queries.build_of_team(principal.team, name)
        if row is None:
            raise absent("build", name)
        streams = await self._log.read_streams([f"build-{row.id}", f"lease-{row.id}"])
        recorded = sorted(chain.from_iterable(streams.values()), key=lambda one: one.position)
        stages = prepared(row.stages, facts(recorded))
        waits = await self._asked([Attempt(row.id, stage.stage, stage.attempt) for stage in stages if stage.state == "queued"][:ASKED])
        numbers = await self._numbers(principal.team, waits.values())
        shown = [with_waits(stage, waits[stage.stage], numbers) if stage.stage in waits else stage for stage in stages]
        return answer(BuildPreparation(id=row.id, number=row.number, status=row.status, stages=shown))

    async def _asked(self, attempts: list[Attempt]) -> dict[str, StageWaits]:
        """What a scheduler says of them, by stage; nothing if none says anything in time."""
        if not attempts:
            return {}
        try:
            async with asyncio.timeout(PATIENCE):
                said = await self._bus.ask(f"why.{attempts[0].build}", msgspec.msgpack.encode(WhyWaiting(attempts=attempts)))
            return {one.attempt.stage: one for one in msgspec.msgpack.decode(said, type=StagesWait).stages}
        except (BusUnavailable, TimeoutError, msgspec.DecodeError) as error:
            logger.info("no scheduler says why a build waits", error=str(error) or type(error).__name__)
            return {}

    async def _numbers(self, team: str, waits: Iterable[StageWaits]) -> dict[str, int]:
        """The builds of the team that are named there: number by id."""
        named = {own.build for one in waits for own in (*one.own, *(each for holder in one.holders for each in holder.own))}
        rows = await asyncio.gather(*map(self._queries.build, named))
        return {row.id: row.number for row in rows if row is not None and row.team == team}
