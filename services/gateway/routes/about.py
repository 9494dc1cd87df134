"""What the server is, and how to speak to it."""

from typing import Any

from aiohttp import web

from proto.api.teams import Info
from services.gateway.auth import Authenticator, Principal
from services.gateway.openapi import document
from services.gateway.routes.endpoint import Endpoint, answer


class AboutRoutes:
    """`known`: every other endpoint of the server."""

    def __init__(self, *, version: str, authenticator: Authenticator, public_url: str, known: list[Endpoint]) -> None:
        self._version = version
        self._authenticator = authenticator
        self._document: dict[str, Any] = document([*known, *self.endpoints()], version, public_url)

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint(
                method="GET",
                path="/info",
                summary="The server's version and, with a token, whose it is",
                handler=self.info,
                least=None,
                answers={200: Info},
            ),
            Endpoint(
                method="GET",
                path="/openapi.json",
                summary="This description",
                handler=self.openapi,
                least=None,
                answers={200: "application/json"},
            ),
        ]

    async def info(self, request: web.Request, _: Principal) -> web.Response:
        if "Authorization" not in request.headers:
            return answer(Info(version=self._version))
        principal = await self._authenticator.principal(request)
        return answer(Info(version=self._version, teams=[principal.team], team=principal.team, role=principal.role))

    async def openapi(self, _: web.Request, __: Principal) -> web.Response:
        return answer(self._document)
