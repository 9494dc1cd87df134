"""Workers: who there is, what each one does."""

from collections.abc import Callable

from aiohttp import web

from proto.api.workers import Worker, WorkerPage
from services.gateway.auth import Principal
from services.gateway.presence import Presence
from services.gateway.queries import Queries
from services.gateway.refusals import absent, invalid
from services.gateway.routes.endpoint import MAX_PAGE, Endpoint, Parameter, answer, number
from services.gateway.worker_view import worker_view
from services.gateway.workers import LeaseRow, WorkerRow


class FleetRoutes:
    """Anybody with a token may look; owners of `first`, the team that the deployment began with, see whose builds run and on which machine.
    `now` is unix seconds."""

    def __init__(self, *, queries: Queries, presence: Presence, first: str, now: Callable[[], float]) -> None:
        self._queries = queries
        self._presence = presence
        self._first = first
        self._now = now

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                method="GET",
                path="/workers",
                summary="All workers, by name",
                handler=self.all,
                parameters=(
                    Parameter(name="limit", about=f"at most this many (1 to {MAX_PAGE})", schema=int),
                    Parameter(name="cursor", about="`next` of the page before"),
                ),
                answers={200: WorkerPage},
            ),
            Endpoint(method="GET", path="/workers/{worker}", summary="One worker", handler=self.one, answers={200: Worker}),
        ]

    async def all(self, request: web.Request, principal: Principal) -> web.Response:
        limit = number(request, "limit", MAX_PAGE, 1, MAX_PAGE) or MAX_PAGE
        after = request.query.get("cursor", "")
        if "\0" in after or not after.isprintable():
            raise invalid("cursor", "`next` of the page before")
        rows = await self._queries.workers(limit + 1, after)
        page = rows[:limit]
        return answer(WorkerPage(items=await self._seen(page, principal), next=page[-1].name if len(rows) > limit else None))

    async def one(self, request: web.Request, principal: Principal) -> web.Response:
        name = request.match_info["worker"]
        row = await self._queries.worker(name)
        if row is None or row.standing == "deleted":
            raise absent("worker", name)
        (worker,) = await self._seen([row], principal)
        return answer(worker)

    async def _seen(self, rows: list[WorkerRow], principal: Principal) -> list[Worker]:
        now, leases = self._now(), dict[str, list[LeaseRow]]()
        for lease in await self._queries.leases([row.name for row in rows]):
            leases.setdefault(lease.worker, []).append(lease)
        owner = principal.team == self._first and principal.may("owner")
        heard = {row.name: self._presence.of(row.name, row.key, row.boot) for row in rows if row.key}
        return [worker_view(row, heard.get(row.name), leases.get(row.name, []), now, principal.team, owner) for row in rows]
