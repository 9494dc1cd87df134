"""User artifacts through the gateway: piped, never kept."""

import asyncio
import contextlib
import io
import json
import uuid
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from yarl import URL

from libs.runtime.http import Timeouts
from proto.events.artifact import ArtifactExpired, ArtifactSealed
from proto.events.base import ArtifactRef
from proto.events.build import BuildFinished, StageQueued, StepFinished
from proto.plan import Requirements
from services.gateway.commands import request_name
from tests.controls import eventually
from tests.gateway_fixture import TOKEN, Gateway, running_gateway


@pytest.fixture
async def gateway(database, nats_server) -> AsyncIterator[Gateway]:
    async with running_gateway(database, nats_server.url) as running:
        yield running


async def test_an_upload_is_there_at_once(gateway: Gateway) -> None:
    async with gateway.call("POST", "/teams/main/user-artifacts?name=source", data=b"a tar") as answer:
        found = await answer.json()
        assert (answer.status, answer.headers["Location"]) == (201, f"/api/v1/teams/main/user-artifacts/{found['id']}")
    assert (found["size"], found["name"], found["expires_at"]) == (5, "source", None)
    grant = gateway.artifacts.grants[0]
    assert (grant.team, grant.artifact, grant.action) == ("main", found["id"], "put")
    assert (await gateway.json("GET", "/teams/main/user-artifacts", 200))["items"] == [found]
    async with gateway.call("GET", f"/teams/main/user-artifacts/{found['id']}?format=tar") as answer:
        assert (answer.status, await answer.read(), answer.content_type, answer.headers["ETag"]) == (200, b"a tar", "application/x-tar", '"same"')
    async with gateway.call("GET", f"/teams/main/user-artifacts/{found['id']}", headers={"If-None-Match": '"same"'}) as answer:
        assert answer.status == 304
    await gateway.json("GET", f"/teams/main/user-artifacts/{found['id']}?format=rar", 422)


async def test_artifacts_are_listed_by_pages_newest_first(gateway: Gateway) -> None:
    build = await gateway.submit()
    for number in range(3):
        await seal(gateway, f"u{number}", name=f"n{number}")
    await seal(gateway, "old", expires_at=1)
    await gateway.record("artifact-old", ArtifactExpired(artifact="old"))
    await seal(gateway, "o", kind="output", build=build["id"], name="dist")
    await seal(gateway, "e", kind="output", build="another", name="dist", expires_at=1, pinned=True)
    await seal(gateway, "p", part=True)
    await eventually(lambda: _listed(gateway, 5))
    first = await gateway.json("GET", "/teams/main/user-artifacts?limit=3&kind=user", 200)
    assert [item["id"] for item in first["items"]] == ["u2", "u1", "u0"]
    first = await gateway.json("GET", "/teams/main/user-artifacts?limit=3", 200)
    second = await gateway.json("GET", f"/teams/main/user-artifacts?limit=3&cursor={first['next']}", 200)
    assert [item["id"] for item in first["items"] + second["items"]] == ["e", "o", "u2", "u1", "u0"]
    assert second["next"] is None
    assert (first["items"][0]["pinned"], first["items"][0]["expires_at"], first["items"][0]["build"]) == (True, None, None)
    assert (first["items"][1]["kind"], first["items"][1]["build"], first["items"][1]["build_id"]) == ("output", 1, build["id"])
    for query, ids in [
        ("build=1", ["o"]),
        (f"build={build['id']}&kind=output", ["o"]),
        ("name=n1", ["u1"]),
        ("kind=output", ["e", "o"]),
        ("kind=part", ["p"]),
        ("name=%00", []),
    ]:
        assert [item["id"] for item in (await gateway.json("GET", f"/teams/main/user-artifacts?{query}", 200))["items"]] == ids
    assert "`99`" in (await gateway.json("GET", "/teams/main/user-artifacts?build=99", 404))["detail"]
    assert (await gateway.json("GET", "/teams/main/user-artifacts?kind=odd", 422))["path"] == "kind"
    assert (await gateway.json("GET", "/teams/main/user-artifacts?kidn=user", 422))["path"] == "kidn"


async def seal(gateway: Gateway, artifact: str, **more: object) -> None:
    sealed = {"artifact": artifact, "kind": "user", "digest": "d", "size": 1, "files": 1} | more
    await gateway.record(f"artifact-{artifact}", ArtifactSealed(**sealed))  # type: ignore[arg-type]


async def _listed(gateway: Gateway, count: int) -> bool:
    return len((await gateway.json("GET", "/teams/main/user-artifacts", 200))["items"]) == count


async def upload(gateway: Gateway, **more: object) -> str:
    found: str = (await gateway.json("POST", "/teams/main/user-artifacts", 201, data=b"a tar", **more))["id"]
    return found


async def test_what_is_gone_was_there(gateway: Gateway) -> None:
    artifact, late = await upload(gateway), await upload(gateway)
    one = f"/teams/main/user-artifacts/{artifact}"
    for _ in range(2):
        async with gateway.call("DELETE", one) as answer:
            assert answer.status == 204
    await gateway.record(f"artifact-{late}", ArtifactExpired(artifact=late))
    await eventually(lambda: _listed(gateway, 0))
    for method, path, more in [
        ("GET", one, {}),
        ("GET", f"/teams/main/user-artifacts/{late}", {}),
        ("GET", f"{one}/tree", {}),
        ("POST", f"{one}/blobs", {"data": b"x" * 32}),
        ("PATCH", one, {"json": {"pinned": True}}),
        ("POST", f"/teams/main/user-artifacts?from={artifact}", {}),
    ]:
        found = await gateway.json(method, path, 410, **more)
        assert found["type"] == "urn:penstock:problem:expired"
        assert ("deleted" if artifact in path else "expired") in found["detail"]


async def test_viewers_see_artifacts_but_not_what_is_in_their_files(gateway: Gateway) -> None:
    viewer = await gateway.token("main", "viewer")
    artifact = await upload(gateway)
    one = f"/teams/main/user-artifacts/{artifact}"
    seen = await gateway.json("GET", one, 200, token=viewer, headers={"Accept": "application/json"})
    assert (seen["id"], seen["kind"], seen["size"]) == (artifact, "user", 5)
    assert (await gateway.json("GET", f"{one}/tree?recursive=true", 200, token=viewer))["items"][0]["path"] == "a"
    assert gateway.artifacts.grants[-1].action == "see"
    assert (await gateway.json("GET", "/teams/main/usage", 200, token=viewer))["stored_bytes"] == 5
    asked = len(gateway.artifacts.asked)
    for method, path in [
        ("GET", one),
        ("GET", f"{one}?path=a"),
        ("POST", f"{one}/blobs"),
        ("PUT", f"{one}/blobs"),
        ("PATCH", one),
        ("DELETE", one),
        ("POST", "/teams/main/user-artifacts"),
    ]:
        await gateway.json(method, path, 403, token=viewer, headers={"Accept": "application/json"} if "?" in path else None, data=b"{}")
    assert len(gateway.artifacts.asked) == asked


async def test_a_lifetime_is_changed_and_seen_at_once(gateway: Gateway) -> None:
    artifact = await upload(gateway)
    one = f"/teams/main/user-artifacts/{artifact}"
    assert (await gateway.json("PATCH", one, 200, json={"pinned": True}))["pinned"] is True
    changed = await gateway.json("PATCH", one, 200, json={"keep": 3_000_000_000})
    assert (changed["pinned"], changed["expires_at"]) == (False, "2065-01-24T05:20:00Z")
    assert gateway.artifacts.grants[-1].actor.startswith("token:")
    for wrong in ({"keep": -1}, {"keep": "forever"}, {"kept": 1}):
        await gateway.json("PATCH", one, 422, json=wrong)


async def test_a_manifest_tells_what_is_missing_and_the_last_chunks_make_the_artifact(gateway: Gateway) -> None:
    key = {"Idempotency-Key": "k", "Content-Type": "application/vnd.penstock.tree", "Content-Encoding": "zstd"}
    artifact = str(uuid.uuid5(uuid.UUID("9f0e6a43-1f0d-4b36-8a0c-3d8c5e2a7f10"), request_name("main", "k")))
    gateway.artifacts.missing[artifact] = [(0, 2)]
    pending = await gateway.json("POST", "/teams/main/user-artifacts?name=n&keep=forever", 202, headers=key, data=b"manifest")
    assert (pending["id"], pending["missing"]) == (artifact, [[0, 2]])
    method, path, headers = gateway.artifacts.asked[-1]
    assert (method, path) == ("POST", f"/artifacts/{artifact}?name=n&keep=forever")
    assert (headers["Content-Encoding"], headers["Content-Type"], headers["Content-Length"]) == ("zstd", "application/vnd.penstock.tree", "8")
    assert "Transfer-Encoding" not in headers
    made = await gateway.json("PUT", f"/teams/main/user-artifacts/{artifact}/blobs", 201, data=b"frames")
    assert (made["id"], made["kind"]) == (artifact, "user")
    async with gateway.call("POST", f"/teams/main/user-artifacts/{artifact}/blobs", data=b"x" * 32) as answer:
        assert (await answer.read(), answer.content_type) == (b"frames of " + b"x" * 32, "application/vnd.penstock.blobs")
    await gateway.json("PUT", "/teams/main/user-artifacts/no-uuid/blobs", 404, data=b"frames")
    assert (await gateway.json("POST", f"/teams/main/user-artifacts?tree={'00' * 32}", 404))["type"].endswith("tree-unknown")
    for keep in ("0", "-1", "always", "9" * 12):
        await gateway.json("POST", f"/teams/main/user-artifacts?keep={keep}", 422, data=b"x")


async def test_the_same_key_is_the_same_artifact_until_it_is_gone(gateway: Gateway) -> None:
    key = {"Idempotency-Key": "k"}
    artifact = await upload(gateway, headers=key)
    assert await upload(gateway, headers=key) == artifact
    other = await gateway.token("other")
    assert (await gateway.json("POST", "/teams/other/user-artifacts", 201, token=other, headers=key, data=b"x"))["id"] != artifact


async def test_ranges_and_conditions_pass_through(gateway: Gateway) -> None:
    one = f"/teams/main/user-artifacts/{await upload(gateway)}"

    async def got(method: str = "GET", path: str = one, **headers: str) -> tuple[int, bytes, str | None]:
        async with gateway.call(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}) as answer:
            return answer.status, await answer.read(), answer.headers.get("Content-Range")

    assert await got(Range="bytes=2-3") == (206, b"ta", "bytes 2-3/5")
    assert await got(Range="bytes=-2", If_Range='"same"') == (206, b"ar", "bytes 3-4/5")
    assert await got(Range="bytes=2-3", If_Range='"other"') == (200, b"a tar", None)
    status, _, where = await got(Range="bytes=9-")
    assert (status, where) == (416, "bytes */5")
    async with gateway.call("HEAD", one) as answer:
        assert (answer.status, answer.headers["Content-Length"], answer.headers["Accept-Ranges"], await answer.read()) == (200, "5", "bytes", b"")
    assert gateway.artifacts.asked[-1][0] == "HEAD"
    async with gateway.call("HEAD", one, headers={"Accept": "application/json"}) as answer:
        assert (answer.status, answer.content_type) == (200, "application/json")
    await got(path=one + "?path=%ff%2Fa", Accept="application/gzip", Accept_Encoding="zstd")
    _, path, headers = gateway.artifacts.asked[-1]
    assert path.endswith("?path=%FF/a&format=tgz")
    assert headers["Accept-Encoding"] == "zstd"
    await got(path=one, Accept="*/*")
    assert gateway.artifacts.asked[-1][1].endswith(one.rpartition("/")[2])


async def test_who_waits_to_be_told_sends_nothing_that_artifacts_does_not_want(gateway: Gateway) -> None:
    gateway.artifacts.refuse = web.Response(status=429, text='{"status": 429}', content_type="application/problem+json", headers={"Retry-After": "2"})
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b"x" * 65536

    gateway.artifacts.tells = False
    async with gateway.call("POST", "/teams/main/user-artifacts", data=body(), expect100=True) as answer:
        assert (answer.status, answer.headers["Retry-After"]) == (429, "2")
    assert sent == 0
    gateway.artifacts.refuse, gateway.artifacts.tells = None, True
    async with gateway.call("POST", "/teams/main/user-artifacts", data=body(), expect100=True) as answer:
        assert answer.status == 201
    assert (sent, gateway.artifacts.received) == (100, 100 * 65536)


INPUT: dict[str, object] = {
    "stages": [{"name": "m", "steps": [{"step": "run", "name": "run", "config": {"run": {"path": "true"}, "inputs": [{"name": "src"}]}}]}]
}


async def test_an_artifact_is_an_input_until_it_is_gone(gateway: Gateway) -> None:
    await seal(gateway, "a1", name="mine", expires_at=1)
    await eventually(lambda: _listed(gateway, 1))
    await gateway.submit(INPUT, inputs={"src": "a1"})  # no clock has been judged by: there is no tombstone
    await gateway.record("artifact-a1", ArtifactExpired(artifact="a1"))
    await seal(gateway, "a2", digest="d2", size=7, files=2)
    await seal(gateway, "a3", expires_at=1, pinned=True)
    await seal(gateway, "a4", kind="output", build="b")
    await gateway.record("artifact-a4", ArtifactExpired(artifact="a4"))
    await eventually(lambda: _listed(gateway, 2))
    found = await gateway.submit(INPUT, inputs={"src": "a1"}, status=422)
    assert found["path"] == "inputs.src"
    assert "`mine`" in found["detail"] and "has expired: upload it again (POST /api/v1/teams/main/user-artifacts)" in found["detail"]
    assert "run build" in (await gateway.submit(INPUT, inputs={"src": "artifact:a4"}, status=422))["detail"]
    for name in ("a2", "artifact:a2", "artifact:a2/"):
        build = await gateway.submit(INPUT, inputs={"src": name})
        assert build["inputs"]["src"] == {"id": "a2", "digest": "d2", "size": 7, "files": 2}
    await gateway.submit(INPUT, inputs={"src": "a3"})


async def test_a_repeat_gives_the_same_build_when_its_input_is_gone_since(gateway: Gateway) -> None:
    """FAULTS 12"""
    key = {"Idempotency-Key": "k"}
    artifact = await upload(gateway)
    inputs = {"src": f"artifact:{artifact}"}
    first = await gateway.submit(INPUT, inputs=inputs, headers=key)
    async with gateway.call("DELETE", f"/teams/main/user-artifacts/{artifact}") as answer:
        assert answer.status == 204
    assert await gateway.submit(INPUT, inputs=inputs, headers=key) == first
    await gateway.submit(INPUT, inputs=inputs, headers=key, name="other", status=409)
    await gateway.submit(INPUT, inputs=inputs, headers={"Idempotency-Key": "another"}, status=422)
    await gateway.submit(INPUT, inputs=inputs, status=422)


async def test_an_output_of_a_build_is_an_input_of_the_next(gateway: Gateway) -> None:
    made = await gateway.submit()
    detail = (await gateway.submit(INPUT, inputs={"src": "build:1/dist"}, status=422))["detail"]
    assert "build 1 has no output `dist` yet: it is pending, and it has made none" in detail
    await seal(gateway, "o1", kind="output", build=made["id"], digest="d1", size=3)
    dist = ArtifactRef(id="o1", digest="d1", size=3, files=1)
    await gateway.record(
        f"build-{made['id']}",
        StageQueued(stage="main", attempt=1, requirements=Requirements()),
        StepFinished(stage="main", attempt=1, step="run", status="succeeded", exit_code=0, outputs={"dist": dist}),
        BuildFinished(status="succeeded"),
    )
    await eventually(lambda: _outputs(gateway))
    for name in ("build:1/dist", f"build:{made['id']}/dist"):
        build = await gateway.submit(INPUT, inputs={"src": name}, keep=60)
        assert build["inputs"]["src"] == {"id": "o1", "digest": "d1", "size": 3, "files": 1}
    recorded = [event for event in await gateway.logs["builds"].read(0, 100, ["request"]) if event.type == "build.requested"]
    assert b'"keep_seconds":60' in recorded[-1].data
    assert b"keep_seconds" not in recorded[0].data
    await gateway.submit(INPUT, inputs={"src": "build:1/dist"}, keep="forever")
    assert b'"keep_seconds":-1' in (await gateway.logs["builds"].read(0, 100, ["request"]))[-1].data
    for name, said in [("build:1/other", "it has made `dist`"), ("build:77/dist", "no build `77`"), ("build:1", "must be"), ("folder:x", "must be")]:
        assert said in (await gateway.submit(INPUT, inputs={"src": name}, status=422))["detail"]


async def _outputs(gateway: Gateway) -> bool:
    return bool((await gateway.json("GET", "/teams/main/builds/1", 200))["outputs"])


async def test_a_part_of_an_artifact_is_an_input_the_same_for_a_repeat(gateway: Gateway) -> None:
    artifact = await upload(gateway)
    key = {"Idempotency-Key": "k"}
    inputs = {"src": f"artifact:{artifact}/lib/a b/"}
    first = await gateway.submit(INPUT, inputs=inputs, headers=key)
    part = first["inputs"]["src"]["id"]
    assert part != artifact
    method, path, _ = gateway.artifacts.asked[-1]
    assert (method, path) == ("POST", f"/artifacts/{part}?from={artifact}&path=lib%2Fa+b&name=a+b&kind=part")
    asked = len(gateway.artifacts.asked)
    assert await gateway.submit(INPUT, inputs=inputs, headers=key) == first
    assert len(gateway.artifacts.asked) == asked
    assert (await gateway.submit(INPUT, inputs=inputs))["inputs"]["src"]["id"] != part
    detail = (await gateway.submit(INPUT, inputs={"src": f"artifact:{artifact}/absent"}, status=422))["detail"]
    assert detail == f"inputs.src: there is no `absent` in artifact `{artifact}`"


async def test_a_refused_submission_makes_no_part_of_an_artifact(gateway: Gateway) -> None:
    artifact = await upload(gateway)
    key = {"Idempotency-Key": "k"}
    await gateway.submit(INPUT, inputs={"src": artifact}, headers=key)
    stored = set(gateway.artifacts.stored)
    part = f"artifact:{artifact}/lib"
    await gateway.submit(INPUT, inputs={"src": part}, headers=key, status=409)
    for more in ("no-such", f"artifact:{artifact}/absent", "folder:x", "build:1/dist"):
        assert "inputs.more" in (await gateway.submit(INPUT, inputs={"src": part, "more": more}, status=422))["detail"]
    plan = json.loads(json.dumps(INPUT))
    plan["stages"][0]["steps"][0]["config"]["params"] = {"X": "x" * ((1 << 20) - 100)}
    body = json.dumps({"plan": plan, "inputs": {"src": part}}).encode()
    await gateway.json("POST", "/teams/main/builds", 413, data=io.BytesIO(body))
    assert set(gateway.artifacts.stored) == stored
    one, other = [await gateway.submit(INPUT, inputs={"src": part}, headers={"Idempotency-Key": name}, name=name) for name in ("a", "b")]
    assert one["inputs"]["src"]["id"] != other["inputs"]["src"]["id"]


async def test_nothing_is_sent_before_the_token_is_known(gateway: Gateway) -> None:
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1
            yield b"x" * 65536

    async with gateway.call("POST", "/teams/main/user-artifacts", token="pst_wrong", data=body(), expect100=True) as answer:
        assert answer.status == 401
    assert sent == 0
    assert gateway.artifacts.received == 0


async def test_what_artifacts_refuses_is_relayed(gateway: Gateway) -> None:
    text = '{"type": "urn:penstock:problem:invalid", "title": "no", "status": 422, "detail": "../x: climbs out"}'
    gateway.artifacts.refuse = web.Response(status=422, text=text, content_type="application/problem+json")
    found = await gateway.json("POST", "/teams/main/user-artifacts", 422, data=io.BytesIO(b"x" * 5_000_000))
    assert found["detail"] == "../x: climbs out"


async def test_a_refused_grant_is_not_the_clients_fault(gateway: Gateway) -> None:
    gateway.artifacts.refuse = web.Response(status=401, text="no")
    await gateway.json("POST", "/teams/main/user-artifacts", 503, data=b"x")


async def test_a_client_that_disconnects_in_the_middle_leaves_nothing(gateway: Gateway) -> None:
    reader, writer = await asyncio.open_connection(*gateway.address)
    head = f"POST /api/v1/teams/main/user-artifacts HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 1000000\r\n\r\n"
    writer.write(head.encode() + b"x" * 1000)
    await eventually(lambda: gateway.artifacts.received == 1000)
    writer.close()
    await writer.wait_closed()
    await eventually(lambda: len(gateway.artifacts.cut_short) == 1)
    assert gateway.artifacts.stored == {}
    assert (await gateway.json("GET", "/teams/main/user-artifacts", 200))["items"] == []
    assert await reader.read() == b""


async def test_an_upload_that_dawdles_is_ended_on_both_sides(database, nats_server) -> None:
    """FAULTS 7"""
    async with running_gateway(database, nats_server.url, timeouts=Timeouts(body=0.2)) as gateway:
        reader, writer = await asyncio.open_connection(*gateway.address)
        head = f"POST /api/v1/teams/main/user-artifacts HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 1000000\r\n\r\n"
        writer.write(head.encode() + b"x" * 10)
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        await eventually(lambda: len(gateway.artifacts.cut_short) == 1)
        assert gateway.artifacts.stored == {}
        writer.close()
        await writer.wait_closed()


async def test_a_slow_store_slows_the_client_down(gateway: Gateway) -> None:
    gateway.artifacts.proceed.clear()
    sent = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(800):
            sent += 65536
            yield b"x" * 65536

    upload = asyncio.create_task(gateway.json("POST", "/teams/main/user-artifacts", 201, data=body()))
    await eventually(lambda: gateway.artifacts.received > 0)
    before = -1
    while before != sent:
        before = sent
        await asyncio.sleep(0.2)
    assert sent < 40 << 20
    gateway.artifacts.proceed.set()
    assert (await upload)["size"] > 0
    assert gateway.artifacts.received == 800 * 65536


async def test_without_the_artifacts_service_uploads_are_to_be_repeated(database, nats_server) -> None:
    async with running_gateway(database, nats_server.url, artifacts_url="http://127.0.0.1:1") as gateway:
        with contextlib.suppress(ConnectionError):
            async with gateway.call("POST", "/teams/main/user-artifacts", data=b"x") as answer:
                assert (answer.status, answer.headers["Retry-After"]) == (503, "1")


@pytest.mark.parametrize("name", ["%ff", "%F0%9F%98%80", "a%2Fb%20c"])
async def test_any_name_may_be_given(gateway: Gateway, name: str) -> None:
    url = URL(f"{gateway.url}/api/v1/teams/main/user-artifacts?name={name}", encoded=True)
    async with gateway.client.post(url, headers={"Authorization": f"Bearer {TOKEN}"}, data=b"x") as answer:
        assert answer.status == 201, await answer.text()
