"""Properties of trees: whatever packed them, however the stream was cut, the same files are the same tree."""

import hashlib
import io
import itertools
import os
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.archives.compression import Format, compressed
from libs.archives.pump import gathered
from libs.archives.reader import HOLE
from libs.archives.rules import Limits
from libs.archives.selftest import extract
from libs.archives.tree import CHUNK, ZERO_CHUNK, Entry, Tree, TreeCheck, TreeSummary, manifest_of, pieces_of, read_manifest, root_of, tree_of
from libs.archives.writer import tar_size, write_tar_from, write_tree

LIMITS = Limits()

names = st.one_of(
    st.sampled_from([b"a", b"a-b", b"a.b", b"b", b"\xff\xfe", b"caf\xc3\xa9", b"-rf", b"new\nline", b"n" * 255]),
    st.binary(min_size=1, max_size=150).filter(lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b"..")),
)
files = st.tuples(
    st.booleans(),
    st.one_of(st.just(b""), st.binary(max_size=600), st.builds(lambda gap, end: bytes(gap) + end, st.integers(1, 20_000), st.binary(max_size=9))),
)
links = st.just("link")
hard_links = st.builds(lambda n: ("hard link", n), st.integers(0, 1000))
leaves = st.one_of(files, links, hard_links)
folders = st.recursive(
    st.dictionaries(names, leaves, max_size=4),
    lambda inner: st.dictionaries(names, st.one_of(leaves, inner), max_size=4),
    max_leaves=12,
)
forms = st.sampled_from(["tar", "tgz", "tzst"])


def write_out(folder: dict, at: bytes, made: list[bytes] | None = None) -> None:
    """A folder on disk; a hard link is to one of the files made before it."""
    made = [] if made is None else made
    os.mkdir(at)
    for name, inner in folder.items():
        path = at + b"/" + name
        if isinstance(inner, dict):
            write_out(inner, path, made)
        elif inner == "link":
            os.symlink(b"./" + name[:100] + b"-beside", path)
        elif inner[0] == "hard link":
            if made:
                os.link(made[inner[1] % len(made)], path)
        else:
            with open(path, "wb") as f:
                f.write(inner[1])
            os.chmod(path, 0o700 if inner[0] else 0o604)
            made.append(path)


def tree_at(root: Path) -> Tree:
    """The tree of a folder, by the plainest code there is."""
    base = os.fsencode(root)
    entries: list[Entry] = []
    for at, inner, leaves in os.walk(base):
        for name in inner + leaves:
            path = at + b"/" + name
            shown, found = os.path.relpath(path, base), os.lstat(path)
            if os.path.islink(path):
                entries.append(Entry(shown, "link", 0o777, target=os.readlink(path)))
            elif os.path.isdir(path):
                entries.append(Entry(shown, "folder", 0o755))
            else:
                with open(path, "rb") as f:
                    chunks = list(iter(lambda f=f: f.read(CHUNK), b""))
                digest = b"".join(hashlib.sha256(chunk).digest() for chunk in chunks)
                entries.append(Entry(shown, "file", 0o755 if found.st_mode & 0o100 else 0o644, found.st_size, digest, str(found.st_ino).encode()))
    entries.sort(key=lambda entry: entry.path.split(b"/"))
    first: dict[bytes, bytes] = {}
    for n, entry in enumerate(entries):
        if entry.kind == "file":
            known = first.setdefault(entry.target, entry.path)
            entries[n] = Entry(entry.path, "file", entry.mode, entry.size, entry.digest, b"" if known == entry.path else known)
    return tree_of(entries)


def contents_at(root: Path, entry: Entry, start: int = 0) -> list[bytes]:
    with open(os.fsencode(root) + b"/" + entry.path, "rb") as f:
        f.seek(start)
        return [f.read()]


def packed(root: Path, form: Format = "tar") -> bytes:
    return b"".join(write_tree(tree_at(root).entries, lambda entry: contents_at(root, entry), form))


def cut(archive: bytes, sizes: list[int]) -> Iterator[bytes]:
    at = 0
    while at < len(archive):
        for size in sizes:
            yield archive[at : at + size]
            at += size


def checked(manifest: bytes) -> TreeSummary:
    check = TreeCheck(LIMITS)
    for entry in read_manifest(manifest):
        check.add(entry)
    return check.finish(root_of(manifest).digest)


@settings(max_examples=60, deadline=None)
@given(folder=folders, sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=4), form=forms)
def test_a_tree_goes_through_archive_and_disk_and_manifest_unchanged(folder: dict, sizes: list[int], form: Format) -> None:
    with tempfile.TemporaryDirectory() as at:
        one, two = Path(at) / "one", Path(at) / "two"
        write_out(folder, os.fsencode(one))
        tree = tree_at(one)
        assert extract(cut(packed(one, form), sizes), two, LIMITS) == tree.summary
        assert tree_at(two).root == tree.root
        assert packed(two) == packed(one)
        manifest = b"".join(manifest_of(tree.entries))
        assert read_manifest(manifest) == tree.entries
        assert checked(manifest) == tree.summary


@settings(max_examples=25, deadline=None)
@given(folder=folders, form=st.sampled_from(["plain", "gzip", "zstd"]), sparse=st.booleans(), backwards=st.booleans())
def test_the_digest_does_not_depend_on_who_packed_it(folder: dict, form: str, sparse: bool, backwards: bool) -> None:
    with tempfile.TemporaryDirectory() as at:
        one = Path(at) / "one"
        write_out(folder, os.fsencode(one))
        archives = []
        for flavour in ("gnu", "oldgnu", "posix"):
            command = ["tar", f"--format={flavour}", "-C", one, "-cf", "-", *(["--sparse"] if sparse else []), "."]
            archives.append(subprocess.run(command, check=True, capture_output=True).stdout)
        for version in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            out = io.BytesIO()
            with tarfile.open(fileobj=out, mode="w", format=version) as tar:
                for name in sorted(os.listdir(one), reverse=backwards):
                    tar.add(one / name, name)
            archives.append(out.getvalue())
        for n, archive in enumerate(archives):
            stream = list(compressed([archive], {"plain": "tar", "gzip": "tgz", "zstd": "tzst"}[form]))
            assert extract(stream, Path(at) / str(n), LIMITS) == tree_at(one).summary, n


@pytest.mark.parametrize("form", ["tar", "tgz", "tzst"])
def test_a_stream_that_comes_byte_by_byte_gives_the_same_tree(tmp_path: Path, form: Format) -> None:
    write_out({b"a": (True, b"x" * 1500), b"n" * 150: (False, b""), b"d": {b"e": {}}, b"h": ("hard link", 0)}, os.fsencode(tmp_path) + b"/one")
    (tmp_path / "one/link").symlink_to("d/e")
    archive = packed(tmp_path / "one", form)
    whole = extract(cut(archive, [1 << 20]), tmp_path / "two", LIMITS)
    assert extract(cut(archive, [1]), tmp_path / "three", LIMITS) == whole == tree_at(tmp_path / "one").summary


def test_the_digest_does_not_depend_on_flavour_order_time_or_owner(tmp_path: Path) -> None:
    files = {"b": b"bee", "a/deep/" + "n" * 93: b"", "a-b": b"-", "ünï": b"u", "run": b"#!"}

    def archive(flavour: int, names: list[str], when: int, folders: bool) -> bytes:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w", format=flavour) as tar:
            for folder in ("./", "a/", "a/deep") if folders else ():
                info = tarfile.TarInfo(folder)
                info.type, info.mode = tarfile.DIRTYPE, 0o700
                tar.addfile(info)
            for name in names:
                info = tarfile.TarInfo(f"./{name}" if folders else name)
                info.size, info.mtime, info.uid, info.uname = len(files[name]), when, when, str(when)
                info.mode = 0o700 if name == "run" else 0o600
                tar.addfile(info, io.BytesIO(files[name]))
        return out.getvalue()

    digests = set()
    for n, flavour in enumerate((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        for names in (sorted(files), sorted(files, reverse=True)):
            digests.add(extract([archive(flavour, names, n * 1000, folders=n != 1)], tmp_path / f"{n}{names[0]}", LIMITS))
    assert len(digests) == 1


@pytest.mark.parametrize("names", [["z", "a/x", "m"], ["m", "z", "a/x"], ["a/x", "m", "z"]])
def test_hard_links_are_the_same_whichever_of_them_the_archive_names_first(tmp_path: Path, names: list[str]) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        info = tarfile.TarInfo(names[0])
        info.size = 4
        tar.addfile(info, io.BytesIO(b"same"))
        for before, name in itertools.pairwise(names):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, before
            tar.addfile(info)
    extract([out.getvalue()], tmp_path / "root", LIMITS)
    assert [(entry.path, entry.target) for entry in tree_at(tmp_path / "root").entries] == [
        (b"a", b""),
        (b"a/x", b""),
        (b"m", b"a/x"),
        (b"z", b"a/x"),
    ]
    assert extract([out.getvalue()], tmp_path / "again", LIMITS) == tree_at(tmp_path / "root").summary


def test_what_we_pack_gnu_tar_takes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_out({b"d": {b"f": (True, b"contents")}, b"l" * 180: (False, b"long"), b"empty": {}, b"hard": ("hard link", 0)}, os.fsencode(source))
    (source / "link").symlink_to("d/" + "x" * 150)
    (tmp_path / "ours").write_bytes(packed(source))
    (tmp_path / "theirs").mkdir()
    subprocess.run(["tar", "-C", tmp_path / "theirs", "-xf", tmp_path / "ours"], check=True)
    assert tree_at(tmp_path / "theirs").root == tree_at(source).root


@settings(max_examples=40, deadline=None)
@given(folder=folders, data=st.data())
def test_a_plain_archive_begins_at_any_byte(folder: dict, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as at:
        one = Path(at) / "one"
        write_out(folder, os.fsencode(one))
        entries, archive = tree_at(one).entries, packed(one)
        assert tar_size(entries) == len(archive)
        for start in data.draw(st.lists(st.integers(0, len(archive)), max_size=20)):
            rest = b"".join(write_tar_from(entries, lambda entry, at: contents_at(one, entry, at), start))
            assert rest == archive[start:]


def test_a_range_asks_for_no_contents_before_it() -> None:
    entries = [Entry(b"a", "file", 0o644, 1000, b"a" * 32), Entry(b"b", "file", 0o644, 9 << 30, b"b" * 32 * 1152), Entry(b"c", "file", 0o644)]
    asked: list[tuple[bytes, int]] = []

    def contents(entry: Entry, start: int) -> Iterator[bytes]:
        asked.append((entry.path, start))
        yield from (bytes(entry.size - start),) if entry.size - start < 2000 else ()

    size = tar_size(entries)
    # a, its padding, b with an extended header, c, the end
    assert size == 512 + 1024 + 1536 + (9 << 30) + 512 + 1024
    assert len(b"".join(write_tar_from(entries, contents, size - 512 - 1024 - 700))) == 700 + 1536
    assert asked == [(b"b", (9 << 30) - 700)]


def test_small_pieces_are_gathered_and_large_ones_given_on_as_they_are() -> None:
    large, middle = bytes(1 << 20), bytes(300 << 10)
    found = list(gathered([b"a", b"", b"b", large, large, b"c", middle, b"d", *[bytes(1 << 10)] * 300, b"e", b""]))
    assert found[1] is large and found[2] is large
    assert found[0] == b"ab" and found[3] == b"c" + middle and found[-1].endswith(b"e")
    assert [len(piece) for piece in found[4:]] == [1 + (256 << 10), (44 << 10) + 1]
    assert list(gathered([b"", b""])) == []


def test_a_large_file_has_a_digest_for_each_chunk() -> None:
    assert hashlib.sha256(bytes(CHUNK)).digest() == ZERO_CHUNK
    assert len(HOLE) == CHUNK
    entry = Entry(b"f", "file", 0o644, 2 * CHUNK + 5, ZERO_CHUNK * 2 + b"e" * 32)
    assert list(entry.chunks()) == [(ZERO_CHUNK, CHUNK), (ZERO_CHUNK, CHUNK), (b"e" * 32, 5)]
    assert entry.file_id == hashlib.sha256(entry.digest).hexdigest()
    assert Entry(b"f", "file", 0o644, 1, b"e" * 32).file_id == b"e".hex() * 32
    assert Entry(b"f", "file", 0o644).file_id == hashlib.sha256(b"").hexdigest()
    assert list(Entry(b"f", "file", 0o644).chunks()) == []


def test_a_manifest_past_one_chunk_is_stored_in_pieces() -> None:
    entries = [Entry(b"%06d" % n + b"n" * 200, "file", 0o644) for n in range(90_000)]
    tree = tree_of(entries)
    root, *pieces = tree.root.blobs
    manifest = b"".join(manifest_of(entries))
    assert len(pieces) == 3 and b"".join(pieces) == manifest
    assert hashlib.sha256(root).digest() == tree.root.digest
    assert list(pieces_of(root)) == [hashlib.sha256(piece).digest() for piece in pieces]
    assert root_of(manifest) == root_of(cut(manifest, [100_001])) == tree.root
    assert read_manifest(manifest) == entries
    assert checked(manifest) == tree.summary


@pytest.mark.parametrize("count", [0, 1, 15, 16, 4095, 4096, 4097, 8192])
def test_a_manifest_of_any_length_reads_back(count: int) -> None:
    entries = [Entry(b"%06d" % n, "file", 0o644, n % 2, b"d" * 32 * (n % 2)) for n in range(count)]
    manifest = b"".join(manifest_of(entries))
    assert read_manifest(manifest) == entries
    tree = tree_of(entries)
    assert tree.root.blobs == [manifest] and tree.root.digest == hashlib.sha256(manifest).digest()
    assert pieces_of(manifest) == ()
    assert checked(manifest) == tree.summary
