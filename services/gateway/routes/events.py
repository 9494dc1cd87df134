"""The log itself, as server-sent events."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from aiohttp import web

from proto.api.bodies import ProblemDetails
from proto.catalogue import OWNERS, category_of
from proto.envelope import CloudEvent, Recorded
from services.gateway.auth import Principal
from services.gateway.feed import LogFeed
from services.gateway.refusals import invalid
from services.gateway.routes.endpoint import LAST_EVENT, Endpoint, Parameter, number
from services.gateway.sse import Streams, bad_token, last_event_id, message


class EventRoutes:
    """Everything that happens to a team, from any position on."""

    def __init__(self, *, feed: LogFeed, streams: Streams) -> None:
        self._feed = feed
        self._streams = streams

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                method="GET",
                path="/events",
                summary="Every event of the token's team as it is recorded (CloudEvents); the message's id is its position in the log",
                handler=self.events,
                parameters=(
                    *LAST_EVENT,
                    Parameter(name="from", about="begin at this position; left away: now", schema=int),
                    Parameter(name="category", about=f"only these, separated by commas: {', '.join(OWNERS)}"),
                ),
                answers={200: (CloudEvent, "text/event-stream"), 400: ProblemDetails},
            )
        ]

    async def events(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        token = last_event_id(request)
        if token is not None and not (token.isascii() and token.isdigit() and len(token) <= 18):
            raise bad_token()
        begin = number(request, "from", None)
        after = int(token) if token is not None else None if begin is None else max(begin - 1, 0)
        categories = frozenset(filter(None, request.query.get("category", "").split(","))) or None
        if unknown := sorted((categories or frozenset()) - OWNERS.keys()):
            raise invalid("category", f"there is no `{unknown[0]}`")
        async with aclosing(self._messages(principal.team, after, categories)) as messages:
            return await self._streams.respond(request, messages)

    async def _messages(self, team: str, after: int | None, categories: frozenset[str] | None) -> AsyncGenerator[bytes, None]:
        def wanted(recorded: Recorded) -> bool:
            return recorded.team == team and (categories is None or category_of(recorded.stream) in categories)

        async with aclosing(self._feed.events(after, wanted, categories)) as batches:
            async for batch in batches:
                yield b"".join(message(recorded.type, str(recorded.position), event) for recorded, event in batch)
