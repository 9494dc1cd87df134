"""Uploads: what is sent and what is not, across broken connections and files that do not hold still."""

import asyncio
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from aiohttp import web

from penstock.client import Changed, Full, Selection, Transfer, Unavailable, select
from penstock.client.index import Index, index_path, moment, read_index, settled, stamp_of
from penstock.client.tree import CHUNK, tree_digest
from tests.unit.artifact_server import ArtifactServer, connected, problem


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index folder of its own."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Some files that have been there for a while."""
    root = tmp_path / "source"
    for n in range(200):
        path = root / f"d{n % 7}/{n}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(os.urandom(1000 + n))
    return settle(root)


def settle(root: Path) -> Path:
    """Wait until nothing in the folder is younger than its file system's clock can tell."""
    newest = max(max(status.st_mtime_ns, status.st_ctime_ns) for status in (path.lstat() for path in [root, *root.rglob("*")]))
    while moment(os.fsencode(root)) <= newest:
        time.sleep(0.005)
    return root


def unread(selection: Selection) -> list[str]:
    return [os.fsdecode(selection.entries[n].path) for n in selection.unread]


async def test_a_folder_that_did_not_change_is_named_and_nothing_is_sent(source: Path) -> None:
    server = ArtifactServer()
    told: list[Transfer] = []
    async with connected(server) as client:
        first = await client.upload(source, "one")
        server.log.clear()
        server.received = 0
        second = await client.upload(source, "two", told.append)
        assert server.log == ["POST ?tree"]
        assert (server.received, second.digest) == (0, first.digest)
        assert [(transfer.phase, transfer.total, transfer.skipped) for transfer in told] == [("hashing", 0, first.size), ("sending", 0, first.size)]
        server.manifests.clear()  # it has expired there
        server.log.clear()
        assert (await client.upload(source)).digest == first.digest
        assert server.log == ["POST ?tree", "POST "]


async def test_after_an_edit_only_the_file_is_read_and_sent(source: Path) -> None:
    server = ArtifactServer()
    async with connected(server) as client:
        await client.upload(source)
        (source / "d0/7").write_text("edited")
        settle(source)
        selection = select(source)
        assert unread(selection) == ["d0/7"]
        server.received = 0
        stored = len(server.blobs)
        await client.upload(selection)
    assert len(server.blobs) == stored + 1
    assert server.received < 200 * 120


async def test_a_small_edit_comes_with_the_manifest_and_not_where_it_is_not_alone_missing(source: Path) -> None:
    server, other = ArtifactServer(), ArtifactServer()
    async with connected(server) as client, connected(other) as elsewhere:
        await client.upload(source)
        edited = sorted(path for path in source.rglob("*") if path.is_file())[0]
        edited.write_bytes(b"another text")
        server.log.clear()
        artifact = await client.upload(source)
        assert server.log == ["POST "]
        assert artifact.digest
        edited.write_bytes(b"and yet another")
        await elsewhere.upload(source)  # it never had the tree before
        assert [line.split()[0] for line in other.log] == ["POST", "PUT"]


async def test_an_upload_goes_on_wherever_its_connection_is_cut(source: Path) -> None:
    (source / "big").write_bytes(os.urandom(2 * CHUNK))
    server = ArtifactServer()
    server.cut_after = [0, 1, 31, 36, 37, 2000, 100_000, CHUNK, CHUNK + 100]
    async with connected(server) as client:
        artifact = await client.upload(source)
    assert not server.cut_after
    assert artifact.size == select(source).size
    assert len({line for line in server.log if line.startswith("PUT")}) == 1


async def test_a_server_that_is_busy_or_restarts_is_waited_for_as_long_as_it_asks(source: Path) -> None:
    answers = [
        problem(429, headers={"Retry-After": "1"}, detail="too many uploads"),
        problem(503),
        None,
        problem(503),
        None,
        problem(404, "upload-unknown", detail="no such upload"),
        None,
        None,
    ]
    times: list[float] = []

    async def before(request: web.Request) -> web.StreamResponse | None:
        times.append(time.monotonic())
        if len(times) == 3:
            server.blobs.clear()  # it starts from nothing
        return answers.pop(0) if answers else None

    server = ArtifactServer()
    server.before = before
    async with connected(server) as client:
        assert (await client.upload(source)).files == 200
    assert times[1] - times[0] >= 1.0


async def test_patience_ends_when_nothing_moves_and_the_reason_is_said(source: Path) -> None:
    async def away(request: web.Request) -> web.StreamResponse | None:
        return problem(503, detail="the store is away") if request.method == "PUT" else None

    server = ArtifactServer()
    server.before = away
    async with connected(server, patience_upload=0.5) as client:
        with pytest.raises(Unavailable, match="the store is away"):
            await client.upload(source)


async def test_a_full_store_is_not_tried_again(source: Path) -> None:
    async def full(request: web.Request) -> web.StreamResponse | None:
        return problem(507, "quota-exceeded", detail="the team's quota is used up: 1 GB")

    server = ArtifactServer()
    server.before = full
    async with connected(server) as client:
        with pytest.raises(Full, match="quota is used up"):
            await client.upload(source)
    assert len(server.log) == 1


async def test_an_upload_that_is_given_up_leaves_no_thread(source: Path) -> None:
    stuck = asyncio.Event()

    async def hang(request: web.Request) -> web.StreamResponse | None:
        if request.method == "PUT":
            stuck.set()
            await asyncio.Event().wait()
        return None

    (source / "big").write_bytes(os.urandom(4 * CHUNK))
    server = ArtifactServer()
    server.before = hang
    before = threading.active_count()
    async with connected(server) as client:
        work = asyncio.ensure_future(client.upload(source))
        await stuck.wait()
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert threading.active_count() == before


async def test_the_same_chunk_is_sent_once_and_big_files_in_chunks(tmp_path: Path) -> None:
    block = os.urandom(CHUNK)
    (tmp_path / "a").write_bytes(block * 3 + b"tail")
    (tmp_path / "b").write_bytes(block)
    server = ArtifactServer()
    async with connected(server) as client:
        artifact = await client.upload(tmp_path)
        assert server.received < CHUNK + 10_000
        assert artifact.size == 4 * CHUNK + 4
        with open(tmp_path / "a", "r+b") as file:
            file.seek(CHUNK + 5)
            file.write(b"edit")
        server.received = 0
        await client.upload(tmp_path)
        assert CHUNK < server.received < CHUNK + 10_000


# --- files that do not hold still


async def test_a_file_that_changes_between_reading_and_sending_is_taken_as_it_is_then(source: Path) -> None:
    edits: list[int] = []
    server = ArtifactServer()
    selection = select(source)

    async def before(request: web.Request) -> web.StreamResponse | None:
        if not edits:
            edits.append((source / "d0/7").write_text("edited"))
        return None

    server.before = before
    async with connected(server) as client:
        artifact = await client.upload(selection)
        entries = {entry.path: entry for entry in await client.manifest(artifact)}
    assert entries[b"d0/7"].size == len("edited")


async def test_a_file_that_changes_all_the_time_is_said_by_name(source: Path) -> None:
    count = 0

    async def edit(request: web.Request) -> web.StreamResponse | None:
        nonlocal count
        count += 1
        (source / "d0/7").write_text(f"edited {count}")
        return None

    server = ArtifactServer()
    server.before = edit
    async with connected(server) as client:
        with pytest.raises(Changed, match=r"d0/7 changed while it was uploaded: try again when nothing writes to it"):
            await client.upload(source)


async def test_a_change_without_a_trace_in_the_times_is_found_by_the_server_and_read_again(source: Path) -> None:
    """As a write through mmap may be: same size, same times."""
    victim = source / "d0/7"
    server = ArtifactServer()
    async with connected(server) as client:
        await client.upload(source)
        selection = select(source)
        path = selection.index.path
        assert path
        place = selection.paths.index(b"d0/7")
        with open(victim, "r+b") as file:
            file.write(b"other")
        settle(source)
        selection.index.stamps[place] = stamp_of(victim.lstat())  # as if nothing had happened
        from penstock.client.index import write_index

        write_index(selection.index)
        assert unread(select(source)) == []
        fresh = ArtifactServer()
    async with connected(fresh) as client:
        artifact = await client.upload(source)
        pieces = [piece async for piece in client.read_file(artifact, "d0/7")]
    assert b"".join(pieces) == victim.read_bytes()


async def test_a_file_that_is_gone_before_it_is_read_is_left_out(source: Path) -> None:
    selection = select(source)
    (source / "d0/7").unlink()
    async with connected(ArtifactServer()) as client:
        assert (await client.upload(selection)).files == 199


UPLOAD = """
import asyncio, sys
from pathlib import Path
from penstock.client import Unreadable
from tests.unit.artifact_server import ArtifactServer, connected
async def main():
    async with connected(ArtifactServer()) as client:
        try:
            await client.upload(Path(sys.argv[1]))
        except Unreadable as error:
            print(error)
asyncio.run(main())
"""


def test_a_file_that_may_not_be_read_is_said_by_name(source: Path) -> None:
    (source / "d0/7").chmod(0)
    # root may read everything, as long as it has these
    humble = [] if os.geteuid() else ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-dac_override,-dac_read_search"]
    command = [*humble, sys.executable, "-P", "-c", UPLOAD, str(source)]
    said = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=True, timeout=60
    )
    assert re.search(r"cannot read .*d0/7: Permission denied", said.stdout), said


# --- the index


def index_of(root: Path) -> Path:
    path = index_path(os.path.realpath(os.fsencode(root)), "False False", os.environ)
    assert path
    return path


async def upload(root: Path) -> ArtifactServer:
    server = ArtifactServer()
    async with connected(server) as client:
        await client.upload(root)
    return server


async def test_what_changed_in_the_moment_of_the_scan_is_read_again(source: Path) -> None:
    young = source / "d0/7"
    for n in range(50):
        young.write_text(f"{n:09}")
        server = await upload(source)
        assert any(blob == f"{n:09}".encode() for blob in server.blobs.values())
    settle(source)
    await upload(source)
    assert unread(select(source)) == []


def test_a_file_is_settled_when_its_time_is_past(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    stamp = stamp_of((tmp_path / "a").lstat())
    assert not settled(stamp, moment(os.fsencode(tmp_path)))
    settle(tmp_path)
    assert settled(stamp, moment(os.fsencode(tmp_path)))
    os.utime(tmp_path / "a", (1 << 33, 1 << 33))  # a time to come
    assert not settled(stamp_of((tmp_path / "a").lstat()), moment(os.fsencode(tmp_path)))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign", "folder"])
async def test_a_damaged_index_is_as_good_as_none(source: Path, damage: str) -> None:
    await upload(source)
    path = index_of(source)
    data = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "flipped":
            path.write_bytes(data[:2000] + bytes([data[2000] ^ 1]) + data[2001:])
        case "empty":
            path.write_bytes(b"")
        case "foreign":
            path.write_bytes(data.replace(os.fsencode(source), os.fsencode(source)[:-1] + b"X"))
        case "folder":
            path.unlink()
            path.mkdir()
    assert len(unread(select(source))) == 200
    await upload(source)
    assert len(unread(select(source))) == (200 if damage == "folder" else 0)


async def test_without_a_place_for_the_index_uploads_work_all_the_same(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/proc/nowhere")
    await upload(source)
    monkeypatch.delenv("HOME")
    assert select(source).index == Index(None, os.path.realpath(os.fsencode(source)), select(source).index.listing)
    await upload(source)


async def test_two_clients_on_one_folder_at_once_are_harmless(source: Path) -> None:
    server = ArtifactServer()
    async with connected(server) as one, connected(server) as other:
        artifacts = await asyncio.gather(*(client.upload(source) for client in (one, other, one, other)))
    assert len({artifact.digest for artifact in artifacts}) == 1
    root = os.path.realpath(os.fsencode(source))
    index = read_index(index_of(source), root)
    assert len(index.entries) == 207
    assert index.tree.hex() == artifacts[0].digest


async def test_a_chmod_a_new_name_and_a_removal_are_seen(source: Path) -> None:
    first = await upload(source)
    (source / "d0/7").chmod(0o755)
    (source / "new").write_text("new")
    (source / "d1/1").unlink()
    (source / "link").symlink_to("new")
    second = await upload(source)
    digests = {tree_digest([*server.manifests.values()]) for server in (first, second)}
    assert len(digests) == 2
    assert {b"new", b"link"} <= set(select(source).paths)
    assert b"d1/1" not in select(source).paths
