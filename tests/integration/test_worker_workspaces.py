"""What a step may do in its workspace, whatever its inputs lie on: anything that it may do in a folder, and none of it reaches the cache."""

import os
import socket
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from libs.archives.rules import ArchiveRefused, LimitExceeded
from proto.plan import TaskInput, TaskOutput
from services.worker import workspace
from services.worker.capture import capture
from services.worker.copying import copy_tree
from services.worker.executors.sandboxes import Choice
from services.worker.placing import Means
from tests.controls import eventually
from tests.worker_controls import a_system, all_means, means, sandboxes_here, sh, step
from tests.worker_shop import TOKEN, a_shop

__all__ = ["all_means", "means"]

SRC = [TaskInput(name="src")]

VANDAL = """
import ctypes, mmap, os, shutil, subprocess

done = set()
def act(way):
    path = f"src/{way.__name__}"
    assert open(path, "rb").read() == way.__name__.encode() * 2000, path
    try:
        way(path)
        done.add(way.__name__)
    except OSError as error:
        print(way.__name__, error)

def writes(path):
    with open(path, "r+b") as file: file.write(b"bad")
def appends(path):
    with open(path, "ab") as file: file.write(b"bad")
def truncates(path): os.truncate(path, 1)
def changes_mode(path): os.chmod(path, 0o4777)
def changes_owner(path): os.chown(path, 1, 1)
def renames_over(path):
    with open("new", "wb") as file: file.write(b"bad")
    os.rename("new", path)
def maps(path):
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory: memory[:3] = b"bad"
def links(path):
    os.link(path, "linked")
    with open("linked", "r+b") as file: file.write(b"bad")
    os.chmod("linked", 0o777)
def dates(path): os.utime(path, (1, 1))
def marks(path): os.setxattr(path, "user.bad", b"bad")
def removes(path): os.unlink(path)
def makes_unnamed(path):
    made = os.open("src", os.O_TMPFILE | os.O_RDWR, 0o777)
    os.write(made, b"bad")
    os.unlink(path)
    os.link(f"/proc/self/fd/{made}", path, follow_symlinks=True)
def opens_again(path):
    read = os.open(path, os.O_RDONLY)
    again = os.open(f"/proc/self/fd/{read}", os.O_RDWR)
    os.write(again, b"bad")
def punches(path):
    with open(path, "r+b") as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(file.fileno(), 3, ctypes.c_long(0), ctypes.c_long(4096)):
            raise OSError(ctypes.get_errno(), "fallocate")
def copies_over(path):
    with open("new", "wb") as file: file.write(b"bad" * 5000)
    with open("new", "rb") as source, open(path, "r+b") as target: os.copy_file_range(source.fileno(), target.fileno(), 9000)
def is_root_of_its_own(path):
    script = f"echo bad >> {path}; chown 1 {path}; chmod 7777 {path}; mount -o remount,rw .; umount .; umount -l .; umount src; echo bad > {path}"
    subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script], stderr=subprocess.DEVNULL)

for way in (writes, appends, truncates, changes_mode, changes_owner, renames_over, maps, links, dates, marks, removes, makes_unnamed, opens_again,
            punches, copies_over, is_root_of_its_own):
    act(way)
assert {"writes", "appends", "truncates", "changes_mode", "renames_over", "maps", "links", "dates", "removes", "opens_again"} <= done, done
os.rename("src/deep", "src/moved")
with open("src/moved/down/file", "ab") as file: file.write(b"bad")
shutil.rmtree("src")
assert not os.path.exists("src")
"""


def cached(folder: Path) -> dict[str, tuple[object, ...]]:
    found = {}
    for path in (folder / "cache" / "files" / "main").iterdir():
        seen = path.lstat()
        marks = tuple(os.listxattr(path, follow_symlinks=False))
        found[path.name] = (path.read_bytes(), seen.st_mode, seen.st_uid, seen.st_gid, seen.st_mtime_ns, marks)
    return found


def mounted(folder: Path) -> list[str]:
    return [line for line in Path("/proc/self/mounts").read_text().splitlines() if str(folder) in line]


@pytest.mark.parametrize("sandbox", sandboxes_here())
async def test_whatever_a_step_does_to_its_inputs_the_cache_stays_as_it_is(tmp_path: Path, sandbox: Choice, means: Means) -> None:
    src = tmp_path / "in" / "src"
    (src / "deep" / "down").mkdir(parents=True)
    (src / "deep" / "down" / "file").write_text("file" * 2000)
    for line in VANDAL.splitlines():
        if line.startswith("def ") and not line.startswith("def act"):
            name = line[4:].partition("(")[0]
            (src / name).write_text(name * 2000)
    worker = tmp_path / "w"
    async with a_shop(tmp_path) as shop, a_system(worker, sandbox=sandbox, means=means, artifacts_url=shop.url) as (scheduler, _):
        look = sh("cat src/*/*/* src/[a-z]* 2>/dev/null | md5sum; ls -l src | wc -l", inputs=SRC)
        first = await scheduler.send(look, inputs=shop.refs("src"), token=TOKEN)
        assert (await scheduler.finished(first)).status == "succeeded"
        before = cached(worker)
        attempt = await scheduler.send(step(sys.executable, "-c", VANDAL, inputs=SRC), inputs=shop.refs("src"), token=TOKEN)
        assert (await scheduler.finished(attempt)).status == "succeeded", await scheduler.log(attempt)
        await eventually(lambda: not mounted(worker))
        assert cached(worker) == before
        again = await scheduler.send(look, inputs=shop.refs("src"), token=TOKEN)
        assert await scheduler.log(again, "stdout") == await scheduler.log(first, "stdout")
        assert shop.requests == {"manifest": 1, "blobs": 1}


async def test_no_two_files_of_a_workspace_become_one_by_copying_it_with_its_links(tmp_path: Path, means: Means) -> None:
    for name in ("src", "lib"):
        (tmp_path / "in" / name).mkdir(parents=True)
        for number in range(3):
            (tmp_path / "in" / name / f"empty{number}").touch()
            (tmp_path / "in" / name / f"same{number}").write_text("the same\n")
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, _):
        script = "mkdir all; cp -a src lib all; echo changed > all/src/same0; echo changed > all/src/empty0; cat all/*/*"
        inputs = [*SRC, TaskInput(name="lib")]
        for _ in range(2):
            attempt = await scheduler.send(sh(script, inputs=inputs), inputs=shop.refs("src", "lib"), token=TOKEN)
            assert await scheduler.log(attempt, "stdout") == "the same\n" * 3 + "changed\nchanged\n" + "the same\n" * 2


async def test_hard_links_come_and_go_as_they_are(tmp_path: Path, means: Means) -> None:
    src = tmp_path / "in" / "src"
    (src / "b").mkdir(parents=True)
    (src / "a").write_text("1\n")
    (src / "b" / "c").hardlink_to(src / "a")
    (src / "other").write_text("1\n")
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, _):
        again = sh("true", inputs=SRC, outputs=[TaskOutput(name="src")])
        attempt = await scheduler.send(again, inputs=shop.refs("src"), token=TOKEN)
        assert (await scheduler.finished(attempt)).status == "succeeded"
        assert scheduler.step(attempt).outputs["src"].digest == shop.ref("src").digest
        script = "echo 2 >> src/b/c; cat src/a src/other; ln src/other dist/new; ln dist/new dist/newer"
        attempt = await scheduler.send(sh(script, inputs=SRC, outputs=["dist"]), inputs=shop.refs("src"), token=TOKEN)
        assert await scheduler.log(attempt, "stdout") == "1\n2\n1\n"
        dist = tmp_path / "out" / "step" / "dist"
        assert (dist / "new").samefile(dist / "newer")


async def test_inputs_may_lie_in_one_another(tmp_path: Path, means: Means) -> None:
    (tmp_path / "in" / "whole" / "empty").mkdir(parents=True)
    (tmp_path / "in" / "whole" / "full").mkdir()
    (tmp_path / "in" / "whole" / "full" / "file").write_text("whole\n")
    (tmp_path / "in" / "whole" / "link").symlink_to("empty")
    (tmp_path / "in" / "part").mkdir()
    (tmp_path / "in" / "part" / "file").write_text("part\n")
    whole = TaskInput(name="whole", path=".")
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, _):

        async def said(path: str) -> str:
            inputs = [TaskInput(name="part", path=path), whole]
            attempt = await scheduler.send(sh("cat */file; cat */*/file; true", inputs=inputs), inputs=shop.refs("whole", "part"), token=TOKEN)
            extent = await scheduler.finished(attempt)
            return extent.error or await scheduler.log(attempt, "stdout")

        assert await said("empty") == "part\nwhole\npart\n"
        assert "input `part`: its folder `full` is there already" in await said("full")
        assert "input `part`: its folder `link` leads through a link, `link`" in await said("link")
        assert "part" in await said("full/deeper")
        assert "is there already" in await said("full/file")


async def test_a_step_changes_what_it_was_given_and_only_that_is_sent(tmp_path: Path, means: Means) -> None:
    src = tmp_path / "in" / "src"
    for number in range(40):
        (src / f"d{number % 4}").mkdir(parents=True, exist_ok=True)
        (src / f"d{number % 4}" / f"f{number}").write_text(f"{number}\n")
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, _):
        script = """
            set -e
            echo changed > src/d0/f0; rm src/d0/f4; chmod +x src/d1/f1; touch src/d1/f5
            mv src/d2 src/x; mv src/d3 src/d2; mv src/x src/d3; mv src/d1/f9 src/d1/renamed
        """
        attempt = await scheduler.send(sh(script, inputs=SRC, outputs=[TaskOutput(name="src")]), inputs=shop.refs("src"), token=TOKEN)
        assert (await scheduler.finished(attempt)).status == "succeeded", await scheduler.log(attempt)
        out = tmp_path / "out" / "step" / "src"
        assert shop.received == 1
        assert (out / "d0" / "f0").read_text() == "changed\n"
        assert not (out / "d0" / "f4").exists()
        assert os.access(out / "d1" / "f1", os.X_OK)
        assert (out / "d3" / "f2").read_text() == "2\n"
        assert (out / "d2" / "f3").read_text() == "3\n"
        assert (out / "d1" / "renamed").read_text() == "9\n"
        assert sum(1 for path in out.rglob("*") if path.is_file()) == 39


async def test_a_change_that_keeps_size_and_times_is_seen(tmp_path: Path, means: Means) -> None:
    src = tmp_path / "in" / "src"
    src.mkdir(parents=True)
    (src / "file").write_text("one")
    script = "import os; s = os.stat('src/file'); open('src/file', 'r+').write('two'); os.utime('src/file', ns=(s.st_atime_ns, s.st_mtime_ns))"
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, _):
        changing = step(sys.executable, "-c", script, inputs=SRC, outputs=[TaskOutput(name="src")])
        attempt = await scheduler.send(changing, inputs=shop.refs("src"), token=TOKEN)
        assert (await scheduler.finished(attempt)).status == "succeeded"
        assert (tmp_path / "out" / "step" / "src" / "file").read_text() == "two"


async def test_what_a_stage_made_the_next_one_here_does_not_fetch(tmp_path: Path, means: Means) -> None:
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, running):
        script = "mkdir dist/a; seq 9 > dist/a/nine; cp /bin/true dist/program; chmod 600 dist/a/nine; ln -s a dist/link; touch dist/empty"
        first = await scheduler.send(sh(script, outputs=["dist"]), token=TOKEN)
        await scheduler.finished(first)
        await eventually(lambda: len(list((running.folder / "cache" / "files" / "main").iterdir())) == 2)
        using = sh("stat -c %a dist/a/nine dist/program; tail -n 1 dist/link/nine; dist/program", inputs=[TaskInput(name="dist")])
        second = await scheduler.send(using, inputs={"dist": scheduler.step(first).outputs["dist"]}, token=TOKEN)
        assert await scheduler.log(second, "stdout") == "644\n755\n9\n"
        assert shop.requests == {"offer": 1, "take": 1}


async def test_a_later_step_cannot_change_what_an_earlier_one_gave_to_the_cache(tmp_path: Path, means: Means) -> None:
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, _):
        script = "import os; s = os.stat('dist/f'); open('dist/f', 'r+').write('two'); os.utime('dist/f', ns=(s.st_atime_ns, s.st_mtime_ns))"
        attempt = await scheduler.send(
            sh("echo one > dist/f", name="make", outputs=["dist"]), step(sys.executable, "-c", script, name="spoil"), token=TOKEN
        )
        ref = (await scheduler.finished(attempt)) and scheduler.step(attempt, "make").outputs["dist"]
        later = await scheduler.send(sh("cat dist/f", inputs=[TaskInput(name="dist")]), inputs={"dist": ref}, token=TOKEN)
        assert await scheduler.log(later, "stdout") == "one\n"


async def test_who_may_still_write_to_an_output_cannot_write_to_what_is_cached(tmp_path: Path, means: Means) -> None:
    """A step may send a descriptor anywhere, as through an abstract socket to another build."""
    script = """
import os, socket
there = socket.socket(socket.AF_UNIX)
there.connect("\\0" + os.environ["THERE"])
made = os.open("dist/library", os.O_CREAT | os.O_RDWR, 0o644)
os.write(made, b"genuine")
socket.send_fds(there, [b"x"], [made])
there.recv(1)
"""
    here = socket.socket(socket.AF_UNIX)
    here.settimeout(20)
    here.bind(f"\0{tmp_path}")
    here.listen()
    received: list[int] = []

    def receive() -> None:
        with here, here.accept()[0] as there:
            received.extend(socket.recv_fds(there, 1, 1)[1])
            there.send(b"x")

    thread = threading.Thread(target=receive)
    thread.start()
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, running):
        first = await scheduler.send(step(sys.executable, "-c", script, params={"THERE": str(tmp_path)}, outputs=["dist"]), token=TOKEN)
        assert (await scheduler.finished(first)).status == "succeeded", await scheduler.log(first)
        thread.join()
        files = running.folder / "cache" / "files" / "main"
        await eventually(lambda: list(files.iterdir()))
        os.pwrite(received[0], b"POISON!", 0)
        os.close(received[0])
        ref = scheduler.step(first).outputs["dist"]
        second = await scheduler.send(sh("cat dist/library", inputs=[TaskInput(name="dist")]), inputs={"dist": ref}, token=TOKEN)
        assert await scheduler.log(second, "stdout") == "genuine"
        assert shop.requests == {"offer": 1, "take": 1}


async def test_of_an_output_only_what_is_still_as_it_was_stored_is_cached(tmp_path: Path, means: Means) -> None:
    spoil = "import os; s = os.stat('dist/a'); open('dist/a', 'r+').write('two'); os.utime('dist/a', ns=(s.st_atime_ns, s.st_mtime_ns))"
    more = "os.remove('dist/b'); os.mkfifo('dist/b')"
    for name in "cd":
        more += f"; os.rename('dist/{name}', '{name}'); os.symlink('../{name}', 'dist/{name}')"
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, running):
        make = sh("for f in a b c e; do echo $f > dist/$f; done; mkdir dist/d; echo f > dist/d/f", name="make", outputs=["dist"])
        attempt = await scheduler.send(make, step(sys.executable, "-c", f"{spoil}; {more}", name="spoil"), token=TOKEN)
        assert (await scheduler.finished(attempt)).status == "succeeded", await scheduler.log(attempt)
        files = running.folder / "cache" / "files" / "main"
        await eventually(lambda: [path.read_text() for path in files.iterdir()] == ["e\n"])
        assert not list((running.folder / "cache" / "new").iterdir())


async def test_inputs_have_one_time_which_is_older_than_what_a_step_makes(tmp_path: Path, means: Means) -> None:
    src = tmp_path / "in" / "src"
    src.mkdir(parents=True)
    (src / "made").write_text("made\n")
    (src / "from").write_text("from\n")
    (src / "link").hardlink_to(src / "from")
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, _):
        for _ in range(2):
            attempt = await scheduler.send(sh("stat -c %Y.%y src/*", inputs=SRC), inputs=shop.refs("src"), token=TOKEN)
            (said,) = set((await scheduler.log(attempt, "stdout")).splitlines())
            assert said.startswith("946684800.") and ".000000000" in said


async def test_what_a_step_wants_elsewhere_is_copied_with_its_holes(tmp_path: Path, means: Means) -> None:
    make = "cd out; truncate -s 5G holes; echo end >> holes; mkdir deep; echo 1 > deep/file; chmod 755 deep/file; ln -s file deep/link"
    look = "stat -c %s elsewhere/holes; tail -c 4 elsewhere/holes; test $(du -m elsewhere/holes | cut -f1) -lt 20; echo $?"
    rest = "stat -c %a elsewhere/deep/file; cat elsewhere/deep/link"
    elsewhere = [TaskInput(name="out", path="elsewhere")]
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, _):
        steps = [sh(make, name="make", outputs=["out"]), sh(f"{look}; {rest}", name="use", inputs=elsewhere)]
        attempt = await scheduler.send(*steps, token=TOKEN)
        assert await scheduler.log(attempt, "stdout") == "5368709124\nend\n0\n755\n1\n", await scheduler.log(attempt)


def test_a_copy_of_a_folder_follows_no_link_and_ends_when_it_is_told_to(tmp_path: Path) -> None:
    source, target, outside = tmp_path / "source", tmp_path / "target", tmp_path / "outside"
    for folder in (source / "deep", target, outside):
        folder.mkdir(parents=True)
    (source / "deep" / "file").write_text("new")
    (source / "large").write_bytes(b"x" * (4 << 20))
    (outside / "file").write_text("old")
    (target / "deep").symlink_to(outside)
    with pytest.raises(ArchiveRefused, match="`deep` is a link"):
        copy_tree(source, target, False, lambda: None)
    (target / "deep").unlink()
    (target / "deep").mkdir()
    (target / "deep" / "file").hardlink_to(outside / "file")
    asked = 0

    def twice() -> None:
        nonlocal asked
        asked += 1
        if asked == 4:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        copy_tree(source, target, False, twice)
    assert (target / "large").stat().st_size < 4 << 20
    copy_tree(source, target, False, lambda: None)
    assert (outside / "file").read_text() == "old"
    assert (target / "deep" / "file").read_text() == "new"
    copy_tree(source, source / "deep" / "inside", False, lambda: None)
    assert sorted(path.name for path in (source / "deep" / "inside").rglob("*")) == ["deep", "file", "large"]


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    (tmp_path / "one").write_bytes(b"one")
    with (tmp_path / "two").open("wb") as file:
        file.truncate(5 << 40)
    with pytest.raises(LimitExceeded, match="`two` takes the tree past"):
        capture(folder, folder, lambda *_: None, lambda: pytest.fail("something was read"))


def test_the_reading_of_a_large_file_ends_when_it_is_told_to(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path)
    with (tmp_path / "one").open("wb") as file:
        file.truncate(2 << 40)
    asked = 0

    def go_on() -> None:
        nonlocal asked
        asked += 1
        if asked == 100:
            raise InterruptedError

    tracemalloc.start()
    try:
        with pytest.raises(InterruptedError):
            capture(folder, folder, lambda *_: None, go_on)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


async def test_a_killed_attempt_leaves_no_mount_and_no_folder(tmp_path: Path, means: Means) -> None:
    (tmp_path / "in" / "src").mkdir(parents=True)
    (tmp_path / "in" / "src" / "file").touch()
    worker = tmp_path / "w"
    async with a_shop(tmp_path) as shop, a_system(worker, means=means, artifacts_url=shop.url) as (scheduler, running):
        attempt = await scheduler.send(sh("echo x > src/new; echo up; sleep 60", inputs=SRC), inputs=shop.refs("src"), token=TOKEN)
        await eventually(lambda: "up" in scheduler.text(attempt))
        assert bool(mounted(worker)) == (means.overlays is not None)
        scheduler.lost.add(attempt)
        await eventually(lambda: not mounted(worker) and "new" not in {name for _, _, names in os.walk(worker / "work") for name in names})
        assert not running.tools.cache.of("main")._pins, "what is pinned is let go before the folders are removed"
        attempt = await scheduler.send(sh("ls -A", inputs=[]))
        assert await scheduler.log(attempt, "stdout") == ""


@pytest.mark.parametrize("means", ["overlay"], indirect=True)
async def test_what_lay_below_an_overlay_leaves_folders_that_are_used_again(tmp_path: Path, means: Means) -> None:
    (tmp_path / "in" / "src").mkdir(parents=True)
    (tmp_path / "in" / "src" / "file").touch()
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, slots=1, artifacts_url=shop.url) as (scheduler, _):
        for _ in range(3):
            script = "rm -r src; mkdir src; touch src/other .hidden"
            attempt = await scheduler.send(sh(script, inputs=SRC), inputs=shop.refs("src"), token=TOKEN)
            assert (await scheduler.finished(attempt)).status == "succeeded"
    (left,) = (tmp_path / "w" / "work").iterdir()
    assert left.name.endswith("-1"), "the first attempt's"


async def test_an_abort_does_not_wait_for_what_is_being_read(tmp_path: Path, means: Means, monkeypatch: pytest.MonkeyPatch) -> None:
    reading = threading.Event()

    def slow(*arguments: Any) -> Any:
        for _ in range(600):
            reading.set()
            arguments[3]()
            time.sleep(0.1)

    monkeypatch.setattr(workspace, "capture", slow)
    async with a_shop(tmp_path) as shop, a_system(tmp_path / "w", means=means, artifacts_url=shop.url) as (scheduler, _):
        attempt = await scheduler.send(sh("true", outputs=["dist"]), token=TOKEN)
        await eventually(reading.is_set)
        scheduler.interrupted[attempt] = "aborted"
        assert (await scheduler.finished(attempt, timeout=10)).status == "aborted"
