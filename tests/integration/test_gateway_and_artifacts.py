"""The gateway and the real artifacts service: what a client sends, looks at, fetches and builds from."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from backports import zstd

from libs.archives.tree import CHUNK
from tests.artifacts_fixture import BLOBS, GRANT_KEY, TREE, blob_stream, blobs_in, chunks_of, distinct, manifest, missing, serving, tar, tree_digest
from tests.controls import eventually
from tests.gateway_fixture import Gateway, running_gateway
from tests.nats_fixture import NatsServer
from tests.postgres_fixture import Database

BIG = os.urandom(CHUNK) + bytes(CHUNK) + os.urandom(1000)
FILES = {"a": b"alpha", "lib/b": b"beta", "lib/deep/c": b"gamma", "z": BIG}
ALL = "/teams/main/user-artifacts"


@pytest.fixture
async def gateway(database: Database, nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Gateway]:
    async with (
        serving(database, nats_server, tmp_path / "store") as api,
        running_gateway(database, nats_server.url, artifacts_url=api.url, grant_key=GRANT_KEY) as running,
    ):
        yield running


async def send_manifest(gateway: Gateway, files: Mapping[str, bytes], status: int, query: str = "", **headers: str) -> Any:
    return await gateway.json("POST", ALL + query, status, data=manifest(files), headers={"Content-Type": TREE} | headers)


async def send_blobs(gateway: Gateway, artifact: str, body: bytes, status: int, **headers: str) -> Any:
    return await gateway.json("PUT", f"{ALL}/{artifact}/blobs", status, data=body, headers={"Content-Type": BLOBS} | headers)


async def fetched(gateway: Gateway, path: str, method: str = "GET", **more: Any) -> tuple[int, bytes, Mapping[str, str]]:
    async with gateway.call(method, path, **more) as answer:
        return answer.status, await answer.read(), answer.headers


async def test_only_what_is_missing_is_sent_and_an_unfinished_upload_is_taken_up_again(gateway: Gateway) -> None:
    key = {"Idempotency-Key": "once"}
    pending = await send_manifest(gateway, FILES, 202, "?name=src&keep=60", **key)
    wanted = missing(FILES, pending)
    half = await send_blobs(gateway, pending["id"], blob_stream(wanted[:2]), 200)
    assert half["missing_blobs"] == len(wanted) - 2
    again = await send_manifest(gateway, FILES, 202, "?name=src&keep=60", **key)
    assert again == half
    body = zstd.compress(blob_stream(missing(FILES, again)))
    made = await send_blobs(gateway, pending["id"], body, 201, **{"Content-Encoding": "zstd"})
    assert (made["id"], made["kind"], made["name"], made["files"], made["digest"]) == (pending["id"], "user", "src", 4, tree_digest(FILES))
    assert made["expires_at"] is not None
    assert (await send_manifest(gateway, FILES, 201, **key))["id"] == made["id"]
    known = await eventually(lambda: gateway.json("POST", f"{ALL}?tree={made['digest']}", 201))
    assert known["digest"] == made["digest"]
    assert (await gateway.json("POST", f"{ALL}?tree={'0' * 64}", 404))["type"].endswith("tree-unknown")
    assert (await gateway.json("POST", ALL, 201, data=tar(FILES)))["digest"] == made["digest"]
    usage = await eventually(lambda: _usage(gateway, artifacts=3))
    assert (usage["artifact_bytes"], usage["quota_bytes"]) == (3 * made["size"], None)
    assert usage["stored_bytes"] < 2 * made["size"]


async def _usage(gateway: Gateway, **wanted: object) -> Any:
    found = await gateway.json("GET", "/teams/main/usage", 200)
    return found if all(found[name] == value for name, value in wanted.items()) else None


async def test_a_tree_comes_back_whole_in_parts_and_by_ranges(gateway: Gateway) -> None:
    artifact = (await gateway.json("POST", ALL, 201, data=tar(FILES)))["id"]
    one = f"{ALL}/{artifact}"
    assert (await fetched(gateway, f"{one}?format=tree"))[:2] == (200, manifest(FILES))
    digests = [hashlib.sha256(chunk).digest() for chunk in distinct(FILES)]
    status, body, _ = await fetched(gateway, f"{one}/blobs", "POST", data=b"".join(digests))
    assert (status, blobs_in(body)) == (200, {hashlib.sha256(chunk).digest(): chunk for text in FILES.values() for chunk in chunks_of(text)})
    status, body, headers = await fetched(gateway, f"{one}?path=z", headers={"Range": f"bytes={CHUNK - 5}-{CHUNK + 4}"})
    assert (status, body, headers["Content-Range"]) == (206, BIG[CHUNK - 5 : CHUNK + 5], f"bytes {CHUNK - 5}-{CHUNK + 4}/{len(BIG)}")
    assert (await fetched(gateway, f"{one}?path=z", headers={"If-None-Match": headers["ETag"]}))[0] == 304
    whole = (await fetched(gateway, one))[1]
    assert (await fetched(gateway, one, headers={"Range": "bytes=700-"}))[1] == whole[700:]
    status, body, headers = await fetched(gateway, one, "HEAD")
    assert (status, body, headers["Content-Length"], headers["Content-Type"]) == (200, b"", str(len(whole)), "application/x-tar")
    status, _, headers = await fetched(gateway, f"{one}?path=a", headers={"Range": "bytes=99-"})
    assert (status, headers["Content-Range"]) == (416, "bytes */5")
    status, body, headers = await fetched(gateway, f"{one}?format=tree", headers={"Accept-Encoding": "zstd"}, auto_decompress=False)
    assert headers["Content-Encoding"] == "zstd"
    found = (await gateway.json("GET", f"{one}/tree", 200))["items"]
    assert [(item["path"], item["kind"]) for item in found] == [("a", "file"), ("lib", "folder"), ("z", "file")]
    first = await gateway.json("GET", f"{one}/tree?path=lib&recursive=true&limit=2", 200)
    rest = await gateway.json("GET", f"{one}/tree?path=lib&recursive=true&limit=2&cursor={first['next']}", 200)
    assert [item["path"] for item in first["items"] + rest["items"]] == ["lib/b", "lib/deep", "lib/deep/c"]
    for path in (f"{one}?path=no/such", f"{one}/tree?path=no/such"):
        assert "`no/such`" in (await gateway.json("GET", path, 404))["detail"]


async def test_what_is_changed_about_a_lifetime_is_seen_at_once(gateway: Gateway) -> None:
    one = f"{ALL}/{(await gateway.json('POST', ALL, 201, data=tar(FILES)))['id']}"
    as_json = {"Accept": "application/json"}
    before = await gateway.json("GET", one, 200, headers=as_json)
    pinned = await gateway.json("PATCH", one, 200, json={"pinned": True})
    assert (pinned["pinned"], pinned["expires_at"]) == (True, None)
    assert await gateway.json("PATCH", one, 200, json={"pinned": False}) == before
    assert (await gateway.json("PATCH", one, 200, json={"keep": 1}))["expires_at"] == before["expires_at"]
    assert (await gateway.json("PATCH", one, 200, json={"keep": 10**6}))["expires_at"] > before["expires_at"]
    await gateway.json("PATCH", one, 200, json={"keep": 0, "shorten": True})
    await eventually(lambda: _tombstone(gateway))
    assert (await gateway.json("GET", one, 410))["type"].endswith("expired")
    assert (await gateway.json("PATCH", one, 410, json={"keep": 100}))["type"].endswith("expired")


async def _tombstone(gateway: Gateway) -> bool:
    return any(event.type == "artifact.expired" for event in await gateway.logs["builds"].read(0, 100, ["artifact"]))


async def test_a_folder_of_an_artifact_is_an_input_and_the_same_for_a_repeat_however_late(gateway: Gateway) -> None:
    artifact = (await gateway.json("POST", ALL, 201, data=tar(FILES)))["id"]
    inputs, key = {"src": f"artifact:{artifact}/lib", "file": f"artifact:{artifact}/lib/deep/c"}, {"Idempotency-Key": "k"}
    build = await gateway.submit(inputs=inputs, headers=key)
    part, file = (build["inputs"][name]["id"] for name in ("src", "file"))
    assert build["inputs"]["src"]["digest"] == tree_digest({"b": b"beta", "deep/c": b"gamma"})
    assert build["inputs"]["file"]["digest"] == tree_digest({"c": b"gamma"})
    assert [each["id"] for each in (await gateway.json("GET", ALL, 200))["items"]] == [artifact], "nobody asked for the parts by themselves"
    assert {each["id"] for each in (await gateway.json("GET", f"{ALL}?kind=part", 200))["items"]} == {part, file}
    assert (await gateway.json("GET", f"{ALL}/{part}", 200, headers={"Accept": "application/json"}))["kind"] == "part"
    assert (await fetched(gateway, f"{ALL}/{file}?path=c"))[1] == b"gamma"
    async with asyncio.TaskGroup() as group:
        for each in (artifact, part, file):
            group.create_task(gateway.json("DELETE", f"{ALL}/{each}", 204))
    assert await gateway.submit(inputs=inputs, headers=key) == build
    assert "was deleted" in (await gateway.submit(inputs=inputs, status=422))["detail"]
    fresh = (await gateway.json("POST", ALL, 201, data=tar(FILES)))["id"]
    assert "there is no `no`" in (await gateway.submit(inputs={"src": f"artifact:{fresh}/no"}, status=422))["detail"]
    copy = await gateway.json("POST", f"{ALL}?from={fresh}&path=lib/deep&name=part", 201)
    assert (copy["digest"], copy["name"], copy["kind"]) == (tree_digest({"c": b"gamma"}), "part", "user")
    assert {each["id"] for each in (await gateway.json("GET", ALL, 200))["items"]} == {fresh, copy["id"]}


async def test_another_team_finds_neither_an_artifact_nor_an_unfinished_upload(gateway: Gateway) -> None:
    """FAULTS 33"""
    other = await gateway.token("other")
    pending = await send_manifest(gateway, FILES, 202)
    body = blob_stream(missing(FILES, pending))
    theirs = {"token": other, "data": body, "headers": {"Content-Type": BLOBS}}
    assert (await gateway.json("PUT", f"/teams/other/user-artifacts/{pending['id']}/blobs", 404, **theirs))["type"].endswith("upload-unknown")
    made = await send_blobs(gateway, pending["id"], body, 201)
    await gateway.json("POST", f"/teams/other/user-artifacts?tree={made['digest']}", 404, token=other)
    asked = await gateway.json("POST", "/teams/other/user-artifacts", 202, token=other, data=manifest(FILES), headers={"Content-Type": TREE})
    assert asked["missing"] == pending["missing"]
    assert (await gateway.json("GET", "/teams/other/usage", 200, token=other))["artifacts"] == 0


async def test_a_quota_is_kept(gateway: Gateway) -> None:
    policy = {"input_seconds": 60, "output_seconds": 60, "quota_bytes": 100_000}
    await gateway.json("PUT", "/teams/main/policy", 200, json=policy)
    await eventually(lambda: _usage(gateway, quota_bytes=100_000))
    refused = await gateway.json("POST", ALL, 507, data=tar(FILES))
    assert refused["type"].endswith("quota-exceeded")
    assert (await gateway.json("POST", ALL, 201, data=tar({"a": b"small"})))["size"] == 5


async def test_what_is_refused_is_said_in_the_words_of_the_archive(gateway: Gateway) -> None:
    """FAULTS 19"""
    refused = await gateway.json("POST", ALL, 422, data=tar({"../x": b""}))
    assert refused["type"].endswith("archive-refused")
    assert "../x" in refused["detail"]
    await send_manifest(gateway, {}, 201)
    assert (await gateway.json("POST", ALL, 422, data=b"no manifest", headers={"Content-Type": TREE}))["type"].endswith("manifest-refused")
    await gateway.json("PUT", f"{ALL}/{'0' * 8}-0000-0000-0000-{'0' * 12}/blobs", 415, data=b"x")
