"""The worker's cache on a real file system: what it keeps, what it lets go, what it survives."""

import asyncio
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from libs.archives.rules import ArchiveRefused
from libs.archives.tree import CHUNK, ZERO_CHUNK, Entry, tree_of
from proto.events.base import ArtifactRef
from proto.messages import TREE_HINT
from proto.plan import TaskInput, TaskOutput
from services.worker.cache import Cache
from services.worker.filling import Filling
from services.worker.newtree import add_tree
from services.worker.placing import Copies, Means
from services.worker.teamcache import TeamCache
from services.worker.trees import Names, name_of
from tests.controls import eventually
from tests.integration.test_blobstore import small_disk
from tests.worker_controls import a_system, all_means, means, sh
from tests.worker_shop import TOKEN, a_shop

__all__ = ["all_means", "means"]

SRC = [TaskInput(name="src")]
KIB = 1 << 10


@pytest.fixture
def whole(tmp_path: Path) -> Iterator[Cache]:
    whole = Cache(tmp_path / "cache", 260 * KIB)
    whole.open()
    yield whole
    whole.close()


@pytest.fixture
def cache(whole: Cache) -> TeamCache:
    return whole.of("main")


def contents(path: str, size: int) -> bytes:
    return (path.encode() * size)[:size]


def file(path: str, size: int = 20 * KIB, of: str = "") -> Entry:
    return Entry(path.encode(), "file", 0o644, size, hashlib.sha256(contents(of or path, size)).digest() if size else b"")


def fill(cache: TeamCache, entries: Sequence[Entry]) -> None:
    filling = Filling(cache, list({name_of(entry): entry for entry in entries if entry.kind == "file" and not cache.has(entry)}.values()))
    of = {entry.digest: contents(entry.path.decode(), entry.size) for entry in entries}
    for digest in filling.lacking:
        filling.put(digest, of[digest])
    filling.close()


def keep(cache: TeamCache, *entries: Entry) -> str:
    """A tree as an attempt leaves it: its files, its manifest, a layer."""
    fill(cache, entries)
    tree = tree_of(entries)
    cache.layer(add_tree(cache, tree.summary.digest, tree.root.blobs), b"src", [])
    return tree.summary.digest


def on_disk(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in (folder / "files" / "main").iterdir())


def test_what_was_used_longest_ago_goes_first_and_with_its_tree_only_what_no_other_holds(cache: TeamCache, tmp_path: Path) -> None:
    both = file("both")
    old = keep(cache, both, file("old"), file("older"))
    used = keep(cache, file("used"), file("used too"))
    new = keep(cache, both, file("new"))
    assert cache.tree(used) is not None
    keep(cache, *(file(f"last{n}") for n in range(5)))
    cache.all.trim()
    assert cache.tree(old) is None
    assert cache.tree(used) and cache.tree(new)
    assert not cache.has(file("old"))
    assert cache.has(both) and cache.has(file("used"))
    assert cache.all.bytes <= cache.all.limit
    assert on_disk(tmp_path / "cache") <= cache.all.bytes


def test_what_is_pinned_stays_whatever_the_limit(cache: TeamCache) -> None:
    tree, loose = keep(cache, file("a")), file("loose")
    fill(cache, [loose])
    with cache.pinned(Names.of(tree)), cache.pinned(Names.of(name_of(loose))):
        cache.all.trim(0)
        assert cache.tree(tree) is not None
        assert cache.has(loose) and cache.has(file("a"))
    cache.all.trim(0)
    assert cache.tree(tree) is None
    assert not cache.has(loose)
    assert cache.all.bytes == 0


def test_hints_name_the_trees_that_are_there_and_are_new_only_when_those_are(cache: TeamCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.worker.cache.MAX_HINTS", 3)

    def named(*trees: str) -> tuple[str, ...]:
        return tuple(tree[:TREE_HINT] for tree in trees)

    assert cache.all.hints() == ()
    a, b, c = (keep(cache, file(name)) for name in "abc")
    hints = cache.all.hints()
    assert hints == named(c, b, a)
    assert cache.tree(a) and cache.tree("0" * 64) is None
    keep(cache, file("b"))
    assert cache.all.hints() is hints
    d = keep(cache, file("d"))
    assert cache.all.hints() == named(d, b, a)
    assert cache.tree(c)
    assert cache.all.hints() == named(c, d, b)
    with cache.pinned(Names.of(b)):
        cache.all.trim(0)
    assert cache.all.hints() == named(b)
    again = Cache(cache._files.parents[1], cache.all.limit)
    again.open()
    assert again.hints() == named(b)
    again.close()


def test_a_later_life_takes_up_what_is_whole(tmp_path: Path) -> None:
    first = Cache(tmp_path / "cache", 1 << 20)
    first.open()
    first_main = first.of("main")
    tree = keep(first_main, file("a"), file("b"), file("empty", 0))
    size = first.bytes
    (tmp_path / "cache" / "new" / "half").write_text("half")
    first.close()
    second = Cache(tmp_path / "cache", 1 << 20)
    second.open()
    second_main = second.of("main")
    assert second.bytes == size
    assert second_main.tree(tree) is not None
    assert not list((tmp_path / "cache" / "new").iterdir())
    second.close()
    os.truncate(tmp_path / "cache" / "files" / "main" / name_of(file("a")), 5)
    third = Cache(tmp_path / "cache", 1 << 20)
    third.open()
    third_main = third.of("main")
    assert third_main.tree(tree) is None
    assert not third_main.has(file("a"))
    assert third_main.has(file("b"))
    third.close()


def test_a_damaged_file_or_manifest_is_not_used(cache: TeamCache, tmp_path: Path) -> None:
    tree = keep(cache, file("a"))
    assert cache.has(file("a")) and cache.tree(tree) is not None
    os.truncate(tmp_path / "cache" / "files" / "main" / name_of(file("a")), 5)
    assert not cache.has(file("a"))
    (tmp_path / "cache" / "trees" / "main" / tree / "manifest").write_bytes(b"x")
    assert cache.tree(tree) is None


def test_equal_files_of_one_workspace_have_inodes_of_their_own(cache: TeamCache) -> None:
    one, other = file("one"), Entry(b"other", "file", 0o644, 20 * KIB, file("one").digest)
    made = tree_of([one, other])
    fill(cache, [one])
    tree = add_tree(cache, made.summary.digest, made.root.blobs)
    layers = [cache.layer(tree, path, others) / path.decode() for path, others in ((b"a", []), (b"b/c", [tree.names]))]
    inodes = {(layer / name).stat().st_ino for layer in layers for name in ("one", "other")}
    assert len(inodes) == 4
    again = cache.layer(tree, b"a", [])
    assert again / "a" == layers[0]
    assert all((layer / name).read_bytes() == contents("one", 20 * KIB) for layer in layers for name in ("one", "other"))


def test_a_file_may_be_in_more_trees_than_it_may_have_links(cache: TeamCache, tmp_path: Path) -> None:
    one = file("one", 10)
    fill(cache, [one])
    source = tmp_path / "cache" / "files" / "main" / name_of(one)
    many = tmp_path / "many"
    many.mkdir()
    for number in range(70_000):
        try:
            os.link(source, many / str(number))
        except OSError:
            break
    keep(cache, one)
    assert source.stat().st_nlink in (2, 70_002)


def test_a_large_file_comes_in_any_order_and_its_zeros_are_neither_sent_nor_written(cache: TeamCache, tmp_path: Path) -> None:
    last = b"the end"
    first = b"a" * CHUNK
    digests = [hashlib.sha256(first).digest(), ZERO_CHUNK, ZERO_CHUNK, hashlib.sha256(last).digest()]
    big = Entry(b"big", "file", 0o755, 3 * CHUNK + len(last), b"".join(digests))
    filling = Filling(cache, [big])
    assert set(filling.lacking) == {digests[0], digests[3]}
    filling.put(digests[3], last)
    assert not cache.has(big)
    filling.put(digests[0], first)
    assert cache.has(big)
    path = tmp_path / "cache" / "files" / "main" / name_of(big)
    assert path.read_bytes() == first + bytes(2 * CHUNK) + last
    assert path.stat().st_blocks * 512 < 2 * CHUNK
    assert path.stat().st_mode & 0o777 == 0o755
    filling.close()


def test_what_did_not_come_whole_leaves_nothing(cache: TeamCache, tmp_path: Path) -> None:
    digests = [hashlib.sha256(letter * CHUNK).digest() for letter in (b"a", b"b")]
    filling = Filling(cache, [Entry(b"big", "file", 0o644, 2 * CHUNK, b"".join(digests))])
    filling.put(digests[0], b"a" * CHUNK)
    assert list((tmp_path / "cache" / "new").iterdir())
    filling.close()
    assert not list((tmp_path / "cache" / "new").iterdir())
    assert not list((tmp_path / "cache" / "files" / "main").iterdir())


FULL = """
import errno, hashlib, os, sys
from pathlib import Path
from libs.archives.tree import Entry
from services.worker.cache import Cache
from services.worker.filling import Filling
cache = Cache(Path(sys.argv[1]) / "cache", 1 << 30)
cache.open()
cache = cache.of("main")
def fill(name, size):
    contents = (name * size)[:size]
    entry = Entry(name, "file", 0o644, size, hashlib.sha256(contents).digest())
    filling = Filling(cache, [entry])
    try:
        filling.put(entry.digest, contents)
    finally:
        filling.close()
    assert cache.has(entry)
for number in range(12):
    fill(b"%d" % number, 1 << 20)
try:
    fill(b"large", 7 << 20)
except OSError as error:
    assert error.errno == errno.ENOSPC, error
else:
    sys.exit("it was not full")
fill(b"after", 1 << 20)
assert not os.listdir(Path(sys.argv[1]) / "cache" / "new")
"""


async def test_on_a_full_disk_the_cache_makes_room_before_it_gives_up(tmp_path: Path) -> None:
    """FAULTS 53"""
    command = [*small_disk(tmp_path, "5m"), sys.executable, "-c", FULL, str(tmp_path)]
    run = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    _, errors = await run.communicate()
    assert run.returncode == 0, errors.decode()


async def test_a_worker_that_may_keep_nothing_keeps_nothing(tmp_path: Path, means: Means) -> None:
    (tmp_path / "in" / "src").mkdir(parents=True)
    (tmp_path / "in" / "src" / "file").write_text("x" * 10_000)
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, cache_bytes=0, artifacts_url=shop.url) as (scheduler, running):
        shop.writes = False
        for _ in range(2):
            attempt = await scheduler.send(
                sh("cp src/file dist; cat src/file | wc -c", inputs=SRC, outputs=["dist"]), inputs=shop.refs("src"), token=TOKEN
            )
            assert (await scheduler.finished(attempt)).status == "succeeded"
            assert await scheduler.log(attempt, "stdout") == "10000\n"
            await eventually(lambda: [name for _, _, names in os.walk(running.folder / "cache") for name in names] == ["machine"])
        assert shop.requests["blobs"] == 2


async def test_two_stages_at_once_fetch_a_tree_once(tmp_path: Path, means: Means) -> None:
    for number in range(50):
        (tmp_path / "in" / "src").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "src" / str(number)).write_text(str(number))
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, _):
        refs = shop.refs("src")
        attempts = [await scheduler.send(sh("ls src | wc -l", inputs=SRC), inputs=refs, token=TOKEN) for _ in range(2)]
        assert [await scheduler.log(attempt, "stdout") for attempt in attempts] == ["50\n", "50\n"]
        assert (shop.requests["manifest"], shop.sent) == (1, 50)


async def test_many_files_are_fetched_some_at_a_time_and_each_contents_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.worker.artifacts._AT_ONCE", 20)
    (tmp_path / "in" / "src").mkdir(parents=True)
    for number in range(90):
        (tmp_path / "in" / "src" / f"{number:02}").write_text(str(number % 45))
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", artifacts_url=shop.url) as (scheduler, _):
        attempt = await scheduler.send(sh("cat src/*", inputs=SRC), inputs=shop.refs("src"), token=TOKEN)
        assert await scheduler.log(attempt, "stdout") == "".join(map(str, range(45))) * 2
        assert (shop.requests["blobs"], shop.sent) == (3, 45)


@pytest.mark.parametrize("means", ["reflink"], indirect=True)
async def test_where_contents_can_be_shared_a_workspace_takes_no_room_for_them(tmp_path: Path, means: Means) -> None:
    size, files = 200 * KIB, 200
    (tmp_path / "in" / "src").mkdir(parents=True)
    for number in range(files):
        (tmp_path / "in" / "src" / str(number)).write_bytes(os.urandom(size))
    disk = os.statvfs(tmp_path)
    before = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, _):
        look = sh("cat src/* | wc -c; sync -f .; df --output=used -B1 . | tail -n 1", inputs=SRC)
        attempt = await scheduler.send(look, inputs=shop.refs("src"), token=TOKEN)
        seen, used = map(int, (await scheduler.log(attempt, "stdout")).split())
        assert seen == size * files
        assert 0.9 < (used - before) / seen < 1.3


async def test_a_transfer_that_breaks_goes_on_where_it_was(tmp_path: Path) -> None:
    """FAULTS 21: either way."""
    (tmp_path / "in" / "src").mkdir(parents=True)
    for number in range(40):
        (tmp_path / "in" / "src" / str(number)).write_bytes(os.urandom(100_000))
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", artifacts_url=shop.url) as (scheduler, _):
        shop.cut_sending, shop.cut_taking = [10, 10], [10, 10]
        script = "for f in src/*; do (echo more; cat $f) > dist/${f#src/}; done"
        attempt = await scheduler.send(sh(script, inputs=SRC, outputs=["dist"]), inputs=shop.refs("src"), token=TOKEN)
        assert (await scheduler.finished(attempt)).status == "succeeded"
        assert (shop.requests["blobs"], shop.requests["take"]) == (3, 3)
        assert shop.sent <= 60
        assert shop.received == 40
        for number in range(40):
            taken = (tmp_path / "out" / "step" / "dist" / str(number)).read_bytes()
            assert taken == b"more\n" + (tmp_path / "in" / "src" / str(number)).read_bytes()


async def test_an_input_whose_manifest_is_another_trees_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in" / "src").mkdir(parents=True)
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", artifacts_url=shop.url) as (scheduler, _):
        refs = shop.refs("src")
        (tmp_path / "in" / "src" / "file").touch()
        shop.refs("src")
        attempt = await scheduler.send(sh("true", inputs=SRC), inputs=refs, token=TOKEN)
        assert "input `src`: its manifest is refused: it is not that of the tree" in (await scheduler.finished(attempt, timeout=5)).error


@pytest.mark.parametrize("file", [[], [Entry(b"../out", "file", 0o644)]], ids=["nothing to fetch", "a file to fetch"])
async def test_an_input_that_is_no_tree_is_refused_and_nothing_of_it_is_written(tmp_path: Path, means: Means, file: list[Entry]) -> None:
    hostile = tree_of([Entry(b"..", "folder", 0o755), Entry(b"../new", "folder", 0o755), *file])
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, _):
        shop.trees["src"] = hostile
        ref = ArtifactRef(id="hostile", digest=hostile.summary.digest, size=0, files=len(file))
        for _ in range(2):
            attempt = await scheduler.send(sh("true", inputs=SRC), inputs={"src": ref}, token=TOKEN)
            assert (await scheduler.finished(attempt)).error == "step `step`: input `src`: `..` has `..` in its path"
    assert list((tmp_path / "w").rglob("new")) == [tmp_path / "w" / "cache" / "new"]
    assert not list((tmp_path / "w" / "cache" / "files" / "main").iterdir())


async def test_an_output_of_holes_and_one_of_many_chunks_come_back_as_they_were(tmp_path: Path, means: Means) -> None:
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, _):
        script = "truncate -s 200M dist/holes; echo end >> dist/holes; seq 3000000 > dist/large; sha256sum dist/* | cut -c1-64"
        first = await scheduler.send(sh(script, outputs=["dist"]), token=TOKEN)
        assert (await scheduler.finished(first)).status == "succeeded"
        assert shop.received == 4
        running = tmp_path / "w" / "cache"
        await eventually(lambda: (running / "files" / "main").exists() and len(list((running / "files" / "main").iterdir())) == 2)
        for path in (running / "files" / "main").iterdir():
            path.unlink()
        using = sh("sha256sum dist/* | cut -c1-64; test $(du -m dist/holes | cut -f1) -lt 20", inputs=[TaskInput(name="dist")])
        second = await scheduler.send(using, inputs={"dist": scheduler.step(first).outputs["dist"]}, token=TOKEN)
        assert (await scheduler.finished(second)).status == "succeeded"
        assert await scheduler.log(second, "stdout") == await scheduler.log(first, "stdout")


async def test_a_file_that_changes_while_it_is_stored_is_refused(tmp_path: Path) -> None:
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", artifacts_url=shop.url) as (scheduler, running):
        shop.down = 1
        attempt = await scheduler.send(sh("echo one > dist/file", outputs=[TaskOutput(name="dist")]), token=TOKEN)
        await eventually(lambda: shop.requests["offer"])
        (path,) = (running.folder / "work").glob("*/workspace/dist/file")
        path.write_text("two")
        assert "`file` changed while it was read" in (await scheduler.finished(attempt, timeout=5)).error


def test_a_team_does_not_see_what_another_has(whole: Cache, tmp_path: Path) -> None:
    one, other = whole.of("one"), whole.of("other")
    tree = keep(one, file("a"))
    assert other.tree(tree) is None
    assert not other.has(file("a"))
    assert keep(other, file("a")) == tree
    seen = [(tmp_path / "cache" / "files" / team / name_of(file("a"))).stat() for team in ("one", "other")]
    assert [each.st_nlink for each in seen] == [2, 2]
    assert seen[0].st_ino != seen[1].st_ino
    assert {each.st_mtime for each in seen} == {946_684_800}
    one.open_file(file("a"))
    assert whole.hints() == (tree[:TREE_HINT],)
    whole.trim(0)
    assert whole.bytes == 0
    assert not one.has(file("a")) and not other.has(file("a"))


def a_life(folder: Path, machine: str, monkeypatch: pytest.MonkeyPatch) -> Cache:
    monkeypatch.setattr("services.worker.cache._machine", lambda: machine)
    cache = Cache(folder, 1 << 20)
    cache.open()
    return cache


def test_what_an_earlier_run_of_the_machine_left_is_read_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = a_life(cache, "first", monkeypatch)
    tree = keep(first.of("main"), *map(file, "abcd"))
    size = first.bytes
    first.close()
    for name in "ac":
        # as a power cut leaves it
        path = cache / "files" / "main" / name_of(file(name))
        path.write_bytes(bytes(20 * KIB))
    for machine in ("second", "second", "third"):
        life = a_life(cache, machine, monkeypatch)
        main = life.of("main")
        assert main.tree(tree) is not None
        if machine == "second":
            assert not main.has(file("a")) and main.has(file("b"))
        assert life.bytes <= size
        life.close()
    last = a_life(cache, "third", monkeypatch)
    assert [name for name in "abcd" if last.of("main").has(file(name))] == ["b", "d"]
    last.trim(0)
    assert last.bytes == 0
    assert not [path for path in cache.rglob("*") if path.is_file() and path.name != "machine"]
    last.close()


def test_a_doubtful_file_that_is_not_wanted_goes_when_room_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = a_life(tmp_path / "cache", "first", monkeypatch)
    fill(first.of("main"), [file("a"), file("b")])
    first.close()
    second = a_life(tmp_path / "cache", "second", monkeypatch)
    assert second.bytes == 40 * KIB
    with second.of("main").pinned(Names.of(name_of(file("a")))):
        second.trim(0)
    assert second.of("main").has(file("a")) and not second.of("main").has(file("b"))
    second.close()


def test_a_tree_of_which_all_is_cached_is_placed_by_its_checked_paths(cache: TeamCache, tmp_path: Path) -> None:
    fill(cache, [file("a")])
    linked = file("../out", of="a")
    hostile = tree_of([file("a"), msgspec.structs.replace(linked, digest=file("a").digest, target=b"a")])
    with pytest.raises(ArchiveRefused):
        add_tree(cache, hostile.summary.digest, hostile.root.blobs)
    assert cache.tree(hostile.summary.digest) is None
    (tmp_path / "into").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "into" / "way").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        Copies(cache, False, lambda: None).put_linked([file("way/a", of="a")], tmp_path / "into")
    with pytest.raises(ValueError, match="leads up"):
        Copies(cache, False, lambda: None).put_linked([linked], tmp_path / "into")
    assert not list((tmp_path / "elsewhere").iterdir())
    assert not (tmp_path / "out").exists()


def test_what_the_service_took_is_placed_whatever_its_limits_are(cache: TeamCache, tmp_path: Path) -> None:
    size = 65 << 30
    made = tree_of([Entry(b"big", "file", 0o644, size, ZERO_CHUNK * (size // CHUNK))])
    Filling(cache, made.entries).close()
    tree = add_tree(cache, made.summary.digest, made.root.blobs)
    layer = cache.layer(tree, b"src", [])
    Copies(cache, False, lambda: None).place(tree, tmp_path / "into")
    assert (layer / "src" / "big").stat().st_size == (tmp_path / "into" / "big").stat().st_size == size
