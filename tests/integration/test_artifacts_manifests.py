"""Trees that come as a manifest and what is missing of them: only what is new is moved, and nothing is taken on trust."""

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import pytest
from backports import zstd

from libs.archives.blobstream import END_FRAME, frame_header
from libs.archives.tree import CHUNK, FOLDER_MODE, LINK_MODE, ZERO_CHUNK, Entry
from tests.artifacts_fixture import Api, blob_stream, blobs_in, entry, file, manifest, missing, serving, tar, tree_digest
from tests.nats_fixture import NatsServer
from tests.postgres_fixture import Database

BIG = os.urandom(CHUNK) + bytes(CHUNK) + os.urandom(1000)
FILES = {"a": b"alpha", "d/b": b"beta", "d/c": b"alpha", "d/empty": b"", "z": BIG}


@pytest.fixture
async def api(database: Database, nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(database, nats_server, tmp_path / "store") as api:
        yield api


async def test_a_manifest_is_answered_with_what_is_missing_and_the_chunks_make_the_artifact(api: Api) -> None:
    artifact = str(uuid4())
    pending = await api.send_manifest(FILES, artifact)
    assert pending.status == 202
    # alpha, beta, the first chunk of z, zeros (which nobody needs to send), the rest of z
    assert pending.json == {"id": artifact, "missing": [[0, 2], [4, 4]], "missing_bytes": 9 + CHUNK + 1000, "missing_blobs": 4}
    sealed = await api.send_blobs(artifact, blob_stream(reversed(missing(FILES, pending.json))))
    assert sealed.status == 201
    assert (sealed.json["id"], sealed.json["digest"]) == (artifact, tree_digest(FILES))
    assert (sealed.json["size"], sealed.json["files"]) == (14 + len(BIG), 5)
    await api.reads_back(artifact, FILES)
    assert (await api.get(artifact, "?path=z")).body == BIG


async def test_the_same_files_give_the_same_digest_by_tar_and_by_manifest(api: Api) -> None:
    by_tar = (await api.upload(tar(FILES))).json
    by_manifest = await api.send_manifest(FILES)
    assert by_manifest.status == 201
    assert by_tar["digest"] == by_manifest.json["digest"] == tree_digest(FILES)
    assert (await api.get(by_tar["id"])).body == (await api.get(by_manifest.json["id"])).body


async def test_after_one_edit_only_that_is_missing(api: Api) -> None:
    await api.put(FILES)
    before = api.stored()
    edited = FILES | {"d/b": b"gamma"}
    pending = await api.send_manifest(edited)
    assert (pending.status, missing(edited, pending.json)) == (202, [b"gamma"])
    await api.send_blobs(pending.json["id"], blob_stream([b"gamma"]))
    await api.reads_back(pending.json["id"], edited)
    assert set(before) <= set(api.stored())


async def test_a_tree_that_the_team_has_is_named_by_its_digest(api: Api) -> None:
    digest = tree_digest(FILES)
    unknown = await api.of(str(uuid4()), "put", "POST", f"?tree={digest}")
    assert (unknown.status, unknown.problem) == (404, "tree-unknown")
    first = await api.put(FILES)
    known = str(uuid4())
    assert (await api.of(known, "put", "POST", f"?tree={digest}&name=again")).status == 201, "at once, whether it is projected or not"
    await api.of(first["id"], "change", "DELETE")
    await api.reads_back(known, FILES)
    elsewhere = await api.of(str(uuid4()), "put", "POST", f"?tree={digest}", team="other")
    assert (elsewhere.status, elsewhere.problem) == (404, "tree-unknown")
    assert (await api.of(str(uuid4()), "put", "POST", "?tree=xyz")).status == 422


async def test_deduplication_is_within_a_team(api: Api) -> None:
    await api.put(FILES, team="main")
    assert (await api.send_manifest(FILES, team="other")).json["missing_blobs"] == 4


async def test_an_upload_goes_on_where_it_was_cut(api: Api) -> None:
    artifact = str(uuid4())
    pending = (await api.send_manifest(FILES, artifact)).json
    chunks = missing(FILES, pending)
    cut = await api.send_blobs(artifact, blob_stream(chunks[:2], end=b""))
    assert (cut.status, cut.problem) == (422, "blobs-refused")
    again = await api.send_manifest(FILES, artifact)
    assert (again.status, missing(FILES, again.json)) == (202, chunks[2:])
    half = await api.send_blobs(artifact, blob_stream(chunks[2:3]))
    assert (half.status, missing(FILES, half.json)) == (200, chunks[3:])
    assert (await api.send_blobs(artifact, blob_stream(chunks[3:]))).status == 201
    await api.reads_back(artifact, FILES)


async def test_an_upload_goes_on_at_another_instance(database: Database, nats_server: NatsServer, tmp_path: Path) -> None:
    artifact = str(uuid4())
    async with serving(database, nats_server, tmp_path / "store") as one:
        chunks = missing(FILES, (await one.send_manifest(FILES, artifact)).json)
        await one.send_blobs(artifact, blob_stream(chunks[:1]))
    async with serving(database, nats_server, tmp_path / "store") as one, serving(database, nats_server, tmp_path / "store") as other:
        halves = await asyncio.gather(one.send_blobs(artifact, blob_stream(chunks[1:3])), other.send_blobs(artifact, blob_stream(chunks[3:])))
        assert sorted(half.status for half in halves) in ([200, 201], [201, 201])
        await one.reads_back(artifact, FILES)


async def test_the_same_manifest_again_is_the_same_artifact_and_another_is_refused(api: Api) -> None:
    artifact = (await api.put(FILES))["id"]
    assert (await api.send_manifest(FILES, artifact)).status == 201
    other = await api.send_manifest({"other": b"x"}, artifact)
    assert (other.status, other.problem) == (409, "conflict")
    pending = str(uuid4())
    assert (await api.send_manifest({"new": b"1"}, pending)).status == 202
    assert (await api.send_manifest({"new": b"2"}, pending)).status == 409


async def test_bodies_may_be_packed_with_zstd(api: Api) -> None:
    artifact = str(uuid4())
    packed = {"Content-Encoding": "zstd"}
    pending = await api.send_manifest(zstd.compress(manifest(FILES)), artifact, **packed)
    assert pending.status == 202
    body = zstd.compress(blob_stream(missing(FILES, pending.json)))
    assert (await api.send_blobs(artifact, body, **packed)).status == 201
    answer = await api.get(artifact, "?format=tree", **{"Accept-Encoding": "zstd"})
    assert (answer.headers["Content-Encoding"], zstd.decompress(answer.body)) == ("zstd", manifest(FILES))
    assert answer.headers["ETag"] == f'"{tree_digest(FILES)}"'
    assert (await api.send_manifest(manifest(FILES), **{"Content-Encoding": "br"})).status == 415
    assert (await api.send_manifest(manifest(FILES), **packed)).status == 422


def link(path: str, target: str) -> Entry:
    return Entry(path.encode(), "link", LINK_MODE, target=target.encode())


def folder(path: str) -> Entry:
    return Entry(path.encode(), "folder", FOLDER_MODE)


DEEP = "/".join(["d"] * 200)


@pytest.mark.parametrize(
    ("entries", "member", "rule"),
    [
        ([entry("../out", b"x")], "../out", "named before"),  # FAULTS 19
        ([entry("..", b"x")], "..", "`..`"),  # FAULTS 19
        ([entry("/etc/passwd", b"x")], "/etc/passwd", "absolute"),  # FAULTS 19
        ([link("l", "d"), entry("l/out", b"x")], "l/out", "no folder"),  # FAULTS 20
        ([entry("f", b"x"), entry("f/out", b"x")], "f/out", "no folder"),
        ([Entry(b"h", "file", 0o644, 1, hashlib.sha256(b"x").digest(), b"../../x")], "h", "hard link"),  # FAULTS 21
        ([link("l", "../../etc")], "l", "leads out"),  # FAULTS 22
        ([link("l", "/etc")], "l", "absolute"),
        ([Entry(b"p", "file", 0o6755, 0)], "p", "mode"),  # FAULTS 24
        ([entry("n" * 256, b"x")], "n" * 256, "255 bytes"),  # FAULTS 27
        ([entry("a\0b", b"x")], "a\\x00b", "NUL"),  # FAULTS 27
        ([entry("a", b"x"), entry("a", b"x")], "a", "twice"),  # FAULTS 28
        ([entry("b", b"x"), entry("a", b"x")], "a", "order"),
        ([Entry(b"a", "file", 0o644, 100, hashlib.sha256(b"x").digest() * 2)], "a", "digests than chunks"),
        ([entry("a", b"x"), Entry(b"b", "file", 0o644, 2, hashlib.sha256(b"x").digest())], "b", "another size"),
        ([folder("/".join(["d"] * n)) for n in range(1, 200)], "", "folders deep"),
    ],
)
async def test_a_hostile_manifest_is_refused_whole(api: Api, entries: list[Entry], member: str, rule: str) -> None:
    """FAULTS 19–28, by manifest"""
    refused = await api.send_manifest(manifest(entries))
    assert (refused.status, refused.problem) == (422, "manifest-refused")
    assert rule in refused.json["rule"]
    assert not member or refused.json["member"] == member
    assert api.stored() == []


@pytest.mark.parametrize(
    "body", [b"", b"penstock", b"nonsense" * 100, manifest(FILES)[:-1], manifest(FILES) + b"\0", manifest(FILES) + b"\0\0\0\1\x90"]
)
async def test_what_is_no_manifest_is_refused(api: Api, body: bytes) -> None:
    """FAULTS 29"""
    refused = await api.send_manifest(body)
    assert (refused.status, refused.problem) == (422, "manifest-refused")
    assert api.stored() == []


async def test_limits_hold_for_manifests(database: Database, nats_server: NatsServer, tmp_path: Path) -> None:
    """FAULTS 25, 26"""
    limits = {"PENSTOCK_MAX_ARTIFACT_BYTES": "10000000", "PENSTOCK_MAX_ARTIFACT_FILES": "100"}
    async with serving(database, nats_server, tmp_path / "store", **limits) as api:
        large = [Entry(b"zeros", "file", 0o644, 2 * CHUNK, ZERO_CHUNK * 2)]
        many = {f"{n:03}": b"x" for n in range(201)}
        for body in (manifest(large), manifest(many), zstd.compress(bytes(1 << 30))):
            headers = {"Content-Encoding": "zstd"} if body.startswith(b"\x28\xb5") else {}
            refused = await api.send_manifest(body, **headers)
            assert refused.status in (413, 422), refused.body
        assert api.stored() == []


@pytest.mark.parametrize(
    ("body", "rule"),
    [
        (blob_stream([b"alpha"], end=b""), "cut short"),
        (blob_stream([b"alpha"])[:-1], "cut short"),
        (blob_stream([b"alpha"]) + b"x", "goes on"),
        (blob_stream([b"unwanted"]), "not wanted"),
        (blob_stream([b"alpha", b"alpha"]), "twice"),
        (frame_header(hashlib.sha256(b"alpha").digest(), 5) + b"alphb" + END_FRAME, "not those"),  # FAULTS 30
        (frame_header(hashlib.sha256(b"alpha").digest(), 6) + b"alphab" + END_FRAME, "another size"),
        (frame_header(hashlib.sha256(b"alpha").digest(), 0xFFFFFFFF) + b"alpha", "another size"),
        (b"", "cut short"),
    ],
)
async def test_a_blob_stream_that_is_not_what_it_must_be_is_refused(api: Api, body: bytes, rule: str) -> None:
    """FAULTS 29, 30"""
    artifact = str(uuid4())
    await api.send_manifest(FILES, artifact)
    refused = await api.send_blobs(artifact, body)
    assert (refused.status, refused.problem) == (422, "blobs-refused")
    assert rule in refused.json["rule"]
    assert (await api.get(artifact)).status == 404


async def test_chunks_for_no_upload_are_refused(api: Api) -> None:
    artifact = str(uuid4())
    for team in ("main", "other"):
        answer = await api.send_blobs(artifact, blob_stream([b"alpha"]), team)
        assert (answer.status, answer.problem) == (404, "upload-unknown")
        await api.send_manifest(FILES, artifact)


async def test_a_size_that_differs_from_what_is_stored_is_a_lie(api: Api) -> None:
    await api.put(FILES)
    lie = [Entry(b"a", "file", 0o644, 4, hashlib.sha256(b"alpha").digest())]
    refused = await api.send_manifest(manifest(lie))
    assert (refused.status, refused.problem) == (422, "manifest-refused")


async def test_chunks_are_given_only_of_the_tree_that_is_named(api: Api) -> None:
    one, two = await api.put({"one": b"1"}), await api.put({"two": b"2"})
    digest = hashlib.sha256(b"2").digest()
    assert blobs_in((await api.blobs(two["id"], [digest, digest])).body) == {digest: b"2"}
    assert (await api.blobs(one["id"], [digest])).status == 422
    assert (await api.blobs(one["id"], [b"short"])).status == 422


async def test_a_part_of_a_tree_becomes_a_tree_without_moving_bytes(api: Api) -> None:
    source = (await api.put(FILES))["id"]
    stored = api.stored()

    async def part(path: str) -> tuple[int, str]:
        answer = await api.of(str(uuid4()), "put", "POST", f"?from={source}&path={path}")
        return answer.status, answer.json["id"] if answer.status == 201 else answer.problem

    status, folder_of = await part("d")
    assert status == 201
    await api.reads_back(folder_of, {"b": b"beta", "c": b"alpha", "empty": b""})
    status, one = await part("d/b")
    assert status == 201
    await api.reads_back(one, {"b": b"beta"})
    status, whole = await part("")
    assert status == 201
    await api.of(source, "change", "DELETE")
    await api.reads_back(whole, FILES)
    assert await part("d") == (410, "expired")
    source = whole
    assert await part("nothing") == (404, "not-found")
    source = str(uuid4())
    assert await part("d") == (404, "not-found")
    assert len(api.stored()) <= len(stored) + 2


async def test_hard_links_links_empty_folders_and_strange_names_survive(api: Api) -> None:
    strange = b"\xff\xfe \n\\"
    x = entry("d/x", b"x", 0o755)
    entries = [
        Entry(b"d", "folder", FOLDER_MODE),
        Entry(b"d/empty", "folder", FOLDER_MODE),
        x,
        Entry(b"d/y", "file", 0o755, 1, x.digest, b"d/x"),
        Entry(b"link", "link", LINK_MODE, target=b"d/x"),
        Entry(strange, "file", 0o644, 1, x.digest),
    ]
    artifact = str(uuid4())
    assert (await api.send_manifest(manifest(entries), artifact)).status == 202
    assert (await api.send_blobs(artifact, blob_stream([b"x"]))).status == 201
    again = await api.upload((await api.get(artifact)).body)
    assert again.json["digest"] == tree_digest(entries)
    page = await api.of(artifact, "see", "GET", "/tree?recursive=true")
    shown = page.json["items"]
    assert [each["path"] for each in shown] == ["d", "d/empty", "d/x", "d/y", "link", "\\xff\\xfe \n\\"]
    assert shown[2]["executable"] and shown[3]["target"] == "d/x" and shown[5]["path_base64"]
    assert (await api.get(artifact, "?path=%FF%FE%20%0A%5C")).body == b"x"
    part = await api.of(str(uuid4()), "put", "POST", f"?from={artifact}&path=d")
    assert part.status == 201
    assert (await api.get(part.json["id"], "?format=tree")).body == manifest(
        [Entry(b"empty", "folder", FOLDER_MODE), entry("x", b"x", 0o755), Entry(b"y", "file", 0o755, 1, x.digest, b"x")]
    )


async def test_a_tar_is_deduplicated_against_manifests(api: Api) -> None:
    await api.put(FILES)
    before = sum(os.path.getsize(path) for path in api.stored())
    assert (await api.upload(tar(FILES | {"new": b"n"}))).status == 201
    assert sum(os.path.getsize(path) for path in api.stored()) < before + 4096
    assert (await api.upload(file(b"x") * 2)).status == 422
