"""A build live, its log, and the log of everything."""

import asyncio
import base64
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from proto.events.artifact import LogArchived
from proto.events.build import BuildFinished, LogExtent, StageFinished, StageQueued, StepFinished, StepStarted
from proto.events.lease import StageLeased
from proto.messages import Segment
from proto.plan import Requirements
from tests.controls import eventually
from tests.gateway_fixture import TOKEN, Gateway, Sse, running_gateway


@pytest.fixture
async def gateway(database, nats_server) -> AsyncIterator[Gateway]:
    async with running_gateway(database, nats_server.url, sse_heartbeat_seconds=0.2, log_wait_seconds=1.0) as running:
        yield running


@asynccontextmanager
async def watching(gateway: Gateway, build: str, after: str | None = None) -> AsyncIterator[Sse]:
    headers = {"Last-Event-ID": after} if after else {}
    async with gateway.call("GET", f"/teams/main/builds/{build}/events", headers=headers) as answer:
        assert answer.status == 200, await answer.text()
        assert answer.headers["X-Accel-Buffering"] == "no"
        yield Sse(answer)


async def started(gateway: Gateway) -> str:
    build: str = (await gateway.submit())["id"]
    await gateway.record(f"build-{build}", StageQueued(stage="main", attempt=1, requirements=Requirements()))
    await gateway.record(f"lease-{build}", StageLeased(stage="main", attempt=1, worker="w1", boot="b", credit="c"))
    await gateway.record(f"build-{build}", StepStarted(stage="main", attempt=1, step="run", worker="w1"))
    # The read models follow a moment later; a log is only its lease holder's.
    await eventually(lambda: _is_started(gateway, build))
    return build


async def _is_started(gateway: Gateway, build: str) -> bool:
    return (await gateway.json("GET", f"/teams/main/builds/{build}", 200))["status"] == "started"


async def finish(gateway: Gateway, build: str, chunks: int, lines: int) -> None:
    await gateway.record(
        f"build-{build}",
        StepFinished(stage="main", attempt=1, step="run", status="succeeded", exit_code=0),
        StageFinished(stage="main", attempt=1, status="succeeded", worker="w1", log=LogExtent(chunks=chunks, lines=lines)),
        BuildFinished(status="succeeded"),
    )


def texts(events: list) -> list[tuple[int, str]]:
    return [(data["line"], data["text"]) for _, event, data in events if event == "log"]


async def test_a_build_is_watched_live_to_its_end(gateway: Gateway) -> None:
    build = (await gateway.submit())["id"]
    async with watching(gateway, build) as events:
        assert (await events.next())[2]["status"] == "pending"
        await gateway.record(f"build-{build}", StageQueued(stage="main", attempt=1, requirements=Requirements()))
        await gateway.record(f"lease-{build}", StageLeased(stage="main", attempt=1, worker="w1", boot="b", credit="c"))
        await gateway.record(f"build-{build}", StepStarted(stage="main", attempt=1, step="run", worker="w1"))
        while (await events.next("status"))[2]["status"] != "started":
            pass
        await gateway.say(build, 1, 0, b"one\ntwo\n", b"thr")
        assert (await events.next("log"))[2] == {
            "stage": "main",
            "attempt": 1,
            "step": "run",
            "stream": "stdout",
            "line": 0,
            "at": 1_700_000_000_001,
            "text": "one\ntwo\n",
        }
        assert (await events.next("log"))[2]["text"] == "thr"
        await finish(gateway, build, chunks=2, lines=4)
        await gateway.say(build, 2, 3, b"the last\n")
        rest = await events.all()
    assert texts(rest) == [(3, "the last\n")]
    assert (rest[-1][1], rest[-1][2]["status"], rest[-1][2]["percent"]) == ("end", "succeeded", 100)
    assert [event for _, event, _ in rest].count("end") == 1


async def test_the_end_waits_for_the_whole_log(gateway: Gateway) -> None:
    build = await started(gateway)
    async with watching(gateway, build) as events:
        await finish(gateway, build, chunks=1, lines=1)
        while (await events.next("status"))[2]["status"] != "succeeded":
            pass
        with pytest.raises(TimeoutError):
            await events.next("end", timeout=0.3)
        await gateway.say(build, 1, 0, b"late\n")
        assert texts(await events.all()) == [(0, "late\n")]


async def test_a_log_that_never_comes_is_marked(gateway: Gateway) -> None:
    build = await started(gateway)
    await gateway.say(build, 2, 5, b"behind a gap\n")
    async with watching(gateway, build) as events:
        await finish(gateway, build, chunks=3, lines=8)
        rest = await events.all()
    assert rest[-1][1] == "end"
    assert [(line, text.partition(":")[0].strip()) for line, text in texts(rest)] == [(0, "[penstock"), (5, "behind a gap"), (6, "[penstock")]


async def test_a_build_without_a_log_ends_at_once(gateway: Gateway) -> None:
    build = await started(gateway)
    async with watching(gateway, build) as events:
        await gateway.record(f"build-{build}", StageFinished(stage="main", attempt=1, status="succeeded"), BuildFinished(status="succeeded"))
        await events.next("end", timeout=0.8)


NO_UTF_8 = b"latin1 \xe9 \xff\xfe\nsound\n\xc3(\x80 \xed\xa0\x80 \xf4\x90\x80\x80\n"


async def seen(gateway: Gateway, build: str) -> list[str]:
    """The log as events, as a page and as text say it."""
    async with watching(gateway, build) as events:
        entries = [data for _, event, data in await events.all() if event == "log"]
    page = await gateway.json("GET", f"/teams/main/builds/{build}/log", 200, headers={"Accept": "application/json"})
    async with gateway.call("GET", f"/teams/main/builds/{build}/log", headers={"Accept": "text/plain"}) as answer:
        text = await answer.read()
    for found in (entries, page["lines"]):
        assert b"".join(base64.b64decode(one["text_base64"]) if "text_base64" in one else one["text"].encode() for one in found) == text
    assert ["text_base64" in line for line in page["lines"]] == [True, False, True], "what is not all that was written is marked, and nothing else"
    return ["".join(one["text"] for one in found) for found in (entries, page["lines"])] + [text.decode(errors="replace")]


async def test_what_is_no_utf_8_is_shown_and_marked_alike_everywhere(gateway: Gateway) -> None:
    """FAULTS 103: live, and when only the archive has it."""
    build = await started(gateway)
    await gateway.say(build, 1, 0, NO_UTF_8)
    await finish(gateway, build, chunks=1, lines=3)
    await eventually(lambda: _has_ended(gateway, build))
    live = await seen(gateway, build)
    gateway.artifacts.archives[f"{build}/main/1"] = [(0, Segment("run", "stdout", 1, NO_UTF_8))]
    archived = LogArchived(build=build, stage="main", attempt=1, archive=1, digest="d", chunks=1, lines=3, bytes=len(NO_UTF_8))
    await gateway.record(f"artifact-log-{build}-main-1", archived)
    assert gateway.bus is not None
    await gateway.bus.purge("LOGS", "logs.>")
    await eventually(lambda: _archived(gateway, build))
    assert live == await seen(gateway, build) == [NO_UTF_8.decode(errors="replace")] * 3


async def _has_ended(gateway: Gateway, build: str) -> bool:
    return (await gateway.json("GET", f"/teams/main/builds/{build}", 200))["status"] == "succeeded"


async def test_the_log_of_a_lost_worker_is_its_archive(gateway: Gateway) -> None:
    build = await started(gateway)
    async with watching(gateway, build) as events:
        await gateway.say(build, 1, 0, b"one\n")
        lost = StageFinished(stage="main", attempt=1, status="errored", log=LogExtent(chunks=-1))
        await gateway.record(f"build-{build}", lost, BuildFinished(status="errored"))
        with pytest.raises(TimeoutError):
            await events.next("end", timeout=0.3)
        gateway.artifacts.archives[f"{build}/main/1"] = [(0, Segment("run", "stdout", 1, b"one\ntwo\n"))]
        archived = LogArchived(build=build, stage="main", attempt=1, archive=1, digest="d", chunks=2, lines=2, bytes=8)
        await gateway.record(f"artifact-log-{build}-main-1", archived)
        rest = await events.all()
    assert rest[-1][1] == "end"
    *before, mark = texts(rest)
    assert before[-1] == (1, "two\n")
    assert mark == (2, "[penstock: the worker was lost here, and what was written last may be, too]\n")
    async with watching(gateway, build, after=rest[-1][0]) as events:
        assert texts(await events.all()) == [], "it is said once"
    async with gateway.call("GET", f"/teams/main/builds/{build}/log") as answer:
        assert (await answer.text()).startswith("one\ntwo\n[penstock: the worker was lost here")
    found = await gateway.json("GET", f"/teams/main/builds/{build}/log?from=3", 200, headers={"Accept": "application/json"})
    assert (found["complete"], found["lines"]) == (True, [])


async def test_of_an_archive_that_cannot_be_read_clients_learn_no_address_of_ours(database, nats_server) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = str(nobody.getsockname()[1])
        async with running_gateway(database, nats_server.url, log_wait_seconds=0.1, artifacts_url=f"http://127.0.0.1:{port}") as gateway:
            build = await started(gateway)
            lost = StageFinished(stage="main", attempt=1, status="errored", log=LogExtent(chunks=-1))
            await gateway.record(f"build-{build}", lost, BuildFinished(status="errored"))
            archived = LogArchived(build=build, stage="main", attempt=1, archive=1, digest="d", chunks=2, lines=2, bytes=8)
            await gateway.record(f"artifact-log-{build}-main-1", archived)
            problem = await eventually(lambda: gateway.json("GET", f"/teams/main/builds/{build}/log", 503))
            async with watching(gateway, build) as events:
                _, event, failure = (await events.all())[-1]
            said = [problem["detail"], failure["detail"]]
            assert event == "error"
            assert all("the artifacts service cannot be reached" in each and port not in each for each in said), said


async def test_what_an_archive_lacks_is_marked_once(gateway: Gateway) -> None:
    build = await started(gateway)
    gateway.artifacts.archives[f"{build}/main/1"] = [
        (0, Segment("run", "stdout", 1, b"one\n")),
        (3, Segment("run", "stdout", 2, b"four, un")),
    ]
    await finish(gateway, build, chunks=4, lines=6)
    archived = LogArchived(build=build, stage="main", attempt=1, archive=1, digest="d", chunks=2, lines=6, bytes=19, gaps=[])
    await gateway.record(f"artifact-log-{build}-main-1", archived)
    await eventually(lambda: _archived(gateway, build))
    async with watching(gateway, build) as events:
        everything = await events.all()
    assert texts(everything) == [
        (0, "one\n"),
        (1, "[penstock: log lines from 1 on are missing]\n"),
        (3, "four, un"),
        (4, "[penstock: log lines from 4 on are missing]\n"),
    ]
    for token, _, data in [event for event in everything if event[1] == "log"][1::2]:
        async with watching(gateway, build, after=token) as events:
            assert texts(await events.all()) == texts([event for event in everything if event[1] == "log" and event[2]["line"] > data["line"]])
    async with gateway.call("GET", f"/teams/main/builds/{build}/log") as answer:
        assert await answer.text() == ("one\n[penstock: log lines from 1 on are missing]\nfour, un\n[penstock: log lines from 4 on are missing]\n")


async def test_repeated_and_reordered_chunks_are_delivered_once_in_order(gateway: Gateway) -> None:
    build = await started(gateway)
    for number, line, text in [(1, 0, b"a\n"), (3, 2, b"c\n"), (1, 0, b"a\n"), (2, 1, b"b\n"), (3, 2, b"c\n")]:
        await gateway.say(build, number, line, text)
    await finish(gateway, build, chunks=3, lines=3)
    async with watching(gateway, build) as events:
        assert texts(await events.all()) == [(0, "a\n"), (1, "b\n"), (2, "c\n")]


async def test_a_worker_that_does_not_hold_the_attempt_is_not_heard(gateway: Gateway) -> None:
    build = await started(gateway)
    await gateway.say(build, 1, 0, b"forged\n", worker="w2")
    await gateway.say(build, 1, 0, b"true\n")
    await finish(gateway, build, chunks=1, lines=1)
    async with watching(gateway, build) as events:
        assert texts(await events.all()) == [(0, "true\n")]


async def test_a_watcher_goes_on_where_it_was(gateway: Gateway) -> None:
    build = await started(gateway)
    await gateway.say(build, 1, 0, b"one\ntwo\n", b"three\n")
    async with watching(gateway, build) as events:
        token, _, first = await events.next("log")
        assert first["text"] == "one\ntwo\n"
    await gateway.say(build, 2, 3, b"four\n")
    await finish(gateway, build, chunks=2, lines=4)
    async with watching(gateway, build, after=token) as events:
        everything = await events.all()
    assert everything[0][1] == "status"
    assert texts(everything) == [(2, "three\n"), (3, "four\n")]
    end = everything[-1][0]
    async with watching(gateway, build, after=end) as events:
        again = await events.all()
    assert [event for _, event, _ in again] == ["status", "end"]


async def test_a_watcher_goes_on_from_the_bus_in_the_archive(gateway: Gateway) -> None:
    build = await started(gateway)
    await gateway.say(build, 1, 0, b"one\ntwo\n")
    async with watching(gateway, build) as events:
        token, _, _ = await events.next("log")
    gateway.artifacts.archives[f"{build}/main/1"] = [
        (0, Segment("run", "stdout", 1, b"one\ntwo\nthree\n")),
        (3, Segment("run", "stderr", 2, b"four\n")),
    ]
    await finish(gateway, build, chunks=2, lines=4)
    await gateway.record(
        f"artifact-log-{build}-main-1", LogArchived(build=build, stage="main", attempt=1, archive=1, digest="d", chunks=2, lines=4, bytes=19)
    )
    await eventually(lambda: _archived(gateway, build))
    async with watching(gateway, build, after=token) as events:
        assert texts(await events.all()) == [(2, "three\n"), (3, "four\n")]
    async with watching(gateway, build) as events:
        assert texts(await events.all()) == [(0, "one\ntwo\nthree\n"), (3, "four\n")]
    async with gateway.call("GET", f"/teams/main/builds/{build}/log?from=1&limit=2") as answer:
        assert (answer.content_type, await answer.text()) == ("text/plain", "two\nthree\n")
    found = await gateway.json("GET", f"/teams/main/builds/{build}/log?from=2", 200, headers={"Accept": "application/json"})
    assert found["complete"] is True
    assert found["next"] is None
    assert [(line["line"], line["text"]) for line in found["lines"]] == [(2, "three\n"), (3, "four\n")]


async def _archived(gateway: Gateway, build: str) -> bool:
    return (await gateway.json("GET", f"/teams/main/builds/{build}/log", 200, headers={"Accept": "application/json"}))["complete"] is True


async def test_a_running_log_is_read_by_range(gateway: Gateway) -> None:
    build = await started(gateway)
    path = f"/teams/main/builds/{build}/log"
    async with gateway.call("GET", path) as answer:
        assert (answer.status, await answer.text()) == (200, "")
    await gateway.say(build, 1, 0, b"one\ntwo\n", b"three\n")
    async with gateway.call("GET", path + "?stage=main&attempt=1") as answer:
        assert await answer.text() == "one\ntwo\nthree\n"
    found = await gateway.json("GET", path + "?limit=2", 200, headers={"Accept": "application/json"})
    assert ([line["text"] for line in found["lines"]], found["next"], found["complete"]) == (["one\n", "two\n"], 2, False)
    await gateway.json("GET", path + "?stage=other", 404)
    await gateway.json("GET", path + "?attempt=2", 404)
    await gateway.json("GET", path + "?from=x", 422)


async def test_many_watchers_share_one_watch(gateway: Gateway) -> None:
    build = await started(gateway)
    async with asyncio.TaskGroup() as group:

        async def watch() -> list:
            async with watching(gateway, build) as events:
                return texts(await events.all())

        watchers = [group.create_task(watch()) for _ in range(20)]
        for number in range(1, 51):
            await gateway.say(build, number, number - 1, b"line %d\n" % number)
        await finish(gateway, build, chunks=50, lines=50)
    assert all(watcher.result() == [(n - 1, f"line {n}\n") for n in range(1, 51)] for watcher in watchers)


async def test_a_token_that_is_none_is_refused(gateway: Gateway) -> None:
    build = await started(gateway)
    await gateway.json("GET", f"/teams/main/builds/{build}/events", 400, headers={"Last-Event-ID": "nonsense"})
    await gateway.json("GET", "/events", 400, headers={"Last-Event-ID": "nonsense"})


async def test_a_watcher_that_never_reads_is_dropped_and_others_are_not(database, nats_server) -> None:
    """FAULTS 18"""
    async with running_gateway(database, nats_server.url, sse_stall_seconds=0.5, sse_buffer_bytes=1 << 20) as gateway:
        build = await started(gateway)
        reader, writer = await asyncio.open_connection(*gateway.address, limit=1024)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        writer.write(f"GET /api/v1/teams/main/builds/{build}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
        async with watching(gateway, build) as events:
            line = b"x" * 999 + b"\n"
            for number in range(1, 401):
                await gateway.say(build, number, (number - 1) * 60, line * 60)
            await finish(gateway, build, chunks=400, lines=24_000)
            everything = await events.all()
        assert everything[-1][1] == "end"
        assert sum(data["text"].count("\n") for _, event, data in everything if event == "log") == 24_000
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        received = 0
        with pytest.raises(ConnectionError):
            while data := await reader.read(1 << 20):
                received += len(data)
            raise ConnectionResetError  # a clean cut is as good
        assert received < 24_000_000
        writer.close()


async def test_the_log_of_a_team_is_followed_and_resumed(gateway: Gateway) -> None:
    other = await gateway.token("other")
    async with gateway.call("GET", "/events?from=1") as answer:
        events = Sse(answer)
        first = await events.next()
        assert (first[1], first[2]["type"], first[2]["subject"]) == ("team.created", "team.created", "team-main")
        build = await gateway.submit()
        await gateway.submit(team="other", token=other)
        token, _, requested = await events.next("build.requested")
        assert requested["data"]["build"] == build["id"]
        assert requested["position"] == int(token)
        assert requested["team"] == "main"
    second = await gateway.submit()
    async with gateway.call("GET", "/events?category=request", headers={"Last-Event-ID": token}) as answer:
        events = Sse(answer)
        assert (await events.next())[2]["data"]["build"] == second["id"]
        third = await gateway.submit()
        assert (await events.next())[2]["data"]["build"] == third["id"]
    async with gateway.call("GET", "/events") as answer:
        events = Sse(answer)
        fourth = await gateway.submit()
        assert (await events.next())[2]["data"]["build"] == fourth["id"]
    await gateway.json("GET", "/events?category=odd", 422)
