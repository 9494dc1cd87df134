"""Log chunks in any order become one archive that reads by line."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proto.events.artifact import LogArchived, LogGap
from proto.messages import Attempt, LogChunk, Segment, count_lines
from services.artifacts.chunks import Chunks, LateChunks
from services.artifacts.log_archive import DamagedArchive, LogArchiveWriter, frames_from, index_span, read_frames, records
from services.artifacts.reactions import EndedLog

ATTEMPT = Attempt("b", "s", 1)
ENDED = EndedLog(team="main", build="b", stage="s", attempt=1, worker="w1", chunks=3, lines=0, bytes=0, correlation_id="", event_id="")
SUBJECT = "logs.w1.b.s.1"


def chunk(number: int, first_line: int = 0, data: bytes = b"line\n", attempt: Attempt = ATTEMPT) -> LogChunk:
    return LogChunk(attempt=attempt, number=number, first_line=first_line, segments=[Segment("step", "stdout", 1, data)])


def offered(ended: EndedLog, chunks: list[tuple[str, LogChunk]]) -> tuple[Chunks, list[int]]:
    taken: list[int] = []
    gathering = Chunks(ended, lambda c: taken.append(c.number))
    for subject, each in chunks:
        gathering.offer(subject, msgspec.msgpack.encode(each))
    return gathering, taken


@given(st.permutations([1, 2, 3, 4, 5]), st.lists(st.integers(1, 5), max_size=4))
def test_repeated_and_reordered_chunks_are_taken_in_order_once(order: list[int], again: list[int]) -> None:
    gathering, taken = offered(msgspec.structs.replace(ENDED, chunks=5), [(SUBJECT, chunk(n)) for n in [*order[:3], *again, *order[3:], *again]])
    assert taken == [1, 2, 3, 4, 5] and gathering.complete and gathering.count == 5


def test_what_is_missing_is_listed() -> None:
    gathering, taken = offered(msgspec.structs.replace(ENDED, chunks=9), [(SUBJECT, chunk(n)) for n in (1, 4, 5, 8)])
    assert not gathering.complete
    gathering.give_up()
    assert taken == [1, 4, 5, 8]
    assert gathering.gaps == [LogGap(first=2, last=3), LogGap(first=6, last=7), LogGap(first=9, last=9)]


def test_chunks_of_others_are_passed_over() -> None:
    """FAULTS 48: another worker's, another attempt's, one past the end, and what is no chunk."""
    gathering, taken = offered(
        ENDED, [("logs.w2.b.s.1", chunk(1)), (SUBJECT, chunk(1, attempt=Attempt("b", "s", 2))), (SUBJECT, chunk(4)), (SUBJECT, chunk(2))]
    )
    gathering.offer(SUBJECT, b"\xc1nonsense")
    gathering.give_up()
    assert taken == [2]


def test_a_log_of_unknown_length_is_never_complete_by_itself() -> None:
    gathering, taken = offered(msgspec.structs.replace(ENDED, chunks=-1), [(SUBJECT, chunk(n)) for n in (1, 3)])
    assert not gathering.complete
    gathering.give_up()
    assert (taken, gathering.gaps) == ([1, 3], [LogGap(first=2, last=2)])


def read(archive: bytes, first: int) -> tuple[list[tuple[int, Segment]], int]:
    start, length = index_span(len(archive), archive[-8:])
    frames = frames_from(read_frames(archive[start : start + length]), first)
    found = []
    for frame in frames:
        for _line, after, record in records(archive[frame.offset : frame.offset + frame.size]):
            if after > first:
                found.append(msgspec.msgpack.decode(record[4:], type=tuple[int, Segment]))
    return found, len(frames)


def test_a_range_of_lines_reads_only_its_frames() -> None:
    writer = LogArchiveWriter()
    line = 0
    for number in range(1, 101):
        data = b"".join(b"line %d %s\n" % (line + n, b"x" * 80) for n in range(200))
        writer.add(chunk(number, line, data))
        line += count_lines(data)
    archive = writer.close()
    assert (writer.lines, len(archive) < writer.bytes / 5) == (20_000, True)
    everything, all_frames = read(archive, 0)
    assert [first for first, _ in everything] == list(range(0, 20_000, 200))
    tail, frames = read(archive, 19_950)
    assert frames == 1 < all_frames
    assert tail[-1][0] == 19_800 and tail[-1][1].data.splitlines()[150].startswith(b"line 19950 ")


def test_an_empty_log_is_an_archive_too() -> None:
    assert read(LogArchiveWriter().close(), 0) == ([], 0)


def test_a_damaged_frame_is_noticed() -> None:
    writer = LogArchiveWriter()
    writer.add(chunk(1, 0, b"hello\n" * 100))
    archive = bytearray(writer.close())
    archive[40] ^= 0xFF
    with pytest.raises(DamagedArchive):
        read(bytes(archive), 0)


ALL_NUMBERS = st.sets(st.integers(1, 12))


@given(ALL_NUMBERS, ALL_NUMBERS, st.sampled_from([-1, 12]))
def test_late_chunks_fill_gaps_and_leave_others(early: set[int], late: set[int], chunks: int) -> None:
    ended = msgspec.structs.replace(ENDED, chunks=chunks)
    gathering, _ = offered(ended, [(SUBJECT, chunk(n)) for n in early])
    gathering.give_up()
    archived = LogArchived(build="b", stage="s", attempt=1, archive=1, digest="d", chunks=gathering.count, lines=0, bytes=0, gaps=gathering.gaps)
    added = LateChunks(ended, archived)
    for n in [*late, *early]:
        added.offer(SUBJECT, msgspec.msgpack.encode(chunk(n, first_line=n)))
    assert [line for line, _ in added.segments()] == sorted(late - early)
    assert added.complete == (early | late == set(range(1, 13)) and chunks == 12)
    missing = {n for gap in added.gaps for n in range(gap.first, gap.last + 1)}
    assert missing == set(range(1, max(early | late | {chunks}) + 1)) - early - late
    assert sum(gap.last - gap.first + 1 for gap in added.gaps) == len(missing), "no two overlap"
