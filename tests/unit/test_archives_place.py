"""Trees on their way to disk: whole or not at all, never outside, holes kept."""

import os
import random
import stat
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.archives.place import create_file, place, write_file
from libs.archives.rules import ArchiveRefused
from libs.archives.tree import Entry
from tests.unit.test_archives_manifests import HOSTILE, D, file, folder, link
from tests.unit.test_archives_trees import tree_at


def nothing(entry: Entry, parent: int, name: bytes) -> None:
    create_file(entry, parent, name, [b"x"] * entry.size)


@pytest.mark.parametrize("entries", [entries for entries, _, _ in HOSTILE if len(entries) < 100])
def test_what_is_no_tree_is_refused_and_leaves_nothing(tmp_path: Path, entries: list[Entry]) -> None:
    with pytest.raises(ArchiveRefused):
        place(entries, tmp_path / "root", nothing)
    assert os.listdir(tmp_path) == []


def test_a_tree_is_placed_with_its_modes_links_and_hard_links(tmp_path: Path) -> None:
    entries = [
        folder(b"a"),
        folder(b"a/empty"),
        file(b"a/program", 1, D, 0o755),
        file(b"a-text"),
        *(folder(b"f%02d" % n) for n in range(40)),
        file(b"hard", 1, D, 0o755, b"a/program"),
        link(b"l", b"a/empty/../program"),
        folder(b"z"),
        file(b"z/hard", 1, D, 0o644, b"a-text"),
        link(b"z/l", b"../l"),
    ]
    before = os.umask(0o077)
    try:
        place(entries, tmp_path / "root", nothing)
    finally:
        os.umask(before)
    root = tmp_path / "root"
    modes = {path.name: stat.S_IMODE(path.lstat().st_mode) for path in root.rglob("*") if not path.is_symlink()}
    assert {modes[name] for name in ("a", "empty", "f00", "z", "program")} == {0o755} and modes["a-text"] == 0o644
    assert (root / "hard").samefile(root / "a/program") and (root / "z/hard").samefile(root / "a-text")
    assert (root / "z/l").read_text() == "x"
    assert [(e.path, e.kind, e.mode, e.target) for e in tree_at(root).entries] == [(e.path, e.kind, e.mode, e.target) for e in entries]


def test_a_chain_of_folders_as_deep_as_may_be_is_placed(tmp_path: Path) -> None:
    paths = [b"/".join([b"d%d" % n for n in range(depth)]) for depth in range(1, 128)]
    entries = [*map(folder, paths), file(paths[-1] + b"/f"), file(b"e", target=paths[-1] + b"/f"), link(b"l", b"e")]
    place(entries, tmp_path / "root", nothing)
    assert [entry.path for entry in tree_at(tmp_path / "root").entries] == [entry.path for entry in entries]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    def fails(entry: Entry, parent: int, name: bytes) -> None:
        if name == b"c":
            raise ConnectionError("gone")
        nothing(entry, parent, name)

    (tmp_path / "empty").mkdir()
    entries = [folder(b"a"), file(b"a/b"), file(b"b"), file(b"c"), link(b"l", b"a")]
    descriptors = len(os.listdir("/proc/self/fd"))
    for root in (tmp_path / "root", tmp_path / "empty"):
        with pytest.raises(ConnectionError):
            place(entries, root, fails)
    assert os.listdir(tmp_path) == ["empty"] and os.listdir(tmp_path / "empty") == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_folder_that_is_not_empty_or_a_link_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("x")
    (tmp_path / "link").symlink_to("elsewhere")
    (tmp_path / "there").mkdir()
    (tmp_path / "to").symlink_to("there")
    for root in ("mine", "link", "to"):
        with pytest.raises(OSError):
            place([file(b"a")], tmp_path / root, nothing)
    assert (tmp_path / "mine/file").read_text() == "x" and os.listdir(tmp_path / "there") == []
    assert sorted(os.listdir(tmp_path)) == ["link", "mine", "there", "to"]


def test_a_link_that_takes_the_place_of_a_folder_meanwhile_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()

    def plants(entry: Entry, parent: int, name: bytes) -> None:
        nothing(entry, parent, name)
        if name == b"first":
            os.rename("a", "was-a", src_dir_fd=parent, dst_dir_fd=parent)
            os.symlink("../outside", "a", dir_fd=parent)

    entries = [folder(b"a"), *(folder(b"a/%02d" % n) for n in range(40)), file(b"first"), file(b"h", target=b"a/x")]
    entries.insert(-2, file(b"a/x"))
    with pytest.raises(OSError):
        place([*entries[:-1], folder(b"g"), *(folder(b"g/%02d" % n) for n in range(40)), entries[-1]], tmp_path / "root", plants)
    assert os.listdir(tmp_path / "outside") == []


def test_a_file_that_is_there_already_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    (tmp_path / "l").symlink_to("out")
    parent = os.open(tmp_path, os.O_RDONLY)
    try:
        for name in (b"l", b"out"):
            with pytest.raises(FileExistsError):
                create_file(file(name), parent, name, [b"y"])
    finally:
        os.close(parent)
    assert (tmp_path / "out").read_text() == "x"


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.tuples(st.booleans(), st.integers(0, 20_000)), max_size=8), cuts=st.lists(st.integers(1, 30_000), min_size=1, max_size=4))
def test_holes_change_no_byte(tmp_path_factory: pytest.TempPathFactory, parts: list[tuple[bool, int]], cuts: list[int]) -> None:
    contents = b"".join(random.Random(n).randbytes(size) if full else bytes(size) for n, (full, size) in enumerate(parts))
    pieces, at = [], 0
    while at < len(contents):
        for size in cuts:
            pieces.append(contents[at : at + size])
            at += size
    path = tmp_path_factory.mktemp("holes") / "file"
    opened = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        assert write_file(opened, pieces) == len(contents)
    finally:
        os.close(opened)
    assert path.read_bytes() == contents


def test_zeros_take_no_room(tmp_path: Path) -> None:
    entry = file(b"f", 0, b"")
    parent = os.open(tmp_path, os.O_RDONLY)
    create_file(entry, parent, b"f", [b"start", bytes(8 << 20), b"end", bytes(8 << 20)])
    os.close(parent)
    found = (tmp_path / "f").stat()
    assert found.st_size == (16 << 20) + 8
    assert found.st_blocks * 512 <= 64 << 10
