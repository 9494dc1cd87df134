"""The artifacts service over HTTP, on real Postgres, NATS and a real folder: tars in, everything out."""

import asyncio
import gzip
import io
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import aiohttp
import pytest
from backports import zstd

from libs.archives.tar import END, write_header
from libs.blobstore.objects import Folder, StoreFull
from tests.artifacts_fixture import Api, entries_of, file, manifest, serving, tar, tree_digest
from tests.controls import eventually
from tests.nats_fixture import NatsServer
from tests.postgres_fixture import Database

FILES = {"a": b"alpha", "d/b": b"beta"}
TAR = tar(FILES)


def names(archive: bytes) -> dict[str, int]:
    """The names in an archive, with their modes."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as found:
        return {member.name: member.mode for member in found}


@pytest.fixture
async def api(database: Database, nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(database, nats_server, tmp_path / "store") as api:
        yield api


async def test_a_tree_goes_in_and_comes_out_in_every_format(api: Api) -> None:
    for body in (TAR, gzip.compress(TAR), zstd.compress(TAR)):
        sealed = await api.upload(body)
        assert sealed.status == 201
        assert (sealed.json["size"], sealed.json["files"], sealed.json["digest"]) == (9, 2, tree_digest(FILES))
    artifact = sealed.json["id"]
    for form in ("tar", "tgz", "tzst"):
        answer = await api.get(artifact, f"?format={form}")
        assert (answer.status, answer.headers["ETag"]) == (200, f'"{tree_digest(FILES)}-{form}"')
        assert (await api.upload(answer.body)).json["digest"] == tree_digest(FILES)
        again = await api.get(artifact, f"?format={form}", **{"If-None-Match": answer.headers["ETag"]})
        assert (again.status, again.body) == (304, b"")
    tree = await api.get(artifact, "?format=tree")
    assert (tree.body, tree.headers["ETag"]) == (manifest(FILES), f'"{tree_digest(FILES)}"')
    assert (await api.get(artifact, "?format=zip")).status == 422


async def test_one_file_or_folder_of_a_tree_can_be_read(api: Api) -> None:
    artifact = (await api.upload(TAR)).json["id"]
    one = await api.get(artifact, "?path=d/b")
    assert (one.status, one.body, one.headers["Content-Length"]) == (200, b"beta", "4")
    assert one.headers["ETag"] == f'"{entries_of(FILES)[2].file_id}"'
    assert (await api.get(artifact, "?path=d/b", **{"If-None-Match": one.headers["ETag"]})).status == 304
    assert names((await api.get(artifact, "?path=d")).body) == {"b": 0o644}
    assert (await api.get(artifact, "?path=nothing")).status == 404
    head = await api.of(artifact, "get", "HEAD", "?path=d/b")
    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", "4")


async def test_ranges_of_files_and_of_plain_archives_can_be_read(api: Api) -> None:
    contents = os.urandom(9 << 20)
    artifact = (await api.upload(tar({"f": contents, "g": b"g"}))).json["id"]
    whole = (await api.get(artifact)).body
    for query, all_of_it in (("?path=f", contents), ("", whole)):
        size = len(all_of_it)
        for asked, start, end in (
            ("bytes=0-0", 0, 1),
            ("bytes=8388600-8388700", 8388600, 8388701),
            ("bytes=9000000-", 9000000, size),
            ("bytes=-5", size - 5, size),
            (f"bytes={size - 1}-{size + 10}", size - 1, size),
        ):
            part = await api.get(artifact, query, Range=asked)
            assert (part.status, part.body) == (206, all_of_it[start:end])
            assert part.headers["Content-Range"] == f"bytes {start}-{end - 1}/{size}"
        past = await api.get(artifact, query, Range=f"bytes={size}-")
        assert (past.status, past.headers["Content-Range"]) == (416, f"bytes */{size}")
        etag = part.headers["ETag"]
        assert (await api.get(artifact, query, **{"Range": "bytes=0-0", "If-Range": etag})).status == 206
        assert (await api.get(artifact, query, **{"Range": "bytes=0-0", "If-Range": '"other"'})).body == all_of_it
        assert (await api.get(artifact, query, Range="bytes=5-1")).status == 200


async def test_a_tree_can_be_browsed_page_by_page(api: Api) -> None:
    files = {f"d/{n:02}": b"%d" % n for n in range(10)} | {"e/x/y": b"y", "a": b"a"}
    artifact = (await api.upload(tar(files))).json["id"]

    async def browse(query: str) -> list[str]:
        found, cursor = [], ""
        while True:
            page = await api.of(artifact, "see", "GET", f"/tree?limit=4&{query}&cursor={cursor}")
            assert page.status == 200, page.body
            found += [each["path"] for each in page.json["items"]]
            cursor = page.json.get("next")
            if not cursor:
                return found

    assert await browse("") == ["a", "d", "e"]
    assert await browse("path=d") == [f"d/{n:02}" for n in range(10)]
    assert await browse("path=e&recursive=1") == ["e/x", "e/x/y"]
    assert await browse("recursive=1") == [each.path.decode() for each in entries_of(files)]
    assert await browse("path=a") == ["a"]
    assert (await api.of(artifact, "see", "GET", "/tree?path=nothing")).status == 404


async def test_the_same_upload_again_is_the_same_answer_and_another_is_refused(api: Api) -> None:
    artifact = str(uuid4())
    first = await api.upload(TAR, artifact)
    stored = api.stored()
    assert (await api.upload(TAR, artifact)).json == first.json
    assert api.stored() == stored
    other = await api.upload(tar({"other": b""}), artifact)
    assert (other.status, other.problem) == (409, "conflict")
    assert (await api.get(artifact, "?path=a")).body == b"alpha"


@pytest.mark.parametrize(
    ("archive", "member", "rule"),
    [
        (file(b"../out"), "../out", "`..`"),  # FAULTS 19
        (file(b"/etc/passwd"), "/etc/passwd", "absolute"),  # FAULTS 19
        (write_header(b"l", b"2", 0o777, 0, b"d") + file(b"l/out"), "l/out", "under a link"),  # FAULTS 20
        (write_header(b"h", b"1", 0o644, 0, b"../../x"), "../../x", "`..`"),  # FAULTS 21
        (write_header(b"l", b"2", 0o777, 0, b"/" * 10 + b"etc"), "l", "absolute"),  # FAULTS 22
        (write_header(b"fifo", b"6", 0o644, 0), "fifo", "FIFO"),  # FAULTS 23
        (file(b"n" * 256), "n" * 256, "255 bytes"),  # FAULTS 27
        (file(b"a") + file(b"a"), "a", "twice"),  # FAULTS 28
        (file(b"/".join([b"d"] * 10_000)), "", "4096 bytes"),
    ],
)
async def test_a_hostile_archive_is_refused_whole(api: Api, archive: bytes, member: str, rule: str) -> None:
    """FAULTS 19–28"""
    refused = await api.upload(file(b"sound", os.urandom(100)) + archive + END)
    assert (refused.status, refused.problem) == (422, "archive-refused")
    assert rule in refused.json["rule"]
    assert not member or refused.json["member"] == member
    assert api.stored() == []


async def test_names_that_only_look_alike_are_kept(api: Api) -> None:
    """FAULTS 27, 28"""
    files = {"Case": b"1", "case": b"2", "back\\slash": b"3", "new\nline": b"4"}
    assert (await api.upload(tar(files))).json["digest"] == tree_digest(files)


async def test_setuid_does_not_survive(api: Api) -> None:
    """FAULTS 24"""
    artifact = (await api.upload(write_header(b"p", b"0", 0o6755, 0) + END)).json["id"]
    assert names((await api.get(artifact)).body) == {"p": 0o755}


async def test_a_bomb_and_a_flood_of_members_are_stopped_at_the_limit(database: Database, nats_server: NatsServer, tmp_path: Path) -> None:
    """FAULTS 25, 26"""
    limits = {"PENSTOCK_MAX_ARTIFACT_BYTES": "10000000", "PENSTOCK_MAX_ARTIFACT_FILES": "100"}
    async with serving(database, nats_server, tmp_path / "store", **limits) as api:
        bomb = zstd.compress(write_header(b"zeros", b"0", 0o644, 1 << 28) + bytes(1 << 28) + END)
        stopped = await api.upload(bomb)
        assert (stopped.status, stopped.json["member"]) == (413, "zeros")
        stopped = await api.upload(b"".join(file(b"%d" % n, b"x") for n in range(101)) + END)
        assert (stopped.status, stopped.json["member"]) == (413, "100")
        await eventually(lambda: api.stored() == [])


async def test_an_archive_cut_short_is_refused_and_leaves_nothing(api: Api) -> None:
    """FAULTS 29"""
    for cut in (b"", TAR[:100], TAR[:-600], gzip.compress(TAR)[:-1], file(b"big", os.urandom(20 << 20))[: 15 << 20]):
        refused = await api.upload(cut)
        assert (refused.status, "cut short" in refused.json["rule"]) == (422, True)
    await eventually(lambda: api.stored() == [])


async def test_a_client_that_disappears_in_the_middle_leaves_nothing(api: Api) -> None:
    """FAULTS 32"""
    artifact = str(uuid4())
    body = file(b"big", os.urandom(40 << 20)) + END
    host, _, port = api.url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    token = api.grant(artifact, "put")["Authorization"]
    writer.write(f"POST /artifacts/{artifact} HTTP/1.1\r\nHost: x\r\nAuthorization: {token}\r\nContent-Length: {len(body)}\r\n\r\n".encode())
    writer.write(body[: 30 << 20])
    await writer.drain()
    await eventually(api.stored)
    writer.transport.abort()
    await eventually(lambda: not api.stored())
    assert (await api.get(artifact)).status == 404


async def test_another_teams_artifact_is_absent(api: Api) -> None:
    """FAULTS 33"""
    artifact = (await api.upload(TAR, team="main")).json["id"]
    nothing = str(uuid4())
    for action, method, below in (("get", "GET", ""), ("get", "POST", "/blobs"), ("see", "GET", "/tree"), ("change", "DELETE", "")):
        there = await api.of(artifact, action, method, below, team="other")
        absent = await api.of(nothing, action, method, below, team="other")
        assert (there.status, there.body) == (absent.status, absent.body) == (404, absent.body)
    part = await api.of(nothing, "put", "POST", f"?from={artifact}&path=d", team="other")
    assert (part.status, part.problem) == (404, "not-found")


async def test_a_full_store_is_507_and_the_service_goes_on(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """FAULTS 31, at the edge: the real full disk is the store's test."""

    def full(*_: object, **__: object) -> None:
        raise StoreFull("no space left in the store")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "put", full)
        for answer in (await api.upload(TAR), await api.send_manifest(FILES)):
            assert (answer.status, answer.problem) == (507, "store-full")
    await eventually(lambda: api.stored() == [])
    assert (await api.upload(TAR)).status == 201


async def test_a_damaged_store_never_passes_for_a_whole_answer_and_an_upload_heals_it(api: Api) -> None:
    contents, first = os.urandom(3 << 20), os.urandom(1 << 20)
    artifact = (await api.upload(tar({"f": contents, "a": first}))).json["id"]
    for path in map(Path, api.stored()):
        damaged = bytearray(path.read_bytes())
        if len(damaged) > len(contents):
            damaged[damaged.find(contents) + 2_000_000] ^= 1
            path.write_bytes(damaged)
    answer = await api.get(artifact, "?path=f")
    assert (answer.status, answer.problem) == (500, "damaged")
    assert "pack main/" in answer.json["detail"] and "heals" in answer.json["detail"]
    with pytest.raises(aiohttp.ClientError):
        await api.get(artifact)
    unknown = await api.of(str(uuid4()), "put", "POST", f"?tree={tree_digest({'f': contents, 'g': b'g'})}")
    assert (unknown.status, unknown.problem) == (404, "tree-unknown")
    assert (await api.send_manifest({"f": contents, "a": first})).json["missing_blobs"] == 1
    assert (await api.upload(tar({"other": contents}))).status == 201
    assert (await api.get(artifact, "?path=f")).body == contents


async def test_only_so_many_uploads_run_at_once(database: Database, nats_server: NatsServer, tmp_path: Path) -> None:
    async with serving(database, nats_server, tmp_path / "store", PENSTOCK_MAX_UPLOADS="1") as api:
        taken, go_on = asyncio.Event(), asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            taken.set()
            yield TAR[:600]
            await go_on.wait()
            yield TAR[600:]

        first = asyncio.create_task(api.of(str(uuid4()), "put", "POST", data=slowly(), expect100=True))
        await taken.wait()
        for refused in (await api.upload(TAR), await api.send_manifest(FILES)):
            assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
        go_on.set()
        assert (await first).status == 201
        assert (await api.upload(TAR)).status == 201
