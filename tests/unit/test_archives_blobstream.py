"""Blob streams: what was asked for comes through, whole and once; anything else is refused as soon as it shows."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from libs.archives.blobstream import END_FRAME, BlobStreamReader, frame_header, frames, poured, whole_pieces
from libs.archives.pages import LARGE, Pages, is_paged
from libs.archives.rules import ArchiveRefused
from libs.archives.tree import CHUNK


def named(contents: bytes) -> tuple[bytes, bytes]:
    return hashlib.sha256(contents).digest(), contents


ONE, TWO = named(b"one"), named(b"two, longer")
WANTED = {digest: len(contents) for digest, contents in (ONE, TWO)}
BOTH = b"".join(frames([ONE, TWO]))


def read(stream: bytes, size: int = 1 << 20, wanted: dict[bytes, int] = WANTED) -> list[tuple[bytes, bytes]]:
    reader = BlobStreamReader(wanted.get)
    found = [blob for at in range(0, len(stream), size) for blob in reader.feed(stream[at : at + size])]
    reader.finish()
    return found


@given(st.lists(st.binary(min_size=1, max_size=300), unique=True), st.integers(1, 500))
def test_blobs_come_out_as_they_went_in_however_the_stream_is_cut(contents: list[bytes], size: int) -> None:
    blobs = [named(text) for text in contents]
    assert read(b"".join(frames(blobs)), size, {digest: len(text) for digest, text in blobs}) == blobs


def test_the_order_is_free_and_not_all_need_come() -> None:
    assert read(b"".join(frames([TWO, ONE]))) == [TWO, ONE]
    assert read(b"".join(frames([TWO]))) == [TWO]
    assert read(END_FRAME) == []


def test_a_whole_chunk_fits_and_one_byte_more_does_not() -> None:
    digest, contents = named(bytes(CHUNK))
    assert read(b"".join(frames([(digest, contents)])), 1 << 20, {digest: CHUNK}) == [(digest, contents)]
    with pytest.raises(ArchiveRefused, match="another size"):
        read(frame_header(digest, CHUNK + 1), wanted={digest: CHUNK + 1})


@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_a_stream_cut_anywhere_is_refused(size: int) -> None:
    for at in range(len(BOTH)):
        with pytest.raises(ArchiveRefused, match="cut short"):
            read(BOTH[:at], size)


@pytest.mark.parametrize(
    ("stream", "rule"),
    [
        (BOTH + b"\0", "goes on after its end"),
        (BOTH + BOTH, "goes on after its end"),
        (frame_header(named(b"three")[0], 5), "not wanted"),
        (frame_header(bytes(32), 1), "not wanted"),
        (frame_header(ONE[0], 4), "another size"),
        (frame_header(ONE[0], 0), "another size"),
        (frame_header(ONE[0], 0xFFFFFFFF), "another size"),
        (frame_header(ONE[0], 3) + b"One", "not those of blob"),
        (frame_header(ONE[0], 3) + TWO[1] + frame_header(TWO[0], 11) + ONE[1], "not those of blob"),
        (frame_header(ONE[0], 3) + b"one" + frame_header(ONE[0], 3), "twice"),
        (BOTH[:20] + BOTH[21:], "not those of blob|not wanted|another size"),
    ],
)
def test_what_was_not_asked_for_is_refused(stream: bytes, rule: str) -> None:
    for size in (1, 1 << 20):
        with pytest.raises(ArchiveRefused, match=rule):
            read(stream, size)


def test_what_is_refused_is_refused_before_its_bytes_are_kept() -> None:
    reader = BlobStreamReader({}.get)
    with pytest.raises(ArchiveRefused, match="not wanted"):
        list(reader.feed(frame_header(ONE[0], CHUNK)))


@given(st.lists(st.sampled_from([1, 35, 36, 37, 5000, (1 << 20) - 1, 1 << 20, CHUNK]), max_size=12), st.integers(0, 1 << 20))
@settings(deadline=None, max_examples=30)
def test_whole_pieces_are_the_stream_and_large_blobs_are_not_copied(sizes: list[int], cut: int) -> None:
    blobs = {hashlib.sha256(contents).digest(): contents for contents in (bytes([n + 1]) * size for n, size in enumerate(sizes))}
    stream = b"".join(frames(blobs.items()))
    assert asyncio.run(_whole(stream)) == (stream, blobs, sum(len(contents) >= LARGE for contents in blobs.values()))
    assert asyncio.run(_whole(stream[:cut], whole=False))[0] == stream[:cut]


@given(st.lists(st.integers(1, 3000), max_size=8), st.integers(1, 2000), st.booleans())
def test_what_is_poured_is_the_stream_up_to_where_it_broke_off(sizes: list[int], each: int, breaks: bool) -> None:
    stream = [bytes([n]) * size for n, size in enumerate(sizes)]

    async def pieces() -> AsyncIterator[bytes]:
        for piece in stream:
            yield piece
        if breaks:
            raise ConnectionResetError

    async def pour() -> bytes:
        fill, together, memory = poured(pieces()), b"", memoryview(bytearray(each))
        with pytest.raises(ConnectionResetError) if breaks else nullcontext():
            while came := await fill(memory):
                together += memory[:came]
        return together

    assert asyncio.run(pour()) == b"".join(stream)


async def _whole(stream: bytes, whole: bool = True) -> tuple[bytes, dict[bytes, bytes], int]:
    """The pieces together, the blobs in them, and how many of these lie at a page of their own."""
    at = 0

    async def fill(memory: memoryview) -> int:
        nonlocal at
        part = stream[at : at + len(memory)]
        memory[: len(part)] = part
        at += len(part)
        return len(part)

    reader = BlobStreamReader(lambda digest: CHUNK) if not whole else BlobStreamReader(dict(_sizes(stream)).get)
    together, found, paged = b"", {}, 0
    with Pages(2 * CHUNK).share() as filling:
        async for piece in whole_pieces(fill, filling):
            together += piece
            if whole:
                for digest, contents in reader.feed(piece):
                    found[digest] = bytes(contents)
                    paged += is_paged(contents)
                    del contents
            del piece
    if whole:
        reader.finish()
    return together, found, paged


def _sizes(stream: bytes) -> Iterator[tuple[bytes, int]]:
    at = 0
    while size := int.from_bytes(stream[at + 32 : at + 36], "big"):
        yield stream[at : at + 32], size
        at += 36 + size
