"""Bytes into lines, whole reads at a time: no work for each line."""

from collections.abc import Iterator

MAX_LINE = 16 << 10
"""Longer lines are split into pieces of this size, or a little less: no piece ends inside a character."""


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
            piece = data[at : at + MAX_LINE]
            piece = piece[: _whole(piece)]
            yield self._given(piece)
            start = at = at + len(piece)
        end = max(end, start)
        if end > start:
            yield self._given(data[start:end])
        self._rest = data[end:]

    def rest(self, ended: bool = True) -> tuple[bytes, bool] | None:
        """The unfinished line, given up as a piece; unless it has `ended`, without a character of which only a part is there."""
        end = len(self._rest) if ended else _whole(self._rest)
        if not end:
            return None
        piece, self._rest = self._rest[:end], self._rest[end:]
        return self._given(piece)

    def _given(self, part: bytes) -> tuple[bytes, bool]:
        began_earlier = self._inside
        self._inside = not part.endswith(b"\n")
        return part, began_earlier


def _whole(piece: bytes) -> int:
    """How much of it does not end inside a character, as far as it is UTF-8 at all."""
    for back, byte in enumerate(reversed(piece[-3:]), 1):
        if byte & 0xC0 != 0x80:
            length = 4 if byte >= 0xF0 else 3 if byte >= 0xE0 else 2 if byte >= 0xC0 else 1
            return len(piece) - back if length > back else len(piece)
    return len(piece)
