"""Requests that need an event which this code cannot read: of a newer version, or damaged. Each is answered with which event that is."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from libs.runtime.http import problem
from proto.events.artifact import LogArchived
from proto.events.build import StageQueued
from proto.plan import Requirements
from services.gateway.commands import request_name
from tests.artifacts_fixture import serving, tar
from tests.controls import eventually
from tests.gateway_fixture import PLAN, Gateway, running_gateway
from tests.nats_fixture import NatsServer
from tests.postgres_fixture import Database

INSERT = """
INSERT INTO eventlog.event (position, stream, version, event_id, type, data, team, correlation_id, causation_id, actor, recorded_at)
SELECT (SELECT max(position) FROM eventlog.event) + 1, $1, (SELECT coalesce(max(version), 0) FROM eventlog.event WHERE stream = $1) + 1,
    'unreadable', $2, '{}', 'main', 'c', 'c', 'test', clock_timestamp()
RETURNING position
"""
POLICY = {"input_seconds": 1, "output_seconds": 1, "quota_bytes": 0}
WORKER = {"bootstrap_workers": "w1=" + "k" * 43}
KEY = {"Idempotency-Key": "k"}
NEWER = "thing.of_tomorrow"


async def put_unreadable(database: Database, stream: str, tag: str) -> str:
    """Into a stream; what is said of it."""
    connection = await asyncpg.connect(database.url("postgres"))
    try:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock(x'70656e73746f636b'::bigint)")
            position = await connection.fetchval(INSERT, stream, tag)
    finally:
        await connection.close()
    return f"event {position} ({tag} on {stream}) cannot be read: "


@pytest.mark.parametrize(
    ("method", "path", "stream", "tag", "more"),
    [
        ("GET", "/teams/main/builds/1/preparation", "build-{build}", NEWER, {}),
        ("GET", "/teams/main/builds/1/preparation", "lease-{build}", "lease.expired", {}),
        ("PUT", "/teams/main/builds/1/abort", "request-abort-{build}", NEWER, {}),
        ("POST", "/teams/main/builds", f"request-{request_name('main', 'k')}", NEWER, {"json": {"plan": PLAN}, "headers": KEY}),
        ("PUT", "/teams/main", "team-main", NEWER, {}),
        ("POST", "/teams/main/tokens", "team-main", "team.token_issued", {"json": {"role": "viewer"}}),
        ("PUT", "/teams/main/policy", "team-main", NEWER, {"json": POLICY}),
        ("PUT", "/workers/w1/drain", "fleet-worker-w1", NEWER, {"json": {}}),
        ("PUT", "/workers/w1/resume", "fleet-worker-w1", NEWER, {"json": {}}),
        ("PUT", "/workers/w1/revoke", "fleet-worker-w1", NEWER, {"json": {}}),
        ("DELETE", "/workers/w1", "fleet-worker-w1", NEWER, {}),
    ],
)
async def test_the_gateway_says_which_event_it_cannot_read(
    database: Database, nats_server: NatsServer, method: str, path: str, stream: str, tag: str, more: Mapping[str, Any]
) -> None:
    async with running_gateway(database, nats_server.url, **WORKER) as gateway:
        build = (await gateway.submit())["id"]
        said = await put_unreadable(database, stream.format(build=build), tag)
        await is_said(gateway, said, method, path, **more)


async def is_said(gateway: Gateway, said: str, method: str, path: str, **more: Any) -> None:
    async with gateway.call(method, path, **more) as answer:
        told = await answer.json(content_type="application/problem+json")
        assert (answer.status, told["type"]) == (503, "urn:penstock:problem:unreadable-event"), told
        assert told["detail"].startswith(said)
        assert "run a version of this service that can read it" in told["detail"]
        assert answer.headers["Retry-After"] == "60"


async def test_the_log_itself_is_shown_with_what_cannot_be_read(database: Database, nats_server: NatsServer) -> None:
    """So that whoever runs the server can look at it."""
    async with running_gateway(database, nats_server.url) as gateway:
        said = await put_unreadable(database, "team-main", NEWER)
        position = said.split()[1]
        async with gateway.call("GET", f"/events?from={position}") as answer:
            first = await answer.content.readuntil(b"\n\n")
        assert f"id: {position}\nevent: {NEWER}\n".encode() in first


async def test_a_gateway_starts_where_the_first_team_and_a_worker_cannot_be_read(database: Database, nats_server: NatsServer) -> None:
    async with running_gateway(database, nats_server.url, **WORKER) as gateway:
        await gateway.submit()
    await put_unreadable(database, "team-main", NEWER)
    async with running_gateway(database, nats_server.url, **WORKER) as gateway:
        assert [build["number"] for build in (await gateway.json("GET", "/teams/main/builds", 200))["items"]] == [1]


@pytest.mark.parametrize(
    ("deed", "method", "below"),
    [
        ("get", "GET", ""),
        ("get", "HEAD", ""),
        ("see", "GET", "/tree"),
        ("get", "POST", "/blobs"),
        ("change", "PATCH", ""),
        ("change", "DELETE", ""),
        ("put", "POST", "?name=src"),
    ],
)
async def test_artifacts_says_which_event_of_an_artifact_it_cannot_read(
    database: Database, nats_server: NatsServer, tmp_path: Path, deed: str, method: str, below: str
) -> None:
    async with serving(database, nats_server, tmp_path / "store") as api:
        artifact = (await api.put({"a": b"alpha"}))["id"]
        said = await put_unreadable(database, f"artifact-{artifact}", NEWER)
        body = {"PATCH": b'{"pinned": true}', "POST": tar({"a": b"beta"}) if deed == "put" else b"x" * 32}.get(method)
        answer = await api.of(artifact, deed, method, below, data=body)
        assert answer.status == 503
        if method != "HEAD":
            assert (answer.problem, answer.json["detail"].startswith(said)) == ("unreadable-event", True), answer.body


async def test_artifacts_says_which_event_of_a_log_it_cannot_read(database: Database, nats_server: NatsServer, tmp_path: Path) -> None:
    async with serving(database, nats_server, tmp_path / "store") as api:
        await api.put({"a": b"alpha"})
        said = await put_unreadable(database, "artifact-log-b1-s-1", NEWER)
        answer = await api.ask("GET", "/logs/b1/s/1", api.grant("b1", "log"))
        assert (answer.status, answer.problem, answer.json["detail"].startswith(said)) == (503, "unreadable-event", True)


async def test_the_gateway_passes_on_why_a_log_cannot_be_read(database: Database, nats_server: NatsServer) -> None:
    async with running_gateway(database, nats_server.url) as gateway:
        build = (await gateway.submit())["id"]
        await gateway.record(f"build-{build}", StageQueued(stage="main", attempt=1, requirements=Requirements()))
        archived = LogArchived(build=build, stage="main", attempt=1, archive=1, digest="d", chunks=1, lines=1, bytes=1)
        await gateway.record(f"artifact-log-{build}-main-1", archived)
        gateway.artifacts.refuse = problem(503, "unreadable-event", "The log cannot be read here", "event 7 cannot be read")

        async def said() -> bool:
            answer = await gateway.json("GET", f"/teams/main/builds/{build}/log?stage=main", 503)
            return bool(answer["detail"] == "the log cannot be read now: event 7 cannot be read")

        await eventually(said)


async def test_an_artifact_that_cannot_be_read_keeps_no_other_from_expiring(database: Database, nats_server: NatsServer, tmp_path: Path) -> None:
    """Nor does it end the service."""
    async with serving(database, nats_server, tmp_path / "store") as api:
        first, second = [(await api.put({"a": name}, query="?keep=1"))["id"] for name in (b"1", b"2")]
        await put_unreadable(database, f"artifact-{first}", NEWER)

        async def expired() -> bool:
            return (await api.get(second, "?format=tree")).status == 410

        await eventually(expired, timeout=20)
        assert (await api.get(first, "?format=tree")).status == 503
