"""Folders on their way out and back: what is chosen, sent, and written again."""

import asyncio
import hashlib
import os
import subprocess
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from backports import zstd

import libs.archives.rules as archives
from penstock.client import Client, Damaged, NotFound, Selection, Transfer, Unreadable, Unwritable, select
from penstock.client.placing import Parts, Place
from penstock.client.tree import CHUNK, Entry, manifest_of, order, read_manifest
from penstock.client.treecheck import Limits, limits_of
from penstock.client.upload import is_loopback
from tests.unit.artifact_server import ArtifactServer, connected


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An index folder of its own."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "protocol.file.allow=always"]
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def write(path: Path, text: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def names(selection: Selection) -> list[str]:
    return [os.fsdecode(path) for path in selection.paths]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repo"
    root.mkdir()
    git(root, "init", "-q")
    write(root / ".gitignore", "*.log\nbuild/\n")
    write(root / "a.py")
    write(root / "deep/b.py")
    write(root / "gone.py")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    (root / "gone.py").unlink()
    write(root / "new.py")
    write(root / "x.log")
    write(root / "build/c.o")
    return root


def test_a_git_folder_is_what_git_shows_tracked_and_untracked_without_ignored_and_deleted(repository: Path) -> None:
    assert names(select(repository)) == [".gitignore", "a.py", "deep", "deep/b.py", "new.py"]


def test_a_subfolder_of_a_work_tree_is_git_aware_too(repository: Path) -> None:
    write(repository / "deep/y.log")
    assert names(select(repository / "deep")) == ["b.py"]


def test_an_ignored_folder_that_is_named_itself_is_taken_whole(repository: Path) -> None:
    assert names(select(repository / "build")) == ["c.o"]


def test_include_ignored_takes_all_but_git_and_include_git_takes_that(repository: Path) -> None:
    assert "x.log" in names(select(repository, include_ignored=True))
    assert ".git" not in names(select(repository, include_ignored=True))
    with_git = names(select(repository, include_git=True))
    assert ".git/HEAD" in with_git
    assert "x.log" not in with_git


def test_a_submodule_and_a_nested_repository_are_taken_as_git_shows_them(repository: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    write(other / ".gitignore", "*.tmp")
    write(other / "lib.c")
    git(other, "add", ".")
    git(other, "commit", "-qm", "first")
    git(repository, "submodule", "add", "-q", str(other), "sub")
    write(repository / "sub/z.tmp")
    git(repository, "clone", "-q", str(other), "nested")
    chosen = names(select(repository))
    assert {"sub", "sub/lib.c", "nested/lib.c"} <= set(chosen)
    assert not any(".git" in name.split("/") or name.endswith(".tmp") for name in chosen)


def test_a_folder_outside_git_is_taken_whole_with_its_empty_folders(tmp_path: Path) -> None:
    write(tmp_path / "a")
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    selection = select(tmp_path)
    assert names(selection) == ["a", "empty"]
    assert selection.skipped == ["pipe"]
    assert (selection.files, selection.size) == (1, 1)


def test_a_penstockignore_takes_away_more(repository: Path) -> None:
    write(repository / ".penstockignore", "deep/\n*.py\n!a.py\n")
    assert names(select(repository)) == [".gitignore", ".penstockignore", "a.py"]


async def test_what_the_index_knows_hides_no_change_of_what_git_shows(repository: Path) -> None:
    """Each step changes what is there, not always what git lists."""

    def gone(name: str) -> None:
        (repository / name).unlink()

    steps: list[Callable[[], object]] = [
        lambda: write(repository / "gone.py", "back"),
        lambda: gone("gone.py"),
        lambda: write(repository / "gone.py", "back again"),
        lambda: write(repository / "new2.py"),
        lambda: write(repository / ".gitignore", "*.log\nbuild/\nnew2.py\n"),
        lambda: write(repository / ".penstockignore", "*.md\n"),
        lambda: write(repository / "read.md"),
        lambda: write(repository / ".penstockignore", "\n"),
        lambda: (gone("a.py"), (repository / "a.py").symlink_to("new.py")),
        lambda: (gone("a.py"), (repository / "a.py").mkdir()),
        lambda: write(repository / "a.py/inner.log"),
        lambda: (gone("a.py/inner.log"), (repository / "a.py").rmdir(), os.mkfifo(repository / "a.py")),
        lambda: (gone("a.py"), write(repository / "a.py", "a file")),
        lambda: (gone("deep/b.py"), (repository / "deep").rmdir(), (repository / "deep").symlink_to("build")),
        lambda: git(repository, "clone", "-q", str(repository), "nested"),
        lambda: write(repository / "nested/new.py"),
    ]
    async with connected(ArtifactServer()) as client:
        await client.upload(repository)
        for step in steps:
            step()
            seen, fresh = select(repository), select(repository, environ={})
            assert (names(seen), seen.skipped, seen.files, seen.size) == (names(fresh), fresh.skipped, fresh.files, fresh.size)
            one, two = await client.upload(seen), await client.upload(fresh)
            assert seen.entries == fresh.entries
            assert one.digest == two.digest


@pytest.mark.parametrize("make", [lambda path: None, lambda path: write(path)])
def test_what_is_no_folder_is_refused_by_name(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "it")
    with pytest.raises(Unreadable, match=r"it (does not exist|is not a folder)"):
        select(tmp_path / "it")


# --- out and back


async def there_and_back(source: Path, into: Path, server: ArtifactServer | None = None) -> int:
    async with connected(server or ArtifactServer()) as client:
        return await client.download(await client.upload(source), into)


def held(folder: Path) -> dict[str, object]:
    """All that a folder has, as it can be compared."""
    found: dict[str, object] = {}
    for top, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = os.path.join(top, name)
            key = os.path.relpath(path, folder)
            if os.path.islink(path):
                found[key] = ("link", os.readlink(path))
            elif os.path.isdir(path):
                found[key] = "folder"
            else:
                found[key] = (Path(path).read_bytes(), os.access(path, os.X_OK))
    return found


async def test_a_tree_survives_the_way_out_and_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(source / "deep/run.sh", "echo").chmod(0o755)
    write(source / ("long" * 50) / ("name" * 50))
    write(source / "nothing", "")
    (source / "empty").mkdir()
    (source / "deep/link").symlink_to("../deep/run.sh")
    (source / "dangling").symlink_to("nowhere")
    (source / "big").write_bytes(os.urandom(2 * CHUNK + 3))
    Path(os.fsdecode(os.path.join(os.fsencode(source), b"not-utf8-\xff\n\\"))).write_text("odd")
    told: list[Transfer] = []
    server = ArtifactServer()
    async with connected(server) as client:
        artifact = await client.upload(source, "src", told.append)
        assert artifact.files == 5
        assert await client.download(artifact, tmp_path / "made/here", told.append) == 5
        entries = await client.manifest(artifact)
    assert held(tmp_path / "made/here") == held(source)
    assert [entry.path for entry in entries] == select(source).paths
    last = {transfer.phase: transfer for transfer in told}
    for phase in ("hashing", "sending", "receiving"):
        assert last[phase].done == last[phase].total == select(source).size
        assert last[phase].skipped == 0


async def test_hard_links_are_hard_links_again(tmp_path: Path) -> None:
    source, into = tmp_path / "source", tmp_path / "into"
    write(source / "b/two", "same")
    os.link(source / "b/two", source / "a")
    os.link(source / "b/two", source / "c")
    write(source / "d", "same")  # equal, and no link
    assert await there_and_back(source, into) == 4
    inodes = {name: (into / name).stat().st_ino for name in ("a", "b/two", "c", "d")}
    assert inodes["a"] == inodes["b/two"] == inodes["c"] != inodes["d"]
    server = ArtifactServer()
    async with connected(server) as client:
        (source / "a").unlink()
        artifact = await client.upload(source)
        assert {entry.path: entry.target for entry in await client.manifest(artifact) if entry.target} == {b"c": b"b/two"}
        await client.download(artifact, tmp_path / "part", path="b")
        assert (tmp_path / "part/two").read_text() == "same"


async def test_holes_are_neither_read_nor_sent_nor_written(tmp_path: Path) -> None:
    source, into = tmp_path / "source", tmp_path / "into"
    source.mkdir()
    with open(source / "sparse", "wb") as file:
        file.truncate(1 << 34)
        file.seek(5 * CHUNK + 100)
        file.write(b"here")
    with open(source / "all-hole", "wb") as file:
        file.truncate(3 * CHUNK)
    with open(source / "small-hole", "wb") as file:
        file.write(b"x")
        file.truncate(1 << 20)
    server = ArtifactServer()
    await there_and_back(source, into, server)
    assert server.received < 11 << 20
    assert (into / "sparse").stat().st_size == 1 << 34
    with open(into / "sparse", "rb") as file:
        file.seek(5 * CHUNK + 99)
        assert file.read(6) == b"\0here\0"
    for name, most in (("sparse", CHUNK), ("all-hole", 0), ("small-hole", 1 << 17)):
        assert (into / name).stat().st_blocks * 512 <= most
    assert (into / "small-hole").read_bytes() == (source / "small-hole").read_bytes()


async def test_only_what_the_folder_lacks_is_fetched(tmp_path: Path) -> None:
    source, into = tmp_path / "source", tmp_path / "into"
    for n in range(20):
        write(source / f"d/{n}", f"contents {n}")
    (source / "big").write_bytes(os.urandom(3 * CHUNK))
    server = ArtifactServer()
    async with connected(server) as client:
        artifact = await client.upload(source)
        await client.download(artifact, into)
        assert server.asked == [23]
        await client.download(artifact, into)
        assert server.asked == [23]
        (into / "d/3").write_text("altered")
        (into / "d/4").write_text("contents X")
        (into / "d/5").unlink()
        (into / "d/6").chmod(0o755)
        with open(into / "big", "r+b") as file:
            file.seek(CHUNK + 7)
            file.write(b"altered")
        write(into / "mine")
        told: list[Transfer] = []
        await client.download(artifact, into, told.append)
    assert server.asked == [23, 4]
    assert told[-1].skipped == artifact.size - told[-1].total
    (into / "mine").unlink()
    assert held(into) == held(source)


async def test_a_part_is_downloaded_alone(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(source / "a/b/c", "c")
    write(source / "a/b.d", "d")
    write(source / "a/e", "e")
    async with connected(ArtifactServer()) as client:
        artifact = await client.upload(source)
        assert await client.download(artifact, tmp_path / "folder", path="a/b") == 1
        assert await client.download(artifact, tmp_path / "file", path="a/e") == 1
        with pytest.raises(NotFound, match="has no `a/x`"):
            await client.download(artifact, tmp_path / "none", path="a/x")
    assert held(tmp_path / "folder") == {"c": (b"c", False)}
    assert held(tmp_path / "file") == {"e": (b"e", False)}


async def test_a_download_goes_on_where_its_connection_broke(tmp_path: Path) -> None:
    source, into = tmp_path / "source", tmp_path / "into"
    for n in range(300):
        write(source / f"d{n % 7}/{n}", f"contents {n}" * n)
    (source / "big").write_bytes(os.urandom(CHUNK + 1000))
    server = ArtifactServer()
    server.cut_sending = [0, 1, 35, 36, 40, 20_000, 300_000]
    async with connected(server) as client:
        await client.download(await client.upload(source), into)
    assert held(into) == held(source)
    assert server.asked == sorted(server.asked, reverse=True)
    assert server.asked[-1] < server.asked[0]


async def test_a_download_that_is_given_up_leaves_no_half_file_and_no_thread(tmp_path: Path) -> None:
    source, into = tmp_path / "source", tmp_path / "into"
    for n in range(50):
        (write(source / f"{n:02}")).write_bytes(os.urandom(200_000))
    server = ArtifactServer()
    server.cut_sending = [3_000_000] * 3
    before = threading.active_count()
    async with connected(server, patience_upload=0.0) as client:
        artifact = await client.upload(source)
        with pytest.raises(Exception, match="broke"):
            await client.download(artifact, into)
        assert threading.active_count() == before
        there = held(into)
        assert 0 < len(there) < 50
        assert there.items() <= held(source).items()
        server.cut_sending = []
        await client.download(artifact, into)
    assert server.asked[-1] == 50 - len(there)
    assert held(into) == held(source)


async def test_a_big_file_is_gone_on_with_by_the_next_download(tmp_path: Path) -> None:
    source, into = tmp_path / "source", tmp_path / "into"
    source.mkdir()
    (source / "big").write_bytes(os.urandom(4 * CHUNK))
    server = ArtifactServer()
    async with connected(server, patience_upload=0.0) as client:
        artifact = await client.upload(source)
        server.cut_sending = [2 * CHUNK + 100]
        with pytest.raises(Exception, match="broke"):
            await client.download(artifact, into)
        assert not (into / "big").exists()
        await client.download(artifact, into)
    assert server.asked == [4, 2]
    assert held(into) == held(source)


async def test_two_downloads_into_one_folder_at_once_are_harmless(tmp_path: Path) -> None:
    source, into = tmp_path / "source", tmp_path / "into"
    for n in range(100):
        write(source / f"d{n % 7}/{n}", f"contents {n}")
    (source / "big").write_bytes(os.urandom(3 * CHUNK))
    async with connected(ArtifactServer()) as client:
        artifact = await client.upload(source)
        await asyncio.gather(*(client.download(artifact, into) for _ in range(3)))
    assert held(into) == held(source)


def gathered(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob(".penstock-*")}


async def test_what_a_given_up_download_left_is_not_uploaded_and_goes_with_the_next_version(repository: Path, tmp_path: Path) -> None:
    source, into = tmp_path / "source", repository / "deep"
    source.mkdir()
    (source / "big").write_bytes(os.urandom(2 * CHUNK))
    (source / "second").write_bytes(os.urandom(2 * CHUNK))
    server = ArtifactServer()
    async with connected(server, patience_upload=0.0) as client:
        artifact = await client.upload(source)
        server.cut_sending = [CHUNK + 100]
        with pytest.raises(Exception, match="broke"):
            await client.download(artifact, into)
        assert len(gathered(into)) == 2
        for chosen in (select(repository), select(repository, include_git=True), select(repository, include_ignored=True), select(into)):
            assert not any(".penstock" in name for name in names(chosen))
        (source / "big").write_bytes(os.urandom(2 * CHUNK))
        (source / "second").write_text("small now")
        await client.download(await client.upload(source), into)
    assert not gathered(into)
    assert held(source).items() <= held(into).items()


def big_entry(contents: bytes) -> Entry:
    digests = [hashlib.sha256(contents[at : at + CHUNK]).digest() for at in range(0, len(contents), CHUNK)]
    return Entry(b"big", "file", 0o644, len(contents), b"".join(digests))


def nothing() -> None: ...


def test_a_second_download_gathers_apart_and_takes_nothing_of_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = os.urandom(CHUNK + 4000)
    entry = big_entry(contents)
    real, waiting = os.ftruncate, [True]

    def slow(handle: int, size: int) -> None:
        """The second stops before it makes its file; the first comes a long way meanwhile."""
        if waiting:
            waiting.clear()
            assert one.had(entry) == []
            one.write_chunk(entry, 0, contents[:CHUNK])
        real(handle, size)

    with Parts(tmp_path) as first, Parts(tmp_path) as second, Place(tmp_path, nothing, first) as one, Place(tmp_path, nothing, second) as two:
        monkeypatch.setattr(os, "ftruncate", slow)
        assert two.had(entry) == []
        one.write_chunk(entry, 1, contents[CHUNK:])
        one.complete(entry)
        assert (tmp_path / "big").read_bytes() == contents
        assert len(gathered(tmp_path)) == 2  # the second's, which is at work
        (tmp_path / "big").unlink()
        with Parts(tmp_path) as third, Place(tmp_path, nothing, third) as three:
            assert three.had(entry) == []
            two.write_chunk(entry, 1, contents[CHUNK:])
            two.write_chunk(entry, 0, contents[:CHUNK])
            two.complete(entry)
            assert (tmp_path / "big").read_bytes() == contents
    assert gathered(tmp_path) == set()


def test_a_dead_downloads_files_go_when_their_path_is_whole(tmp_path: Path) -> None:
    contents = os.urandom(CHUNK + 1)
    entry = big_entry(contents)
    with Parts(tmp_path):
        second = Parts(tmp_path)
        with Place(tmp_path, nothing, second.__enter__()) as two:
            two.had(entry)
        for handle in (second._folder, second._sign):  # as a kill does
            os.close(handle)
    assert len(gathered(tmp_path)) == 2
    with Parts(tmp_path) as third, Place(tmp_path, nothing, third) as three:
        three.had(entry)
        three.write_chunk(entry, 0, contents[:CHUNK])
        three.write_chunk(entry, 1, contents[CHUNK:])
        three.complete(entry)
    assert held(tmp_path) == {"big": (contents, False)}


# --- hostile trees


@pytest.mark.parametrize("hostile", [b".git/hooks/pre-commit", b".GIT/config", b"deep/.git", b"new/.Git/config"])
async def test_nothing_comes_into_a_git_work_tree_that_git_would_run(repository: Path, hostile: bytes) -> None:
    before = held(repository)
    above = [folder(hostile[:at]) for at in range(len(hostile)) if hostile[at : at + 1] == b"/"]
    top = os.fsdecode(hostile[: hostile.lower().index(b".git") + 4])
    for into in (repository, repository / "deep"):
        with pytest.raises(Damaged, match=f"holds `{top}`, and .* is a git work tree: nothing is written"):
            await received(into, file(b"Good"), *above, file(hostile))
    assert held(repository) == before
    write(repository / "build/.gitignore")
    await received(repository / "empty", file(b"Good"), *above, file(hostile))
    await received(repository, file(b".gitignore"), folder(b"a.git"), file(b"a.git/b"))


async def test_a_repository_in_a_plain_folder_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    git(tmp_path / "sub", "init", "-q")
    with pytest.raises(Damaged, match=r"holds `sub/.git`, and .* has one"):
        await received(tmp_path, folder(b"sub"), folder(b"sub/.git"), file(b"sub/.git/config"))
    await received(tmp_path, folder(b"other"), folder(b"other/.git"), file(b"other/.git/config"))


async def received(into: Path, *entries: Entry, contents: bytes = b"x", ordered: bool = True) -> int:
    """Download a tree that a server made up."""
    server = ArtifactServer()
    listed = sorted(entries, key=lambda entry: order(entry.path)) if ordered else entries
    server.manifests["u1"] = b"".join(manifest_of(listed))
    server.blobs[X] = contents
    async with connected(server) as client:
        return await client.download("u1", into)


X = hashlib.sha256(b"x").digest()


def file(path: bytes, **more: object) -> Entry:
    return msgspec.structs.replace(Entry(path, "file", 0o644, 1, X), **more)


def link(path: bytes, target: bytes) -> Entry:
    return Entry(path, "link", 0o777, target=target)


def folder(path: bytes) -> Entry:
    return Entry(path, "folder", 0o755)


@pytest.mark.parametrize(
    "entries",
    [
        [file(b"../escaped")],
        [file(b"/escaped")],
        [folder(b"a"), file(b"a/../../escaped")],
        [file(b"a/./b")],
        [file(b"a//b")],
        [file(b"")],
        [file(b"nul\0")],
        [file(b"n" * 256)],
        [file(b"under/no-folder")],
        [link(b"link", b"/etc/passwd")],
        [link(b"link", b"../escaped")],
        [folder(b"a"), link(b"a/link", b"../../escaped")],
        [link(b"l", b"m"), link(b"m", b"l")],
        [folder(b"d"), link(b"d/e", b"."), link(b"d/f", b"e/../..")],
        [link(b"l", b"."), file(b"l/through")],
        [file(b"f"), file(b"f/under")],
        [file(b"twice"), file(b"twice")],
        [file(b"setuid", mode=0o4755)],
        [file(b"lies", size=CHUNK + 1)],
        [file(b"lies", digest=b"")],
        [file(b"lies", size=-1)],
        [file(b"hard", target=b"/etc/passwd")],
        [file(b"a"), file(b"hard", target=b"a", digest=b"\1" * 32)],
    ],
)
async def test_a_tree_that_must_not_be_written_is_refused_whole(tmp_path: Path, entries: list[Entry]) -> None:  # FAULTS 19, 21, 22, 24, 27, 28
    with pytest.raises(Damaged):
        await received(tmp_path / "into", file(b"Good"), *entries)
    assert list(tmp_path.iterdir()) == []


async def test_a_tree_that_is_not_in_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match="not in order"):
        await received(tmp_path / "into", file(b"b"), file(b"a"), ordered=False)


async def test_contents_that_do_not_match_are_not_written(tmp_path: Path) -> None:  # FAULTS 30
    with pytest.raises(Damaged, match="does not match its digest"):
        await received(tmp_path / "into", file(b"a"), contents=b"y")
    assert not list((tmp_path / "into").iterdir())


async def test_a_chunk_that_was_not_asked_for_is_refused(tmp_path: Path) -> None:
    async def other(request: web.Request) -> web.StreamResponse | None:
        return web.Response(body=hashlib.sha256(b"y").digest() + b"\0\0\0\1y" + bytes(36)) if request.method == "POST" else None

    server = ArtifactServer()
    server.manifests["u1"] = b"".join(manifest_of([file(b"a")]))
    server.before = other
    async with connected(server) as client:
        with pytest.raises(Damaged, match="not asked for"):
            await client.download("u1", tmp_path / "into")


@pytest.mark.parametrize("manifest", [b"", b"penstock tree 1\n\0", b"<html>", b"penstock tree 1\n\0\0\0\1\x90", b"penstock tree 1\n\xff\xff\xff\xff"])
async def test_a_manifest_that_cannot_be_read_is_said_to_be_damaged(tmp_path: Path, manifest: bytes) -> None:
    server = ArtifactServer()
    server.manifests["u1"] = manifest
    async with connected(server) as client:
        with pytest.raises(Damaged, match="manifest that cannot be read"):
            await client.download("u1", tmp_path / "into")


@pytest.mark.parametrize(
    "manifest",
    [
        bytes(1 << 30),
        b"penstock tree 1\n" + (90_000_005).to_bytes(4, "big") + b"\xdd" + (10_000_000).to_bytes(4, "big") + b"\x93\xc4\0\xa4file\0" * 10_000_000,
    ],
)
async def test_a_manifest_that_unpacks_to_too_much_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest: bytes) -> None:
    monkeypatch.setattr("penstock.client.download.is_loopback", lambda url: False)
    packed = zstd.compress(manifest)
    assert len(packed) < 1 << 18

    async def bomb(request: web.Request) -> web.StreamResponse | None:
        return web.Response(body=packed, headers={"Content-Encoding": "zstd"})

    server = ArtifactServer()
    server.before = bomb
    tracemalloc.start()
    try:
        async with connected(server) as client:
            with pytest.raises(Damaged, match="manifest that cannot be read"):
                await client.download("u1", tmp_path / "into")
        assert tracemalloc.get_traced_memory()[1] < 300 << 20
    finally:
        tracemalloc.stop()


async def test_a_compressed_manifest_that_is_cut_short_or_wants_a_huge_window_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.client.download.is_loopback", lambda url: False)
    server = ArtifactServer()
    async with connected(server) as client:
        for packed in (zstd.compress(b"".join(manifest_of([file(b"a")])))[:-3], b"\x28\xb5\x2f\xfd\0\xa0"):

            async def answer(request: web.Request, body: bytes = packed) -> web.StreamResponse | None:
                return web.Response(body=body, headers={"Content-Encoding": "zstd"})

            server.before = answer
            with pytest.raises(Damaged, match="manifest that cannot be read"):
                await client.download("u1", tmp_path / "into")


LONG = b"n" * 200


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([file(b"%05d" % n) for n in range(201)], "files and folders"),
        ([file(b"%05d" % n + LONG) for n in range(60)], "bytes of names"),
        ([link(b"%05d" % n, LONG) for n in range(60)], "bytes of names"),
        ([file(b"a", size=3 * CHUNK, digest=X * 3)], "bytes"),
        ([link(b"l", b"a/" * 255 + b"a/b")], "more than 256 components"),
        ([link(b"%05d" % n, b"./" * 250) for n in range(300)], "taken together"),
    ],
)
async def test_a_tree_past_the_limits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: list[Entry], said: str) -> None:
    limits = Limits() if "component" in said or "together" in said else Limits(entries=200, size=2 * CHUNK, names=10_000)
    monkeypatch.setattr("penstock.client.download.limits_of", lambda environ: limits)
    with pytest.raises(Damaged, match=said):
        await received(tmp_path / "into", *entries)
    assert list(tmp_path.iterdir()) == []


def test_the_limits_are_the_servers_and_can_be_raised_like_them() -> None:
    server = archives.Limits()
    assert Limits() == (2 * server.max_members, server.max_bytes, server.max_names)
    assert Limits().manifest == server.max_manifest
    assert limits_of({"PENSTOCK_MAX_ARTIFACT_BYTES": "5", "PENSTOCK_MAX_ARTIFACT_FILES": "7"})[:2] == (14, 5)
    assert limits_of({"PENSTOCK_MAX_ARTIFACT_BYTES": "", "PENSTOCK_MAX_ARTIFACT_FILES": "many"}) == Limits()


async def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:  # FAULTS 20
    into, outside = tmp_path / "into", tmp_path / "outside"
    into.mkdir()
    outside.mkdir()
    write(outside / "kept", "mine")
    (into / "a").symlink_to(outside)
    with pytest.raises(Damaged, match="`a` is already there and is not a folder"):
        await received(into, folder(b"a"), file(b"a/b"))
    (into / "l").symlink_to(outside / "kept")
    await received(into, folder(b"d"), file(b"d/b"), file(b"l"), link(b"m", b"d"))
    assert held(outside) == {"kept": (b"mine", False)}
    assert not (into / "l").is_symlink()
    assert (into / "m/b").read_text() == "x"


async def test_files_are_replaced_and_others_left_alone(tmp_path: Path) -> None:
    write(tmp_path / "a", "old").chmod(0o444)
    write(tmp_path / "b", "mine")
    await received(tmp_path, file(b"a", mode=0o755))
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("x", "mine")
    assert (tmp_path / "a").stat().st_mode & 0o7777 == 0o755


async def test_a_file_where_a_folder_is_and_the_other_way_round_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write(tmp_path / "b")
    for entries in ([file(b"a")], [folder(b"b"), file(b"b/c")], [folder(b"b")], [link(b"a", b"b"), file(b"b")]):
        with pytest.raises(Damaged):
            await received(tmp_path, *entries)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


async def test_a_full_or_forbidden_disk_is_said_with_what_to_do(tmp_path: Path) -> None:  # FAULTS 31
    write(tmp_path / "file")
    with pytest.raises(Unwritable, match="cannot write"):
        await received(tmp_path / "file/into", file(b"a"))
    if os.geteuid():
        (tmp_path / "closed").mkdir(mode=0o555)
        with pytest.raises(Unwritable, match=r"make .*closed writable"):
            await received(tmp_path / "closed", file(b"a"))


# --- single files


async def test_a_file_is_read_in_parts_and_across_broken_connections(tmp_path: Path) -> None:
    source = tmp_path / "source"
    contents = os.urandom(1_000_000)
    (write(source / "a/b c%+&\xe9")).write_bytes(contents)
    write(source / "empty", "")
    cuts = [1000, 300_000, 1_000_000]

    async def cut(request: web.Request) -> web.StreamResponse | None:
        if "path" not in request.query or not cuts:
            return None
        response = await server.handle_file(request)
        await response.prepare(request)
        assert isinstance(response.body, bytes)
        await response.write(response.body[: cuts.pop(0)])
        assert request.transport
        request.transport.close()
        return response

    async def text(client: Client, *arguments: object) -> bytes:
        return b"".join([piece async for piece in client.read_file(*arguments)])  # type: ignore[arg-type]

    server = ArtifactServer()
    async with connected(server) as client:
        artifact = await client.upload(source)
        assert await text(client, artifact, "empty") == b""
        name = "a/b c%+&\xe9"
        assert await text(client, artifact, name, 10, 5) == contents[10:15]
        assert await text(client, artifact, name.encode(), 999_990) == contents[999_990:]
        server.before = cut
        assert await text(client, artifact, name) == contents
    assert not cuts


async def test_to_another_machine_it_goes_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.client.upload.is_loopback", lambda url: False)
    monkeypatch.setattr("penstock.client.download.is_loopback", lambda url: False)
    for n in range(100):
        write(tmp_path / f"source/{n}", f"{n} again and " * 1000)
    (tmp_path / "source/zeros").write_bytes(bytes(CHUNK + 1))
    server = ArtifactServer()
    await there_and_back(tmp_path / "source", tmp_path / "into", server)
    assert held(tmp_path / "into") == held(tmp_path / "source")
    assert server.encodings == ["zstd", "zstd"]


@pytest.mark.parametrize(
    ("url", "near"),
    [
        ("http://127.0.0.1:1", True),
        ("http://[::1]:1", True),
        ("http://localhost", True),
        ("https://build.example.org", False),
        ("http://10.0.0.1", False),
    ],
)
def test_what_is_on_this_machine(url: str, near: bool) -> None:
    assert is_loopback(url) == near


async def test_two_manifests_of_one_folder_are_the_same(tmp_path: Path) -> None:
    for n in range(10_000 // 2):
        write(tmp_path / f"s/{n % 50}/{n}", "")
    async with connected(server := ArtifactServer()) as client:
        first, second = [await client.upload(tmp_path / "s") for _ in range(2)]
    assert first.digest == second.digest
    assert len(read_manifest(server.manifests[first.id])) == 5050
