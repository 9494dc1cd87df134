"""Hostile archives are refused whole, naming member and rule, and leave nothing behind (FAULTS 19–29). Each one is extracted for real."""

import gzip
import io
import os
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from backports import zstd

from libs.archives.rules import ArchiveRefused, LimitExceeded, Limits
from libs.archives.selftest import extract, self_test
from libs.archives.tar import END, padding, write_header

LIMITS = Limits(max_members=1000, max_bytes=1 << 20)


def file(path: bytes, contents: bytes = b"", mode: int = 0o644) -> bytes:
    return write_header(path, b"0", mode, len(contents)) + contents + bytes(padding(len(contents)))


def link(path: bytes, target: bytes) -> bytes:
    return write_header(path, b"2", 0o777, 0, target)


def hardlink(path: bytes, target: bytes) -> bytes:
    return write_header(path, b"1", 0o644, 0, target)


def chunks(archive: bytes, size: int = 65536) -> Iterator[bytes]:
    for at in range(0, len(archive), size):
        yield archive[at : at + size]


@pytest.fixture
def refused(tmp_path: Path) -> Callable:
    def check(archive: bytes, member: str, rule: str, limits: Limits = LIMITS) -> None:
        outside = sorted(tmp_path.rglob("*"))
        with pytest.raises(ArchiveRefused) as refusal:
            extract(chunks(archive), tmp_path / "root", limits)
        assert refusal.value.member == member
        assert rule in refusal.value.rule
        assert sorted(tmp_path.rglob("*")) == outside, "something was left behind"

    return check


def test_a_path_that_climbs_out_is_refused(refused: Callable) -> None:
    """FAULTS 19"""
    refused(file(b"ok") + file(b"a/../../out") + END, "a/../../out", "`..`")
    refused(file(b"..") + END, "..", "`..`")


def test_an_absolute_path_is_refused(refused: Callable) -> None:
    """FAULTS 19"""
    refused(file(b"/etc/passwd") + END, "/etc/passwd", "absolute")


def test_a_file_written_through_a_link_is_refused(refused: Callable) -> None:
    """FAULTS 20"""
    refused(link(b"l", b"d") + file(b"l/out") + END, "l/out", "lies under a link")
    refused(link(b"f", b"d") + file(b"f") + END, "f", "twice")


def test_a_link_out_is_refused(refused: Callable) -> None:
    """FAULTS 20"""
    refused(link(b"l", b"/etc") + END, "l", "absolute")
    refused(link(b"d/l", b"../../etc") + END, "d/l", "out of the tree")
    # a link that by its text alone stays inside, and by the link it leads through does not
    refused(link(b"a/up", b"..") + link(b"l", b"a/up/../etc") + END, "l", "out of the tree")


def test_a_hard_link_out_is_refused(refused: Callable) -> None:
    """FAULTS 21"""
    refused(hardlink(b"h", b"../out") + END, "../out", "`..`")
    refused(hardlink(b"h", b"/etc/passwd") + END, "/etc/passwd", "absolute")
    refused(hardlink(b"h", b"later") + file(b"later") + END, "h", "no earlier file")
    refused(link(b"l", b"d") + hardlink(b"h", b"l/x") + END, "h", "no earlier file")


def test_a_chain_of_links_past_path_max_does_not_escape(refused: Callable) -> None:
    """FAULTS 22: the chain of CVE-2025-4517, in which each link stands for a very long folder and realpath gives up."""
    archive, folder, name = b"", b"", b"d" * 247
    for step in b"abcdefghijklmnop":
        letter = bytes([step])
        archive += write_header((folder + b"/" + name).lstrip(b"/") + b"/", b"5", 0o755, 0)
        archive += link((folder + b"/" + letter).lstrip(b"/"), name)
        folder += b"/" + letter
    through = b"/".join(bytes([step]) for step in b"abcdefghijklmnop") + b"/" + b"l" * 254
    archive += link(through, b"../" * 16) + link(b"escape", through + b"/../../out") + file(b"escape/flag")
    refused(archive + END, "a/" + "d" * 247, "lies under a link")


def test_links_in_a_circle_are_refused(refused: Callable) -> None:
    refused(link(b"a", b"b") + link(b"b", b"a") + END, "a", "circle")
    chain = b"".join(link(b"l%d" % i, b"l%d" % (i + 1)) for i in range(60))
    refused(chain + END, "l0", "more than 40 links")


@pytest.mark.parametrize(("kind", "rule"), [(b"3", "device"), (b"4", "device"), (b"6", "FIFO"), (b"s", "unknown kind")])
def test_what_is_no_file_folder_or_link_is_refused(refused: Callable, kind: bytes, rule: str) -> None:
    """FAULTS 23"""
    refused(file(b"ok") + write_header(b"x", kind, 0o644, 0) + END, "x", rule)


def test_setuid_setgid_and_sticky_are_stripped(tmp_path: Path) -> None:
    """FAULTS 24"""
    archive = file(b"program", b"x", 0o6755) + file(b"text", b"x", 0o6640) + write_header(b"d/", b"5", 0o7777, 0) + END
    extract(chunks(archive), tmp_path / "root", LIMITS)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "root").iterdir()}
    assert modes == {"program": 0o755, "text": 0o644, "d": 0o755}


def test_a_bomb_is_stopped_at_the_limit(refused: Callable) -> None:
    """FAULTS 25: by what its header claims, by what comes out, and by how much comes out of how little."""
    refused(write_header(b"big", b"0", 0o644, 1 << 40) + END, "big", "past 1048576 bytes")
    packed = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = write_header(b"zeros", b"0", 0o644, 64 << 20) + bytes(64 << 20) + END
    bomb = packed.compress(zeros) + packed.flush()
    refused(bomb, "zeros", "past 1048576 bytes")
    roomy = Limits(max_ratio=100, free_ratio_bytes=1 << 20)
    refused(bomb, "", "100 times its size", roomy)
    refused(zstd.compress(zeros), "", "100 times its size", roomy)
    # all of the stream is bounded, not only what belongs to members
    endless = zstd.compress(END + bytes(64 << 20))
    refused(endless, "", "holds more than", Limits(max_members=10, max_bytes=10, max_names=10))


@pytest.mark.parametrize("nothing", [gzip.compress(b"", mtime=0), zstd.compress(b"")], ids=["gzip", "zstd"])
def test_streams_of_nothing_are_stopped(refused: Callable, nothing: bytes) -> None:
    """FAULTS 25: they hold no byte, and each costs as much as a real one."""
    refused(nothing * 5000, "", "compressed streams of less than 64 bytes")


def test_hard_links_do_not_multiply_a_file(tmp_path: Path) -> None:
    """FAULTS 25: they cost the tree what they cost the archive, nothing, and come out as hard links."""
    archive = file(b"f", bytes(300_000)) + b"".join(hardlink(b"h%d" % i, b"f") for i in range(4))
    summary = extract(chunks(archive + END), tmp_path / "root", LIMITS)
    assert (summary.size, summary.files) == (300_000, 5)
    assert (tmp_path / "root/f").stat().st_nlink == 5


def test_too_many_members_are_stopped_at_the_limit(refused: Callable) -> None:
    """FAULTS 26"""
    archive = b"".join(file(b"%d" % i) for i in range(1001)) + END
    refused(archive, "1000", "1000 members")
    deep = b"".join(file(b"%d/a/b/c" % i) for i in range(900)) + END
    refused(deep, "500/a/b/c", "2000 files and folders")
    with pytest.raises(LimitExceeded):
        raise LimitExceeded(b"", "")


def test_names_that_no_disk_takes_are_refused(refused: Callable) -> None:
    """FAULTS 27"""
    nul = b"18 path=a\0b/cdefg\n"
    pax = write_header(b"p", b"x", 0o644, len(nul)) + nul + bytes(padding(len(nul)))
    refused(pax + file(b"x") + END, "a\\x00b/cdefg", "NUL")
    refused(file(b"n" * 256) + END, "n" * 256, "255 bytes")
    long = b"/".join([b"n" * 100] * 41)
    refused(file(long) + END, long.decode()[:150] + "…" + long.decode()[-150:], "4096 bytes")
    refused(file(b"a/" * 200 + b"b") + END, ("a/" * 200 + "b")[:150] + "…" + ("a/" * 200 + "b")[-150:], "folders deep")


def test_odd_names_are_kept_exactly(tmp_path: Path) -> None:
    """FAULTS 27"""
    names = [b"\xff\xfe", b"back\\slash", b"new\nline", b"caf\xc3\xa9", b" ", b"-rf", b"\xff" * 200, b"tab\there"]
    archive = b"".join(file(name, name) for name in names) + END
    extract(chunks(archive), tmp_path / "root", LIMITS)
    root = os.fsencode(tmp_path / "root")
    assert sorted(os.listdir(root)) == sorted(names)
    for name in names:
        with open(root + b"/" + name, "rb") as f:
            assert f.read() == name


def test_the_same_path_twice_is_refused(refused: Callable) -> None:
    """FAULTS 28"""
    refused(file(b"a") + file(b"./a") + END, "a", "twice")
    refused(file(b"a/b") + file(b"a") + END, "a", "twice")
    refused(file(b"a") + file(b"a/b") + END, "a/b", "lies under a file")
    refused(file(b".") + END, ".", "root")


def test_paths_that_differ_only_in_case_are_kept(tmp_path: Path) -> None:
    """FAULTS 28"""
    extract(chunks(file(b"Read") + file(b"read") + END), tmp_path / "root", LIMITS)
    assert sorted(p.name for p in (tmp_path / "root").iterdir()) == ["Read", "read"]


def _sample() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, contents in (("a", b"alpha"), ("d/" + "long" * 40, bytes(700)), ("d/e", b"")):
            info = tarfile.TarInfo(name)
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return out.getvalue()


def test_an_archive_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """FAULTS 29: at each byte of a plain tar, and of its compressed forms."""
    plain = _sample()
    end = len(plain.rstrip(b"\0"))
    end += -end % 512 + 1024
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    gzipped = packer.compress(plain) + packer.flush()
    zstandard = zstd.compress(plain)
    cuts = [plain[:at] for at in range(0, end, 37)] + [gzipped[:at] for at in range(len(gzipped))] + [zstandard[:at] for at in range(len(zstandard))]
    for cut in cuts:
        with pytest.raises(ArchiveRefused):
            extract(chunks(cut), tmp_path / "root", LIMITS)
        assert not (tmp_path / "root").exists()


def test_what_follows_the_end_is_refused(refused: Callable) -> None:
    refused(file(b"a") + END + file(b"hidden") + END, "", "goes on after its end")


def test_damaged_bytes_are_refused(refused: Callable) -> None:
    refused(
        b"this is no archive at all" * 100,
        "this is no archive at allthis is no archive at allthis is no archive at allthis is no archive at all",
        "damaged header",
    )
    refused(b"\x1f\x8b" + b"nonsense" * 100, "", "gzip")
    refused(b"\x28\xb5\x2f\xfd" + b"nonsense" * 100, "", "zstd")
    refused(b"", "", "cut short")


def test_a_folder_that_is_not_empty_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(FileExistsError):
        extract(chunks(file(b"a") + END), tmp_path, LIMITS)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_the_self_test_passes_here() -> None:
    self_test()
