"""What every HTTP edge does alike: strict JSON in, RFC 9457 problems out, bodies that are counted and paced, connections that may not dawdle.

aiohttp sets no timeout on headers, bodies or silent connections: `runner` serves with a protocol that does (FAULTS 6–9).
"""

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NoReturn, TypeVar

import msgspec
import structlog
from aiohttp import web
from aiohttp.http import HttpVersion11
from aiohttp.web_protocol import RequestHandler, RequestPayloadError
from aiohttp.web_server import Server

from libs.eventlog.log import LogUnavailable
from libs.runtime.decisions import Refused
from proto.envelope import UnreadableEvent

logger = structlog.get_logger()

T = TypeVar("T")

MAX_DEPTH = 64
"""How deep JSON may nest."""
MAX_HEADERS, MAX_HEADER = 64, 64 << 10
"""How many headers a request may have, and how long each: a build token names all inputs and outputs of its stage."""

_PIECE = 1 << 20
"""Bytes that one read of a widened socket may take: a fifth less processor time than with asyncio's 256 KiB."""
_ENOUGH = 1 << 20
"""Bytes that have to be there before a body that is read straight is looked at again."""
_STRAIGHT = 4 << 20
"""Bytes of a body that is worth reading straight."""
_STRAIGHTLY = web.RequestKey("straight", bool)
_REGEX = re.compile(r"Expected `str` matching regex '(.*)'")
_STRUCTURE = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[{]|[\]}]', re.DOTALL)
"""A string without an end matches too: looking for one again at each of its quotes would take time with the square of its length."""
_STATUS_OF_REFUSAL = {"conflict": 409, "invalid": 422, "too-large": 413, "forbidden": 403, "missing": 404}


class Timeouts(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds: `head` for a request's line and headers (also until the first byte), `keepalive` between requests, `shutdown` for open requests,
    `linger` for what a refused client still sends. A body brings at least `least_bytes` in every `body` seconds."""

    head: float = 10.0
    keepalive: float = 75.0
    shutdown: float = 3.0
    linger: float = 5.0
    body: float = 10.0
    least_bytes: int = 1024


TIMEOUTS = web.AppKey("timeouts", Timeouts)


class Problem(Exception):
    """An answer that is no success (RFC 9457). `slug` is for programs, `title` and `detail` are for people, `more` are extra members."""

    def __init__(self, status: int, slug: str, title: str, detail: str = "", headers: dict[str, str] | None = None, **more: object) -> None:
        super().__init__(detail or title)
        self.status = status
        self.headers = headers
        self.body = {
            "type": f"urn:penstock:problem:{slug}",
            "title": title,
            "status": status,
            "detail": detail,
            **{key: value for key, value in more.items() if value is not None},
        }

    def response(self) -> web.Response:
        return web.Response(status=self.status, body=msgspec.json.encode(self.body), content_type="application/problem+json", headers=self.headers)


def problem(status: int, slug: str, title: str, detail: str = "", **more: Any) -> web.Response:
    """The response of a Problem."""
    return Problem(status, slug, title, detail, **more).response()


def unavailable(detail: str) -> Problem:
    """503: nothing is known to have happened; try again."""
    return Problem(503, "unavailable", "Try again soon", detail, headers={"Retry-After": "1"})


# --- JSON ----------------------------------------------------------------------------------------------------------------------------


def strict_json(body: bytes, cls: type[T]) -> T:
    """Decode a body. Raises Problem: 400 for what is no JSON (with its position), repeats a key, holds NaN or NUL, or nests too deep; 422 for what is
    JSON but not a `cls`, naming the path."""
    _check_depth(body)
    try:
        text = body.decode("utf-8")
        loose = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise _malformed(f"not UTF-8 at byte {error.start}", position=error.start) from None
    except json.JSONDecodeError as error:
        raise _malformed(f"{error.msg} at line {error.lineno}, column {error.colno}", position=error.pos) from None
    except (ValueError, RecursionError) as error:
        raise _malformed(str(error)) from None
    if "\\u0000" in text and _holds_nul(loose):
        raise _malformed("a string holds a NUL")
    try:
        return msgspec.json.decode(body, type=cls)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `")
        path = path.rstrip("`").removeprefix("$").removeprefix(".")
        if match := _REGEX.fullmatch(message):
            message = f"must be of this form: {_described(match[1], cls)}"
        raise Problem(422, "invalid", "The request does not say what it must", f"{path}: {message}" if path else message, path=path) from None
    except msgspec.DecodeError as error:
        raise _malformed(str(error)) from None


def _described(pattern: str, cls: type[Any]) -> str:
    """A pattern in the words that its type has for it."""
    types = msgspec.json.schema(cls)

    def find(schema: Any) -> Iterator[str]:
        if isinstance(schema, dict) and schema.get("pattern") == pattern and "description" in schema:
            yield schema["description"]
        for inner in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
            yield from find(inner)

    return next(find(types), pattern)


def _check_depth(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for match in _STRUCTURE.finditer(body):
        first = body[match.start()]
        if first in b"[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise _malformed(f"nested deeper than {MAX_DEPTH} at byte {match.start()}", position=match.start())
        elif first in b"]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is given twice in one object")
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _holds_nul(value: object) -> bool:
    match value:
        case str():
            return "\0" in value
        case list():
            return any(map(_holds_nul, value))
        case dict():
            return any(_holds_nul(key) or _holds_nul(item) for key, item in value.items())
    return False


def _malformed(detail: str, position: int | None = None) -> Problem:
    return Problem(400, "malformed", "The body is not JSON", detail, position=position)


# --- bodies --------------------------------------------------------------------------------------------------------------------------


async def read_body(request: web.Request, limit: int) -> bytes:
    """The whole body, at most `limit` bytes. Raises Problem 413 (at once when the length is declared, else once counted), 408 when it dawdles."""
    return b"".join([chunk async for chunk in body_chunks(request, limit)])


async def body_chunks(request: web.Request, limit: int | None = None) -> AsyncIterator[bytes]:
    """The body as it comes. The client is told to go on (100) only now, so whoever is refused beforehand sends nothing.
    Time that the consumer takes is not counted against the client. Raises Problem 413, 408."""
    if limit is not None and (request.content_length or 0) > limit:
        raise _too_large(limit)
    await _tell_to_go_on(request)
    timeouts = request.app.get(TIMEOUTS, Timeouts())
    clock = asyncio.get_running_loop().time
    total = in_window = 0
    window = clock() + timeouts.body
    while True:
        try:
            async with asyncio.timeout_at(window):
                chunk = await request.content.readany()
        except TimeoutError:
            chunk = None
        if chunk is None or clock() > window:
            if in_window + len(chunk or b"") < timeouts.least_bytes and chunk != b"":
                raise _too_slow(timeouts)
            in_window, window = 0, clock() + timeouts.body
            if chunk is None:
                continue
        if not chunk:
            return
        total += len(chunk)
        in_window += len(chunk)
        if limit is not None and total > limit:
            raise _too_large(limit)
        handed_over = clock()
        yield chunk
        window += clock() - handed_over


class StraightBody:
    """A body that is read from its socket into the caller's own memory, past aiohttp, which would copy it twice in small pieces."""

    def __init__(self, request: web.Request, sock: socket.socket, early: bytes, size: int) -> None:
        """`early`: what has come of its `size` bytes already."""
        self._request = request
        self._socket = sock
        self._early = early
        self._told = bool(early)
        self._timeouts = request.app.get(TIMEOUTS, Timeouts())
        self.left = size

    async def into(self, memory: memoryview) -> int:
        """As many bytes as fit, or as came within the time that a body has; 0 at its end. Raises Problem 408, ConnectionResetError."""
        if not self._told:
            self._told = True
            await _tell_to_go_on(self._request)
        memory = memory[: self.left]
        came = len(self._early[: len(memory)])
        memory[:came], self._early = self._early[:came], self._early[came:]
        try:
            async with asyncio.timeout(self._timeouts.body):
                while came < len(memory):
                    if got := self._read(memory[came:]):
                        came += got
                    else:
                        await self._readable(min(len(memory) - came, _ENOUGH))
        except TimeoutError:
            came += self._read(memory[came:])
            if came < min(self._timeouts.least_bytes, len(memory)):
                raise _too_slow(self._timeouts) from None
        self.left -= came
        return came

    def _read(self, memory: memoryview) -> int:
        """0: nothing is there."""
        try:
            came = self._socket.recv_into(memory)
        except BlockingIOError:
            return 0
        if not came:
            raise ConnectionResetError("the body was cut short")
        return came

    async def _readable(self, enough: int) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, enough)
        loop.add_reader(self._socket, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._socket)


@contextlib.contextmanager
def straight(request: web.Request) -> Iterator[StraightBody | None]:
    """The body so; None where that cannot be, or is not worth it: it is short, of no declared length, or not what the socket has. The connection is
    closed after the answer, as aiohttp has not seen all that came."""
    transport, size = request.transport, request.content_length or 0
    sock = transport.get_extra_info("socket") if transport is not None else None
    if transport is None or sock is None or transport.get_extra_info("sslcontext") is not None or size < _STRAIGHT:
        yield None
        return
    request[_STRAIGHTLY] = True
    early = bytearray()
    transport.pause_reading()
    while piece := request.content.read_nowait():
        early += piece
        transport.pause_reading()
    transport.pause_reading()
    with socket.fromfd(sock.fileno(), sock.family, sock.type) as own:
        own.setblocking(False)
        try:
            body = StraightBody(request, own, bytes(early), size)
            yield body
            if not body.left:
                request.content.feed_eof()
        finally:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
            transport.resume_reading()


def widen(transport: asyncio.BaseTransport | None) -> None:
    """Bytes that come in masses are read from the socket in larger pieces than asyncio's."""
    if isinstance(getattr(transport, "max_size", None), int):
        transport.max_size = _PIECE  # type: ignore[union-attr]


def _too_large(limit: int) -> Problem:
    return Problem(413, "too-large", "The body is too large", f"at most {limit} bytes", limit=limit)


def _too_slow(timeouts: Timeouts) -> Problem:
    return Problem(408, "slow-body", "The body came too slowly", f"under {timeouts.least_bytes} bytes in {timeouts.body:g} s")


async def _tell_to_go_on(request: web.Request) -> None:
    if request.headers.get("Expect", "").lower() == "100-continue" and request.version == HttpVersion11:
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # the answer itself has not begun


async def expect_later(_: web.Request) -> None:
    """An `expect_handler` that leaves `100 Continue` to `body_chunks`."""


# --- errors --------------------------------------------------------------------------------------------------------------------------


@web.middleware
async def problems(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    """Answer every error as a problem. Of an unforeseen one the client learns nothing but that it happened."""
    try:
        response = await handler(request)
        if _STRAIGHTLY in request:
            response.force_close()
        return response
    except web.HTTPException as error:
        if error.status < 400:
            raise
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        failure = Problem(error.status, error.reason.lower().replace(" ", "-"), error.reason, headers=headers)
    except Problem as error:
        failure = error
    except Refused as error:
        failure = Problem(_STATUS_OF_REFUSAL.get(error.kind, 409), error.kind, "The request was refused", error.message)
    except UnreadableEvent as error:
        logger.error("a request needs an event that cannot be read", path=request.path, why=str(error))
        advice = "run a version of this service that can read it, or have whoever runs the server mend the log"
        failure = Problem(503, "unreadable-event", "The log cannot be read here", f"{error}; {advice}", headers={"Retry-After": "60"})
    except LogUnavailable as error:
        logger.warning("unavailable", why=str(error), path=request.path)
        failure = unavailable("the log cannot be reached")
    except RequestPayloadError as error:
        failure = Problem(400, "malformed", "The body is not what its headers say", str(error))
    except ConnectionError:
        raise
    except Exception as error:
        logger.error("a request failed", method=request.method, path=request.path, exc_info=error)
        failure = Problem(500, "internal", "Something is wrong here", "the server's log says more")
    if request.writer.output_size > 0:
        if request.transport is not None:
            request.transport.abort()  # a cut is the only way left to say that the answer is not whole
        raise ConnectionResetError("the answer was cut short")
    answer = failure.response()
    if _STRAIGHTLY in request:
        answer.force_close()
    return answer


# --- connections ---------------------------------------------------------------------------------------------------------------------


class _PunctualHandler(RequestHandler):
    """aiohttp's connection, closed when a request's head is not whole `head` seconds after the connection, or its first byte, came."""

    __slots__ = ("_head_seconds", "_head_timer")

    def __init__(self, server: Server, head_seconds: float, **options: Any) -> None:
        super().__init__(server, **options)
        self._head_seconds = head_seconds
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._start()

    def data_received(self, data: bytes) -> None:
        heads = self._request_count
        super().data_received(data)
        if self._request_count != heads:
            self._stop()
        elif data and self._head_timer is None and self._waiter is not None and not self._waiter.done():
            self._start()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _start(self) -> None:
        self._head_timer = self._loop.call_later(self._head_seconds, self.force_close)

    def _stop(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """What is no HTTP, or fails outside the middleware."""
        if request.writer.output_size > 0:
            raise ConnectionResetError("the answer was cut short")
        if status >= 500 and not isinstance(exc, ConnectionError):  # nobody is there any more: no fault of ours
            logger.error("a request failed", exc_info=exc)
        title = "This is not HTTP" if status == 400 else "Something is wrong here"
        answer = problem(status, "malformed" if status == 400 else "internal", title, (message or "").partition("\n")[0])
        answer.force_close()
        return answer


class _PunctualServer(Server):
    def __init__(self, server: Server, timeouts: Timeouts) -> None:
        super().__init__(server.request_handler, request_factory=server.request_factory)
        self._timeouts = timeouts

    def __call__(self) -> RequestHandler:
        return _PunctualHandler(
            self,
            self._timeouts.head,
            loop=self._loop,
            keepalive_timeout=self._timeouts.keepalive,
            lingering_time=self._timeouts.linger,
            access_log=None,
            max_headers=MAX_HEADERS,
            max_field_size=MAX_HEADER,
            auto_decompress=False,  # bytes are passed on as they come, and a small body cannot become a large one
        )


class _PunctualRunner(web.AppRunner):
    def __init__(self, app: web.Application, timeouts: Timeouts) -> None:
        super().__init__(app, access_log=None, shutdown_timeout=timeouts.shutdown)
        self._timeouts = timeouts

    async def _make_server(self) -> Server:
        return _PunctualServer(await super()._make_server(), self._timeouts)


def runner(app: web.Application, timeouts: Timeouts | None = None) -> web.AppRunner:
    """Serves an application with the timeouts above (the application's own under TIMEOUTS, unless given)."""
    return _PunctualRunner(app, timeouts or app.get(TIMEOUTS, Timeouts()))
