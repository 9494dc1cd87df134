"""User artifacts through the gateway: piped, never kept."""

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from yarl import URL

from proto.events.artifact import ArtifactSealed
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


async def test_an_artifact_is_an_input_until_it_expires(gateway: Gateway) -> None:
    plan = {"stages": [{"name": "m", "steps": [{"step": "run", "name": "run", "config": {"run": {"path": "true"}, "inputs": [{"name": "src"}]}}]}]}
    await gateway.record("artifact-a1", ArtifactSealed(artifact="a1", kind="user", digest="d", size=1, files=1, expires_at=1))
    position = await gateway.record("artifact-a2", ArtifactSealed(artifact="a2", kind="user", digest="d2", size=7, files=2))
    await eventually(lambda: _listed(gateway, 2))
    assert position
    assert "expired" in (await gateway.submit(plan, inputs={"src": "a1"}, status=422))["detail"]
    build = await gateway.submit(plan, inputs={"src": "a2"})
    assert build["inputs"]["src"] == {"id": "a2", "digest": "d2", "size": 7, "files": 2}


async def _listed(gateway: Gateway, count: int) -> bool:
    return len((await gateway.json("GET", "/teams/main/user-artifacts", 200))["items"]) == count


async def test_uploads_are_listed_by_pages_without_what_builds_made(gateway: Gateway) -> None:
    for number in range(3):
        await gateway.record(f"artifact-u{number}", ArtifactSealed(artifact=f"u{number}", kind="user", digest="d", size=1, files=1))
    await gateway.record("artifact-o", ArtifactSealed(artifact="o", kind="output", digest="d", size=1, files=1))
    await eventually(lambda: _listed(gateway, 3))
    first = await gateway.json("GET", "/teams/main/user-artifacts?limit=2", 200)
    second = await gateway.json("GET", f"/teams/main/user-artifacts?limit=2&cursor={first['next']}", 200)
    assert [item["id"] for item in first["items"] + second["items"]] == ["u2", "u1", "u0"]
    assert second["next"] is None


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
