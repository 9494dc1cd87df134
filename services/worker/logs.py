"""A step's output becomes numbered chunks.

Chunks go out when they are full or 20 ms old, an unfinished line after 0.2 s. Past the limit output is read and dropped, and the last line says so.
"""

import asyncio
import time
from collections.abc import Callable

from proto.messages import Attempt, LogChunk, Segment, count_lines
from proto.topology import MAX_CHUNK
from services.worker.executors.executor import Stream
from services.worker.lines import LineSplitter
from services.worker.masking import Masker, Texts, masked

CHUNK_SECONDS = 0.02
PIECE_SECONDS = 0.2
MAX_SEGMENTS = 1024


class AttemptLog:
    """The log of one attempt. `publish` takes each chunk; `preamble` is its first line, said only if there is another; `secrets` are masked in all
    that is written."""

    def __init__(self, attempt: Attempt, publish: Callable[[LogChunk], None], limit: int, preamble: str, secrets: Texts | None = None) -> None:
        self.chunks = 0
        self.lines = 0
        self.bytes = 0
        self.dropped = 0
        self._attempt = attempt
        self._publish = publish
        self._limit = limit
        self._preamble = preamble
        self._loop = asyncio.get_running_loop()
        self._segments: list[Segment] = []
        self._size = 0
        self.secrets = secrets
        self._maskers: dict[tuple[str, Stream], Masker] = {}
        self._splitters: dict[tuple[str, Stream], LineSplitter] = {}
        self._chunk_timer: asyncio.TimerHandle | None = None
        self._piece_timers: dict[tuple[str, Stream], asyncio.TimerHandle] = {}

    def write(self, step: str, stream: Stream, data: bytes) -> list[bytes]:
        """Take what a step wrote. Gives the whole lines that are new, but not a line whose beginning was given up before."""
        key = (step, stream)
        if self.secrets is not None:
            masker = self._maskers.get(key)
            if masker is None:
                masker = self._maskers[key] = Masker(self.secrets)
            data = masker.feed(data)
        return self._write(key, data) if data else []

    def _write(self, key: tuple[str, Stream], data: bytes) -> list[bytes]:
        splitter = self._splitters.get(key)
        if splitter is None:
            splitter = self._splitters[key] = LineSplitter()
        lines: list[bytes] = []
        for part, began_earlier in splitter.feed(data):
            self._add(*key, part)
            if part.endswith(b"\n"):
                lines.append(part[part.index(b"\n") + 1 :] if began_earlier else part)
        timer = self._piece_timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        if splitter.waiting:
            self._piece_timers[key] = self._loop.call_later(PIECE_SECONDS, self._give_up, key, False)
        return lines

    def say(self, step: str, text: str) -> None:
        """A line of the worker's own, on stderr; the limit does not hold for it."""
        if self.secrets is not None:
            text = masked(self.secrets, text)
        self._put(step, "stderr", f"penstock: {text}\n".encode())

    def end_step(self, step: str) -> None:
        """Nothing more comes from the step."""
        for key in [key for key in self._maskers if key[0] == step]:
            if rest := self._maskers.pop(key).rest():
                self._write(key, rest)
        for key in [key for key in self._splitters if key[0] == step]:
            self._give_up(key, True)
            del self._splitters[key]

    def close(self, step: str) -> None:
        """Nothing more comes at all: the last chunk goes out. `step` is whose line the limit's is."""
        if self.dropped:
            size = f"{self._limit >> 20} MiB" if self._limit % (1 << 20) == 0 else f"{self._limit} bytes"
            self.say(step, f"log limit of {size} reached, {self.dropped} bytes dropped")
        self._flush()
        for timer in self._piece_timers.values():
            timer.cancel()

    def _give_up(self, key: tuple[str, Stream], ended: bool) -> None:
        timer = self._piece_timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        rest = self._splitters[key].rest(ended)
        if rest is not None:
            self._add(*key, rest[0])

    def _add(self, step: str, stream: Stream, part: bytes) -> None:
        room = self._limit - self.bytes
        if len(part) > room:
            self.dropped += len(part) - max(0, room)
            part = part[: max(0, room)]
            if not part:
                return
        self._put(step, stream, part)

    def _put(self, step: str, stream: Stream, part: bytes) -> None:
        if self._preamble:
            preamble, self._preamble = self._preamble, ""
            self.say(step, preamble)
        at = int(time.time() * 1000)
        while part:
            room = MAX_CHUNK - self._size
            piece = part
            if len(part) > room:
                piece = part[: part.rfind(b"\n", 0, room) + 1]
                if not piece:
                    self._flush()
                    continue
            part = part[len(piece) :]
            self._segments.append(Segment(step, stream, at, piece))
            self._size += len(piece)
            self.bytes += len(piece)
            if self._size == MAX_CHUNK or len(self._segments) == MAX_SEGMENTS:
                self._flush()
        if self._segments and self._chunk_timer is None:
            self._chunk_timer = self._loop.call_later(CHUNK_SECONDS, self._flush)

    def _flush(self) -> None:
        if self._chunk_timer is not None:
            self._chunk_timer.cancel()
            self._chunk_timer = None
        if not self._segments:
            return
        self.chunks += 1
        chunk = LogChunk(attempt=self._attempt, number=self.chunks, first_line=self.lines, segments=self._segments)
        self.lines += sum(count_lines(segment.data) for segment in self._segments)
        self._segments, self._size = [], 0
        self._publish(chunk)
