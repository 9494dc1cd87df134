"""The artifacts service, as the gateway asks it: bytes are piped through, under a grant that names team, artifact and deed (60 s); or go past the
gateway, where clients can reach that service, under one for nothing but those bytes (300 s)."""

import asyncio
import ipaddress
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Literal

import aiohttp
import msgspec
from aiohttp import web
from yarl import URL

from libs.runtime.addresses import address_of
from libs.runtime.http import unavailable
from libs.tokens import sign_token
from proto.api.artifacts import Direct
from proto.api.bodies import ProblemDetails
from proto.messages import Segment

GRANT_SECONDS = 60.0
DIRECT_SECONDS = 300
_RECORD = msgspec.msgpack.Decoder(tuple[int, Segment])
_MAX_RECORD = 16 << 20

Deed = Literal["put", "get", "see", "change", "log"]
DirectDeed = Literal["tar", "send", "fetch"]


class ArchiveUnavailable(Exception):
    """The archive exists, but cannot be read now."""


class Whose(msgspec.Struct, frozen=True):
    """The artifact that is meant ("": none), its team, and who asks."""

    team: str
    artifact: str
    actor: str


class ArtifactsClient:
    """Calls the artifacts service. Raises Problem 503 when it cannot be reached."""

    def __init__(self, session: aiohttp.ClientSession, url: str, key: str, clock: Callable[[], float], public_url: str = "") -> None:
        """`public_url`: where clients reach it; "": they do not."""
        self._session = session
        self._url = url.rstrip("/")
        self._public_url = public_url.rstrip("/")
        self._key = key
        self._clock = clock

    @asynccontextmanager
    async def ask(
        self,
        deed: Deed,
        whose: Whose,
        method: str,
        below: str = "",
        *,
        query: str = "",
        headers: Mapping[str, str] | None = None,
        body: AsyncIterator[bytes] | bytes | None = None,
        expect: bool = False,
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """Ask for `below` (a path below the artifact's), with a `query` as it stands in a URL. A body is sent on as it comes, with `expect` only once
        it is wanted; when it raises, the inner request is cut, and that is raised."""
        sent = {"Accept-Encoding": "identity", **(headers or {}), **self._grant(deed, whose)}
        path = f"/artifacts/{whose.artifact}{below}" if whose.artifact else below
        url = URL(f"{self._url}{path}?{query}", encoded=True)
        failure: list[Exception] = []
        data = _noting(body, failure) if isinstance(body, AsyncIterator) else body
        try:
            async with self._session.request(method, url, headers=sent, data=data, expect100=expect) as answer:
                yield answer
        except (aiohttp.ClientError, ConnectionError, RuntimeError) as error:
            if failure:  # it was the client's side that broke
                raise failure[0] from None
            if isinstance(error, RuntimeError):
                raise
            raise unavailable("the artifacts service does not answer") from error

    async def archive(self, team: str, build: str, stage: str, attempt: int, first: int) -> AsyncGenerator[tuple[int, Segment], None]:
        """The archived log from line `first` on, each segment with the number of its first line. Raises ArchiveUnavailable."""
        try:
            path = f"/logs/{build}/{stage}/{attempt}"
            async with self._session.get(self._url + path, headers=self._grant("log", Whose(team, build, "")), params={"from": str(first)}) as answer:
                if answer.status != 200:
                    raise ArchiveUnavailable(await _why(answer))
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
        except msgspec.DecodeError as error:
            raise ArchiveUnavailable("it is no archive") from error
        except (aiohttp.ClientError, TimeoutError, EOFError) as error:
            raise ArchiveUnavailable("the artifacts service cannot be reached") from error

    def direct(self, deed: DirectDeed, whose: Whose, below: str, request: web.Request) -> Direct | None:
        """Where the client who asks may do this itself. An address of this machine is only for who asked for an address of this machine, and is on
        it: what comes through a proxy does not see that address, or another one there."""
        if not self._public_url or (_is_here(URL(self._public_url).host) and not (_is_here(address_of(request)) and _is_here(request.url.host))):
            return None
        url = f"{self._public_url}/artifacts/{whose.artifact}{below}"
        return Direct(url=url, token=self._signed(deed, whose, DIRECT_SECONDS), seconds=DIRECT_SECONDS)

    def _grant(self, deed: Deed, whose: Whose) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._signed(deed, whose, GRANT_SECONDS)}"}

    def _signed(self, deed: Deed | DirectDeed, whose: Whose, seconds: float) -> str:
        claims = {"team": whose.team, "artifact": whose.artifact, "action": deed, "actor": whose.actor}
        return sign_token(self._key, claims, seconds, self._clock())


async def _why(answer: aiohttp.ClientResponse) -> str:
    """What artifacts says of its answer, which is none."""
    with suppress(msgspec.MsgspecError):
        if said := msgspec.json.decode(await answer.read(), type=ProblemDetails).detail:
            return said
    return f"the artifacts service answered {answer.status}"


def relayed(inner: aiohttp.ClientResponse, body: bytes) -> web.Response:
    """What artifacts answered, in its words: JSON, or a problem. That it refused our grant is no business of the client's."""
    if inner.status in (401, 403) or inner.content_type not in ("application/json", "application/problem+json"):
        raise unavailable(f"the artifacts service answered {inner.status}")
    headers = {name: inner.headers[name] for name in ("Retry-After", "Content-Range") if name in inner.headers}
    return web.Response(body=body, status=inner.status, content_type=inner.content_type, headers=headers)


def _is_here(host: str | None) -> bool:
    """Whether that is this machine, whichever it is."""
    try:
        return host == "localhost" or ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


async def _noting(chunks: AsyncIterator[bytes], failure: list[Exception]) -> AsyncIterator[bytes]:
    """The chunks; what ends them is noted, because the inner request only says that its body failed."""
    try:
        async for chunk in chunks:
            yield chunk
    except Exception as error:
        failure.append(error)
        raise
