"""Bytes into lines, and what a step says of its progress."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.worker.lines import MAX_LINE, LineSplitter
from services.worker.progress import last_percent


def split(*reads: bytes, late: bool = False) -> list[bytes]:
    """`late`: what is unfinished is given up after each read."""
    splitter = LineSplitter()
    parts: list[bytes] = []
    for read in reads:
        parts += [part for part, _ in splitter.feed(read)]
        if late and (given := splitter.rest(ended=False)):
            parts.append(given[0])
    rest = splitter.rest()
    return parts + ([rest[0]] if rest else [])


def test_a_read_of_whole_lines_stays_one_part() -> None:
    assert split(b"one\ntwo\nthree\n") == [b"one\ntwo\nthree\n"]


def test_an_unfinished_line_waits_for_its_end() -> None:
    assert split(b"one\ntw", b"o\n") == [b"one\n", b"two\n"]


def test_a_long_line_is_split_into_pieces() -> None:
    long = b"x" * (2 * MAX_LINE + 5)
    assert split(b"a\n" + long + b"\nb\n") == [b"a\n", b"x" * MAX_LINE, b"x" * MAX_LINE, b"x" * 5 + b"\nb\n"]


def test_a_stream_without_newlines_holds_little() -> None:
    """FAULTS 100"""
    splitter = LineSplitter()
    for _ in range(100):
        for part, _ in splitter.feed(b"y" * 100_000):
            assert len(part) == MAX_LINE
    rest = splitter.rest()
    assert rest is None or len(rest[0]) <= MAX_LINE


@given(st.lists(st.binary(max_size=200) | st.integers(0, 40_000).map(lambda n: b"z" * n) | st.just(b"\n")))
def test_nothing_is_lost_and_every_part_is_lines_or_one_piece(reads: list[bytes]) -> None:
    parts = split(*reads)
    assert b"".join(parts) == b"".join(reads)
    for part in parts:
        assert part.endswith(b"\n") or (b"\n" not in part and len(part) <= MAX_LINE)
        assert all(len(line) <= MAX_LINE for line in part.splitlines())


@given(st.text(alphabet="a\né€🚢", max_size=50), st.integers(1, 9), st.booleans(), st.integers(MAX_LINE - 9, MAX_LINE + 9))
def test_no_piece_ends_inside_a_character(text: str, step: int, late: bool, before: int) -> None:
    """However it is read, however long its lines are: it can be shown piece by piece."""
    data = ("x" * before + text).encode()
    reads = [data[:before], *(data[at : at + step] for at in range(before, len(data), step))]
    assert "".join(part.decode() for part in split(*reads, late=late)) == "x" * before + text


@given(st.lists(st.sampled_from(b"\xe2\x82\xac\xf0\x9f\xed\xa0\x80\xc3(\nA\xff\xf4\x90"), max_size=20).map(bytes), st.integers(1, 4))
def test_what_is_no_utf_8_is_shown_alike_in_whatever_pieces_it_comes(data: bytes, step: int) -> None:
    """FAULTS 103"""
    parts = split(*(data[at : at + step] for at in range(0, len(data), step)), late=True)
    assert b"".join(parts) == data
    assert "".join(part.decode(errors="replace") for part in parts) == data.decode(errors="replace")


def test_a_line_that_was_given_up_is_marked_in_what_follows() -> None:
    splitter = LineSplitter()
    list(splitter.feed(b"start"))
    assert splitter.rest() == (b"start", False)
    assert list(splitter.feed(b"::progress 5::\n::progress 6::\n")) == [(b"::progress 5::\n::progress 6::\n", True)]


@pytest.mark.parametrize(
    ("lines", "percent"),
    [
        (b"::progress 7::\n", 7),
        (b"a\n::progress 0::\nb\n", 0),
        (b"::progress 100::\n", 100),
        (b"::progress 5::\n::progress 3::\n", 3),
        (b"::progress 101::\n", None),
        (b" ::progress 7::\n", None),
        (b"::progress 7:: \n", None),
        (b"::progress 7::\r\n", None),
        (b"::progress 7.5::\n", None),
        (b"::progress -1::\n", None),
        (b"see ::progress 7::\n", None),
        ("::progress ７::\n".encode(), None),
    ],
)
def test_only_a_line_that_is_exactly_a_progress_line_counts(lines: bytes, percent: int | None) -> None:
    """FAULTS 105"""
    assert last_percent(lines) == percent
