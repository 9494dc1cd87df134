"""Server-sent events: how messages are written, and how a connection that takes none ends."""

import asyncio
from collections.abc import AsyncIterator

from aiohttp import web
from aiohttp_sse import EventSourceResponse

from libs.runtime.http import Problem

TAKE_SECONDS = 60.0


def message(event: str, token: str, data: bytes) -> bytes:
    """One message; `data` is JSON, which holds no raw newline."""
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (token.encode(), event.encode(), data)


class Streams:
    """The open streams, which end when the service drains: clients come back with Last-Event-ID, to another instance if there is one."""

    def __init__(self, heartbeat: float, stall: float) -> None:
        self._heartbeat = heartbeat
        self._stall = stall
        self._open: set[asyncio.Task[object]] = set()

    def close(self) -> None:
        for task in self._open:
            task.cancel()

    async def respond(self, request: web.Request, messages: AsyncIterator[bytes]) -> web.StreamResponse:
        """Write messages as they come, with a comment now and then. A client that takes nothing for `stall` seconds is cut off (FAULTS 18)."""
        response = EventSourceResponse(ping_interval=self._heartbeat, send_timeout=self._stall)
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        try:
            await response.prepare(request)
            async with response:
                async for piece in messages:
                    try:
                        async with asyncio.timeout(self._stall):
                            await response.write(piece)
                    except TimeoutError:
                        cut(request)
                        raise ConnectionResetError("the client takes nothing") from None
        finally:
            self._open.discard(task)
        return response


async def send(request: web.Request, response: web.StreamResponse, piece: bytes) -> None:
    """Write a piece of a long answer; a client that takes nothing for TAKE_SECONDS is cut off."""
    try:
        async with asyncio.timeout(TAKE_SECONDS):
            await response.write(piece)
    except TimeoutError:
        cut(request)
        raise ConnectionResetError("the client takes nothing") from None


def cut(request: web.Request) -> None:
    """End the connection at once."""
    if request.transport is not None:
        request.transport.abort()


def last_event_id(request: web.Request) -> str | None:
    """Where the client was, or None. Raises Problem 400 for what is too long to be ours."""
    token = request.headers.get("Last-Event-ID") or request.query.get("last_event_id")
    if token is not None and len(token) > 8000:
        raise bad_token()
    return token or None


def bad_token() -> Problem:
    return Problem(400, "bad-last-event-id", "This Last-Event-ID is none of ours", "leave it away to start from the beginning")
