"""Folders on their way out and back: what is chosen, packed, and written again."""

import asyncio
import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import pytest
from backports import zstd

from penstock.client import Damaged, select
from penstock.client.packing import pack
from penstock.client.selection import Selection, Unreadable
from penstock.client.unpacking import unpack


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


@pytest.mark.parametrize("make", [lambda path: None, lambda path: write(path)])
def test_what_is_no_folder_is_refused_by_name(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "it")
    with pytest.raises(Unreadable, match=r"it (does not exist|is not a folder)"):
        select(tmp_path / "it")


# --- out and back


async def packed(selection: Selection) -> bytes:
    return b"".join([piece async for piece in pack(selection)])


def reader(data: bytes, piece: int = 1000) -> Callable[[int], object]:
    stream = io.BytesIO(data)

    async def read(size: int) -> bytes:
        await asyncio.sleep(0)
        return stream.read(min(size, piece))

    return read


async def unpacked(data: bytes, into: Path) -> int:
    return await unpack(reader(data), into)  # type: ignore[arg-type]


async def test_a_tree_survives_the_way_out_and_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write(source / "deep/run.sh", "echo").chmod(0o755)
    write(source / ("long" * 50) / ("name" * 50))
    (source / "empty").mkdir()
    (source / "deep/link").symlink_to("../deep/run.sh")
    (source / "big").write_bytes(os.urandom(3_000_000))
    odd = os.path.join(os.fsencode(source), b"not-utf8-\xff\n\\")
    Path(os.fsdecode(odd)).write_text("odd")
    progress: list[int] = []
    selection = select(source)
    data = b"".join([piece async for piece in pack(selection, progress.append)])
    assert progress[-1] == selection.size
    assert await unpacked(data, tmp_path / "made/here") == 4
    assert names(select(tmp_path / "made/here")) == names(selection)
    assert (tmp_path / "made/here/big").read_bytes() == (source / "big").read_bytes()
    assert os.access(tmp_path / "made/here/deep/run.sh", os.X_OK)
    assert os.readlink(tmp_path / "made/here/deep/link") == "../deep/run.sh"
    assert await packed(select(source)) == data  # the same tree gives the same bytes


async def test_a_file_that_shrinks_while_it_is_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a", "x" * 100)
    selection = select(tmp_path)
    stat = os.lstat

    def longer(name: bytes) -> os.stat_result:
        found = list(stat(name))
        return os.stat_result([*found[:6], 200, *found[7:]])

    os.lstat = longer  # type: ignore[assignment]
    try:
        with pytest.raises(Unreadable, match="became shorter while it was read"):
            await packed(selection)
    finally:
        os.lstat = stat
    assert path.exists()


async def test_a_reader_that_leaves_early_ends_the_packing(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(os.urandom(8_000_000))
    async with aclosing(pack(select(tmp_path))) as stream:
        assert await anext(stream)


def archive(*members: tuple[str, bytes, str]) -> bytes:
    """A tzst of (name, type, content or link target)."""
    buffer = io.BytesIO()
    with tarfile.open(mode="w", fileobj=buffer) as tar:
        for name, kind, content in members:
            entry = tarfile.TarInfo(name)
            entry.type = kind
            entry.mode = 0o4755
            if kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                entry.linkname = content
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content.encode()))
    return zstd.compress(buffer.getvalue())


FILE, LINK, HARD, FOLDER, FIFO = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE


@pytest.mark.parametrize(
    "member",
    [
        ("../escaped", FILE, "x"),
        ("/escaped", FILE, "x"),
        ("a/../../escaped", FILE, "x"),
        ("link", LINK, "/etc/passwd"),
        ("link", LINK, "../escaped"),
        ("a/link", LINK, "../../escaped"),
        ("a/link", LINK, "b/../../../escaped"),
        ("hard", HARD, "/etc/passwd"),
        ("pipe", FIFO, ""),
        ("", FILE, "x"),
    ],
)
async def test_a_member_that_must_not_be_written_is_refused(tmp_path: Path, member: tuple[str, bytes, str]) -> None:  # FAULTS 19, 21, 23
    with pytest.raises(Damaged):
        await unpacked(archive(("good", FILE, "x"), member), tmp_path / "into")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["into"]
    assert not any(path.name != "good" and path.name != "a" for path in (tmp_path / "into").iterdir())


async def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:  # FAULTS 20
    into, outside = tmp_path / "into", tmp_path / "outside"
    into.mkdir()
    outside.mkdir()
    (into / "a").symlink_to(outside)
    with pytest.raises(Damaged, match="`a` is already there and is not a folder"):
        await unpacked(archive(("a/b", FILE, "x")), into)
    await unpacked(archive(("d", FOLDER, ""), ("l", LINK, "d"), ("d/b", FILE, "x")), into)
    assert not list(outside.iterdir())
    assert (into / "l/b").read_text() == "x"


async def test_a_chain_of_links_does_not_leave_the_folder(tmp_path: Path) -> None:  # FAULTS 22
    with pytest.raises(Damaged):
        await unpacked(archive(("d/e", LINK, "."), ("d/f", LINK, "e/../.."), ("d/f/escaped", FILE, "x")), tmp_path / "into")
    assert not (tmp_path / "escaped").exists()


async def test_setuid_is_stripped_files_are_replaced_and_others_left_alone(tmp_path: Path) -> None:  # FAULTS 24
    write(tmp_path / "a", "old")
    write(tmp_path / "b", "mine")
    await unpacked(archive(("a", FILE, "new")), tmp_path)
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("new", "mine")
    assert (tmp_path / "a").stat().st_mode & 0o7777 == 0o755


async def test_a_file_where_a_folder_is_and_the_other_way_round_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    write(tmp_path / "b")
    for member in [("a", FILE, "x"), ("b/c", FILE, "x"), ("b", FOLDER, "")]:
        with pytest.raises(Damaged):
            await unpacked(archive(member), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


async def test_an_archive_that_is_cut_short_is_refused_and_leaves_no_half_file(tmp_path: Path) -> None:  # FAULTS 29
    (tmp_path / "source").mkdir()
    (tmp_path / "source/big").write_bytes(os.urandom(500_000))
    data = await packed(select(tmp_path / "source"))
    for length in (0, 10, len(data) // 2, len(data) - 2):
        with pytest.raises(Damaged, match="cut short"):
            await unpacked(data[:length], tmp_path / "into")
    assert {path.name for path in (tmp_path / "into").iterdir()} <= {"big"}


async def test_a_download_that_is_given_up_leaves_no_half_file(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/big").write_bytes(os.urandom(500_000))
    data = io.BytesIO(await packed(select(tmp_path / "source")))
    stuck = asyncio.Event()

    async def read(size: int) -> bytes:
        if data.tell() > 300_000:
            stuck.set()
            await asyncio.Event().wait()
        return data.read(min(size, 50_000))

    work = asyncio.ensure_future(unpack(read, tmp_path / "into"))
    await stuck.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert not list((tmp_path / "into").iterdir())
