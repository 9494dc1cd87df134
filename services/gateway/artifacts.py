"""The artifacts service, as the gateway asks it: bytes are piped through, under a grant that names team and artifact (60 s)."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager

import aiohttp
import msgspec

from libs.runtime.http import unavailable
from libs.tokens import sign_token
from proto.messages import Segment

GRANT_SECONDS = 60.0
_RECORD = msgspec.msgpack.Decoder(tuple[int, Segment])
_MAX_RECORD = 16 << 20


class ArchiveUnavailable(Exception):
    """The archive exists, but cannot be read now."""


class ArtifactsClient:
    """Calls the artifacts service. Raises Problem 503 when it cannot be reached."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str, clock: Callable[[], float]) -> None:
        self._session = session
        self._url = url.rstrip("/")
        self._key = key
        self._clock = clock

    @asynccontextmanager
    async def upload(self, team: str, artifact: str, name: str, kind: str, body: AsyncIterator[bytes]) -> AsyncIterator[aiohttp.ClientResponse]:
        """Send a body on as it comes. When `body` raises, the inner request is cut, and nothing of it is kept."""
        headers = self._grant(team, artifact, "put") | {"Content-Type": kind or "application/octet-stream"}
        async with self._answer("POST", f"/artifacts/{artifact}", headers, {"name": name} if name else {}, body) as answer:
            yield answer

    @asynccontextmanager
    async def download(self, team: str, artifact: str, query: dict[str, str], headers: dict[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        async with self._answer("GET", f"/artifacts/{artifact}", self._grant(team, artifact, "get") | headers, query) as answer:
            yield answer

    async def archive(self, team: str, build: str, stage: str, attempt: int, first: int) -> AsyncGenerator[tuple[int, Segment], None]:
        """The archived log from line `first` on, each segment with the number of its first line. Raises ArchiveUnavailable."""
        try:
            path = f"/logs/{build}/{stage}/{attempt}"
            async with self._session.get(self._url + path, headers=self._grant(team, build, "log"), params={"from": str(first)}) as answer:
                if answer.status != 200:
                    raise ArchiveUnavailable(f"artifacts answered {answer.status}")
                while True:
                    try:
                        size = int.from_bytes(await answer.content.readexactly(4), "big")
                    except asyncio.IncompleteReadError as error:
                        if error.partial:
                            raise
                        return
                    if size > _MAX_RECORD:
                        raise ArchiveUnavailable("it is no archive")
                    yield _RECORD.decode(await answer.content.readexactly(size))
        except (aiohttp.ClientError, TimeoutError, EOFError, msgspec.DecodeError) as error:
            raise ArchiveUnavailable(str(error)) from error

    @asynccontextmanager
    async def _answer(
        self, method: str, path: str, headers: dict[str, str], query: dict[str, str], body: AsyncIterator[bytes] | None = None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            answer = await self._session.request(method, self._url + path, headers=headers, params=query, data=body)
        except (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError, aiohttp.ServerTimeoutError) as error:
            raise unavailable("the artifacts service cannot be reached") from error
        async with answer:
            yield answer

    def _grant(self, team: str, artifact: str, action: str) -> dict[str, str]:
        claims = {"team": team, "artifact": artifact, "action": action}
        return {"Authorization": f"Bearer {sign_token(self._key, claims, GRANT_SECONDS, self._clock())}"}
