"""A build's events as they happen, across broken connections."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from penstock.client.errors import PenstockError, StreamBroken, Unavailable, error_for
from penstock.client.http import Http, limits
from penstock.client.model import Build, BuildEnded, BuildEvent, BuildLogged, BuildStatus, LogEntry, LogLine, Problem
from penstock.client.sse import Message, Parser

SILENCE_SECONDS = 60.0
"""The server sends something at least every 15 s; after so long without, the connection is dead."""


async def build_events(http: Http, path: str, last_event_id: str, patience: float) -> AsyncGenerator[BuildEvent, None]:
    """Every event once, up to BuildEnded. Raises StreamBroken after `patience` seconds without any, other PenstockErrors as the server gives them."""
    last = last_event_id
    loop = asyncio.get_running_loop()
    heard: float | None = None
    pause, reached = 0.1, http.reached
    while True:
        try:
            async with aclosing(_messages(http, path, last)) as messages:
                async for message in messages:
                    heard, pause = loop.time(), 0.1
                    last = message.id
                    event = _event(http, message)
                    if event is not None:
                        yield event
                    if isinstance(event, BuildEnded):
                        return
            broken = Unavailable("it was closed before the build's end")
        except Unavailable as error:
            if heard is None and last == "" and not reached:  # it never was a stream: the caller is told at once what is wrong
                heard = loop.time() - patience + 1.0
            broken = error
        if heard is None:
            heard = loop.time()
        if loop.time() - heard + pause > patience:
            raise StreamBroken(f"the build's event stream broke and could not be taken up again: {broken}") from broken
        await asyncio.sleep(pause)
        pause = min(pause * 2, 2.0)


async def _messages(http: Http, path: str, last: str) -> AsyncGenerator[Message, None]:
    """The messages of one connection, until it ends or breaks (Unavailable)."""
    headers = {"Accept": "text/event-stream", "Cache-Control": "no-store"}
    if last:
        headers["Last-Event-ID"] = last
    async with http.open("GET", path, headers=headers, timeout=limits(SILENCE_SECONDS), read_bufsize=2**18) as response:
        if response.content_type != "text/event-stream":
            raise PenstockError(f"{http.url} answered with {response.content_type} where an event stream is due")
        parser = Parser(last)
        async for data in response.content.iter_any():
            for message in parser.feed(data):
                yield message


def _event(http: Http, message: Message) -> BuildEvent | None:
    """A message as an event; None for kinds that a newer server may send."""
    match message.event:
        case "status":
            return BuildStatus(message.id, http.decoded(message.data, Build))
        case "log":
            entry = http.decoded(message.data, LogEntry)
            line = LogLine(line=entry.line, step=entry.step, stream=entry.stream, at=entry.at, text=entry.text)
            return BuildLogged(message.id, entry.stage, entry.attempt, line)
        case "end":
            return BuildEnded(message.id, http.decoded(message.data, Build))
        case "error":
            raise error_for(http.decoded(message.data, Problem))
    return None
