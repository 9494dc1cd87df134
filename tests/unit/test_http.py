"""libs/runtime/http: strict JSON, problems, bodies, and connections that dawdle."""

import asyncio
import contextlib
import hashlib
import json
import os
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

import msgspec
import pytest
from aiohttp import ClientSession, web
from structlog.testing import capture_logs

from libs.eventlog.log import LogUnavailable
from libs.runtime.decisions import Refused
from libs.runtime.http import TIMEOUTS, Problem, Timeouts, expect_later, problems, read_body, runner, straight, strict_json


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    tag: Annotated[str, msgspec.Meta(pattern="^[a-z]+$", description="lower-case letters")] = "a"
    extra: Any = None


class Body(msgspec.Struct, forbid_unknown_fields=True):
    inner: list[Inner]


ESCAPES = b'\\"' * 400_000
KEYS = b",".join(b'"%d":0' % i for i in range(80_000))


def refused(body: bytes) -> dict[str, Any]:
    with pytest.raises(Problem) as caught:
        strict_json(body, Body)
    return caught.value.body


def test_what_is_right_is_decoded() -> None:
    assert strict_json(b'{"inner": [{"name": "a"}]}', Body) == Body([Inner("a")])


def test_what_has_not_the_form_that_it_must_have_is_told_so_in_words() -> None:
    said = refused(b'{"inner": [{"name": "a", "tag": "a b"}]}')
    assert (said["status"], said["detail"]) == (422, "inner[0].tag: must be of this form: lower-case letters")


@pytest.mark.parametrize("body", [b"{", b'{"inner": [}', b"", b'{"inner": [{"name": "a"}]} x', b"{'inner': []}"])
def test_malformed_json_is_answered_with_its_position(body: bytes) -> None:
    """FAULTS 1"""
    found = refused(body)
    assert found["status"] == 400
    assert "line 1, column" in found["detail"]
    assert isinstance(found["position"], int)


def test_a_key_given_twice_is_refused_by_name() -> None:
    """FAULTS 2"""
    found = refused(b'{"inner": [{"name": "a", "name": "b"}]}')
    assert found["status"] == 400
    assert "'name'" in found["detail"]


def cpu_seconds(act: Callable[[], object]) -> float:
    """What this process computes meanwhile: others may be busy."""
    began = time.process_time()
    act()
    return time.process_time() - began


@pytest.mark.parametrize(
    ("wrong", "extra"),
    [
        (b"[]" * 65 + b'"' + ESCAPES, b'"' + ESCAPES + b'"'),
        (b"{" + KEYS + b',"79999":1}', b"{" + KEYS + b"}"),
    ],
    ids=["a string without an end", "many keys and one twice"],
)
def test_refusing_takes_no_longer_than_reading(wrong: bytes, extra: bytes) -> None:
    """It is done on the event loop, for whoever has a token. What is no longer in proportion takes a thousand times as long."""
    right = b'{"inner": [{"name": "a", "extra": ' + extra + b"}]}"
    reading = cpu_seconds(lambda: strict_json(right, Body))
    assert cpu_seconds(lambda: refused(wrong)) < 100 * reading


@pytest.mark.parametrize("constant", [b"NaN", b"Infinity", b"-Infinity"])
def test_what_is_no_number_is_refused(constant: bytes) -> None:
    """FAULTS 2"""
    assert refused(b'{"inner": [{"name": "a", "extra": ' + constant + b"}]}")["status"] == 400


@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_deep_nesting_is_refused(opening: bytes) -> None:
    """FAULTS 3"""
    started = time.process_time()
    found = refused(b'{"inner": [{"name": "a", "extra": ' + opening * 100_000)
    assert found["status"] == 400
    assert "nested" in found["detail"]
    assert time.process_time() - started < 1


def test_brackets_inside_strings_do_not_nest() -> None:
    text = '[{\\"' * 1000
    assert strict_json(b'{"inner": [{"name": "' + text.encode() + b'"}]}', Body).inner[0].name == '[{"' * 1000


@pytest.mark.parametrize("body", [b'{"inner": [{"name": "\xff"}]}', b'\xef\xbb\xbf{"inner": []}', b'{"inner": [{"name": "\\ud800"}]}', b"1" * 6000])
def test_text_that_is_not_unicode_is_refused(body: bytes) -> None:
    assert refused(body)["status"] == 400


def test_a_nul_is_refused_but_not_its_spelling() -> None:
    assert refused(b'{"inner": [{"name": "a\\u0000"}]}')["status"] == 400
    assert strict_json(b'{"inner": [{"name": "a\\\\u0000"}]}', Body).inner[0].name == "a\\u0000"


def test_an_unknown_field_is_refused_by_name() -> None:
    """FAULTS 10"""
    found = refused(b'{"inner": [{"name": "a", "nmae": 1}]}')
    assert found["status"] == 422
    assert found["path"] == "inner[0]"
    assert "nmae" in found["detail"]


def test_a_wrong_type_is_refused_with_its_path() -> None:
    found = refused(b'{"inner": [{"name": 1}]}')
    assert (found["status"], found["path"]) == (422, "inner[0].name")


# --- over real connections -----------------------------------------------------------------------------------------------------------


LIMIT = 1000


async def echo_length(request: web.Request) -> web.Response:
    return web.Response(text=str(len(await read_body(request, LIMIT))))


async def digest_straight(request: web.Request) -> web.Response:
    """What is read, in a size that fits nothing; the query's `stop` ends it in the middle."""
    found = hashlib.sha256()
    with straight(request) as body:
        assert body is not None
        memory = memoryview(bytearray(1_000_003))
        while came := await body.into(memory):
            found.update(memory[:came])
            if "stop" in request.query:
                raise Refused("conflict", "enough")
    return web.Response(text=found.hexdigest())


async def failing(request: web.Request) -> web.Response:
    match request.match_info["how"]:
        case "refused":
            raise Refused("conflict", "it has ended")
        case "log":
            raise LogUnavailable("secret detail")
        case _:
            raise RuntimeError("secret detail")


@contextlib.asynccontextmanager
async def serving(timeouts: Timeouts) -> AsyncIterator[int]:
    app = web.Application(middlewares=[problems])
    app[TIMEOUTS] = timeouts
    app.router.add_post("/echo", echo_length, expect_handler=expect_later)
    app.router.add_post("/straight", digest_straight, expect_handler=expect_later)
    app.router.add_get("/fail/{how}", failing)
    running = runner(app)
    await running.setup()
    site = web.TCPSite(running, "127.0.0.1", 0)
    await site.start()
    try:
        yield running.addresses[0][1]
    finally:
        await running.cleanup()


async def talk(port: int, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Send pieces; what came back until the server closed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    received = bytearray()

    async def read() -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                received.extend(data)

    try:
        async with asyncio.timeout(10), asyncio.TaskGroup() as group:
            group.create_task(read())
            with contextlib.suppress(ConnectionError):
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(pause)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    return bytes(received)


def problem_of(answer: bytes) -> dict[str, Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head
    found: dict[str, Any] = json.loads(body)
    return found


QUICK = Timeouts(head=0.3, keepalive=5.0, body=0.3, least_bytes=100, shutdown=0.2, linger=0.2)


async def test_a_token_of_many_words_is_taken_and_endless_headers_are_not() -> None:
    async with serving(QUICK) as port, ClientSession() as session:
        for name, size, status in (("Authorization", 60_000, 404), ("Authorization", 70_000, 400)):
            async with session.get(f"http://127.0.0.1:{port}/", headers={name: "x" * size}) as answer:
                assert answer.status == status
        async with session.get(f"http://127.0.0.1:{port}/", headers={f"X-{i}": "x" for i in range(100)}) as answer:
            assert answer.status == 400


async def test_headers_in_drips_do_not_hold_a_connection() -> None:
    """FAULTS 6"""
    async with serving(QUICK) as port:
        started = time.monotonic()
        assert await talk(port, b"GET / HTTP/1.1\r\nX-Slow: ", *[b"X"] * 40, pause=0.02) == b""
        assert time.monotonic() - started < 2


async def test_headers_in_drips_after_a_request_do_not_hold_a_connection_either() -> None:
    """FAULTS 6"""
    async with serving(QUICK) as port:
        first = b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n"
        started = time.monotonic()
        answer = await talk(port, first, *[b"X"] * 40, pause=0.02)
        assert answer.startswith(b"HTTP/1.1 404")
        assert time.monotonic() - started < 2


async def test_a_silent_connection_is_closed() -> None:
    """FAULTS 8"""
    async with serving(QUICK) as port:
        started = time.monotonic()
        assert await talk(port) == b""
        assert 0.2 < time.monotonic() - started < 2


async def test_an_idle_connection_is_kept_between_requests() -> None:
    async with serving(QUICK) as port, ClientSession() as client:
        for _ in range(2):
            async with client.get(f"http://127.0.0.1:{port}/nothing") as answer:
                assert answer.status == 404
                kept = answer.connection
            await asyncio.sleep(0.4)
        assert kept is None or kept.transport is not None


async def test_a_body_in_drips_is_refused() -> None:
    """FAULTS 7"""
    async with serving(QUICK) as port:
        answer = await talk(port, b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 500\r\n\r\n", *[b"X"] * 20, pause=0.03)
        assert problem_of(answer)["status"] == 408


LARGE = os.urandom(5 << 20)
LARGE_HEAD = b"POST /straight%s HTTP/1.1\r\nHost: x\r\n%sContent-Length: %d\r\n\r\n"


@pytest.mark.parametrize("size", [1, 70_001, 1 << 20])
async def test_a_body_is_read_straight_from_its_socket_however_it_comes(size: int) -> None:
    """The connection is closed afterwards, and what followed is none of its bytes."""
    pieces = [LARGE[at : at + size] for at in range(0, len(LARGE), size)] if size > 1 else [LARGE[:1], LARGE[1:-1], LARGE[-1:]]
    async with serving(Timeouts()) as port:
        answer = await talk(port, LARGE_HEAD % (b"", b"", len(LARGE)), *pieces, b"GET /fail/log HTTP/1.1\r\nHost: x\r\n\r\n")
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.endswith(hashlib.sha256(LARGE).hexdigest().encode())
    assert b"Connection: close" in answer


async def test_a_straight_body_is_told_to_come() -> None:
    async with serving(Timeouts()) as port:
        answer = await talk(port, LARGE_HEAD % (b"", b"Expect: 100-continue\r\n", len(LARGE)), b"", LARGE, pause=0.2)
    assert answer.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200")


async def test_a_straight_body_in_drips_is_refused() -> None:
    """FAULTS 7"""
    async with serving(QUICK) as port:
        answer = await talk(port, LARGE_HEAD % (b"", b"", len(LARGE)), *[b"X"] * 40, pause=0.03)
        assert problem_of(answer)["status"] == 408


async def test_a_straight_body_that_is_refused_in_the_middle_is_answered() -> None:
    async with serving(QUICK) as port:
        answer = await talk(port, LARGE_HEAD % (b"?stop=1", b"", len(LARGE)), LARGE)
        assert problem_of(answer)["status"] == 409


@pytest.mark.parametrize("path", [b"/echo", b"/straight"])
async def test_a_client_that_goes_away_is_no_error_of_ours(path: bytes) -> None:
    with capture_logs() as said:
        async with serving(QUICK) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            size = len(LARGE) if path == b"/straight" else 900
            writer.write(b"POST %s HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: %d\r\n\r\n" % (path, size))
            await reader.readuntil(b"\r\n\r\n")
            writer.transport.abort()
    assert [each for each in said if each["log_level"] == "error"] == []


@pytest.mark.parametrize("order", [0, 1])
async def test_both_a_length_and_chunks_are_refused(order: int) -> None:
    """FAULTS 9"""
    headers = [b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n"]
    async with serving(QUICK) as port:
        answer = await talk(port, b"POST /echo HTTP/1.1\r\nHost: x\r\n" + headers[order] + headers[1 - order] + b"\r\n5\r\nhello\r\n0\r\n\r\n")
        assert problem_of(answer)["status"] == 400


async def test_a_body_over_the_limit_is_refused_before_it_is_sent() -> None:
    """FAULTS 4"""
    async with serving(QUICK) as port:
        head = b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: 10000000\r\n\r\n"
        answer = await talk(port, head)
        assert answer.startswith(b"HTTP/1.1 413")
        assert problem_of(answer)["limit"] == LIMIT


async def test_chunks_are_counted() -> None:
    """FAULTS 5"""
    async with serving(QUICK) as port:
        chunk = b"100\r\n" + b"x" * 256 + b"\r\n"
        answer = await talk(
            port, b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n", *[chunk] * 5, b"0\r\n\r\n"
        )
        assert problem_of(answer)["status"] == 413


async def test_a_client_that_asks_is_told_to_continue() -> None:
    body = b"x" * 900
    async with serving(QUICK) as port, ClientSession() as client, client.post(f"http://127.0.0.1:{port}/echo", data=body, expect100=True) as answer:
        assert (answer.status, await answer.text()) == (200, "900")


async def test_a_compressed_body_is_not_unpacked() -> None:
    async with serving(QUICK) as port:
        head = b"POST /echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"
        assert (await talk(port, head)).endswith(b"\r\n\r\n3")


@pytest.mark.parametrize(("how", "status"), [("refused", 409), ("log", 503), ("else", 500)])
async def test_errors_are_problems_that_tell_no_secrets(how: str, status: int) -> None:
    async with serving(QUICK) as port, ClientSession() as client, client.get(f"http://127.0.0.1:{port}/fail/{how}") as answer:
        text = await answer.text()
        assert (answer.status, answer.content_type) == (status, "application/problem+json")
        assert "secret" not in text
        assert (answer.headers.get("Retry-After") is not None) == (status == 503)


async def test_unknown_paths_and_methods_are_problems() -> None:
    async with serving(QUICK) as port, ClientSession() as client:
        async with client.get(f"http://127.0.0.1:{port}/nothing") as answer:
            assert (answer.status, (await answer.json(content_type=None))["type"]) == (404, "urn:penstock:problem:not-found")
        async with client.get(f"http://127.0.0.1:{port}/echo") as answer:
            assert (answer.status, answer.headers["Allow"]) == (405, "POST")
