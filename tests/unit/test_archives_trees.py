"""Properties of trees: whatever packed them, however the stream was cut, the same files are the same tree."""

import io
import os
import subprocess
import tarfile
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.archives.compression import Format, compressed
from libs.archives.extract import extract
from libs.archives.reader import members
from libs.archives.rules import ArchiveRefused, Limits
from libs.archives.tree import Entry, InvalidManifest, read_manifest, tree_of
from libs.archives.writer import pack, write_tree

LIMITS = Limits()

names = st.binary(min_size=1, max_size=40).filter(lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b".."))
contents = st.tuples(st.booleans(), st.binary(max_size=2000))
folders = st.recursive(
    st.dictionaries(names, contents, max_size=4),
    lambda inner: st.dictionaries(names, st.one_of(contents, inner), max_size=4),
    max_leaves=12,
)


def write_out(folder: dict, at: bytes) -> None:
    os.mkdir(at)
    for name, inner in folder.items():
        if isinstance(inner, dict):
            write_out(inner, at + b"/" + name)
        else:
            with open(at + b"/" + name, "wb") as f:
                f.write(inner[1])
            os.chmod(at + b"/" + name, 0o700 if inner[0] else 0o604)


async def joined(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


async def cut(archive: bytes, sizes: list[int]) -> AsyncIterator[bytes]:
    at = 0
    while at < len(archive):
        for size in sizes:
            yield archive[at : at + size]
            at += size


@settings(max_examples=40, deadline=None)
@given(folder=folders, sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=4), form=st.sampled_from(["tar", "tgz", "tzst"]))
async def test_packing_and_extracting_gives_the_same_tree(folder: dict, sizes: list[int], form: Format) -> None:
    with tempfile.TemporaryDirectory() as at:
        write_out(folder, os.fsencode(at) + b"/one")
        archive = await joined(pack(Path(at) / "one", form))
        first = await extract(cut(archive, sizes), Path(at) / "two", LIMITS)
        again = await joined(pack(Path(at) / "two", form))
        assert again == archive
        assert await extract(cut(again, [1 << 20]), Path(at) / "three", LIMITS) == first


@pytest.mark.parametrize("form", ["tar", "tgz", "tzst"])
async def test_a_stream_that_comes_byte_by_byte_gives_the_same_tree(tmp_path: Path, form: Format) -> None:
    write_out({b"a": (True, b"x" * 1500), b"n" * 150: (False, b""), b"d": {b"e": {}}}, os.fsencode(tmp_path) + b"/one")
    (tmp_path / "one/link").symlink_to("d/e")
    archive = await joined(pack(tmp_path / "one", form))
    whole = await extract(cut(archive, [1 << 20]), tmp_path / "two", LIMITS)
    assert await extract(cut(archive, [1]), tmp_path / "three", LIMITS) == whole
    listed = [(e.member.path, await joined(e.contents)) async for e in members(cut(archive, [1]), LIMITS)]
    assert (b"a", b"x" * 1500) in listed and len(listed) == 5


async def test_the_digest_does_not_depend_on_flavour_order_time_or_owner(tmp_path: Path) -> None:
    files = {"b": b"bee", "a/deep/" + "n" * 95: b"", "a-b": b"-", "ünï": b"u", "run": b"#!"}

    def packed(flavour: int, order: list[str], when: int, folders: bool) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=flavour) as tar:
            for folder in ("./", "a/", "a/deep") if folders else ():
                info = tarfile.TarInfo(folder)
                info.type, info.mode = tarfile.DIRTYPE, 0o700
                tar.addfile(info)
            for name in order:
                info = tarfile.TarInfo(f"./{name}" if folders else name)
                info.size, info.mtime, info.uid, info.uname = len(files[name]), when, when, str(when)
                info.mode = 0o700 if name == "run" else 0o600
                tar.addfile(info, io.BytesIO(files[name]))
        return out.getvalue()

    digests = set()
    for n, flavour in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        for order in (sorted(files), sorted(files, reverse=True)):
            archive = packed(flavour, order, n * 1000, folders=n != 1)
            digests.add(await extract(cut(archive, [5000]), tmp_path / f"{n}{order[0]}", LIMITS))
    assert len(digests) == 1


async def test_what_gnu_tar_packs_comes_out_and_what_we_pack_gnu_tar_takes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_out({b"d": {b"f": (True, b"contents")}, b"l" * 180: (False, b"long"), b"empty": {}}, os.fsencode(source))
    (source / "link").symlink_to("d/" + "x" * 150)
    os.link(source / "d/f", source / "hard")
    for flavour in ("gnu", "posix", "oldgnu"):
        subprocess.run(["tar", f"--format={flavour}", "-C", source, "-cf", tmp_path / flavour, "."], check=True)
        summary = await extract(cut((tmp_path / flavour).read_bytes(), [9000]), tmp_path / f"{flavour}.out", LIMITS)
        assert summary.files == 3
        assert (tmp_path / f"{flavour}.out/hard").stat().st_nlink == 2
    (tmp_path / "ours").write_bytes(await joined(pack(source)))
    (tmp_path / "theirs").mkdir()
    subprocess.run(["tar", "-C", tmp_path / "theirs", "-xf", tmp_path / "ours"], check=True)
    assert await joined(pack(tmp_path / "theirs")) == (tmp_path / "ours").read_bytes()


async def test_a_manifest_reads_back_and_writes_the_same_archive_as_the_folder(tmp_path: Path) -> None:
    write_out({b"a": (True, b"one"), b"a-b": (False, b"two"), b"d": {b"z": (False, b"three")}}, os.fsencode(tmp_path) + b"/one")
    archive = await joined(pack(tmp_path / "one"))
    seen = [(e.member, await joined(e.contents)) async for e in members(cut(archive, [700]), LIMITS)]
    import hashlib

    texts = {hashlib.sha256(text).digest(): text for _, text in seen}
    entries = [
        Entry(m.path, "folder", 0o755)
        if m.kind == "folder"
        else Entry(m.path, "file", 0o755 if m.executable else 0o644, m.size, hashlib.sha256(t).digest())
        for m, t in reversed(seen)
    ]
    tree = tree_of(entries)
    assert b"".join(write_tree(read_manifest(tree.manifest), lambda e: [texts[e.digest]])) == archive
    assert tree.summary == await extract(cut(archive, [700]), tmp_path / "two", LIMITS)
    with pytest.raises(InvalidManifest):
        read_manifest(tree.manifest[:-1])
    with pytest.raises(InvalidManifest):
        read_manifest(b"something else")


async def test_packing_refuses_what_is_no_file_folder_or_link(tmp_path: Path) -> None:
    """FAULTS 23"""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(ArchiveRefused, match="fifo"):
        await joined(pack(tmp_path))


async def test_a_broken_producer_leaves_nothing(tmp_path: Path) -> None:
    """FAULTS 29, 32"""

    async def broken() -> AsyncIterator[bytes]:
        for piece in compressed([bytes(1 << 20)], "tar"):
            yield piece
        raise ConnectionError("gone")

    with pytest.raises((ConnectionError, ArchiveRefused)):
        await extract(broken(), tmp_path / "root", LIMITS)
    assert not (tmp_path / "root").exists()
