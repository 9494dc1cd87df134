"""Hostile manifests are refused, naming member and rule, before anything is done for them."""

import os
import sys
import time
import tracemalloc
from collections.abc import Iterable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.archives.compression import Decompressor, compressed
from libs.archives.links import refuse_escapes
from libs.archives.rules import ArchiveRefused, LimitExceeded, Limits
from libs.archives.tree import (
    CHUNK,
    ZERO_CHUNK,
    Entry,
    InvalidManifest,
    ManifestReader,
    TreeCheck,
    manifest_of,
    order,
    pieces_of,
    read_manifest,
    tree_of,
)

LIMITS = Limits(max_members=1000, max_bytes=1 << 30)
D = b"d" * 32
MAGIC = b"penstock tree 1\n"


def file(path: bytes, size: int = 1, digest: bytes | None = None, mode: int = 0o644, target: bytes = b"") -> Entry:
    return Entry(path, "file", mode, size, D * (size > 0) if digest is None else digest, target)


def folder(path: bytes, mode: int = 0o755) -> Entry:
    return Entry(path, "folder", mode)


def link(path: bytes, target: bytes, mode: int = 0o777) -> Entry:
    return Entry(path, "link", mode, target=target)


def check(entries: Iterable[Entry], limits: Limits = LIMITS) -> TreeCheck:
    check = TreeCheck(limits)
    for entry in entries:
        check.add(entry)
    check.finish(b"")
    return check


HOSTILE: list[tuple[list[Entry], str, str]] = [
    ([file(b"..")], "..", "`..`"),
    ([file(b".")], ".", "`.`"),
    ([file(b"")], "", ""),
    ([file(b"a//b")], "a//b", "not named before"),
    ([folder(b"a"), file(b"a/")], "a/", "``"),
    ([folder(b"a"), folder(b"a/.."), file(b"a/../b")], "a/..", "`..`"),
    ([file(b"../a")], "../a", "not named before"),
    ([folder(b"/")], "/", "absolute"),
    ([file(b"/a")], "/a", "absolute"),
    ([file(b"/etc/passwd")], "/etc/passwd", "absolute"),
    ([file(b"a\0b")], "a\\x00b", "NUL"),
    ([file(b"n" * 256)], "n" * 256, "255 bytes"),
    ([file(b"a"), file(b"a")], "a", "twice"),
    ([folder(b"a"), folder(b"a")], "a", "twice"),
    ([folder(b"a"), file(b"a/b"), file(b"a")], "a", "twice"),
    ([folder(b"a"), file(b"b"), file(b"a/b")], "a/b", "not in order"),
    ([file(b"b"), file(b"a")], "a", "not in order"),
    ([folder(b"a"), file(b"a-b"), file(b"a/b")], "a/b", "not in order"),
    ([folder(b"a"), folder(b"a/b"), file(b"a/b/c"), file(b"a/a")], "a/a", "not in order"),
    ([file(b"a"), file(b"a/b")], "a/b", "no folder"),
    ([link(b"a", b"b"), file(b"a/b")], "a/b", "no folder"),
    ([file(b"a/b")], "a/b", "`a`, which is not named before"),
    ([file(b"a", mode=0o4755)], "a", "another mode"),
    ([file(b"a", mode=-1)], "a", "another mode"),
    ([folder(b"a", mode=0o777)], "a", "another mode"),
    ([link(b"a", b"b", mode=0o755)], "a", "another mode"),
    ([Entry(b"a", "folder", 0o755, target=b"b")], "a", "target"),
    ([Entry(b"a", "folder", 0o755, size=1)], "a", "folder with contents"),
    ([Entry(b"a", "link", 0o777, digest=D, target=b"b")], "a", "link with contents"),
    ([file(b"a", -1, b"")], "a", "below 0"),
    ([file(b"a", 1 << 64, b"")], "a", "below 0 or past"),
    ([file(b"a", (1 << 30) + 1)], "a", "past 1073741824"),
    ([file(b"a", 1 << 30, D * 128), file(b"b")], "b", "past 1073741824"),
    ([file(b"a", 0, D)], "a", "digests than chunks"),
    ([file(b"a", 1, b"")], "a", "digests than chunks"),
    ([file(b"a", 1, D * 2)], "a", "digests than chunks"),
    ([file(b"a", 1, D[:31])], "a", "digests than chunks"),
    ([file(b"a", CHUNK + 1, D)], "a", "digests than chunks"),
    ([file(b"a", CHUNK, D + b"e")], "a", "digests than chunks"),
    ([file(b"a", 1), file(b"b", 2)], "b", "another size"),
    ([file(b"a", CHUNK + 1, D + D)], "a", "another size"),
    ([file(b"a", 5, ZERO_CHUNK)], "a", "another size"),
    ([file(b"a", target=b"b"), file(b"b")], "a", "no earlier, equal file"),
    ([file(b"a", target=b"a")], "a", "no earlier, equal file"),
    ([file(b"a", target=b"../a")], "a", "no earlier, equal file"),
    ([folder(b"a"), file(b"b", target=b"a")], "b", "no earlier, equal file"),
    ([link(b"a", b"c"), file(b"b", target=b"a")], "b", "no earlier, equal file"),
    ([file(b"a"), file(b"b", 2, target=b"a")], "b", "no earlier, equal file"),
    ([file(b"a"), file(b"b", digest=b"e" * 32, target=b"a")], "b", "no earlier, equal file"),
    ([file(b"a"), file(b"b", mode=0o755, target=b"a")], "b", "no earlier, equal file"),
    ([file(b"a"), file(b"b", target=b"a"), file(b"c", target=b"b")], "c", "no earlier, equal file"),
    ([link(b"a", b"")], "a", "link to nothing"),
    ([link(b"a", b"b\0")], "a", "NUL"),
    ([link(b"a", b"b" * 4096)], "a", "4096 bytes"),
    ([link(b"a", b"/etc")], "a", "absolute"),
    ([link(b"a", b"..")], "a", "out of the tree"),
    ([folder(b"a"), link(b"a/up", b".."), link(b"l", b"a/up/../etc")], "l", "out of the tree"),
    ([folder(b"a"), link(b"a/l", b"x/../../../y")], "a/l", "out of the tree"),
    ([link(b"a", b"b"), link(b"b", b"a")], "a", "circle"),
    ([link(b"a", b"a")], "a", "circle"),
    ([link(b"a", b"x/" * 256 + b"y")], "a", "256 components"),
    ([file(b"%05d" % n) for n in range(2001)], "02000", "2000 files and folders"),
]


@pytest.mark.parametrize(("entries", "member", "rule"), HOSTILE)
def test_what_is_no_tree_is_refused(entries: list[Entry], member: str, rule: str) -> None:
    with pytest.raises(ArchiveRefused) as refusal:
        check(entries)
    assert refusal.value.member == member
    assert rule in refusal.value.rule


def test_folders_ten_thousand_levels_deep_are_refused() -> None:
    """As soon as they are too deep, and in no time."""
    began = time.perf_counter()
    paths = [b"/".join([b"d"] * depth) for depth in (*range(1, 300), 10_000)]
    with pytest.raises(ArchiveRefused, match="128 folders deep"):
        check(folder(path) for path in paths)
    check(folder(path) for path in paths[:128])
    with pytest.raises(ArchiveRefused, match="128 folders deep"):
        check(folder(path) for path in paths[:129])
    with pytest.raises(ArchiveRefused, match="not named before"):
        check([folder(paths[-1])])
    assert time.perf_counter() - began < 5


def test_names_are_bounded_together() -> None:
    with pytest.raises(LimitExceeded, match="bytes of names"):
        check((link(b"%03d" % n, b"x" * 4000) for n in range(300)), Limits(max_names=1 << 20))


def test_a_sound_tree_is_summed_up_and_its_chunks_come_in_order() -> None:
    e = b"e" * 32
    entries = [
        folder(b"a"),
        file(b"a/b", CHUNK + 3, ZERO_CHUNK + e),
        folder(b"a/c"),
        link(b"a/c/l", b"../../x/./y//z"),
        file(b"a/d", 3, e, 0o755),
        file(b"a-b", 7, target=b""),
        file(b"h", CHUNK + 3, ZERO_CHUNK + e, target=b"a/b"),
        file(b"z", 0),
    ]
    found = TreeCheck(LIMITS)
    for entry in entries:
        found.add(entry)
    summary = found.finish(b"\1" * 32)
    assert summary == ("01" * 32, CHUNK + 3 + 3 + 7, 5)
    assert list(found.sizes.items()) == [(ZERO_CHUNK, CHUNK), (e, 3), (D, 7)]
    assert tree_of(reversed(entries)).entries == entries


paths = st.lists(st.sampled_from([b"a", b"a-", b"b", b"..", b".", b"", b"a\0", b"c" * 300, b"/"]), min_size=1, max_size=4).map(b"/".join)
anything = st.builds(
    Entry,
    paths,
    st.sampled_from(["file", "folder", "link"]),
    st.sampled_from([0o644, 0o755, 0o777, -1]),
    st.sampled_from([0, 1, CHUNK, -1, 1 << 70]),
    st.sampled_from([b"", D, D * 2]),
    st.one_of(st.just(b""), paths),
)


@settings(max_examples=300)
@given(entries=st.lists(anything, max_size=6))
def test_whatever_passes_is_a_tree(entries: list[Entry]) -> None:
    try:
        check(entries)
    except ArchiveRefused:
        return
    keys = [order(entry.path) for entry in entries]
    assert keys == sorted(set(keys))
    kinds = {entry.path: entry.kind for entry in entries}
    for entry in entries:
        parts = entry.path.split(b"/")
        assert not {b"", b".", b".."} & set(parts) and b"\0" not in entry.path
        assert all(kinds[b"/".join(parts[:n])] == "folder" for n in range(1, len(parts)))
    assert tree_of(entries).entries == entries


def encoded(*blocks: object) -> bytes:
    payloads = [block if isinstance(block, bytes) else msgspec.msgpack.encode(block) for block in blocks]
    return MAGIC + b"".join(len(payload).to_bytes(4, "big") + payload for payload in payloads)


ROW = [b"a", "file", 0o644, 1, D, b""]
GOOD = msgspec.msgpack.encode([ROW])


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (b"", "cut short"),
        (MAGIC[:-1], "cut short"),
        (b"penstock tree 2\n", "does not begin"),
        (b"\x1f\x8b\0\0", "does not begin"),
        (MAGIC + b"\0\0\0", "cut short"),
        (encoded(GOOD)[:-1], "cut short"),
        (encoded(GOOD) + b"\0", "cut short"),
        (encoded(GOOD) + b"\0" * 40, "fewer than 4096"),
        (encoded([ROW], [ROW]), "fewer than 4096"),
        (encoded([]), "no array of 1 to"),
        (encoded(b""), "no array of 1 to"),
        (encoded([ROW] * 4097), "no array of 1 to"),
        (encoded([ROW], []), "fewer than 4096"),
        (encoded({"a": 1}), "no array of 1 to"),
        (encoded(b"\xdd\xff\xff\xff\xff"), "no array of 1 to"),
        (encoded(b"\xdc\x10\x00" + GOOD[1:]), "truncated"),
        (encoded(GOOD + b"\0"), "trailing"),
        (MAGIC + b"\xff\xff\xff\xff", "more than"),
        (encoded([ROW[:5]]), "canonical"),
        (encoded([ROW[:2]]), "length"),
        (encoded([[*ROW, 1]]), "length"),
        (encoded(GOOD.replace(b"file", b"f\x80le")), "utf-8"),
        (encoded([["a", *ROW[1:]]]), "Expected `bytes`"),
        (encoded([[b"a", "socket", *ROW[2:]]]), "Invalid enum value"),
        (encoded([[b"a", "file", 1.0, *ROW[3:]]]), "int"),
        (encoded(b"\xdc\x00\x01" + GOOD[1:]), "canonical"),
        (encoded(GOOD.replace(b"\xc4\x20" + D, b"\xc5\x00\x20" + D)), "canonical"),
        (encoded(GOOD.replace(b"\xa4file", b"\xd9\x04file")), "canonical"),
        (encoded(b"\x91" * 100_000), "length"),
        (encoded(b"\x91\x97" + GOOD[2:] + b"\x91" * 100_000), "length"),
    ],
)
def test_bytes_that_are_no_canonical_manifest_are_refused(manifest: bytes, said: str) -> None:
    with pytest.raises(InvalidManifest, match=said):
        read_manifest(manifest)
    with pytest.raises(InvalidManifest):
        reader = ManifestReader()
        for at in range(0, len(manifest), 1 if len(manifest) < 1000 else 997):
            list(reader.feed(manifest[at : at + (1 if len(manifest) < 1000 else 997)]))
        reader.finish()


@settings(max_examples=200)
@given(at=st.integers(0), new=st.binary(max_size=3), gone=st.integers(0, 3))
def test_a_damaged_manifest_is_refused_or_is_another_one(at: int, new: bytes, gone: int) -> None:
    entries = [folder(b"a"), file(b"a/b", 300), link(b"c", b"a/b")]
    sound = b"".join(manifest_of(entries))
    at %= len(sound)
    damaged = sound[:at] + new + sound[at + gone :]
    try:
        read = read_manifest(damaged)
    except InvalidManifest:
        return
    assert b"".join(manifest_of(read)) == damaged


def test_entries_come_out_as_soon_as_their_block_is_whole() -> None:
    entries = [file(b"%06d" % n) for n in range(10_000)]
    manifest = b"".join(manifest_of(entries))
    reader, counts = ManifestReader(), set()
    seen: list[Entry] = []
    for at in range(0, len(manifest), 1000):
        seen += reader.feed(manifest[at : at + 1000])
        counts.add(len(seen))
    reader.finish()
    assert seen == entries and counts == {0, 4096, 8192, 10_000}


def test_a_damaged_list_of_pieces_is_refused() -> None:
    for root in (b"penstock tree list 1\n", b"penstock tree list 1\n" + D, b"penstock tree list 1\n" + D * 2 + b"x"):
        with pytest.raises(InvalidManifest):
            pieces_of(root)


@pytest.mark.parametrize(
    "links",
    [
        # each leads through the one before it, twice
        {b"l%02d" % n: b"l%02d/../l%02d" % (n - 1, n - 1) for n in range(1, 60)},
        # long ways, deep down
        {b"/".join([b"d" * 30] * 120) + b"/%05d" % n: b"../" * 100 + b"x/" * 150 + b"y" for n in range(10_000)},
        {b"%06d" % n: b"a/" * 255 + b"b" for n in range(250_000)},
        {b"%06d" % n: b"%06d/" % (n + 1) * 30 for n in range(100_000)},
    ],
    ids=["doubling", "deep", "wide", "chain"],
)
def test_following_hostile_links_takes_no_time(links: dict[bytes, bytes]) -> None:
    began = time.process_time()
    with pytest.raises(ArchiveRefused):
        refuse_escapes(links)
    assert time.process_time() - began < 5


def test_as_many_links_as_may_be_are_followed_in_seconds() -> None:
    began = time.process_time()
    refuse_escapes({b"a/b/c/%06d" % n: b"../../../x/y/z/../w/./v/q/r/s/t/u" for n in range(250_000)})
    assert time.process_time() - began < 20


def test_a_quarter_of_a_million_entries_need_little_memory() -> None:
    """Beyond the manifest, which comes in pieces, and the entries, which are let go: 60 MB."""

    def pieces() -> Iterable[bytes]:
        entries = (
            entry
            for f in range(2500)
            for entry in (folder(b"folder%04d" % f), *(file(b"folder%04d/a-file-with-a-name-%02d" % (f, n), 99, os.urandom(32)) for n in range(99)))
        )
        return manifest_of(entries)

    check = TreeCheck()
    reader = ManifestReader()
    tracemalloc.start()
    try:
        for piece in pieces():
            for entry in reader.feed(piece):
                check.add(entry)
        reader.finish()
        check.finish(D)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(check.sizes) == 247_500
    assert peak < 75 << 20, peak
    # of which the digests, that the caller is given, take a part
    assert peak - sys.getsizeof(check.sizes) - 247_500 * sys.getsizeof(D) < 60 << 20, peak


def test_a_body_with_content_encoding_zstd_is_unpacked_within_its_limit() -> None:
    packed = b"".join(compressed([b"ab" * 1000], "tzst"))
    for size in (1, 7, 100_000):
        body = Decompressor(LIMITS, "tzst", most=2000)
        out = b"".join(piece for at in range(0, len(packed), size) for piece in body.feed(packed[at : at + size]))
        body.finish()
        assert out == b"ab" * 1000
    with pytest.raises(LimitExceeded, match="more than 1999 bytes"):
        list(Decompressor(LIMITS, "tzst", most=1999).feed(packed))
    for cut in (b"", packed[:3], packed[:-1]):
        body = Decompressor(LIMITS, "tzst", most=2000)
        list(body.feed(cut))
        with pytest.raises(ArchiveRefused, match="cut short"):
            body.finish()
    with pytest.raises(ArchiveRefused, match="zstd"):
        list(Decompressor(LIMITS, "tzst", most=2000).feed(MAGIC))


def test_the_largest_manifest_inside_the_limits_is_within_the_bound_on_its_bytes() -> None:
    limits = Limits(max_members=5000, max_bytes=1 << 40, max_names=1 << 20)
    entries = [file(b"%05d" % n, (1 << 40) // 10_000, os.urandom(32) * 14) for n in range(10_000)]
    check(entries[:0], limits)
    assert sum(map(len, manifest_of(entries))) <= limits.max_manifest
