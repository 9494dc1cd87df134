"""The parts of a live watch that need no server: order, cutting, tokens, the shared buffer, the description of the API."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
import schemathesis
from hypothesis import given as for_all
from hypothesis import strategies as st

from libs.runtime.http import Problem
from proto.api.builds import Build, Submission
from proto.messages import Attempt, LogChunk, Segment, count_lines
from services.gateway.broadcast import Broadcast
from services.gateway.logs import ChunkOrder, cut, lines_from
from services.gateway.openapi import document
from services.gateway.routes.endpoint import Endpoint, Parameter
from services.gateway.watch import Resume, resume


def chunk(number: int, first: int = 0, *texts: bytes) -> LogChunk:
    return LogChunk(attempt=Attempt("b", "s", 1), number=number, first_line=first, segments=[Segment("run", "stdout", 1, text) for text in texts])


@for_all(st.permutations(range(1, 9)), st.lists(st.integers(1, 8)))
def test_chunks_in_any_order_and_repeated_come_out_once_in_order(order: list[int], repeats: list[int]) -> None:
    chunks = ChunkOrder()
    assert [c.number for number in [*order, *repeats] for c in chunks.take(chunk(number))] == list(range(1, 9))
    assert chunks.next == 9


def test_what_waits_behind_a_gap_can_be_had() -> None:
    chunks = ChunkOrder()
    assert [c for n in (4, 2, 5) for c in chunks.take(chunk(n))] == []
    assert [c.number for c in chunks.rest()] == [2, 4, 5]
    assert chunks.take(chunk(5)) == []


@for_all(st.lists(st.sampled_from([b"a\n", b"\n", b"b\nc\n", b"unfinished"]), min_size=1, max_size=6), st.integers(0, 12))
def test_lines_from_any_line_are_the_tail_of_all_lines(texts: list[bytes], first: int) -> None:
    def numbered(found: list[tuple[int, Segment]]) -> list[tuple[int, bytes]]:
        return [(line + i, text) for line, segment in found for i, text in enumerate(segment.data.splitlines(keepends=True))]

    everything = numbered(lines_from(0, chunk(1, 0, *texts)))
    assert [line for line, _ in everything] == list(range(sum(map(count_lines, texts))))
    assert numbered(lines_from(first, chunk(1, 0, *texts))) == [pair for pair in everything if pair[0] >= first]


def test_a_carriage_return_ends_no_line() -> None:
    assert cut(0, Segment("run", "stdout", 1, b"10%\r20%\r\nnext\n"), 1) == (1, Segment("run", "stdout", 1, b"next\n"))


@for_all(st.integers(0, 10**17), st.dictionaries(st.tuples(st.integers(0, 255), st.integers(0, 10)), st.integers(0, 10**9), max_size=5))
def test_a_resume_token_says_where_a_watcher_was(position: int, lines: dict[tuple[int, int], int]) -> None:
    place = Resume(position, lines)
    assert resume(place.token()) == place


@pytest.mark.parametrize("token", ["", "x", "1.", "1.2", "1.2-3", "-1", "1.1-1-1;", "9" * 40])
def test_a_token_that_is_none_of_ours_is_refused(token: str) -> None:
    with pytest.raises(Problem) as caught:
        resume(token)
    assert caught.value.status == 400


async def read_all(broadcast: Broadcast, place: int = 0) -> bytes:
    reader = broadcast.join(place, lambda: None)
    try:
        async with aclosing(broadcast.read(reader)) as pieces:
            return b"".join([piece async for piece in pieces])
    finally:
        broadcast.leave(reader)


async def test_readers_that_come_at_any_time_get_everything() -> None:
    broadcast = Broadcast(1 << 20, 1.0)
    early = asyncio.create_task(read_all(broadcast))
    for number in range(100):
        await broadcast.append(str(number), b"%d," % number)
        if number % 10 == 0:
            await asyncio.sleep(0)
    late = asyncio.create_task(read_all(broadcast))
    place = broadcast.place_after("97")
    assert place is not None
    resumed = asyncio.create_task(read_all(broadcast, place))
    await asyncio.sleep(0)
    broadcast.end()
    assert await early == await late == b"".join(b"%d," % n for n in range(100))
    assert await resumed == b"98,99,"
    assert broadcast.place_after("unknown") is None


async def test_a_reader_that_takes_nothing_is_dropped_and_the_others_go_on() -> None:
    """FAULTS 18"""
    broadcast = Broadcast(1000, 0.05)
    dropped = asyncio.Event()
    stuck = broadcast.join(0, dropped.set)
    reading = asyncio.create_task(read_all(broadcast))
    for _ in range(50):
        await broadcast.append("t", b"x" * 100)
        await asyncio.sleep(0)
    broadcast.end()
    assert len(await reading) == 5000
    assert dropped.is_set()
    assert stuck.dropped
    assert broadcast.place_after(None) is None  # a newcomer needs another


def test_the_description_of_the_api_is_valid() -> None:
    async def handler(request: Any, principal: Any) -> Any: ...

    endpoints = [
        Endpoint(
            method="POST",
            path="/teams/{team}/builds",
            summary="s",
            handler=handler,
            body=Submission,
            parameters=(Parameter(name="limit", about="a", schema=int),),
            answers={202: Build},
        ),
        Endpoint(method="GET", path="/x", summary="s", handler=handler, least=None, answers={200: (Build, "text/event-stream"), 304: None}),
    ]
    found = document(endpoints, "1", "http://127.0.0.1:1")
    schemathesis.openapi.from_dict(found).validate()
    assert found["paths"]["/api/v1/x"]["get"]["security"] == []
    assert "Plan" in found["components"]["schemas"]
