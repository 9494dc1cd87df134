"""The chunks of an ended attempt's log as they come, in any order and repeated; and what of them an archive has not. Pure."""

from collections.abc import Callable, Iterable, Sequence

import msgspec

from proto.events.artifact import LogArchived, LogGap
from proto.messages import LogChunk, Segment, count_lines
from services.artifacts.reactions import EndedLog

_LARGEST = 128 << 20
_CHUNK = msgspec.msgpack.Decoder(LogChunk)


class Chunks:
    """Passes them on in order, each once."""

    def __init__(self, ended: EndedLog, take: Callable[[LogChunk], None]) -> None:
        self._ended = ended
        self._take = take
        self._held: dict[int, LogChunk] = {}
        self._next = 1
        self._bytes = 0
        self.count = 0
        self.gaps: list[LogGap] = []

    @property
    def complete(self) -> bool:
        return 0 <= self._ended.chunks < self._next

    def offer(self, subject: str, data: bytes) -> None:
        """What is not of the attempt, or not from the worker that held it, is passed over."""
        chunk = _chunk_of(self._ended, subject, data)
        if chunk is None or chunk.number < self._next or chunk.number in self._held:
            return
        self._bytes += len(data)
        if self._bytes > _LARGEST:
            return
        self._held[chunk.number] = chunk
        while (ready := self._held.pop(self._next, None)) is not None:
            self._pass_on(ready)

    def give_up(self) -> None:
        """What is missing stays missing: pass on what waits behind it, and list the gaps."""
        for number in sorted(self._held):
            if number > self._next:
                self.gaps.append(LogGap(first=self._next, last=number - 1))
            self._pass_on(self._held.pop(number))
        if self._next <= self._ended.chunks:
            self.gaps.append(LogGap(first=self._next, last=self._ended.chunks))

    def _pass_on(self, chunk: LogChunk) -> None:
        self._take(chunk)
        self.count += 1
        self._next = chunk.number + 1


class LateChunks:
    """Those that an archive has not."""

    def __init__(self, ended: EndedLog, archived: LogArchived) -> None:
        self._ended = ended
        self._archived = archived
        self._bytes = archived.bytes
        self._held: dict[int, LogChunk] = {}

    @property
    def count(self) -> int:
        return len(self._held)

    @property
    def complete(self) -> bool:
        return self._archived.chunks + self.count == self._ended.chunks

    def offer(self, subject: str, data: bytes) -> None:
        """As of Chunks."""
        chunk = _chunk_of(self._ended, subject, data)
        if chunk is None or chunk.number in self._held or not _lacks(self._archived, chunk.number) or self._bytes + len(data) > _LARGEST:
            return
        self._bytes += len(data)
        self._held[chunk.number] = chunk

    @property
    def gaps(self) -> list[LogGap]:
        """What is still missing with these."""
        last, numbers = self._archived.last, sorted(self._held)
        gaps = list(self._archived.gaps)
        if numbers and numbers[-1] > last:
            gaps.append(LogGap(first=last + 1, last=numbers[-1]))
        return [left for gap in gaps for left in _without(gap, numbers)]

    def segments(self) -> list[tuple[int, Segment]]:
        """In the order of their lines, each with the number of its first."""
        found: list[tuple[int, Segment]] = []
        for _, chunk in sorted(self._held.items()):
            line = chunk.first_line
            for segment in chunk.segments:
                found.append((line, segment))
                line += count_lines(segment.data)
        return found


def _chunk_of(ended: EndedLog, subject: str, data: bytes) -> LogChunk | None:
    if ended.worker and subject.split(".")[1] != ended.worker:
        return None
    try:
        chunk = _CHUNK.decode(data)
    except msgspec.DecodeError:
        return None
    attempt = chunk.attempt
    expected = (attempt.build, attempt.stage, attempt.number) == (ended.build, ended.stage, ended.attempt)
    return chunk if expected and not chunk.number > ended.chunks >= 0 else None


def _lacks(archived: LogArchived, number: int) -> bool:
    return number > archived.last or any(gap.first <= number <= gap.last for gap in archived.gaps)


def _without(gap: LogGap, numbers: Sequence[int]) -> Iterable[LogGap]:
    first = gap.first
    for number in numbers:
        if first <= number <= gap.last:
            if number > first:
                yield LogGap(first=first, last=number - 1)
            first = number + 1
    if first <= gap.last:
        yield LogGap(first=first, last=gap.last)
