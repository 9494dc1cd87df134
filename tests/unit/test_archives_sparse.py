"""Sparse members of GNU tar, of each format: they come out with their holes, and no map can do harm."""

import hashlib
import subprocess
import tempfile
from pathlib import Path

import pytest
from backports import zstd
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.archives.reader import HOLE, ArchiveReader, Member
from libs.archives.rules import ArchiveRefused, LimitExceeded, Limits
from libs.archives.selftest import extract
from libs.archives.tar import END, padding, write_header
from tests.unit.test_archives_trees import tree_at

LIMITS = Limits(max_members=1000, max_bytes=1 << 30)
FORMATS = ["--format=gnu", "--format=oldgnu", *(f"--format=posix --sparse-version={version}" for version in ("0.0", "0.1", "1.0"))]


def refused(archive: bytes, rule: str, limits: Limits = LIMITS) -> ArchiveRefused:
    for size in (len(archive), 100):
        reader = ArchiveReader(limits)
        with pytest.raises(ArchiveRefused, match=rule) as refusal:
            for at in range(0, len(archive), size):
                for _ in reader.feed(archive[at : at + size]):
                    pass
            reader.finish()
    return refusal.value


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %b=%b\n" % (length, key, value)


def pax(records: list[tuple[bytes, bytes]], stored: bytes) -> bytes:
    text = b"".join(record(key, value) for key, value in records)
    head = write_header(b"pax", b"x", 0o644, len(text)) + text + bytes(padding(len(text)))
    return head + write_header(b"f", b"0", 0o644, len(stored)) + stored + bytes(padding(len(stored))) + END


def pax_1_0(text: bytes, data: bytes = b"", size: bytes = b"1000") -> bytes:
    records = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.name", b"name"), (b"GNU.sparse.realsize", size)]
    return pax(records, text + bytes(padding(len(text))) + data)


def pax_0_1(text: bytes, data: bytes = b"", size: bytes = b"1000") -> bytes:
    return pax([(b"GNU.sparse.map", text), (b"GNU.sparse.size", size)], data)


def old(parts: list[tuple[int, int]], data: bytes, size: int = 1000, field: bytes = b"") -> bytes:
    """One header of the old format, of at most 4 parts."""
    header = bytearray(write_header(b"f", b"S", 0o644, len(data)))
    for n, (offset, length) in enumerate(parts):
        header[386 + 24 * n : 386 + 24 * (n + 1)] = b"%011o\0%011o\0" % (offset, length)
    header[483:495] = field or b"%011o\0" % size
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data + bytes(padding(len(data))) + END


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("name", ["f", "n" * 200])
def test_what_gnu_tar_packs_sparse_is_the_same_tree(tmp_path: Path, how: str, name: str) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with (source / name).open("wb") as f:
        for n in range(60):
            f.seek(n * 200_000)
            f.write(b"%05d" % n * 100)
        f.truncate(40_000_000)
    with (source / "all-hole").open("wb") as f:
        f.truncate(20_000_001)
    (source / "empty").touch()
    (source / "full").write_bytes(b"full" * 5000)
    archive = subprocess.run(["tar", *how.split(), "--sparse", "-C", source, "-cf", "-", "."], check=True, capture_output=True).stdout
    assert len(archive) < 2_000_000
    assert extract([archive], tmp_path / "out", LIMITS) == tree_at(source).summary
    reader = ArchiveReader(LIMITS)
    cut = [found for at in range(0, len(archive), 1000) for found in reader.feed(archive[at : at + 1000])]
    reader.finish()
    sizes = {member.path: member.size for member in cut if isinstance(member, Member)}
    assert sizes == {b"": 0, name.encode(): 40_000_000, b"all-hole": 20_000_001, b"empty": 0, b"full": 20_000}
    assert sum(piece is HOLE for piece in cut) == 2 + 2
    holes = tmp_path / "out" / "all-hole"
    assert holes.stat().st_blocks * 512 < 100_000
    assert hashlib.sha256(holes.read_bytes()).digest() == hashlib.sha256(bytes(20_000_001)).digest()


@pytest.mark.parametrize("archive", [old([(10, 3)], b"abc"), pax_0_1(b"10,3", b"abc"), pax_1_0(b"1\n10\n3\n", b"abc")], ids=["old", "0.1", "1.0"])
def test_one_part_comes_out_where_it_belongs(archive: bytes) -> None:
    reader = ArchiveReader(LIMITS)
    member, *pieces = reader.feed(archive)
    reader.finish()
    assert isinstance(member, Member) and member.size == 1000
    assert b"".join(piece for piece in pieces if not isinstance(piece, Member)) == bytes(10) + b"abc" + bytes(987)


BAD_PARTS: list[list[tuple[int, int]]] = [
    [(10, 3), (12, 3)],
    [(10, 3), (5, 3)],
    [(10, 3), (10, 3)],
    [(998, 3), (1001, 3)],
    [(1001, 0), (0, 6)],
    [(2**32, 6)],
    [(5, 2**32)],
]


@pytest.mark.parametrize("parts", BAD_PARTS)
def test_parts_that_overlap_or_lie_outside_are_refused(parts: list[tuple[int, int]]) -> None:
    numbers = [number for part in parts for number in part]
    rule = "overlap, are out of order or lie beyond"
    refused(old(parts, b"abcdef"), rule)
    refused(pax_0_1(b",".join(b"%d" % n for n in numbers), b"abcdef"), rule)
    refused(pax_1_0(b"".join(b"%d\n" % n for n in (len(parts), *numbers)), b"abcdef"), rule)
    repeated = [(b"GNU.sparse.offset" if n % 2 == 0 else b"GNU.sparse.numbytes", b"%d" % number) for n, number in enumerate(numbers)]
    refused(pax([(b"GNU.sparse.size", b"1000"), *repeated], b"abcdef"), rule)


@pytest.mark.parametrize(
    ("archive", "rule"),
    [
        (old([(10, 3)], b"abcd"), "not as long as"),
        (old([(10, 3)], b"ab"), "not as long as"),
        (old([(10, 3)], b"abc", field=b"\xff" * 12), "damaged"),
        (old([(10, 3)], b"abc", field=b"\x80" + b"\xff" * 11), "past 1073741824"),
        (old([(10, 3)], b"abc", field=b"-0000000001\0"), "damaged"),
        (pax_0_1(b"10,3,5", b"abc"), "damaged sparse map"),
        (pax_0_1(b"-10,3", b"abc"), "damaged"),
        (pax_0_1(b"10,-3", b"abc"), "damaged"),
        (pax_0_1(b"10,", b"abc"), "damaged"),
        (pax_0_1(b"1" * 5000 + b",3", b"abc"), "damaged"),
        (pax_0_1(b"10,3", b"abc", b"-5"), "damaged"),
        (pax_0_1(b"10,3", b"abc", b"9" * 19), "past 1073741824"),
        (pax_0_1(b"10,3", b"abc", b"9" * 40), "damaged"),
        (pax_1_0(b"-1\n", b""), "damaged"),
        (pax_1_0(b"2\n1\n1\n", b"a"), "damaged"),
        (pax_1_0(b"\n", b""), "damaged"),
        (pax_1_0(b"99999999999\n0\n1\n", b"a"), "damaged"),
        (pax_1_0(b"9" * 4000, b"a"), "damaged"),
        (pax_1_0(b"", b""), "damaged"),
        (pax([(b"GNU.sparse.major", b"2"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"5")], b"abc"), "unknown format"),
        (pax([(b"GNU.sparse.name", b"../x"), (b"GNU.sparse.size", b"5")], b"abc"), "`..`"),
    ],
)
def test_damaged_maps_are_refused(archive: bytes, rule: str) -> None:
    refused(archive, rule)


def test_huge_maps_are_refused() -> None:
    parts = 300_000
    text = b"%d\n" % parts + b"".join(b"%d\n1\n" % (2 * n) for n in range(parts))
    refused(pax_1_0(text, b"x" * parts, b"1000000000"), "more than 262144 parts")
    header = bytearray(old([(0, 1), (1, 1), (2, 1), (3, 1)], b"", 1 << 29)[:512])
    header[482] = 1
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    more = b"".join(b"".join(b"%011o\0%011o\0" % (n * 21 + k + 4, 1) for k in range(21)) + b"\1" + bytes(7) for n in range(12_600))
    assert isinstance(refused(bytes(header) + more, "more than 262144 parts"), LimitExceeded)


def test_holes_are_no_bomb() -> None:
    """A little of an archive may not unpack to more work than the limits allow: whole chunks of holes cost nothing, others count."""
    limits = Limits(max_members=1000, max_bytes=1 << 40, max_ratio=100, free_ratio_bytes=1 << 20)
    one = old([], b"", 5 << 20)[: -len(END)]
    refused(zstd.compress(one * 900 + END), "100 times its size", limits)
    refused(one * 900 + END, "100 times its size", limits)
    assert isinstance(refused(old([], b"", 1 << 20) + END, "past 1000 bytes", Limits(max_bytes=1000)), LimitExceeded)
    reader = ArchiveReader(limits)
    pieces = [found for found in reader.feed(old([], b"", 4 << 30)) if not isinstance(found, Member)]
    assert len(pieces) == 512 and all(piece is HOLE for piece in pieces)


SOUND = [
    old([(10, 3), (700, 2)], b"abcde"),
    pax_0_1(b"10,3,700,2", b"abcde"),
    pax_1_0(b"2\n10\n3\n700\n2\n", b"abcde"),
    write_header(b"d/", b"5", 0o755, 0) + write_header(b"n" * 150, b"0", 0o644, 0) + write_header(b"h", b"1", 0o644, 0, b"n" * 150) + END,
]
spots = st.one_of(
    st.integers(0, 10_000),
    st.builds(lambda block, at: 512 * block + at, st.integers(0, 5), st.sampled_from([124, 135, 156, 157, 386, 398, 482, 483])),
)


@settings(max_examples=400, deadline=None)
@given(
    archive=st.sampled_from(SOUND),
    damage=st.lists(st.tuples(spots, st.binary(min_size=1, max_size=3)), min_size=1, max_size=4),
    size=st.integers(1, 2000),
)
def test_a_damaged_archive_is_refused_or_is_another_tree(archive: bytes, damage: list[tuple[int, bytes]], size: int) -> None:
    damaged = bytearray(archive)
    for at, new in damage:
        at %= len(archive) - len(new)
        damaged[at : at + len(new)] = new
    for at in range(0, len(damaged), 512):
        if damaged[at + 257 : at + 262] == b"ustar":
            damaged[at + 148 : at + 156] = b" " * 8
            damaged[at + 148 : at + 156] = b"%06o\0 " % sum(damaged[at : at + 512])
    limits = Limits(max_members=100, max_bytes=1 << 20)
    with tempfile.TemporaryDirectory() as folder:
        try:
            summary = extract((bytes(damaged[at : at + size]) for at in range(0, len(damaged), size)), Path(folder) / "root", limits)
        except ArchiveRefused:
            assert list(Path(folder).iterdir()) == []
        else:
            assert tree_at(Path(folder) / "root").summary == summary
