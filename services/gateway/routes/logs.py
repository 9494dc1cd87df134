"""A build live (server-sent events), and its log by range."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

import msgspec
from aiohttp import web

from libs.bus.bus import BusUnavailable
from libs.runtime.http import Problem, unavailable
from proto.api.bodies import ProblemDetails
from proto.api.builds import Build
from proto.api.logs import LogEvent, LogLine, LogPage
from proto.messages import count_lines
from services.gateway.artifacts import ArchiveUnavailable
from services.gateway.auth import Principal
from services.gateway.logs import Line, LogReader, shown
from services.gateway.projection import BuildRow
from services.gateway.refusals import invalid
from services.gateway.routes.builds import BuildRoutes
from services.gateway.routes.endpoint import LAST_EVENT, Endpoint, Parameter, answer, number
from services.gateway.sse import Streams, cut, last_event_id, send
from services.gateway.watch import Hub, resume

MAX_LINES = 10_000
MAX_PAGE_BYTES = 4 << 20
PIECE = 64 << 10


class LogRoutes:
    def __init__(self, *, builds: BuildRoutes, hub: Hub, streams: Streams, reader: LogReader) -> None:
        self._builds = builds
        self._hub = hub
        self._streams = streams
        self._reader = reader

    def endpoints(self) -> list[Endpoint]:
        build = "/teams/{team}/builds/{build}"
        return [
            Endpoint(
                method="GET",
                path=build + "/events",
                summary="The build as it goes: `status` (a whole Build, at once and at each change), `log` (consecutive lines), "
                "`end` (the Build; the log is complete), `error` (a problem; come back)",
                handler=self.events,
                parameters=LAST_EVENT,
                answers={200: (Build, LogEvent, "text/event-stream"), 400: ProblemDetails},
            ),
            Endpoint(
                method="GET",
                path=build + "/log",
                summary="The log of an attempt: plain text as it was written, or numbered lines with `Accept: application/json`",
                handler=self.log,
                parameters=(
                    Parameter(name="stage", about="left away: the one that there is, or as text all, one after another"),
                    Parameter(name="attempt", about="left away: the last", schema=int),
                    Parameter(name="from", about="first line, from 0", schema=int),
                    Parameter(name="limit", about=f"at most this many lines (as JSON at most {MAX_LINES} or some 4 MiB, then ask on)", schema=int),
                ),
                answers={200: (LogPage, "text/plain")},
            ),
        ]

    async def events(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        row = await self._builds.find(request, principal)
        token = last_event_id(request)
        if token is not None:
            resume(token)
        async with aclosing(self._hub.messages(row, token, partial(cut, request))) as messages:
            return await self._streams.respond(request, messages)

    async def log(self, request: web.Request, principal: Principal) -> web.StreamResponse:
        row = await self._builds.find(request, principal)
        as_json = "application/json" in request.headers.get("Accept", "")
        parts = _parts(request, row, one=as_json)
        first = number(request, "from", 0) or 0
        limit = number(request, "limit", None, 1)
        try:
            if as_json:
                return answer(await self._page(row, *parts[0], first, min(limit or MAX_LINES, MAX_LINES)))
            return await self._text(request, row, parts, first, limit)
        except BusUnavailable:
            raise unavailable("the log cannot be read now") from None
        except ArchiveUnavailable as error:
            raise unavailable(f"the log cannot be read now: {error}") from None

    async def _page(self, row: BuildRow, stage: str, attempt: int, first: int, limit: int) -> LogPage:
        ended: list[bool] = []
        lines: list[LogLine] = []
        size = 0
        async with aclosing(self._reader.lines(row, stage, attempt, first, ended.append)) as found:
            async for start, segment in found:
                for line, data in enumerate(_split(segment.data), start):
                    text, exactly = shown(data)
                    lines.append(LogLine(line=line, step=segment.step, stream=segment.stream, at=segment.at, text=text, text_base64=exactly))
                size += len(segment.data)
                if len(lines) > limit:
                    return LogPage(stage=stage, attempt=attempt, lines=lines[:limit], next=lines[limit].line)
                if size >= MAX_PAGE_BYTES:
                    break
        complete = ended == [True]
        following = None if complete else (lines[-1].line + 1 if lines else first)
        return LogPage(stage=stage, attempt=attempt, lines=lines, next=following, complete=complete)

    async def _text(self, request: web.Request, row: BuildRow, parts: list[tuple[str, int]], first: int, limit: int | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/plain; charset=utf-8", "X-Content-Type-Options": "nosniff"})
        buffered = bytearray()
        left = limit
        for stage, attempt in parts:
            async with aclosing(self._limited(row, stage, attempt, first, left)) as found:
                async for _, segment in found:
                    if not segment.step and buffered and not buffered.endswith(b"\n"):  # a mark, after the piece of a line
                        buffered += b"\n"
                    buffered += segment.data
                    left = None if left is None else left - count_lines(segment.data)
                    if len(buffered) >= PIECE:
                        if not response.prepared:
                            await response.prepare(request)
                        await send(request, response, bytes(buffered))
                        buffered.clear()
            if left == 0:
                break
        if not response.prepared:
            await response.prepare(request)
        await response.write_eof(bytes(buffered))
        return response

    async def _limited(self, row: BuildRow, stage: str, attempt: int, first: int, limit: int | None) -> AsyncGenerator[Line, None]:
        async with aclosing(self._reader.lines(row, stage, attempt, first, lambda _: None)) as found:
            async for line, segment in found:
                if limit is not None:
                    count = count_lines(segment.data)
                    if count >= limit:
                        yield line, msgspec.structs.replace(segment, data=b"".join(_split(segment.data)[:limit]))
                        return
                    limit -= count
                yield line, segment


def _split(data: bytes) -> list[bytes]:
    """Lines with their newlines: only `\\n` ends one."""
    pieces = [piece + b"\n" for piece in data.split(b"\n")]
    pieces[-1] = pieces[-1][:-1]
    return pieces if pieces[-1] else pieces[:-1]


def _parts(request: web.Request, row: BuildRow, one: bool) -> list[tuple[str, int]]:
    """The (stage, attempt) that are asked for. Raises Problem 404 for what there is not, 422 when one must be named."""
    wanted = request.query.get("stage")
    stages = [stage for stage in row.stages if wanted in (None, "", stage.name)]
    if not stages:
        raise Problem(404, "not-found", "There is no such thing", f"the build has no stage `{wanted}`")
    if len(stages) > 1 and (one or "from" in request.query or "attempt" in request.query):
        names = ", ".join(stage.name for stage in stages)
        raise invalid("stage", f"one of {names}")
    attempt = number(request, "attempt", None, 1)
    if attempt is not None and attempt > stages[0].attempt:
        raise Problem(404, "not-found", "There is no such thing", f"stage `{stages[0].name}` has no attempt {attempt}")
    return [(stage.name, attempt or stage.attempt) for stage in stages]
