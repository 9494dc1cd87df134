"""The gateway's builds over HTTP, on real Postgres and NATS."""

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator

import msgspec
import pytest
import schemathesis
from yarl import URL

from proto.events.base import ArtifactRef
from proto.events.build import BuildCreated, BuildFinished, LogExtent, StageFinished, StageQueued, StepFinished, StepProgressed, StepStarted
from proto.events.lease import StageDeferred, StageLeased
from proto.plan import Plan, Requirements
from tests.controls import eventually
from tests.gateway_fixture import PLAN, TOKEN, Gateway, running_gateway


@pytest.fixture
async def gateway(database, nats_server) -> AsyncIterator[Gateway]:
    async with running_gateway(database, nats_server.url) as running:
        yield running


async def test_a_submitted_build_is_there_at_once(gateway: Gateway) -> None:
    async with gateway.call("POST", "/teams/main/builds", json={"plan": PLAN, "name": "first"}) as answer:
        build = await answer.json()
        assert answer.status == 202
        assert answer.headers["Location"] == build["url"] == "/api/v1/teams/main/builds/1"
    assert (build["number"], build["name"], build["status"], build["percent"]) == (1, "first", "pending", 0)
    assert build["stages"][0]["steps"][0]["status"] == "pending"
    assert await gateway.json("GET", "/teams/main/builds/1", 200) == build
    assert await gateway.json("GET", f"/teams/main/builds/{build['id']}", 200) == build


async def test_a_build_goes_through_its_life(gateway: Gateway) -> None:
    build = (await gateway.submit())["id"]
    await gateway.record(f"build-{build}", StageQueued(stage="main", attempt=1, requirements=Requirements()))
    await gateway.record(f"lease-{build}", StageDeferred(stage="main", attempt=1, reason="no worker offers docker"))
    await eventually(lambda: _is(gateway, build, reason="no worker offers docker"))
    await gateway.record(f"lease-{build}", StageLeased(stage="main", attempt=1, worker="w1", boot="b", credit="c"))
    await eventually(lambda: _is(gateway, build, reason="", status="pending"))
    await gateway.record(
        f"build-{build}",
        StepStarted(stage="main", attempt=1, step="run", worker="w1", sandbox="docker", image="a/b@sha256:1", reference="a/b:1"),
        StepProgressed(stage="main", attempt=1, step="run", percent=40),
    )
    started = await eventually(lambda: _is(gateway, build, status="started", percent=40))
    [stage] = started["stages"]
    assert (stage["worker"], stage["steps"][0]["image"], stage["steps"][0]["reference"]) == ("w1", "a/b@sha256:1", "a/b:1")
    dist = ArtifactRef(id="a", digest="d", size=1, files=1)
    at = await gateway.record(
        f"build-{build}",
        StepFinished(stage="main", attempt=1, step="run", status="failed", exit_code=3, error="exit 3", outputs={"dist": dist}),
        StageFinished(stage="main", attempt=1, status="failed", log=LogExtent()),
        BuildFinished(status="failed"),
    )
    ended = await eventually(lambda: _is(gateway, build, status="failed"))
    assert (ended["exit_code"], ended["error"], ended["outputs"]["dist"]["id"]) == (3, "exit 3", "a")
    assert ended["positions"]["status"] == at
    assert ended["finished_at"] is not None


async def _is(gateway: Gateway, build: str, **wanted: object) -> dict[str, object] | None:
    found = await gateway.json("GET", f"/teams/main/builds/{build}", 200)
    return found if all(found[key] == value for key, value in wanted.items()) else None


async def test_builds_are_listed_newest_first_by_pages(gateway: Gateway) -> None:
    for _ in range(5):
        await gateway.submit()
    first = await gateway.json("GET", "/teams/main/builds?limit=2", 200)
    second = await gateway.json("GET", f"/teams/main/builds?limit=2&cursor={first['next']}", 200)
    third = await gateway.json("GET", f"/teams/main/builds?limit=2&cursor={second['next']}", 200)
    assert [b["number"] for page in (first, second, third) for b in page["items"]] == [5, 4, 3, 2, 1]
    assert third["next"] is None
    assert (await gateway.json("GET", "/teams/main/builds?status=succeeded", 200))["items"] == []
    assert (await gateway.json("GET", "/teams/main/builds?status=odd", 422))["path"] == "status"
    assert (await gateway.json("GET", "/teams/main/builds?limit=0", 422))["path"] == "limit"


async def test_malformed_json_is_refused_with_its_position(gateway: Gateway) -> None:
    """FAULTS 1"""
    assert (await gateway.json("POST", "/teams/main/builds", 400, data=b'{"plan": }'))["position"] == 9


@pytest.mark.parametrize("body", [b'{"plan": 1, "plan": 2}', b'{"plan": NaN}', b'{"plan": ' + b"[" * 100_000])
async def test_ambiguous_numbers_and_depth_are_refused(gateway: Gateway, body: bytes) -> None:
    """FAULTS 2, 3"""
    await gateway.json("POST", "/teams/main/builds", 400, data=body)


async def test_a_plan_of_10_mb_is_refused_unread(gateway: Gateway) -> None:
    """FAULTS 4"""
    found = await gateway.json("POST", "/teams/main/builds", 413, data=io.BytesIO(b" " * 10_000_000))
    assert found["type"] == "urn:penstock:problem:too-large"


async def test_a_plan_of_10_mb_in_chunks_is_counted_and_refused(gateway: Gateway) -> None:
    """FAULTS 5"""

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(160):
            yield b" " * 65536

    with contextlib.suppress(ConnectionError):
        await gateway.json("POST", "/teams/main/builds", 413, data=chunks())
    assert (await gateway.json("GET", "/teams/main/builds", 200))["items"] == []


async def test_an_event_over_the_limit_is_refused(gateway: Gateway) -> None:
    plan = json.loads(json.dumps(PLAN))
    plan["stages"][0]["steps"][0]["config"]["params"] = {"X": "x" * ((1 << 20) - 100)}
    await gateway.json("POST", "/teams/main/builds", 413, data=io.BytesIO(json.dumps({"plan": plan}).encode()))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda body: body.update(plna=1), "plna"),
        (lambda body: body["plan"].update(stages=[]), "plan.stages"),
        (lambda body: body["plan"]["stages"][0]["steps"][0]["config"]["run"].update(pth="x"), "plan.stages[0].steps[0].config.run"),
        (lambda body: body["plan"]["stages"][0].update(needs=["main"]), "main → main"),
        (lambda body: body["plan"]["stages"][0]["steps"][0]["config"].update(inputs=[{"name": "src"}]), "a missing input: `src`"),
        (lambda body: body.update(inputs={"src": "nothing"}), "inputs.src"),
    ],
)
async def test_what_is_wrong_with_a_plan_is_named(gateway: Gateway, change, named: str) -> None:
    """FAULTS 10"""
    body = {"plan": json.loads(json.dumps(PLAN))}
    change(body)
    found = await gateway.json("POST", "/teams/main/builds", 422, json=body)
    assert named in found["detail"]


async def test_without_a_token_nothing_is_answered(gateway: Gateway) -> None:
    for token in (None, "pst_" + "b" * 43):
        async with gateway.call("GET", "/teams/main/builds", token=token) as answer:
            assert answer.status == 401
            assert answer.headers["WWW-Authenticate"].startswith("Bearer")


async def test_another_teams_things_are_as_if_absent(gateway: Gateway) -> None:
    """FAULTS 11, 33"""
    build = await gateway.submit()
    other = await gateway.token("other")
    mine = await gateway.submit(team="other", token=other)
    assert mine["number"] == 1
    async with gateway.call("POST", "/teams/main/user-artifacts?name=x", data=b"tar") as answer:
        artifact = (await answer.json())["id"]
    described = (await gateway.json("GET", "/openapi.json", 200))["paths"]
    routes = [(method.upper(), path.removeprefix("/api/v1")) for path, methods in described.items() for method in methods if "{team}" in path]
    assert len(routes) > 15
    for method, path in routes:
        await _absent(gateway, method, path.format(team="main", build=1, artifact=artifact, secret="s"), other, path in ANY_TEAM and "team")
        if "{build}" in path:
            await _absent(gateway, method, path.format(team="other", build=build["id"]), other, "build")
            await _absent(gateway, method, path.format(team="other", build=2), other, "build")
        if "{artifact}" in path:
            await _absent(gateway, method, path.format(team="other", artifact=artifact), other, "artifact")
    await gateway.json("GET", "/teams/nobody/builds", 404)
    for reference in (artifact, f"artifact:{artifact}", f"build:{build['id']}/dist", f"artifact:{artifact}/a"):
        found = await gateway.submit(status=422, team="other", token=other, inputs={"src": reference})
        assert "there is no" in found["detail"], found
    await gateway.json("POST", f"/teams/other/user-artifacts?from={artifact}", 404, token=other)
    assert gateway.artifacts.asked[1:] == []
    assert (await gateway.json("GET", "/teams/other/user-artifacts", 200, token=other))["items"] == []
    await gateway.json("GET", f"/teams/other/user-artifacts?build={build['id']}", 404, token=other)


ANY_TEAM = ("/teams/{team}", "/teams/{team}/tokens")


async def _absent(gateway: Gateway, method: str, path: str, token: str, what: object) -> None:
    """The same words as for what never was; of another team nothing is said but that."""
    bodies = {"POST": b"x" * 32, "PUT": b"x", "PATCH": b'{"pinned": true}'}
    async with gateway.call(method, path, token=token, data=bodies.get(method)) as answer:
        assert answer.status == 404, (method, path, answer.status, await answer.text())
        if method != "HEAD":
            found = await answer.json(content_type=None)
            assert found["type"] == "urn:penstock:problem:not-found"
            assert what is False or f"there is no {what} `" in found["detail"] or "there is no upload `" in found["detail"]


async def test_roles_are_kept(gateway: Gateway) -> None:
    viewer, member, owner = [await gateway.token("other", role) for role in ("viewer", "member", "owner")]
    await gateway.json("GET", "/teams/other/builds", 200, token=viewer)
    await gateway.submit(team="other", token=viewer, status=403)
    await gateway.submit(team="other", token=member)
    await gateway.json("PUT", "/teams/other/builds/1/abort", 403, token=viewer)
    await gateway.json("POST", "/teams/other/user-artifacts", 403, token=viewer, data=b"x")
    await gateway.json("POST", "/teams/other/tokens", 403, token=member, json={"role": "owner"})
    assert (await gateway.json("POST", "/teams/other/tokens", 201, token=owner, json={"role": "viewer"}))["token"].startswith("pst_")
    await gateway.json("POST", "/teams/main/tokens", 404, token=owner, json={"role": "viewer"})
    await gateway.json("PUT", "/teams/third", 404, token=owner)
    await gateway.json("PUT", "/teams/No.Good", 422)
    policy = {"input_seconds": 60, "output_seconds": 61, "quota_bytes": 0, "privileged": False}
    for token in (viewer, member):
        await gateway.json("PUT", "/teams/other/policy", 403, token=token, json=policy)
    assert await gateway.json("PUT", "/teams/other/policy", 200, token=owner, json=policy) == policy
    assert await gateway.json("GET", "/teams/other/policy", 200, token=viewer) == policy
    assert (await gateway.json("GET", "/teams/main/policy", 200))["input_seconds"] == 12 * 3600
    for wrong in ({**policy, "input_seconds": 0}, {**policy, "quota_bytes": -1}, {"input_seconds": 5}, {**policy, "more": 1}):
        await gateway.json("PUT", "/teams/other/policy", 422, token=owner, json=wrong)
    assert (await gateway.json("GET", "/info", 200, token=viewer))["role"] == "viewer"


async def test_privileged_steps_are_for_teams_that_the_first_team_lets(gateway: Gateway) -> None:
    owner = await gateway.token("other", "owner")
    step = {"step": "run", "name": "run", "config": {"run": {"path": "true"}, "image": "busybox"}, "privileged": True}
    plan = {"stages": [{"name": "main", "steps": [step]}]}
    policy = {"input_seconds": 60, "output_seconds": 61, "quota_bytes": 0}
    refused = await gateway.submit(team="other", token=owner, plan=plan, status=422)
    assert refused["path"] == "plan.stages[0].steps[0].privileged"
    await gateway.json("PUT", "/teams/other/policy", 403, token=owner, json={**policy, "privileged": True})
    await gateway.json("PUT", "/teams/main/policy", 404, token=owner, json=policy)
    await gateway.json("PUT", "/teams/other/policy", 200, json={**policy, "privileged": True})
    await gateway.submit(team="other", token=owner, plan=plan)
    # Its own owner may keep it, and give it up.
    await gateway.json("PUT", "/teams/other/policy", 200, token=owner, json={**policy, "privileged": True})
    await gateway.json("PUT", "/teams/other/policy", 200, token=owner, json=policy)
    await gateway.submit(team="other", token=owner, plan=plan, status=422)


async def test_the_same_key_and_body_are_the_same_build(gateway: Gateway) -> None:
    """FAULTS 12"""
    key = {"Idempotency-Key": "once"}
    first, second = await asyncio.gather(gateway.submit(headers=key), gateway.submit(headers=key))
    assert first == second
    assert (await gateway.submit(headers=key))["id"] == first["id"]
    refused = await gateway.submit(headers=key, status=409, name="another")
    assert refused["type"] == "urn:penstock:problem:conflict"
    other = await gateway.token("other")
    assert (await gateway.submit(headers=key, team="other", token=other))["id"] != first["id"]


async def test_an_abort_is_recorded_once_and_refused_at_the_end(gateway: Gateway) -> None:
    """FAULTS 14"""
    build = (await gateway.submit())["id"]
    for _ in range(2):
        assert (await gateway.json("PUT", f"/teams/main/builds/{build}/abort", 202))["id"] == build
    recorded = await gateway.logs["builds"].read(0, 100, ["request"])
    assert [event.type for event in recorded] == ["build.requested", "build.abort_requested"]
    await gateway.record(f"build-{build}", BuildCreated(plan=_plan()), BuildFinished(status="aborted"))
    await eventually(lambda: _is(gateway, build, status="aborted"))
    await gateway.json("PUT", f"/teams/main/builds/{build}/abort", 409)


def _plan():
    return msgspec.convert(PLAN, Plan)


async def test_a_client_may_wait_for_the_end(gateway: Gateway) -> None:
    async def end_it() -> None:
        build = await eventually(lambda: _first(gateway))
        await gateway.record(f"build-{build}", BuildFinished(status="succeeded"))

    async with asyncio.TaskGroup() as group:
        group.create_task(end_it())
        async with gateway.call("POST", "/teams/main/builds", headers={"Prefer": "wait=30"}, json={"plan": PLAN}) as answer:
            assert (answer.status, answer.headers["Preference-Applied"]) == (200, "wait=30")
            assert (await answer.json())["status"] == "succeeded"
    async with gateway.call("POST", "/teams/main/builds", headers={"Prefer": "respond-async, wait=1"}, json={"plan": PLAN}) as answer:
        assert (answer.status, (await answer.json())["status"]) == (202, "pending")


async def _first(gateway: Gateway) -> str | None:
    items = (await gateway.json("GET", "/teams/main/builds", 200))["items"]
    return items[0]["id"] if items else None


async def test_too_many_submissions_at_once_are_told_to_come_back(database, nats_server) -> None:
    """FAULTS 13"""
    async with running_gateway(database, nats_server.url, max_submissions=1) as gateway:
        async with gateway.call("POST", "/teams/main/builds", headers={"Prefer": "wait=1"}, json={"plan": PLAN}) as answer:
            assert answer.status == 202
        waiting = asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield b'{"plan": '
            await waiting.wait()
            yield json.dumps(PLAN).encode() + b"}"

        first = asyncio.create_task(gateway.json("POST", "/teams/main/builds", 202, data=slowly()))

        async def refused() -> bool:
            async with gateway.call("POST", "/teams/main/builds", json={"plan": 1}) as answer:
                return answer.status == 429 and answer.headers["Retry-After"] == "1"

        await eventually(refused)
        waiting.set()
        await first


async def test_the_api_describes_itself(gateway: Gateway) -> None:
    found = await gateway.json("GET", "/openapi.json", 200, token=None)
    schemathesis.openapi.from_dict(found).validate()
    assert all(name.isidentifier() for name in found["components"]["schemas"])
    assert {"BuildStage", "Stage"} <= set(found["components"]["schemas"])
    for path, operations in found["paths"].items():
        for method, operation in operations.items():
            for status, response in operation["responses"].items():
                if int(status) >= 400 and method != "head":
                    schema = response["content"]["application/problem+json"]["schema"]
                    says_more = (path, status) == ("/api/v1/workers/standing", "404")
                    assert schema == {"$ref": f"#/components/schemas/{'NoWorker' if says_more else 'ProblemDetails'}"}, (path, method, status)
    assert set(found["paths"]["/api/v1/teams/{team}/builds"]) == {"get", "post"}
    assert (await gateway.json("GET", "/info", 200, token=None)).keys() == {"version"}
    assert (await gateway.json("GET", "/info", 200))["teams"] == ["main"]
    await gateway.json("GET", "/info", 401, token="wrong")


async def test_a_token_is_shown_only_once_and_kept_only_as_a_hash(gateway: Gateway) -> None:
    token = await gateway.token("other")
    everything = await gateway.logs["builds"].read(0, 100)
    assert all(token.encode() not in event.data and TOKEN.encode() not in event.data for event in everything)


@pytest.mark.parametrize("name", ["%00", "%ff%fe", "1%00", "..%2f..", "%F0%9F%98%80", "9" * 30])
async def test_a_strange_name_is_only_absent(gateway: Gateway, name: str) -> None:
    url = URL(f"{gateway.url}/api/v1/teams/main/builds/{name}", encoded=True)
    async with gateway.client.get(url, headers={"Authorization": f"Bearer {TOKEN}"}) as answer:
        assert answer.status == 404


async def test_a_strange_key_is_a_key(gateway: Gateway) -> None:
    reader, writer = await asyncio.open_connection(*gateway.address)
    body = json.dumps({"plan": PLAN}).encode()
    head = f"POST /api/v1/teams/main/builds HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n".encode()
    writer.write(head + b"Connection: close\r\nIdempotency-Key: \xff\xfe\r\n\r\n" + body)
    assert (await reader.read()).startswith(b"HTTP/1.1 202")
    writer.close()
    await writer.wait_closed()
