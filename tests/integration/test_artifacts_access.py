"""Who may do what with artifacts, and how long they stay: over HTTP, on real Postgres, NATS and a real folder."""

import hashlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import jwt
import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from libs.eventlog.log import NO_STREAM
from libs.eventlog.postgres import PostgresLog, open_postgres_log
from libs.proofs import NOTHING, proof_headers
from libs.tokens import new_seed, public_key, sign, signature_text
from proto.catalogue import decode
from proto.events.artifact import ArtifactSealed
from proto.events.base import ArtifactRef
from proto.events.build import BuildFinished, StageFinished
from proto.events.request import BuildRequested
from proto.events.team import DEFAULT_POLICY, TeamPolicySet
from proto.plan import Plan
from tests.artifacts_fixture import BLOBS, SERVER_KEY, TREE, WORKER_KEY, Api, blob_stream, blobs_in, manifest, serving, tar, tree_digest
from tests.controls import eventually, write
from tests.nats_fixture import NatsServer
from tests.postgres_fixture import Database

FILES = {"a": b"alpha", "d/b": b"beta"}
DIGESTS = [hashlib.sha256(contents).digest() for contents in FILES.values()]
PLAN = msgspec.convert({"stages": [{"name": "s", "steps": [{"step": "run", "name": "t", "config": {"run": {"path": "true"}}}]}]}, Plan)


@pytest.fixture
async def api(database: Database, nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(database, nats_server, tmp_path / "store") as api:
        yield api


@pytest.fixture
async def log(database: Database) -> AsyncIterator[PostgresLog]:
    """The log as a superuser writes it."""
    async with open_postgres_log(database.url("postgres")) as log:
        yield log


async def request(log: PostgresLog, build: str, keep: int = 0, **inputs: str) -> None:
    refs = {name: ArtifactRef(id=artifact, digest="") for name, artifact in inputs.items()}
    event = BuildRequested(build=build, plan=PLAN, inputs=refs, keep_seconds=keep)
    await log.append([write(f"request-{build}", event, expected=NO_STREAM)])


async def finish(log: PostgresLog, build: str) -> None:
    await log.append([write(f"build-{build}", BuildFinished(status="succeeded"), expected=NO_STREAM)])


async def send_output(api: Api, files: dict[str, bytes], **claims: object) -> msgspec.Struct:
    headers = api.build(**claims)
    answer = await api.ask("POST", "/outputs/step/out", headers | {"Content-Type": TREE}, data=manifest(files))
    if answer.status == 202:
        answer = await api.ask("PUT", "/outputs/step/out/blobs", headers | {"Content-Type": BLOBS}, data=blob_stream(files.values()))
    return answer


# --- access --------------------------------------------------------------------------------------------------------------------------


async def test_grants_open_only_what_they_name(api: Api) -> None:
    """FAULTS 79–83"""
    artifact = (await api.put(FILES))["id"]
    for headers, expected in (
        ({}, 401),
        ({"Authorization": "Bearer nonsense"}, 401),
        (api.grant(artifact, "get", seconds=-5), 401),
        (api.build(), 401),
        (api.grant(artifact, "put"), 403),
        (api.grant(artifact, "see"), 403),
        (api.grant(str(uuid4()), "get"), 403),
    ):
        assert (await api.ask("GET", f"/artifacts/{artifact}", headers)).status == expected
    for method, below, wrong in (
        ("POST", "", "get"),
        ("PUT", "/blobs", "get"),
        ("POST", "/blobs", "put"),
        ("GET", "/tree", "get"),
        ("PATCH", "", "put"),
        ("DELETE", "", "get"),
    ):
        assert (await api.of(artifact, wrong, method, below)).status == 403
    assert (await api.of("no-uuid", "put", "POST", data=tar(FILES))).status == 422


async def test_a_build_token_reads_the_inputs_that_it_names_and_nothing_else(api: Api) -> None:
    """FAULTS 81–83, 89"""
    mine, other = await api.put(FILES), await api.put({"secret": b"s3cr3t"})
    token = api.build(inputs={"src": mine["digest"]})
    tree = await api.ask("GET", "/inputs/src", token)
    assert (tree.status, tree.body, tree.headers["ETag"]) == (200, manifest(FILES), f'"{mine["digest"]}"')
    blobs = await api.ask("POST", "/inputs/src/blobs", token, data=b"".join(DIGESTS))
    assert set(blobs_in(blobs.body).values()) == set(FILES.values())
    secret = hashlib.sha256(b"s3cr3t").digest()
    assert (await api.ask("POST", "/inputs/src/blobs", token, data=secret)).status == 422
    for method, path, headers, expected in (
        ("GET", "/inputs/other", token, 403),
        ("POST", "/inputs/other/blobs", token, 403),
        ("GET", f"/artifacts/{other['id']}", token, 401),
        ("GET", "/inputs/src", api.grant("src", "get"), 401),
        ("GET", "/inputs/src", api.build(inputs={"src": mine["digest"]}, team="other"), 410),
        ("POST", "/outputs/step/other", token, 403),
        ("PUT", "/outputs/step/other/blobs", token, 403),
        ("POST", "/outputs/step/out", api.build(seconds=-5), 401),
    ):
        assert (await api.ask(method, path, headers)).status == expected, path


async def test_a_build_token_is_worth_nothing_without_its_worker_s_key(api: Api, log: PostgresLog) -> None:
    """FAULTS 79, 80, 83, 84: on another host, for another request, at another time, under another algorithm."""
    digest = (await api.put(FILES))["digest"]
    token = api.build(inputs={"src": digest})["Authorization"].removeprefix("Bearer ")
    other = api.build("b2", inputs={"src": digest})["Authorization"].removeprefix("Bearer ")
    claims = {"team": "main", "build": "b1", "stage": "s", "attempt": 1, "worker": "w1", "key": public_key(WORKER_KEY), "outputs": []}
    claims |= {"inputs": {"src": digest}, "exp": int(time.time()) + 60}
    now = time.time()

    def proof(
        seed: str = WORKER_KEY, token: str = token, method: str = "GET", path: str = "/inputs/src", content: str = NOTHING, at: float = 0
    ) -> dict[str, str]:
        return proof_headers(seed, token, method, path, content, now + at)

    bearer = {"Authorization": f"Bearer {token}"}
    never = "9" * 400
    signed = sign(WORKER_KEY, "penstock-request", "\0".join(("GET", "/inputs/src", never, NOTHING, token)).encode())
    for why, headers in {
        "no signature": {**bearer, "Penstock-Time": ""},
        "another key": proof(seed=new_seed()),
        "another token": proof(token=other) | bearer,
        "another method": proof(method="POST"),
        "another input": proof(path="/inputs/other"),
        "a query": proof(path="/inputs/src?x=1"),
        "no name for the body": proof(content="stream"),
        "another body": proof(content="00" * 32),
        "an hour ago": proof(at=-3600),
        "in an hour": proof(at=3600),
        "another time": proof() | {"Penstock-Time": str(int(now) + 1)},
        "a time that no clock has": proof() | {"Penstock-Time": never, "Penstock-Signature": signature_text(signed.signature)},
        "no time": proof() | {"Penstock-Time": "x"},
        "alg=none": proof(token=jwt.encode(claims, "", algorithm="none")),
        "HS256": proof(token=jwt.encode(claims, public_key(SERVER_KEY), algorithm="HS256")),
        "its own": proof(token=jwt.encode(claims, Ed25519PrivateKey.generate(), algorithm="EdDSA")),
    }.items():
        answer = await api.ask("GET", "/inputs/src", headers)
        assert (answer.status, answer.json.get("detail", "")) == (401, ""), why
        assert "Date" in answer.headers
    assert (await api.ask("GET", "/inputs/src", proof(at=-50))).status == 200
    assert (await api.ask("GET", "/inputs/src", proof(at=50))).status == 200


async def test_a_signed_request_that_is_sent_again_does_nothing_new(api: Api, log: PostgresLog) -> None:
    """FAULTS 84: what was signed is the body, so that nothing else can be sent in its place; sent again it seals nothing again."""
    token = api.build()["Authorization"].removeprefix("Bearer ")
    body = manifest({"empty": b""})
    headers = proof_headers(WORKER_KEY, token, "POST", "/outputs/step/out", hashlib.sha256(body).hexdigest(), time.time())
    forged = await api.ask("POST", "/outputs/step/out", headers | {"Content-Type": TREE}, data=manifest({"forged": b""}))
    assert forged.status == 401
    first = await api.ask("POST", "/outputs/step/out", headers | {"Content-Type": TREE}, data=body)
    again = await api.ask("POST", "/outputs/step/out", headers | {"Content-Type": TREE}, data=body)
    assert (first.status, again.status, first.body) == (201, 201, again.body)
    assert len((await log.read_streams([f"artifact-{first.json['id']}"])).popitem()[1]) == 1
    stream = proof_headers(WORKER_KEY, token, "POST", "/outputs/step/out", "stream", time.time())
    assert (await api.ask("POST", "/outputs/step/out", stream | {"Content-Type": TREE}, data=body)).status == 401


async def test_a_token_is_dead_when_its_attempt_is_over(api: Api, log: PostgresLog) -> None:
    """FAULTS 81, 89"""
    digest = (await api.put(FILES))["digest"]

    async def status(attempt: int) -> int:
        return (await api.ask("GET", "/inputs/src", api.build("b7", attempt, inputs={"src": digest}))).status

    assert await status(1) == 200
    await log.append([write("build-b7", StageFinished(stage="s", attempt=1, status="errored"), expected=NO_STREAM)])

    async def dead(attempt: int) -> bool:
        return await status(attempt) == 403

    await eventually(lambda: dead(1))
    assert await status(2) == 200
    await log.append([write("build-b7", BuildFinished(status="aborted"), expected=1)])
    await eventually(lambda: dead(2))


async def test_an_output_is_sealed_under_the_same_id_however_often_it_is_sent(api: Api, log: PostgresLog) -> None:
    first, again = await send_output(api, FILES), await send_output(api, FILES)
    assert (first.status, again.status, first.body) == (201, 201, again.body)
    [recorded] = (await log.read_streams([f"artifact-{first.json['id']}"])).popitem()[1]
    sealed = decode(recorded.type, recorded.data)
    assert isinstance(sealed, ArtifactSealed) and recorded.actor == "worker:w1"
    assert (sealed.kind, sealed.build, sealed.stage, sealed.attempt, sealed.step, sealed.name) == ("output", "b1", "s", 1, "step", "out")
    assert abs(sealed.expires_at - time.time() - DEFAULT_POLICY.output_seconds) < 60
    assert (await send_output(api, {"else": b""})).status == 409
    assert (await api.ask("POST", "/outputs/step/out", api.build(), data=tar(FILES))).status == 415


# --- lifetimes -----------------------------------------------------------------------------------------------------------------------


async def test_lifetimes_are_as_asked_or_as_the_policy_says(api: Api, log: PostgresLog) -> None:
    def about(artifact: dict, seconds: int) -> bool:
        return abs(artifact["expires_at"] - time.time() - seconds) < 30

    assert about(await api.put({"1": b"1"}), DEFAULT_POLICY.input_seconds)
    assert about(await api.put({"2": b"2"}, query="?keep=100"), 100)
    assert (await api.put({"3": b"3"}, query="?keep=forever"))["expires_at"] == 0
    for bad in ("0", "-1", "x", "9" * 12):
        assert (await api.upload(tar(FILES), query=f"?keep={bad}")).status == 422
    await log.append([write("team-main", TeamPolicySet(input_seconds=1000, output_seconds=2000, quota_bytes=0))])

    async def new_policy() -> bool:
        return about((await api.upload(tar(FILES))).json, 1000)

    await eventually(new_policy)

    async def kept(build: str) -> int:
        ref = (await send_output(api, FILES, build=build)).json
        [recorded] = (await log.read_streams([f"artifact-{ref['id']}"])).popitem()[1]
        sealed = decode(recorded.type, recorded.data)
        assert isinstance(sealed, ArtifactSealed)
        return round(sealed.expires_at - time.time(), -2) if sealed.expires_at else 0

    for build, keep in (("policy", 0), ("long", 5000), ("forever", -1)):
        await request(log, build, keep)
    assert [await kept("policy"), await kept("long"), await kept("forever")] == [2000, 5000, 0]


async def test_an_artifact_is_pinned_kept_longer_and_deleted(api: Api) -> None:
    artifact = (await api.put(FILES, query="?keep=1000"))["id"]

    async def change(body: str) -> dict:
        answer = await api.of(artifact, "change", "PATCH", data=body.encode())
        assert answer.status == 200, answer.body
        return answer.json

    before = (await change("{}"))["expires_at"]
    assert (await change('{"pinned": true}'))["pinned"]
    assert (await change('{"keep": 10}'))["expires_at"] == before
    assert (await change('{"keep": 5000}'))["expires_at"] > before + 3000
    assert (await change('{"keep": 10, "shorten": true}'))["expires_at"] < before
    assert not (await change('{"pinned": false}'))["pinned"]
    assert (await api.of(artifact, "change", "PATCH", data=b'{"keep": "x"}')).status == 422
    assert (await api.of(artifact, "change", "DELETE")).status == 204
    for method, action in (("GET", "get"), ("PATCH", "change"), ("DELETE", "change")):
        gone = await api.of(artifact, action, method, data=b"{}" if method == "PATCH" else None)
        assert (gone.status, gone.problem) == (410, "expired")
    assert (await api.send_manifest(FILES, artifact)).status == 410
    await eventually(lambda: api.stored() == [])


@pytest.mark.parametrize("changes", [[], ['{"keep": 1, "shorten": true}'], ['{"pinned": true}', '{"keep": 1, "shorten": true}', '{"pinned": false}']])
async def test_what_is_due_soon_goes_then_however_seldom_it_is_looked_for(
    database: Database, nats_server: NatsServer, tmp_path: Path, changes: list[str]
) -> None:
    async with serving(database, nats_server, tmp_path / "store", PENSTOCK_TIDY_SECONDS="3600") as api:
        artifact = (await api.put(FILES, query="?keep=1000" if changes else "?keep=1"))["id"]
        for change in changes:
            assert (await api.of(artifact, "change", "PATCH", data=change.encode())).status == 200

        async def gone() -> bool:
            return (await api.of(artifact, "see", "GET", "/tree")).status == 410 and api.stored() == []

        await eventually(gone)


async def test_what_is_due_goes_unless_it_is_pinned_or_an_unfinished_build_uses_it(api: Api, log: PostgresLog) -> None:
    due, pinned, used = [await api.put({name: name.encode()}, query="?keep=2") for name in ("due", "pinned", "used")]
    await api.of(pinned["id"], "change", "PATCH", data=b'{"pinned": true}')
    await request(log, "b9", src=used["id"])
    token = api.build("b9", inputs={"src": used["digest"]})

    async def tombstones() -> set[str]:
        read = await log.read(0, 1000, {"artifact"})
        return {recorded.stream.removeprefix("artifact-") for recorded in read if recorded.type == "artifact.expired"}

    async def due_is_gone() -> bool:
        return due["id"] in await tombstones()

    await eventually(due_is_gone)
    assert (await api.get(due["id"])).status == 410
    await api.reads_back(pinned["id"], {"pinned": b"pinned"})
    assert (await api.ask("GET", "/inputs/src", token)).status == 200
    await finish(log, "b9")

    async def used_is_gone() -> bool:
        return await tombstones() == {due["id"], used["id"]}

    await eventually(used_is_gone)
    stored = len(api.stored())
    await api.of(pinned["id"], "change", "DELETE")
    await eventually(lambda: len(api.stored()) < stored)
    await eventually(lambda: api.stored() == [])


async def test_what_a_build_was_given_can_be_read_until_it_has_finished_even_when_it_is_deleted(api: Api, log: PostgresLog) -> None:
    artifact = await api.put(FILES)
    await request(log, "before", src=artifact["id"])
    await api.of(artifact["id"], "change", "DELETE")
    await request(log, "after", src=artifact["id"])
    await eventually(lambda: _projected(log))
    for _ in range(3):
        tree = await api.ask("GET", "/inputs/src", api.build("before", inputs={"src": artifact["digest"]}))
        blobs = await api.ask("POST", "/inputs/src/blobs", api.build("before", inputs={"src": artifact["digest"]}), data=DIGESTS[0])
        assert (tree.status, blobs.status) == (200, 200)
    await finish(log, "before")

    async def gone() -> bool:
        answer = await api.ask("GET", "/inputs/src", api.build("after", inputs={"src": artifact["digest"]}))
        return (answer.status, answer.status == 410 and answer.problem) == (410, "expired")

    await eventually(gone)
    await eventually(lambda: api.stored() == [])


async def _projected(log: PostgresLog) -> bool:
    position = await log.pool.fetchval("SELECT position FROM artifacts.checkpoint WHERE name = 'artifacts'")
    return bool(position == await log.head())


async def test_a_quota_bounds_what_a_team_stores(api: Api, log: PostgresLog) -> None:
    await api.put(FILES)
    await log.append([write("team-main", TeamPolicySet(input_seconds=1000, output_seconds=2000, quota_bytes=50_000))])
    await eventually(lambda: _projected(log))
    large = {"large": bytes(60_000)}
    for answer in (await api.upload(tar(large)), await api.send_manifest(large)):
        assert (answer.status, answer.problem) == (507, "quota-exceeded")
    assert (await api.upload(tar(large), team="other")).status == 201
    assert (await api.upload(tar(FILES | {"small": b"s"}))).status == 201
    await eventually(lambda: _projected(log))
    usage = (await api.ask("GET", "/usage", api.grant("", "see"))).json
    assert (usage["artifacts"], usage["artifact_bytes"], usage["quota_bytes"]) == (2, 19, 50_000)
    assert 0 < usage["stored_bytes"] < 50_000


async def test_an_upload_that_is_left_lapses(api: Api, log: PostgresLog) -> None:
    artifact = str(uuid4())
    assert (await api.send_manifest(FILES, artifact)).status == 202
    await log.pool.execute("UPDATE artifacts.upload SET seen_at = seen_at - 3601")
    await eventually(lambda: api.stored() == [])
    lapsed = await api.send_blobs(artifact, blob_stream(FILES.values()))
    assert (lapsed.status, lapsed.problem) == (404, "upload-unknown")
    assert (await api.send_manifest(FILES, artifact)).status == 202
    assert (await api.send_blobs(artifact, blob_stream(FILES.values()))).json["digest"] == tree_digest(FILES)
