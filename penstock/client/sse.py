"""Reading a server-sent event stream: bytes in, messages out, as the HTML standard parses them."""

import codecs
from collections.abc import Iterator

import msgspec


class Message(msgspec.Struct, frozen=True):
    """One event. `id` is the last one that the stream gave, also by an earlier message."""

    id: str
    event: str
    data: str


class Parser:
    """Feed it what arrives, however it is cut."""

    def __init__(self, last_id: str = "") -> None:
        self._decode = codecs.getincrementaldecoder("utf-8")("replace")
        self._rest = ""
        self._id = last_id
        self._event = ""
        self._data: list[str] = []
        self.retry: float | None = None  # seconds, as the server asks

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are complete now."""
        text = self._rest + self._decode.decode(data)
        if text.endswith("\r"):  # the other half of a CR LF may follow
            text, held = text[:-1], "\r"
        else:
            held = ""
        lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        self._rest = lines.pop() + held
        for line in lines:
            message = self._line(line)
            if message:
                yield message

    def _line(self, line: str) -> Message | None:
        if not line:
            message = Message(self._id, self._event or "message", "\n".join(self._data)) if self._data else None
            self._event, self._data = "", []
            return message
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._event = value
        elif field == "id" and "\0" not in value:
            self._id = value
        elif field == "retry" and value.isascii() and value.isdigit():
            self.retry = int(value) / 1000
        return None
