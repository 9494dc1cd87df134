"""The client at the edges of the protocol: lost connections, refusals, streams cut in half. The whole way is tested on the real system."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from penstock import Client
from penstock.client import (
    Artifact,
    BuildEnded,
    BuildLogged,
    BuildStatus,
    Conflict,
    Damaged,
    Expired,
    Forbidden,
    Full,
    NoTarget,
    NotFound,
    PenstockError,
    Policy,
    Refused,
    StreamBroken,
    Unauthorized,
    Unavailable,
)
from penstock.client.sse import Message, Parser
from penstock.client.targets import Target, Targets, find_target, read_targets, targets_path, write_targets

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
BUILD = {"id": "b1", "number": 1, "status": "started"}
ENDED = {**BUILD, "status": "failed", "exit_code": 3}


@asynccontextmanager
async def serving(handler: Handler, patience: float = 5.0) -> AsyncIterator[Client]:
    """A client of a server that answers everything with the handler."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        port = runner.addresses[0][1]
        async with Client(f"http://127.0.0.1:{port}", "pst_x", "main", patience=patience) as client:
            yield client
    finally:
        await runner.cleanup()


def problem(status: int, **more: object) -> web.Response:
    return web.Response(status=status, content_type="application/problem+json", body=json.dumps({"status": status, **more}))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, Unauthorized),
        (403, Forbidden),
        (404, NotFound),
        (409, Conflict),
        (422, Refused),
        (413, Refused),
        (400, Refused),
        (410, Expired),
        (507, Full),
    ],
)
async def test_a_problem_becomes_its_exception_with_the_servers_words(status: int, kind: type[PenstockError]) -> None:
    async def handler(request: web.Request) -> web.Response:
        return problem(status, title="No", detail="not like that", path="plan.stages[0]", extra=1)

    async with serving(handler) as client:
        with pytest.raises(kind, match="not like that") as refused:
            await client.build(1)
    assert refused.value.problem and refused.value.problem.path == "plan.stages[0]"


@pytest.mark.parametrize("body", ["<html>", '{"number": "one"}'])
async def test_what_is_no_penstock_is_said_to_be_none(body: str) -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=body)

    async with serving(handler) as client:
        with pytest.raises(PenstockError, match="is it a Penstock"):
            await client.build(1)


async def test_a_page_of_a_proxy_is_an_error_too() -> None:
    async def handler(request: web.Request) -> web.Response:
        return web.Response(status=500, body="<html>oops")

    async with serving(handler) as client:
        with pytest.raises(PenstockError, match="500 Internal Server Error"):
            await client.info()


async def test_a_redirect_is_not_followed_with_our_token() -> None:
    async def handler(request: web.Request) -> web.Response:
        raise web.HTTPFound("http://127.0.0.1:1/elsewhere")

    async with serving(handler) as client:
        with pytest.raises(PenstockError, match="sends us on to http"):
            await client.info()


async def test_making_a_build_is_repeated_under_one_key_while_the_server_is_busy() -> None:
    keys: list[str] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        keys.append(request.headers["Idempotency-Key"])
        if len(keys) == 2 and request.transport:
            request.transport.abort()
        return problem(503) if len(keys) < 3 else web.json_response(BUILD, status=202)

    async with serving(handler) as client:
        build = await client.create_build({"stages": []}, {"src": "a1"}, wait=1)
    assert build.number == 1
    assert len(keys) == 3
    assert len(set(keys)) == 1


async def test_a_server_that_stays_away_is_given_up_with_what_to_do() -> None:
    async with Client("http://127.0.0.1:9", "pst_x") as client:
        with pytest.raises(Unavailable, match=r"cannot reach http://127.0.0.1:9: is it running\? start it with `penstock up`"):
            await client.info()


async def test_a_url_that_is_none_is_said() -> None:
    async with Client("nonsense", "x") as client:
        with pytest.raises(PenstockError, match="is no URL"):
            await client.info()


async def test_builds_come_page_after_page_up_to_the_limit() -> None:
    asked: list[dict[str, str]] = []

    async def handler(request: web.Request) -> web.Response:
        asked.append(dict(request.query))
        first = int(request.query.get("cursor", 10))
        items = [{**BUILD, "number": first - i} for i in range(min(3, int(request.query["limit"])))]
        return web.json_response({"items": items, "next": str(first - 3) if first > 3 else None})

    async with serving(handler) as client:
        assert [b.number async for b in client.builds()] == [10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0, -1]
        asked.clear()
        assert [b.number async for b in client.builds("failed", limit=4)] == [10, 9, 8, 7]
    assert asked == [{"limit": "4", "status": "failed"}, {"limit": "1", "cursor": "7", "status": "failed"}]


# --- events


def sse(name: str, data: object, event_id: str) -> bytes:
    return f"id: {event_id}\nevent: {name}\ndata: {json.dumps(data)}\n\n".encode()


def log(line: int) -> dict[str, object]:
    return {"stage": "task", "attempt": 1, "step": "task", "stream": "stdout", "line": line, "at": 1767225600000, "text": f"{line}\n"}


async def streamed(request: web.Request, *pieces: bytes) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for piece in pieces:
        await response.write(piece)
    return response


async def test_a_broken_event_stream_is_taken_up_where_it_broke() -> None:
    resumed: list[str | None] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        resumed.append(request.headers.get("Last-Event-ID"))
        match len(resumed):
            case 1:
                half = sse("log", log(1), "p2")
                response = await streamed(request, b": ping\n\n", sse("status", BUILD, "p0"), sse("log", log(0), "p1"), half[: len(half) // 2])
                await asyncio.sleep(0.05)
                if request.transport:
                    request.transport.abort()
                return response
            case 2:
                return problem(503)
            case 3:
                return await streamed(request, sse("log", log(1), "p2"))
            case _:
                return await streamed(request, sse("novelty", {}, "p3"), sse("end", ENDED, "p4"), sse("log", log(9), "p5"))

    async with serving(handler) as client, aclosing(client.events(1)) as events:
        seen = [event async for event in events]
    assert resumed == [None, "p1", "p1", "p2"]
    assert [type(event) for event in seen] == [BuildStatus, BuildLogged, BuildLogged, BuildEnded]
    assert [event.entry.line for event in seen if isinstance(event, BuildLogged)] == [0, 1]
    assert isinstance(seen[-1], BuildEnded)
    assert seen[-1].build.exit_code == 3


async def test_waiting_gives_the_build_at_its_end() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await streamed(request, sse("status", BUILD, "1"), sse("end", ENDED, "2"))

    async with serving(handler) as client:
        assert (await client.wait("b1")).status == "failed"


async def test_an_event_stream_that_cannot_be_had_is_an_error() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return problem(503, detail="drained")

    async with serving(handler) as client:
        with pytest.raises(StreamBroken, match="drained"):
            await client.wait(1)


async def test_an_unknown_build_has_no_events() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return problem(404, detail="no such build")

    async with serving(handler) as client:
        with pytest.raises(NotFound, match="no such build"):
            await client.wait(1)


async def test_a_problem_in_the_stream_is_raised() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        return await streamed(request, sse("error", {"status": 410, "detail": "the log is gone"}, "1"))

    async with serving(handler) as client:
        with pytest.raises(PenstockError, match="the log is gone"):
            await client.wait(1)


def test_sse_is_parsed_however_it_is_cut() -> None:
    stream = ": c\r\nid: 1\revent: a\ndata: é\ndata:  two\n\ndata\n\nretry: 250\nid: 2\ndata:x\n\n".encode()
    expected = [Message("1", "a", "é\n two"), Message("1", "message", ""), Message("2", "message", "x")]
    for size in (1, 2, 3, 7, len(stream)):
        parser = Parser()
        pieces = [stream[i : i + size] for i in range(0, len(stream), size)]
        assert [message for piece in pieces for message in parser.feed(piece)] == expected
        assert parser.retry == 0.25


# --- artifacts


async def test_a_tar_whose_upload_is_interrupted_is_sent_again_from_the_start() -> None:
    bodies: list[tuple[bytes, str]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        bodies.append((await request.read(), request.headers["Idempotency-Key"]))
        assert dict(request.query) == {"name": "src", "keep": "forever"}
        return problem(503) if len(bodies) == 1 else web.json_response({"id": "u1", "size": 1000, "files": 1}, status=201)

    async with serving(handler) as client:
        artifact = await client.upload(b"x" * 1000, "src", keep="forever")
    assert artifact.id == "u1"
    assert len(bodies) == 2
    assert bodies[0] == bodies[1]


async def test_artifacts_are_asked_for_and_changed() -> None:
    asked: list[tuple[str, str, object]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        asked.append((request.method, request.rel_url.raw_path_qs.removeprefix("/api/v1/teams/main/"), body))
        artifact = {"id": "u1", "kind": "output", "build": 7, "pinned": True, "size": 3}
        match request.method, request.path.rpartition("/")[2]:
            case "DELETE", _:
                return web.Response(status=204)
            case _, "user-artifacts":
                return web.json_response({"items": [artifact], "next": None if "cursor" in request.query else "c"})
            case _, "tree":
                return web.json_response({"items": [{"path": "a\\xff", "path_base64": "Yf8=", "kind": "file"}], "next": None})
            case _, "usage":
                return web.json_response({"stored_bytes": 1, "artifacts": 2, "artifact_bytes": 3, "quota_bytes": None})
            case "GET", "policy":
                return web.json_response({"input_seconds": 1, "output_seconds": 2, "quota_bytes": 3, "privileged": False})
            case "PUT", "policy":
                return web.json_response(body)
            case "PUT", "builds":
                return web.json_response(BUILD)
        return web.json_response(artifact)

    async with serving(handler) as client:
        found = [artifact async for artifact in client.artifacts("output", build=7)]
        assert [artifact.build for artifact in found] == [7, 7]
        assert (await client.artifact("u1")).pinned
        assert [entry.path_bytes async for entry in client.tree(found[0], b"d\xff/ e", recursive=True)] == [b"a\xff"]
        await client.pin("u1")
        await client.unpin("u1")
        await client.touch("u1", 60)
        await client.touch("u1", 60, shorten=True)
        await client.delete("u1")
        assert (await client.usage()).artifact_bytes == 3
        assert (await client.set_policy(output_seconds=9)) == Policy(input_seconds=1, output_seconds=9, quota_bytes=3)
    assert asked == [
        ("GET", "user-artifacts?kind=output&build=7", None),
        ("GET", "user-artifacts?kind=output&build=7&cursor=c", None),
        ("GET", "user-artifacts/u1", None),
        ("GET", "user-artifacts/u1/tree?recursive=true&path=d%FF%2F+e", None),
        ("PATCH", "user-artifacts/u1", {"pinned": True}),
        ("PATCH", "user-artifacts/u1", {"pinned": False}),
        ("PATCH", "user-artifacts/u1", {"keep": 60}),
        ("PATCH", "user-artifacts/u1", {"keep": 60, "shorten": True}),
        ("DELETE", "user-artifacts/u1", None),
        ("GET", "usage", None),
        ("GET", "policy", None),
        ("PUT", "policy", {"input_seconds": 1, "output_seconds": 9, "quota_bytes": 3, "privileged": False}),
    ]


async def test_a_build_gets_references_and_says_how_long_its_outputs_are_kept() -> None:
    sent: list[dict[str, object]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        sent.append(await request.json())
        return web.json_response(BUILD, status=202)

    async with serving(handler) as client:
        await client.create_build({"stages": []}, {"a": Artifact(id="u1"), "b": "build:7/out/x"}, keep=60)
        await client.create_build({"stages": []})
    assert sent[0]["inputs"] == {"a": "u1", "b": "build:7/out/x"}
    assert sent[0]["keep"] == 60
    assert "keep" not in sent[1]


async def test_an_upload_that_is_refused_midway_tells_why(tmp_path: Path) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        await request.content.readany()
        return problem(413, detail="larger than 1 byte")

    async def endless() -> AsyncIterator[bytes]:
        for _ in range(200):
            yield b"\0" * 65536

    async with serving(handler) as client:
        with pytest.raises(PenstockError, match="larger than 1 byte"):
            await client.upload(endless(), "src")


async def test_a_download_that_is_cut_short_is_an_error(tmp_path: Path) -> None:  # FAULTS 29
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"\x28\xb5\x2f\xfd")
        await asyncio.sleep(0.05)
        if request.transport:
            request.transport.abort()
        return response

    async with serving(handler) as client:
        client.patience_upload = 0.1
        with pytest.raises((Damaged, Unavailable)):
            await client.download("u1", tmp_path / "out")

        async def take(piece: bytes) -> None:
            pass

        with pytest.raises((Damaged, Unavailable)):
            await client.download("u1", take)


# --- targets


def test_targets_are_kept_for_the_owner_alone_and_found_by_name(tmp_path: Path) -> None:
    path = tmp_path / "deep/targets.json"
    here, there = Target(url="http://a:1", token="t", team="x"), Target(url="http://b:1")
    write_targets(path, Targets(current="here", targets={"here": here, "there": there}))
    assert path.stat().st_mode & 0o777 == 0o600
    environ = {"PENSTOCK_TARGETS": str(path)}
    assert find_target(None, environ) == here
    assert find_target("there", environ) == there
    with pytest.raises(NoTarget, match=r"no target `nowhere` in .*\(known: here, there\)"):
        find_target("nowhere", environ)


def test_the_environment_overrides_and_a_token_never_goes_to_another_server(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    write_targets(path, Targets(current="here", targets={"here": Target(url="http://a:1", token="secret", team="x")}))
    environ = {"PENSTOCK_TARGETS": str(path)}
    assert find_target(None, {**environ, "PENSTOCK_TEAM": "y"}) == Target(url="http://a:1", token="secret", team="y")
    assert find_target(None, {**environ, "PENSTOCK_URL": "http://a:1/"}).token == "secret"
    assert find_target(None, {**environ, "PENSTOCK_URL": "http://evil:1"}).token == ""
    assert find_target(None, {"PENSTOCK_TARGETS": str(tmp_path / "none"), "PENSTOCK_URL": "http://c:1", "PENSTOCK_TOKEN": "t"}).token == "t"


def test_where_the_targets_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert targets_path({}) == tmp_path / ".config/penstock/targets.json"
    assert targets_path({"XDG_CONFIG_HOME": "/x"}) == Path("/x/penstock/targets.json")
    assert targets_path({"XDG_CONFIG_HOME": "relative"}) == tmp_path / ".config/penstock/targets.json"
    assert targets_path({"PENSTOCK_TARGETS": "/y.json", "XDG_CONFIG_HOME": "/x"}) == Path("/y.json")


def test_a_damaged_targets_file_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "targets.json"
    path.write_text("{")
    with pytest.raises(NoTarget, match="is not a targets file"):
        read_targets(path)
    with pytest.raises(NoTarget, match="penstock up"):
        find_target(None, {"PENSTOCK_TARGETS": str(tmp_path / "none")})
