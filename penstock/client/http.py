"""One HTTP call after another to one server: the token, the retries, and problems as exceptions.

A call that may be repeated is repeated when the server cannot be reached or says that it is busy, for as long as `patience` seconds once it has
answered before, and for a moment when it never has: then it most likely is not running, and somebody waits to be told.
"""

import asyncio
import ipaddress
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlencode

import msgspec
import yarl

from penstock.client.errors import NotThere, PenstockError, Unavailable, error_for
from penstock.client.model import Direct, Problem

if TYPE_CHECKING:
    import aiohttp  # slow to import: only when a call is made, so that `--help` answers at once

T = TypeVar("T")

CONNECT_SECONDS = 10.0
DIRECT_CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 60.0
NEVER_REACHED_PATIENCE = 0.5
LONGEST_PAUSE = 60.0
LARGEST_PROBLEM = 64 * 1024


class Http:
    """Calls relative to `url`; an async context manager. Errors: PenstockError and nothing else."""

    def __init__(self, url: str, token: str, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.url = url.rstrip("/")
        self._token = token
        self._patience = patience
        self._clock = clock
        self._reached = False
        self._session: aiohttp.ClientSession | None = None
        self._not_there: set[str] = set()

    @property
    def reached(self) -> bool:
        """Whether the server has ever answered."""
        return self._reached

    async def __aenter__(self) -> "Http":
        if not self._token.isprintable():
            raise PenstockError("the token holds what no token can, like the end of a line: log in again with `penstock login`")
        headers = {"User-Agent": "penstock", "Accept-Encoding": "identity"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        import aiohttp

        self._session = aiohttp.ClientSession(headers=headers, timeout=limits(ANSWER_SECONDS), raise_for_status=False, auto_decompress=False)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._session:
            await self._session.close()
            self._session = None

    async def get(
        self, path: str, answer: type[T], params: Mapping[str, str | bytes | int] | None = None, headers: Mapping[str, str] | None = None
    ) -> T:
        """GET, repeated while the server is away."""
        return await self.repeated(lambda: self._ask("GET", path, answer, params=params, headers=headers))

    async def send(
        self, method: str, path: str, answer: type[T], body: object = None, headers: Mapping[str, str] | None = None, wait: float = 0
    ) -> T:
        """A call that may be repeated, with a JSON body; `wait`: how much longer than usual the answer may take, in seconds."""
        data = None if body is None else msgspec.json.encode(body)
        sent = {**({"Content-Type": "application/json"} if data is not None else {}), **(headers or {})}
        return await self.repeated(lambda: self._ask(method, path, answer, data=data, headers=sent, timeout=limits(ANSWER_SECONDS + wait)))

    def direct(self, offered: Direct | None) -> Direct | None:
        """What is offered, if it is of use: it was not found wanting before, is no less private than the server, and not this machine unless the
        server is this machine, too."""
        if offered is None:
            return None
        url = yarl.URL(offered.url)
        private = url.scheme == "https" or (url.scheme == "http" and yarl.URL(self.url).scheme == "http")
        usable = private and (is_loopback(self.url) or not is_loopback(offered.url)) and _origin(offered) not in self._not_there
        return offered if usable else None

    async def delete(self, path: str) -> None:
        """DELETE, repeated while the server is away."""
        await self.tell("DELETE", path)

    async def tell(self, method: str, path: str, body: object = None) -> None:
        """A call that may be repeated and has no answer, with a JSON body."""
        sent: dict[str, Any] = {} if body is None else {"data": msgspec.json.encode(body), "headers": {"Content-Type": "application/json"}}

        async def once() -> None:
            async with self.open(method, path, **sent):
                pass

        await self.repeated(once)

    async def _ask(self, method: str, path: str, answer: type[T], **request: Any) -> T:
        async with self.open(method, path, **request) as response:
            body = await response.read()
        return self.decoded(body, answer)

    def decoded(self, body: bytes | str, answer: type[T]) -> T:
        """The answer as its type. Raises PenstockError when it is something else."""
        try:
            return msgspec.json.decode(body, type=answer)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise PenstockError(
                f"{self.url} gave an answer that this client does not understand ({error}): is it a Penstock, and as new as this?"
            ) from error

    @asynccontextmanager
    async def open(
        self, method: str, path: str, params: Mapping[str, str | bytes | int] | None = None, at: Direct | None = None, **request: Any
    ) -> AsyncIterator["aiohttp.ClientResponse"]:
        """One try: the response, its body still to be read. Raises PenstockError for an answer that is a problem, Unavailable when there is none,
        also while the body is read. Bytes in the query go as they are. With `at` it is made there; raises NotThere when that takes us for
        nobody, is nobody, or breaks off: it is not offered again by `direct`."""
        if self._session is None:
            raise RuntimeError("use the client as an async context manager: `async with Client(…) as client:`")
        import aiohttp

        try:
            url = yarl.URL(at.url if at else f"{self.url}{path}?{urlencode(params)}" if params else self.url + path, encoded=True)
            if at:
                request["headers"] = {**request.get("headers", {}), "Authorization": f"Bearer {at.token}"}
            async with self._session.request(method, url, allow_redirects=False, **request) as response:
                if at and (response.status in (401, 403) or (response.status >= 300 and response.content_type != "application/problem+json")):
                    if response.status != 401:  # only too old, perhaps
                        self._not_there.add(_origin(at))
                    raise NotThere(f"{_origin(at)} answered {response.status}")
                self._reached = True
                if response.status >= 300:
                    raise _error(response, await response.content.read(LARGEST_PROBLEM))
                yield response
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
            raise PenstockError(f"`{self.url}` is no URL: it looks like http://127.0.0.1:7420") from error
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            if at:
                self._not_there.add(_origin(at))
                raise NotThere(f"cannot reach {_origin(at)}") from error
            raise Unavailable(f"cannot reach {self.url}: " + _advice(self.url)) from error
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self.broken_off(at, str(error) or type(error).__name__) from error

    def broken_off(self, at: Direct | None, why: str) -> Unavailable:
        """What a request ends in that began well: somebody between here and a direct address may let nothing pass, and the server itself is then
        asked instead."""
        if at is None:
            return Unavailable(f"the connection to {self.url} broke ({why})")
        self._not_there.add(_origin(at))
        return NotThere(f"the connection to {_origin(at)} broke ({why})")

    async def repeated(self, call: Callable[[], Awaitable[T]], patience: float | None = None) -> T:
        """The call's answer, tried again with growing pauses while it raises Unavailable and there is patience."""
        waiting = self.waiting(patience)
        while True:
            try:
                return await call()
            except Unavailable as error:
                await waiting.after(error)

    def waiting(self, patience: float | None = None) -> "Waiting":
        """Patience for something that is tried again; that of the client when no seconds are given."""
        return Waiting(self._clock, lambda: (self._patience if patience is None else patience) if self._reached else NEVER_REACHED_PATIENCE)


class Waiting:
    """The pauses between tries of one thing: growing, as long as the server asks for, and over when nothing has moved for too long."""

    def __init__(self, clock: Callable[[], float], patience: Callable[[], float]) -> None:
        self._clock = clock
        self._patience = patience
        self.moved()

    def moved(self) -> None:
        """There is progress: patience begins anew."""
        self._began = self._clock()
        self._pause = 0.05

    def excuse(self, seconds: float) -> None:
        """Something may be moving: so much time does not count."""
        self._began += seconds

    async def after(self, error: Unavailable) -> None:
        """Pause before the next try. Raises the error when there is no patience left."""
        pause = max(self._pause, error.retry_after)
        if self._clock() - self._began + pause > self._patience():
            raise error
        await asyncio.sleep(pause * random.uniform(1.0, 1.2) if error.retry_after else pause * random.uniform(0.5, 1.0))  # noqa: S311
        self._pause = min(self._pause * 2, 1.0)


def limits(answer: float, connect: float = CONNECT_SECONDS) -> "aiohttp.ClientTimeout":
    """Of one request: seconds to connect in, and seconds without a byte."""
    import aiohttp

    return aiohttp.ClientTimeout(total=None, sock_connect=connect, sock_read=answer)


def is_loopback(url: str) -> bool:
    """Whether the server is on this machine, where compressing costs more than it saves."""
    host = yarl.URL(url).host or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _advice(url: str) -> str:
    return "is it running? start it with `penstock up`" if is_loopback(url) else "is the URL right, and is there a way to it from here?"


def _origin(direct: Direct) -> str:
    return str(yarl.URL(direct.url).origin())


def _error(response: "aiohttp.ClientResponse", body: bytes) -> PenstockError:
    error = error_for(_problem(response, body))
    asked = response.headers.get("Retry-After", "")
    if isinstance(error, Unavailable) and asked.isascii() and asked.isdigit():
        error.retry_after = min(float(asked), LONGEST_PAUSE)
    return error


def _problem(response: "aiohttp.ClientResponse", body: bytes) -> Problem:
    """What the server says went wrong; made up from the status when the answer is not a problem (a proxy's page)."""
    if response.content_type.endswith("json"):
        try:
            return msgspec.structs.replace(msgspec.json.decode(body, type=Problem), status=response.status)
        except msgspec.MsgspecError:
            pass
    if 300 <= response.status < 400:
        return Problem(status=response.status, detail=f"the server sends us on to {response.headers.get('Location', 'somewhere else')}: use that URL")
    return Problem(
        status=response.status, title=response.reason or "", detail=f"the server answered {response.status} {response.reason or ''}".rstrip()
    )
