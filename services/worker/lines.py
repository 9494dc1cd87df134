"""Bytes into lines, whole reads at a time: no work for each line."""

from collections.abc import Iterator

MAX_LINE = 16 << 10
"""Longer lines are split into pieces of this size."""


class LineSplitter:
    """What one stream of one step writes. What it gives is either whole lines, or one piece of a line without its newline."""

    def __init__(self) -> None:
        self._rest = b""
        self._inside = False

    @property
    def waiting(self) -> bool:
        """Whether an unfinished line is held back."""
        return bool(self._rest)

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bool]]:
        """(lines or piece, whether its first line began in an earlier piece)."""
        if self._rest:
            data = self._rest + data
        end = data.rfind(b"\n") + 1
        if end <= MAX_LINE and len(data) - end < MAX_LINE:
            self._rest = data[end:]
            if end:
                yield self._given(data[:end] if end < len(data) else data)
            return
        start = at = 0
        while len(data) - at > MAX_LINE:
            newline = data.rfind(b"\n", at, at + MAX_LINE) + 1
            if newline:
                at = newline
                continue
            if at > start:
                yield self._given(data[start:at])
            yield self._given(data[at : at + MAX_LINE])
            start = at = at + MAX_LINE
        end = max(end, start)
        if end > start:
            yield self._given(data[start:end])
        self._rest = data[end:]

    def rest(self) -> tuple[bytes, bool] | None:
        """The unfinished line, given up as a piece."""
        if not self._rest:
            return None
        piece, self._rest = self._rest, b""
        return self._given(piece)

    def _given(self, part: bytes) -> tuple[bytes, bool]:
        began_earlier = self._inside
        self._inside = not part.endswith(b"\n")
        return part, began_earlier
